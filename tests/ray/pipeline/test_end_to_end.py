"""The whole pipeline on tiny assets: blocks → connector → model → scores, reused by a second run."""

import hashlib
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from raylava.artifacts import Artifact, lock
from raylava.cli import main
from raylava.config.recipe import Benchmark, Recipe
from raylava.console import Console
from raylava.corpus.block_cache import open_blocks
from raylava.local_copies import local_copy
from raylava.models.connector import CONNECTOR, CONNECTOR_FILE, TRAINED_CONNECTOR, connector_factor
from raylava.pipeline.report import show_results
from raylava.pipeline.results import summarize
from raylava.pipeline.runner import run
from raylava.storage import storage_path
from raylava.toy.demo import show_answers, toy_recipe
from raylava.train.batch_plan import BatchPlan
from raylava.train.step_log import STEP_LOG
from tests.support.official_files import write_mm_vet, write_pope
from tests.support.torchrun import copy_inputs, finish_training, read_training, start_training


@pytest.fixture(scope="module")
def recipe(toy_assets: Artifact) -> Recipe:
    return toy_recipe(
        toy_assets.path,
        [
            "pretrain.global_batch_size=16",
            "finetune.global_batch_size=16",
            "finetune.epochs=1",
            "evaluate.0.batch_size=10",
        ],
    )


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def artifacts(ray_cluster: None, recipe: Recipe, storage: Path) -> dict[str, Artifact]:
    with (storage / "console.txt").open("w") as stream:
        return run(recipe, storage_path(storage), Console(stream))


def test_every_stage_builds_its_artifact(artifacts: dict[str, Artifact]) -> None:
    assert list(artifacts) == [
        "prepare alignment",
        "pretrain",
        "prepare instruction",
        "finetune",
        "evaluate heldout",
        "evaluate heldout (blank)",
        "untrained",
        "evaluate heldout (untrained)",
    ]
    assert artifacts["finetune"].record["inputs"] == {
        "blocks": artifacts["prepare instruction"].fingerprint,
        "connector": artifacts["pretrain"].fingerprint,
    }
    assert artifacts["pretrain"].metrics["steps"] == 3
    assert artifacts["evaluate heldout"].metrics["questions"] == 20


def test_artifact_states_the_mechanisms_in_force_and_the_console_only_progress(
    artifacts: dict[str, Artifact], storage: Path
) -> None:
    mechanisms = artifacts["finetune"].metrics["mechanisms"]
    assert mechanisms["attention"] == "varlen, vision tower sdpa"
    assert mechanisms["ZeRO"] == "stage 2, 2 ranks"
    assert mechanisms["memory dry run"].startswith("3 packs of up to ")
    output = (storage / "console.txt").read_text()
    for stage in ("pretrain", "finetune"):
        assert f"{stage}  3/3 steps" in output
        for name, description in artifacts[stage].metrics["mechanisms"].items():
            assert f"{name}: {description}" not in output


def test_finetune_artifact_keeps_the_connector_whose_folded_form_it_exports(
    artifacts: dict[str, Artifact], recipe: Recipe
) -> None:
    folder = local_copy(artifacts["finetune"].path)
    file = folder / TRAINED_CONNECTOR / CONNECTOR_FILE
    factor, trained = connector_factor(file), load_file(file)
    width = json.loads((folder / "config.json").read_text())["text_config"]["hidden_size"]
    assert factor == pytest.approx(width**0.5)
    exported = load_file(folder / "model.safetensors")
    for name, value in trained.items():
        expected = value * factor if "linear_2" in name else value
        torch.testing.assert_close(exported[name.removeprefix("model.")], expected)
    pretrained = local_copy(artifacts["pretrain"].path) / CONNECTOR_FILE
    assert connector_factor(pretrained) == factor
    assert not torch.equal(load_file(pretrained)[f"{CONNECTOR}linear_2.weight"], trained[f"{CONNECTOR}linear_2.weight"])


def test_step_log_records_the_samples_of_each_step(artifacts: dict[str, Artifact], recipe: Recipe) -> None:
    lines = [json.loads(line) for line in (artifacts["finetune"].path / STEP_LOG).read_bytes().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    plan = BatchPlan(48, global_batch_size=16, epochs=1, seed=recipe.seed)
    orders = [step.samples.astype("<i8") for step in plan.from_step(0)]
    assert [line["samples_sha256"] for line in lines] == [
        hashlib.sha256(order.tobytes()).hexdigest()[:16] for order in orders
    ]
    assert {line["world_size"] for line in lines} == {2}
    lengths = open_blocks(artifacts["prepare instruction"].path).lengths
    assert [line["loss_tokens"] for line in lines] == [int(lengths.loss_tokens[order].sum()) for order in orders]


def test_checkpoints_are_removed_once_a_stage_is_complete(artifacts: dict[str, Artifact]) -> None:
    assert {child.name for child in artifacts["pretrain"].path.children()} == {
        "artifact.json",
        "connector.safetensors",
        "mechanisms.json",
        "metrics.jsonl",
        "sha256.json",
        "steps.jsonl",
        "tensorboard",
    }


def test_second_run_reuses_every_artifact(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))  # JSON is YAML
    capfd.readouterr()
    assert main(["run", str(file), "--storage", str(storage), "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads(json.dumps(summarize(artifacts)))
    assert err.count("reused") == len(artifacts)


def test_run_ends_with_a_report_of_what_it_measured(
    artifacts: dict[str, Artifact], storage: Path, recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json")))
    assert main(["run", str(file), "--storage", str(storage)]) == 0
    (page,) = (storage / "reports").glob("toy-*.html")
    assert f"report: {page}" in capfd.readouterr().err
    assert page.read_text().count('src="data:image;base64,') >= artifacts["evaluate heldout"].metrics["questions"]
    assert main(["report", str(artifacts["finetune"].path), "--json", "--output", str(tmp_path / "page.html")]) == 0
    data = json.loads(capfd.readouterr().out)
    assert {row["label"] for row in data["stages"]} == set(artifacts) - {"untrained"}
    metrics = {"loss", "lr", "grad_norm", "tokens_per_second", "data_wait_fraction"}
    for training in data["training"]:
        assert {curve["name"] for curve in training["curves"]} == metrics
        steps = artifacts[training["label"]].metrics["steps"]
        assert {len(curve["points"]) for curve in training["curves"]} == {steps}


@pytest.mark.parametrize(
    ("changes", "rebuilt"),
    [
        ({"resources": {"workers": 1}}, set()),
        ({"name": "other"}, set()),
        ({"finetune": {"lr": 1e-4}}, {"finetune", "evaluate heldout", "evaluate heldout (blank)"}),
        (
            {"finetune": {"precision": "bf16"}},
            {"finetune", "evaluate heldout", "evaluate heldout (blank)", "untrained", "evaluate heldout (untrained)"},
        ),
        (
            {"pretrain": {"enabled": False}},
            {"finetune", "evaluate heldout", "evaluate heldout (blank)"},
        ),
        (
            {"corpora": {"alignment": {"image_aspect": "pad"}}},
            {"prepare alignment", "pretrain", "finetune", "evaluate heldout", "evaluate heldout (blank)"},
        ),
    ],
)
def test_variant_shares_every_stage_it_has_in_common(
    changes: dict[str, Any], rebuilt: set[str], recipe: Recipe, storage: Path, artifacts: dict[str, Artifact]
) -> None:
    from raylava.config.load import validate
    from raylava.pipeline.graph import build_stages

    data = recipe.model_dump(mode="json")
    _merge(data, changes)
    stages = build_stages(validate(data, "variant"), storage_path(storage))
    assert {stage.label for stage in stages if stage.spec().find() is None} == rebuilt


def _merge(data: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            _merge(data[key], value)
        else:
            data[key] = value


def test_results_and_first_answers_show_the_model_beside_both_baselines(
    artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    with (tmp_path / "output.txt").open("w") as stream:
        console = Console(stream)
        show_answers(artifacts["evaluate heldout"], console)
        show_results(artifacts, console)
    text = (tmp_path / "output.txt").read_text()
    for word in ("blank images", "before training", "majority answer", "color", "raylava chat"):
        assert word in text
    assert text.count("heldout/heldout-") == 3


def upload(folder: Path, bucket: str) -> str:
    for file in folder.rglob("*"):
        if file.is_file():
            (storage_path(bucket) / str(file.relative_to(folder))).write_bytes(file.read_bytes())
    return bucket


def test_official_benchmarks_in_a_bucket_are_evaluated_by_a_recipe(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], s3: str, tmp_path: Path
) -> None:
    image = Image.fromarray(np.full((48, 48, 3), 90, np.uint8))
    for maker, file in ((write_pope, "val2014/a.jpg"), (write_mm_vet, "images/v1_0.png")):
        (tmp_path / maker.__name__.removeprefix("write_") / file).parent.mkdir(parents=True)
        image.save(tmp_path / maker.__name__.removeprefix("write_") / file)
        maker(tmp_path / maker.__name__.removeprefix("write_"))
    benchmarks = [
        Benchmark(name="pope", benchmark="pope", questions=upload(tmp_path / "pope", f"{s3}/official/pope")),
        Benchmark(name="judged", benchmark="mm-vet", questions=upload(tmp_path / "mm_vet", f"{s3}/official/mm-vet")),
    ]
    with (tmp_path / "console.txt").open("w") as stream:
        console = Console(stream)
        results = run(recipe.model_copy(update={"evaluate": tuple(benchmarks)}), storage_path(storage), console)
        show_results(results, console)
    assert results["finetune"].fingerprint == artifacts["finetune"].fingerprint
    metrics = results["evaluate pope"].metrics
    assert (metrics["questions"], metrics["missing"], metrics["protocol"]) == (5, 0, "llava")
    assert list(metrics["by_category"]) == ["adversarial", "popular", "random"]
    limits = [
        results[f"evaluate {name}"].record["fingerprint_fields"]["benchmark"]["max_new_tokens"]
        for name in ("pope", "judged")
    ]
    assert limits == [16, 512], "each benchmark's own, as for `raylava evaluate`"
    answers = results["evaluate judged"].path / "answers.json"
    assert json.loads(answers.read_bytes()).keys() == {"v1_0"}
    output = (tmp_path / "console.txt").read_text()
    assert "pope: " in output
    assert "to be graded by a judge" in " ".join(output.split())


def test_torchrun_training_is_bitwise_identical_to_ray(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    standalone = copy_inputs(storage, tmp_path)
    finish_training(start_training(recipe, standalone, processes=2))
    assert read_training(standalone) == read_training(storage)
    (artifact,) = (standalone / "finetune").iterdir()
    record = json.loads((artifact / "artifact.json").read_text())
    assert record["fingerprint"] == artifacts["finetune"].fingerprint
    assert record["inputs"] == artifacts["finetune"].record["inputs"]
    assert not (artifact / "checkpoints").exists()


def test_torchrun_ranks_wait_together_for_another_run_and_reuse_its_artifact(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    standalone = copy_inputs(storage, tmp_path)
    shutil.copytree(storage / "finetune", standalone / "finetune")
    (folder,) = (standalone / "finetune").iterdir()
    record = (folder / "artifact.json").rename(folder / "artifact.later")
    with lock(storage_path(folder), "finetune"):
        waiting = start_training(recipe, standalone, processes=2)
        assert waiting.stderr is not None
        assert any("waiting for it" in line for line in waiting.stderr)
        record.rename(folder / "artifact.json")
    assert finish_training(waiting).count(" reused ") == 1, "rank 0 tells of it"
    assert read_training(standalone) == read_training(storage)


def test_sigterm_saves_a_checkpoint_and_the_resumed_run_is_bitwise_identical(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    longer = ("finetune.global_batch_size=2", "finetune.epochs=12")
    undisturbed = copy_inputs(storage, tmp_path / "undisturbed")
    interrupted = copy_inputs(storage, tmp_path / "interrupted")
    finish_training(start_training(recipe, undisturbed, 1, *longer))
    run = start_training(recipe, interrupted, 1, *longer)
    while not list(interrupted.glob("finetune/*/metrics.jsonl")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.terminate()
    assert "stopped by SIGTERM" in finish_training(run, status=1)
    finish_training(start_training(recipe, interrupted, 1, *longer))
    assert read_training(interrupted) == read_training(undisturbed)


def test_checkpoint_of_one_rank_in_a_bucket_is_converted_once_for_the_two_ranks_of_a_node(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], s3: str, tmp_path: Path
) -> None:
    bucket = upload(copy_inputs(storage, tmp_path / "inputs"), f"{s3}/torchrun")
    longer = ("finetune.global_batch_size=2", "finetune.epochs=12", "finetune.checkpoint.interval_steps=4")
    run = start_training(recipe, tmp_path, 1, *longer, storage=bucket)
    while not any(name.endswith("done-rank-0.json") for name, _ in (storage_path(bucket) / "finetune").walk_files()):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.terminate()
    assert "stopped by SIGTERM" in finish_training(run, status=1)
    finish_training(start_training(recipe, tmp_path, 2, *longer, storage=bucket))
    (log,) = [name for name, _ in (storage_path(bucket) / "finetune").walk_files() if name.endswith("steps.jsonl")]
    lines = [json.loads(line) for line in (storage_path(bucket) / "finetune" / log).read_bytes().splitlines()]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    assert [lines[0]["world_size"], lines[-1]["world_size"]] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)


def test_keep_best_exports_the_state_with_the_lowest_loss(
    recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    """The rate rises to a value at which the last steps diverge."""
    diverging = ("finetune.lr=1.0", "finetune.warmup_ratio=1.0", "finetune.epochs=4")
    saving = ("finetune.checkpoint.interval_steps=4", "finetune.checkpoint.keep_latest=3")
    results = []
    for keep_best in ("false", "true"):
        folder = copy_inputs(storage, tmp_path / keep_best)
        options = (*diverging, *saving, f"finetune.checkpoint.keep_best={keep_best}")
        finish_training(start_training(recipe, folder, 1, *options))
        losses, weights = read_training(folder)
        (file,) = folder.glob("finetune/*/artifact.json")
        results.append((losses, weights, json.loads(file.read_text())["metrics"]["mechanisms"]["exported weights"]))
    (losses, last_weights, last), (same_losses, best_weights, best) = results
    assert losses == same_losses
    assert last == "after the last step"
    means = {step: sum(loss for *_, loss in losses[step - 4 : step]) / 4 for step in (4, 8, 12)}
    best_step = min(means, key=lambda step: means[step])
    assert best_step < 12, means
    assert best == f"before step {best_step}, mean loss {means[best_step]:.4g}, the lowest"
    assert best_weights != last_weights


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("resources.min_workers=1", "resources.min_workers=1 needs Ray"),
        ("resources.train_node_labels={disk: ssd}", "needs Ray; remove it"),
        ("resources.gpus_per_worker=1", "torch finds no GPU on this machine; set it to 0"),
    ],
)
def test_standalone_stage_refuses_settings_that_only_a_cluster_has(
    override: str, message: str, recipe: Recipe, storage: Path, artifacts: dict[str, Artifact], tmp_path: Path
) -> None:
    err = finish_training(start_training(recipe, copy_inputs(storage, tmp_path), 1, override), status=2)
    assert message in " ".join(err.split())


def test_standalone_stage_names_a_missing_input(recipe: Recipe, tmp_path: Path) -> None:
    err = finish_training(start_training(recipe, tmp_path, processes=1), status=2)
    assert "does not exist yet; build it with `raylava run`" in " ".join(err.split())
