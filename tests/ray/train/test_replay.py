"""A run whose steps are not finite ends with a dump, and the dump shows which samples are to blame."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raylava.cli import main
from raylava.config.recipe import Language, Model, Resources, Training
from raylava.progress import NullProgressBar
from raylava.corpus.blocks import Blocks
from raylava.errors import RunError, UserError
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.storage import storage_path
from raylava.train.ray_backend import train
from raylava.train.replay import replay
from raylava.train.spec import TrainSpec


@pytest.fixture(scope="module")
def spec(
    toy_model: Model,
    vision: VisionSpec,
    language: LanguageSpec,
    prepared_blocks: Blocks,
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainSpec:
    """A run on a language model with a NaN in its embedding."""
    folder = tmp_path_factory.mktemp("broken") / "gemma"
    shutil.copytree(toy_model.language.name, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return TrainSpec(
        stage="pretrain",
        model=toy_model.model_copy(update={"language": Language(name=str(folder))}),
        vision=vision,
        language=dataclasses.replace(language, name=str(folder)),
        training=Training(
            epochs=4, global_batch_size=48, precision="fp32", max_tokens_per_pack=384, max_consecutive_skips=2
        ),
        seed=0,
        blocks=str(prepared_blocks.folder),
        connector=None,
        image_aspect="pad",
        output=str(tmp_path_factory.mktemp("run")),
    )


def test_a_run_of_steps_that_are_not_finite_ends_with_a_dump_that_replays_them(
    spec: TrainSpec, toy_model: Model, prepared_blocks: Blocks, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RunError, match=r"2 steps in a row were not finite, the last is step 1; .*raylava replay"):
        train(spec, Resources(workers=1), NullProgressBar())
    folder = Path(spec.output) / "replay-step-1"
    found = list(replay(storage_path(folder)))
    assert sorted(one.number for one in found) == list(range(48))
    assert not any(one.finite for one in found)
    about = json.loads((folder / "replay.json").read_text())
    about["model"]["language"]["name"] = toy_model.language.name
    (folder / "replay.json").write_text(json.dumps(about))
    assert all(one.finite for one in replay(storage_path(folder))), "with the sound model no sample is to blame"
    capfd.readouterr()
    assert main(["replay", str(folder), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)["samples"]
    assert {one["sample_id"] for one in told} == {prepared_blocks[number].sample_id for number in range(48)}


def test_a_folder_without_a_dump_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dumped step there"):
        list(replay(storage_path(tmp_path)))
