"""The structure that docs/architecture.md describes: import directions, no cycles, module counts, light imports."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raylava
from raylava.evaluation.benchmarks import official_benchmarks
from raylava.models.families import language_families, vision_families

PACKAGE = Path(raylava.__file__).parent

# What each package may import of raylava. A new direction must be added here and to docs/architecture.md.
FOUNDATIONS = {"errors", "storage", "local_copies", "artifacts", "progress"}
ALLOWED = {
    "errors": set(),
    "storage": {"errors"},
    "local_copies": {"errors", "storage"},
    "artifacts": {"errors", "storage", "local_copies"},
    "progress": set(),
    "console": {"errors", "progress"},
    "compat": set(),
    "pages": {"errors"},
    "config": {"errors"},
    "cluster": FOUNDATIONS | {"compat", "config"},
    "perf": FOUNDATIONS | {"config"},
    "models": FOUNDATIONS | {"compat", "config", "perf"},
    "corpus": FOUNDATIONS | {"config", "cluster", "models", "pages"},
    "train": FOUNDATIONS | {"compat", "config", "cluster", "perf", "models", "corpus"},
    "evaluation": FOUNDATIONS | {"config", "cluster", "models", "corpus", "pages"},
    "pipeline": FOUNDATIONS | {"console", "config", "cluster", "models", "corpus", "train", "evaluation", "pages"},
    "estimate": FOUNDATIONS | {"config", "perf", "models", "corpus", "train"},
    "tune": FOUNDATIONS | {"console", "config", "cluster", "evaluation", "pipeline", "train", "pages"},
    "toy": FOUNDATIONS | {"console", "config", "cluster", "models", "corpus", "evaluation", "pipeline"},
    "api": FOUNDATIONS | {"console", "config", "cluster", "models", "corpus", "evaluation", "pipeline", "tune", "toy"},
    "cli": FOUNDATIONS
    | {"console", "config", "cluster", "perf", "models", "corpus", "train", "evaluation", "pipeline"}
    | {"estimate", "tune", "toy", "api"},
}
# Modules of fewer than 40 lines, each with its reason.
SHORT_MODULES = {
    "api/corpora.py": "two functions, apart from those that run something",
    "compat/environment.py": "one context manager, used by the package and by cluster",
    "compat/ray.py": "one library's private parts",
    "compat/torch.py": "one library's private parts",
    "compat/transformers.py": "one library's private parts",
    "corpus/formats.py": "the list of formats, whose modules share row_format.py",
    "corpus/image_hash.py": "one function, which operators and de-duplication share",
    "models/families/siglip.py": "one family",
    "evaluation/benchmarks/benchmark.py": "the type that every benchmark module fills in",
    "evaluation/benchmarks/gqa.py": "one benchmark",
    "evaluation/benchmarks/vqav2.py": "one benchmark",
    "train/process_environment.py": "variables that both backends set",
    "__main__.py": "required by `python -m raylava`",
    "evaluation/published_scores.py": "the paper's table, as data",
    "evaluation/question_images.py": "one function, which two pages share",
    "errors.py": "two exception types that every other module imports",
    "cli/__main__.py": "required by `python -m raylava.cli`",
    "cli/demo.py": "one command",
    "cli/show.py": "one command",
    "cli/verify.py": "one command",
    "cli/batches.py": "one command",
    "cli/run.py": "one command",
    "cli/toy.py": "one command",
    "cli/train.py": "one command",
    "cli/stop.py": "one command",
    "cli/preemption_watcher.py": "one command",
    "cli/local_cluster.py": "one command",
    "cli/replay.py": "one command",
    "cli/options.py": "options that several commands share",
}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, at_runtime_only: bool = False) -> set[str]:
    """Return the raylava modules that a module imports, inside functions and for type checking included."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if at_runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= set(ast.walk(node))
            if isinstance(node, ast.FunctionDef):
                skipped |= set(ast.walk(node))
    names: set[str] = set()
    for node in set(ast.walk(tree)) - skipped:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    known = {module_name(module) for module in MODULES}
    return {name for name in names if name in known and name.startswith("raylava.")}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_follow_the_allowed_directions(path: Path) -> None:
    name = module_name(path)
    if name in ("raylava", "raylava.__main__"):
        return
    package = name.split(".")[1]
    imported = {target.split(".")[1] for target in imports(path)} - {package}
    assert imported <= ALLOWED[package], f"{name} imports {sorted(imported - ALLOWED[package])}"


def test_modules_import_each_other_without_cycles() -> None:
    graph = {module_name(path): imports(path, at_runtime_only=True) - {module_name(path)} for path in MODULES}
    packages = {name for name in graph if (PACKAGE.parent / name.replace(".", "/")).is_dir()}
    graph = {name: targets - packages for name, targets in graph.items() if name not in packages}
    assert list(TopologicalSorter(graph).static_order())


def test_few_modules_are_loose_and_training_has_at_most_fourteen() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]
    train = [path.name for path in (PACKAGE / "train").glob("*.py") if path.name != "__init__.py"]
    assert len(loose) <= 6, loose
    assert len(train) <= 14, train


def test_short_modules_have_a_reason() -> None:
    short = {
        str(path.relative_to(PACKAGE))
        for path in MODULES
        if path.name != "__init__.py" and len(path.read_text().splitlines()) < 40
    }
    assert short <= set(SHORT_MODULES)


@pytest.mark.parametrize("package", ["corpus", "train"])
def test_no_terminal_library_is_imported(package: str) -> None:
    for path in (PACKAGE / package).glob("*.py"):
        assert not re.search(r"^\s*(from|import) (rich|raylava\.console)\b", path.read_text(), re.MULTILINE), path


@pytest.mark.parametrize(
    ("names", "allowed"),
    [
        # Toy backbones and the paper's table are data about particular models and benchmarks.
        ({*vision_families(), *language_families()}, ("models/families", "toy", "evaluation/published_scores.py")),
        # gqa is also the name of a scoring protocol.
        (set(official_benchmarks()) - {"gqa"}, ("evaluation/benchmarks", "evaluation/published_scores.py")),
    ],
    ids=["families", "benchmarks"],
)
def test_only_its_own_module_names_a_family_or_benchmark(names: set[str], allowed: tuple[str, ...]) -> None:
    for file in MODULES:
        if not {PACKAGE / path for path in allowed} & {file, *file.parents}:
            pattern = rf"""["'](?:{"|".join(names)})(?:_vision\w*)?["']"""
            named = re.findall(pattern, file.read_text(), re.IGNORECASE)
            assert not named, f"{file}: {named}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent.name != "compat"], ids=module_name)
def test_private_names_of_other_libraries_are_used_in_compat_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    private = [name for name in modules if re.search(r"(^|\.)_(?!_)", name)]
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    private += [
        ast.unparse(node)
        for node in attributes
        if re.match(r"_(?!_)|__compatible_ops__", node.attr)
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        and node.attr not in own
        and ast.unparse(node) != "os._exit"  # public, despite its name
    ]
    assert not private, f"{path}: {private}"
