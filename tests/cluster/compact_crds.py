"""Makes kuberay_crds.json, the schemas that test_files.py holds the Kubernetes files to, from KubeRay's own CRDs.

    python tests/cluster/compact_crds.py FOLDER VERSION

FOLDER holds ray.io_rayclusters.yaml and ray.io_rayjobs.yaml, from ray-operator/config/crd/bases of KubeRay's
repository at VERSION (a tag or commit, written into the result). Kept is the v1 spec of each kind as JSON Schema:
descriptions, defaults and status are left out, an object takes no property that it does not name, and what occurs more
than once (a pod's template, above all) stands once. The rules that Kubernetes states in CEL are not carried over.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

CRDS = {"RayCluster": "ray.io_rayclusters.yaml", "RayJob": "ray.io_rayjobs.yaml"}
RESULT = Path(__file__).with_name("kuberay_crds.json")
_KEPT = {"type", "required", "enum", "pattern", "minimum", "maximum", "minItems", "maxItems", "maxLength", "minLength"}
_SHARED_FROM = 200  # characters from which a schema that occurs twice is worth a name


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema of Kubernetes as JSON Schema that refuses properties it does not name."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], **({"pattern": schema["pattern"]} if "pattern" in schema else {})}
    result: dict[str, Any] = {key: value for key, value in schema.items() if key in _KEPT}
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if "properties" in schema:
        result["properties"] = {name: strict(inner) for name, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    return result


def kind_of(crd: dict[str, Any], kind: str) -> dict[str, Any]:
    """The v1 schema of a whole resource: its spec is KubeRay's, its metadata is left to Kubernetes."""
    version = next(version for version in crd["spec"]["versions"] if version["name"] == "v1")
    spec = strict(version["schema"]["openAPIV3Schema"]["properties"]["spec"])
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "properties": {
            "apiVersion": {"enum": ["ray.io/v1"]},
            "kind": {"enum": [kind]},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": spec,
        },
        "additionalProperties": False,
    }


def share(kinds: dict[str, Any]) -> dict[str, Any]:
    """The same schemas, with each large one that occurs more than once moved to `$defs`."""
    counts: Counter[str] = Counter()

    def count(schema: dict[str, Any]) -> None:
        counts[_text(schema)] += 1
        if counts[_text(schema)] == 1:  # the parts of one seen before were counted with it
            _each(schema, count)

    for schema in kinds.values():
        count(schema)
    names = {text: f"s{i}" for i, text in enumerate(t for t, n in counts.items() if n > 1 and len(t) >= _SHARED_FROM)}

    def refer(schema: dict[str, Any]) -> dict[str, Any]:
        name = names.get(_text(schema))
        return {"$ref": f"#/$defs/{name}"} if name else _each(schema, refer)

    return {
        "$defs": {name: _each(json.loads(text), refer) for text, name in names.items()},
        "kinds": {kind: refer(schema) for kind, schema in kinds.items()},
    }


def _each(schema: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The schema with `change` applied to the schemas directly in it; a map of properties is no schema itself."""
    result = dict(schema)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = change(schema[key])
    if "properties" in schema:
        result["properties"] = {name: change(inner) for name, inner in schema["properties"].items()}
    return result


def _text(node: Any) -> str:
    return json.dumps(node, sort_keys=True, separators=(",", ":"))


def compact(folder: Path, version: str) -> dict[str, Any]:
    """The result's content: where it comes from, and the kinds."""
    texts = {kind: (folder / name).read_bytes() for kind, name in CRDS.items()}
    crds = {kind: yaml.load(text, Loader=yaml.CSafeLoader) for kind, text in texts.items()}
    origin = {
        "repository": "https://github.com/ray-project/kuberay (Apache-2.0)",
        "path": "ray-operator/config/crd/bases",
        "version": version,
        "sha256": {CRDS[kind]: hashlib.sha256(text).hexdigest() for kind, text in texts.items()},
        "made by": "tests/cluster/compact_crds.py",
    }
    return {"origin": origin, **share({kind: kind_of(crd, kind) for kind, crd in crds.items()})}


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    RESULT.write_text(json.dumps(compact(Path(sys.argv[1]), sys.argv[2]), indent=1, sort_keys=True) + "\n")
