"""A hub revision is pinned to one commit, and weights without safetensors are converted once, without unpickling."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from raylava.config.recipe import Language, Model, Vision
from raylava.errors import UserError
from raylava.models.hub import weights_identity, weights_path
from raylava.models.llava import build_llava
from raylava.models.registry import resolve_model

HUB_ID, OLD, NEW = "some/vit", "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pickled(clip: Path, tmp_path: Path) -> Path:
    """The toy CLIP with its weights in pytorch_model.bin only, as older repositories have them."""
    folder = tmp_path / "pickled"
    folder.mkdir()
    for file in clip.glob("*.json"):
        shutil.copy(file, folder)
    torch.save(load_file(clip / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def hub_cache(clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An offline hub cache with two commits of a vision backbone, whose `main` is the older one."""
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    for commit, offset in ((OLD, 0.0), (NEW, 1.0)):
        snapshot = Path(shutil.copytree(clip, repository / "snapshots" / commit))
        weights = {name: value + offset for name, value in load_file(clip / "model.safetensors").items()}
        (snapshot / "model.safetensors").unlink()
        torch.save(weights, snapshot / "pytorch_model.bin")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_model_with_pickled_weights_only_loads_the_same_weights(clip: Path, pickled: Path, toy_model: Model) -> None:
    towers = [
        build_llava(
            resolve_model(Model(language=toy_model.language, vision=Vision(name=str(folder)))), 0, torch.float32
        ).model.vision_tower.state_dict()
        for folder in (clip, pickled)
    ]
    for name, value in towers[0].items():
        assert torch.equal(value, towers[1][name]), name


def test_weights_are_converted_once_and_every_file_is_hashed(pickled: Path, cache_folder: Path) -> None:
    converted = Path(weights_path(str(pickled), "main"))
    assert converted.is_relative_to(cache_folder)
    assert {file.suffix for file in converted.iterdir()} == {".json", ".safetensors"}
    assert json.loads((converted / "sha256.json").read_text()).keys() >= {"model.safetensors", "config.json"}
    modified = (converted / "model.safetensors").stat().st_mtime_ns
    assert weights_path(str(pickled), "main") == str(converted)
    assert (converted / "model.safetensors").stat().st_mtime_ns == modified


def test_converted_weights_that_changed_are_refused(pickled: Path) -> None:
    file = Path(weights_path(str(pickled), "main")) / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"changed since it was converted from .*; delete"):
        weights_path(str(pickled), "main")


class _Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("import pathlib; pathlib.Path('executed').touch()",))


def test_pickle_that_holds_code_is_refused_and_not_run(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"weight": _Payload()}, pickled / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not unpickled"):
        weights_path(str(pickled), "main")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, [torch.zeros(1)], {"a": 1}], ids=str)
def test_pickle_that_is_no_mapping_to_tensors_is_refused_and_leaves_nothing(
    pickled: Path, content: object, cache_folder: Path
) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="not a mapping of names to tensors"):
        weights_path(str(pickled), "main")
    assert [file for file in cache_folder.rglob("*") if file.is_dir() and file.name.startswith("partial")] == []


def test_backbone_that_lacks_weights_is_refused(pickled: Path, clip: Path, toy_model: Model) -> None:
    weights = {f"module.{name}": value for name, value in load_file(clip / "model.safetensors").items()}
    torch.save(weights, pickled / "pytorch_model.bin")
    model = resolve_model(Model(language=toy_model.language, vision=Vision(name=str(pickled))))
    with pytest.raises(UserError, match=r"lacks .* weights of a CLIPVisionModel"):
        build_llava(model, 0, torch.float32)


def test_other_safetensors_do_not_hide_pickled_weights_from_the_fingerprint(pickled: Path, clip: Path) -> None:
    shutil.copy(clip / "model.safetensors", pickled / "connector.safetensors")
    assert "pytorch_model.bin" in weights_identity(str(pickled), "main")


def test_sharded_pickles_are_converted(pickled: Path, clip: Path) -> None:
    weights = load_file(clip / "model.safetensors")
    names = sorted(weights)
    shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    (pickled / "pytorch_model.bin").unlink()
    for file, part in shards.items():
        torch.save({name: weights[name] for name in part}, pickled / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert load_file(Path(weights_path(str(pickled), "main")) / "model.safetensors").keys() == weights.keys()


def test_pickled_weights_enter_the_fingerprint(pickled: Path) -> None:
    before = weights_identity(str(pickled), "main")
    assert "pytorch_model.bin" in before
    copy = Path(shutil.copytree(pickled, pickled.parent / "other"))
    torch.save({}, copy / "pytorch_model.bin")
    assert weights_identity(str(copy), "main") != before


def test_folder_without_weights_is_refused(pickled: Path) -> None:
    (pickled / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        weights_path(str(pickled), "main")


def test_workers_load_the_commit_that_entered_the_fingerprint(hub_cache: Path, clip: Path, toy_model: Model) -> None:
    """The branch moves between the resolution of the recipe and the start of the workers."""
    recipe = Model(language=Language(name=toy_model.language.name), vision=Vision(name=HUB_ID, family="clip"))
    model = resolve_model(recipe)
    assert model.vision.revision == OLD
    assert weights_identity(HUB_ID, model.vision.revision) == {"hub": HUB_ID, "commit": OLD}
    (hub_cache / "refs" / "main").write_text(NEW)
    tower = build_llava(model, 0, torch.float32).model.vision_tower
    expected = load_file(clip / "model.safetensors")
    assert torch.equal(tower.state_dict()["post_layernorm.bias"], expected["post_layernorm.bias"])
