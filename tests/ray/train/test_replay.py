"""A run whose steps are not finite ends with a dump, which shows the samples that are not finite by themselves."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raylava.cli import main
from raylava.config.recipe import Resources, Training
from raylava.corpus.blocks import Blocks
from raylava.errors import RunError
from raylava.models.registry import ResolvedModel
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.train.ray.driver import run
from raylava.train.replay import replay
from raylava.train.spec import TrainSpec


@pytest.fixture(scope="module")
def spec(resolved_model: ResolvedModel, prepared_blocks: Blocks, tmp_path_factory: pytest.TempPathFactory) -> TrainSpec:
    """A run with a language model that has a NaN in its embedding."""
    folder = tmp_path_factory.mktemp("broken") / "gemma"
    shutil.copytree(resolved_model.language.name, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    broken_language = dataclasses.replace(resolved_model.language, name=str(folder))
    return TrainSpec(
        stage="pretrain",
        model=dataclasses.replace(resolved_model, language=broken_language),
        training=Training(
            epochs=4, global_batch_size=48, precision="fp32", max_tokens_per_pack=384, max_consecutive_skips=2
        ),
        seed=0,
        blocks=str(prepared_blocks.folder),
        connector=None,
        image_aspect="pad",
        output=str(tmp_path_factory.mktemp("run")),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_run_with_non_finite_steps_ends_with_a_dump_that_can_be_replayed(
    spec: TrainSpec, resolved_model: ResolvedModel, prepared_blocks: Blocks, capfd: pytest.CaptureFixture[str]
) -> None:
    message = r"2 consecutive steps had a non-finite loss or gradient, the last is step 1; .*raylava replay"
    with pytest.raises(RunError, match=message):
        run(spec, Resources(workers=1), NullProgressBar())
    folder = Path(spec.output) / "replay-step-1"
    samples = list(replay(storage_path(folder)))
    assert sorted(sample.number for sample in samples) == list(range(48))
    assert not any(sample.finite for sample in samples)
    dump = json.loads((folder / "replay.json").read_text())
    dump["model"]["language"]["name"] = resolved_model.language.name
    (folder / "replay.json").write_text(json.dumps(dump))
    assert all(sample.finite for sample in replay(storage_path(folder))), "every sample is finite on the intact model"
    capfd.readouterr()
    assert main(["replay", str(folder), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)["samples"]
    assert {sample["sample_id"] for sample in printed} == {prepared_blocks[number].sample_id for number in range(48)}
