"""In the paper's mode, raylava computes the losses of an independent trainer, tests/reference/trainer.py.

Both train the toy backbones in fp32 on 64 samples: oblong images, text-only conversations, one row that is too long.
The reference gets the sample ids of each step from `raylava batches`, and everything else from the published recipe.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.config.recipe import Recipe
from raylava.console import Console
from raylava.models.registry import resolve_vision
from raylava.pipeline.runner import run
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe
from raylava.train.step_log import STEP_LOG
from tests.reference.trainer import Backbones, ReferenceTrainer, Stage

STEPS, SAMPLES = 30, 64
MAX_LENGTH = 200
TOLERANCE = 5e-6  # relative
RESIZE = {"clip": None, "dinov2": 112}  # DINOv2's stock processor resizes to more than it crops
PAPER_MODE = [
    "pretrain.global_batch_size=8",
    "pretrain.loss_weighting=groups",
    "pretrain.loss_group_size=4",
    "pretrain.loss_grouping=as_drawn",
    "finetune.global_batch_size=8",
    "finetune.batching=by_modality",
    "finetune.loss_weighting=groups",
    "finetune.loss_group_size=2",
    "corpora.instruction.on_overlong=truncate_tokens",
    f"corpora.instruction.max_length={MAX_LENGTH}",
    "evaluate=[]",
    *(
        f"{stage}.{setting}"
        for stage in ("pretrain", "finetune")
        for setting in (
            "lr=1e-3", "warmup_ratio=0.1", "warmup_start=zero", "max_grad_norm=null", "epochs=4", f"max_steps={STEPS}",
        )
    ),
]  # fmt: skip


extended = pytest.mark.extended
CASES = [
    pytest.param(("clip", 1), marks=extended),
    ("clip", 2),
    ("dinov2", 1),
    pytest.param(("dinov2", 2), marks=extended),
]


@pytest.fixture(scope="module")
def corpus(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy corpus: half of its images oblong, a quarter of its conversations without image, one of them too long."""
    folder = tmp_path_factory.mktemp("reference-corpus")
    source = Path((toy_assets.path / "corpus").path)
    shutil.copytree(source / "images", folder / "images")
    alignment = json.loads((source / "alignment.json").read_text())
    instruction = json.loads((source / "instruction.json").read_text())
    for number, row in enumerate(instruction):
        if number % 4 == 3:
            row.pop("image")
            first = row["conversations"][0]
            first["value"] = first["value"].replace("<image>\n", "")
    instruction[3]["conversations"] *= 4
    for name, rows in (("alignment", alignment), ("instruction", instruction)):
        for number, row in enumerate(rows[::2]):
            if "image" in row:
                _make_oblong(folder / "images" / row["image"], number)
        repeated = [row | {"id": f"{row['id']}-{copy}"} for copy in range(4) for row in rows][:SAMPLES]
        (folder / f"{name}.json").write_text(json.dumps(repeated))
    return folder


def _make_oblong(file: Path, number: int) -> None:
    image = Image.open(file)
    size = (70, 44) if number % 2 else (37, 81)
    image.resize(size).save(file)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, int]:
    """A vision backbone and a number of workers."""
    return request.param


@pytest.fixture(scope="module")
def recipe(case: tuple[str, int], toy_assets: Artifact, corpus: Path) -> Recipe:
    vision, workers = case
    resize = [f"model.vision.resize_size={RESIZE[vision]}"] if RESIZE[vision] else []
    settings = [f"data={corpus}", f"model.vision.name={toy_assets.path}/backbones/{vision}", *resize]
    return toy_recipe(toy_assets.path, [*settings, f"resources.workers={workers}", *PAPER_MODE])


@pytest.fixture(scope="module")
def artifacts(ray_cluster: None, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("reference-storage")
    with (folder / "console.txt").open("w") as stream:
        return run(recipe, storage_path(folder), Console(stream))


@pytest.fixture(scope="module")
def reference(recipe: Recipe) -> ReferenceTrainer:
    pixels = resolve_vision(recipe.model.vision).pixels
    backbones = Backbones(
        Path(recipe.model.language.name),
        Path(recipe.model.vision.name),
        pixels.resized,
        pixels.size,
        pixels.mean,
        pixels.std,
    )
    return ReferenceTrainer(backbones, recipe.seed)


def planned_batches(artifact: Artifact, capfd: pytest.CaptureFixture[str]) -> list[list[list[str]]]:
    """Return the ids of the rows of each step, by loss group. A sample's id is that of its row, #, and its position."""
    assert main(["batches", artifact.path.uri]) == 0
    steps = [json.loads(line)["groups"] for line in capfd.readouterr().out.splitlines()]
    return [[[sample_id.rpartition("#")[0] for sample_id in group] for group in step] for step in steps]


def logged_losses(artifact: Artifact) -> list[float]:
    return [json.loads(line)["loss"] for line in (artifact.path / STEP_LOG).read_bytes().splitlines()]


def replay(
    reference: ReferenceTrainer, artifact: Artifact, corpus: Path, steps: list[list[list[str]]]
) -> Iterator[float]:
    finetunes = artifact.stage == "finetune"
    rows = json.loads((corpus / ("instruction.json" if finetunes else "alignment.json")).read_text())
    stage = Stage(steps, STEPS, 1e-3, 0.1, pad_images=finetunes, train_language=finetunes, max_length=MAX_LENGTH)
    return reference.train(stage, {row["id"]: row for row in rows}, corpus / "images")


def test_losses_of_both_stages_equal_those_of_the_reference_trainer(
    artifacts: dict[str, Artifact],
    reference: ReferenceTrainer,
    corpus: Path,
    case: tuple[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    for name in ("pretrain", "finetune"):
        artifact = artifacts[name]
        steps = planned_batches(artifact, capfd)
        expected = list(replay(reference, artifact, corpus, steps))
        losses = logged_losses(artifact)
        assert len(losses) == STEPS
        assert losses[-1] < losses[0] - 0.1, "the run must learn"
        np.testing.assert_allclose(losses, expected, rtol=TOLERANCE)
    assert artifacts["finetune"].metrics["mechanisms"]["ZeRO"] == f"stage 2, {case[1]} ranks"


def test_steps_hold_one_modality_and_the_corpus_has_what_the_comparison_needs(
    artifacts: dict[str, Artifact], corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, Any]] = json.loads((corpus / "instruction.json").read_text())
    has_image = {row["id"]: "image" in row for row in rows}
    steps = planned_batches(artifacts["finetune"], capfd)
    kinds = [{has_image[sample_id] for group in step for sample_id in group} for step in steps]
    steps_per_epoch = SAMPLES // 8
    for epoch in range(3):
        epoch_kinds = kinds[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch]
        assert all(len(kind) == 1 for kind in epoch_kinds[:-2]), "the last two steps hold the remainder of both kinds"
        assert {True} in epoch_kinds
        assert {False} in epoch_kinds
    assert all(len(group) == 2 for step in steps for group in step)
    assert artifacts["prepare instruction"].metrics["truncated"] == 2
    sizes = {Image.open(corpus / "images" / row["image"]).size for row in rows if "image" in row}
    assert len(sizes) == 3
