"""What identifies the model of an evaluation: all of its files that change an answer, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from raylava.artifacts import ArtifactSpec, publish_folder
from raylava.errors import UserError
from raylava.models.export import export_model
from raylava.models.llava import build_llava
from raylava.models.registry import ResolvedModel
from raylava.pipeline.evaluation import model_ref
from raylava.storage import storage_path


@pytest.fixture(scope="module")
def exported(resolved_model: ResolvedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_model(build_llava(resolved_model, seed=0, dtype=torch.float32), None, resolved_model, "pad", folder)
    return folder


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A model's folder that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


@pytest.mark.parametrize(
    "file",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "processor_config.json",
        "generation_config.json",
        "config.json",
        "model.safetensors",
    ],
)
def test_each_file_that_changes_answers_changes_the_identity(file: str, model: Path) -> None:
    before = model_ref(str(model)).identity
    with (model / file).open("r+b") as stream:
        stream.seek(-1, 2)
        last = stream.read(1)
        stream.seek(-1, 2)
        stream.write(b" " + last if file.endswith(("json", "jinja")) else bytes([last[0] ^ 1]))
    assert model_ref(str(model)).identity != before


def test_model_card_and_location_do_not_change_the_identity(model: Path, tmp_path: Path) -> None:
    before = model_ref(str(model)).identity
    (model / "README.md").write_text("changed")
    assert model_ref(str(model.rename(tmp_path / "elsewhere"))).identity == before


def test_artifact_is_identified_by_its_fingerprint_until_one_of_its_files_is_edited(
    model: Path, tmp_path: Path
) -> None:
    spec = ArtifactSpec("finetune", {}, storage_path(tmp_path / "storage"))
    publish_folder(model, spec.path)
    spec.commit({}, {}, 1.0)
    assert model_ref(spec.path.uri).identity == spec.fingerprint
    generation = json.loads((spec.path / "generation_config.json").read_bytes())
    (spec.path / "generation_config.json").write_bytes(json.dumps(generation | {"repetition_penalty": 2.0}).encode())
    assert model_ref(spec.path.uri).identity != spec.fingerprint


@pytest.mark.parametrize("file", ["chat_template.jinja", "model.safetensors"])
def test_artifact_with_another_or_no_file_is_another_model(file: str, model: Path, tmp_path: Path) -> None:
    spec = ArtifactSpec("finetune", {}, storage_path(tmp_path / "storage"))
    publish_folder(model, spec.path)
    spec.commit({}, {}, 1.0)
    if file == "model.safetensors":
        content = bytearray((spec.path / file).read_bytes())
        content[-1] ^= 1
        (spec.path / file).write_bytes(bytes(content))
    else:
        (spec.path / file).delete()
    assert model_ref(spec.path.uri).identity != spec.fingerprint


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", None, "has neither model.safetensors nor"),
        ("model.safetensors", b"", "damaged or cut off"),
        ("model.safetensors", b"<html>not found</html>", "damaged or cut off"),
        ("config.json", b"{", "config.json: damaged"),
        ("config.json", b"[]", "config.json: damaged"),
        ("model.safetensors.index.json", b"{}", None),  # not read beside model.safetensors
    ],
)
def test_damaged_model_is_refused_before_any_worker_starts(
    file: str, content: bytes | None, message: str | None, model: Path
) -> None:
    (model / file).unlink(missing_ok=True)
    if content is not None:
        (model / file).write_bytes(content)
    if message is None:
        model_ref(str(model))
        return
    with pytest.raises(UserError, match=message):
        model_ref(str(model))


def test_weights_that_were_cut_off_are_refused(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut off; copy the folder again"):
        model_ref(str(model))


def test_a_missing_shard_is_named(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors is missing, which .*index\.json names"):
        model_ref(str(model))
