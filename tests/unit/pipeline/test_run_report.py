"""The report of a run: its figures are those of the artifacts, and the page shows them without running anything."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from raylava.artifacts import Artifact, load_artifact
from raylava.cli import main
from raylava.config.load import load_recipe, validate
from raylava.config.recipe import Recipe
from raylava.console import Console
from raylava.evaluation.compare import QUESTIONS_FILE
from raylava.evaluation.published_scores import published_rows
from raylava.pipeline.graph import build_stages
from raylava.pipeline.results import device_hours_per_second
from raylava.pipeline.run_report.data import ReportSubject, report_data
from raylava.pipeline.run_report.failures import stage_failures
from raylava.pipeline.run_report.gallery import gallery_data
from raylava.pipeline.run_report.page import render_report, report_run
from raylava.pipeline.run_report.scores import evaluations_of, mean_interval
from raylava.pipeline.run_report.stages import ReportStage, stages_of_artifact, stages_of_recipe, stages_of_run
from raylava.pipeline.run_report.training import MAX_POINTS, downsample
from raylava.storage import storage_path
from raylava.toy.demo import recipes_folder
from tests.support.run_artifacts import SECONDS, STEPS, build_run, write_training_logs

Run = tuple[Recipe, dict[str, Artifact]]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def run(toy_assets: Artifact, storage: Path) -> Run:
    return build_run(toy_assets, storage)


def subject(run: Run, storage: Path, **changes: Any) -> ReportSubject:
    recipe, artifacts = run
    settings = {"command": "raylava run toy.yaml", "recipe": recipe} | changes
    return ReportSubject(recipe.name, stages_of_run(artifacts), storage_path(storage), **settings)


@pytest.fixture(scope="module")
def data(run: Run, storage: Path) -> dict[str, Any]:
    return report_data(subject(run, storage))


def test_data_is_json_and_the_same_each_time(run: Run, storage: Path, data: dict[str, Any]) -> None:
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert report_data(subject(run, storage)) == data


def test_stages_have_their_seconds_and_device_hours(run: Run, data: dict[str, Any]) -> None:
    recipe, artifacts = run
    assert [row["label"] for row in data["stages"]] == list(artifacts)
    assert {row["seconds"] for row in data["stages"]} == {SECONDS}
    hours = {row["label"]: row["device_hours"] for row in data["stages"]}
    assert hours["finetune"] == device_hours_per_second(recipe.resources) * SECONDS
    assert hours["prepare alignment"] is None, "it does not run on the workers of the recipe"
    inputs = {row["label"]: row["inputs"] for row in data["stages"]}
    assert inputs["finetune"] == ["prepare instruction", "pretrain"]
    assert inputs["evaluate heldout (untrained)"] == ["untrained"]


@pytest.mark.parametrize(("since", "state"), [(0.0, "built"), (1e11, "reused"), (None, "complete")])
def test_stage_that_finished_before_the_run_began_was_reused(
    since: float | None, state: str, run: Run, storage: Path
) -> None:
    rows = report_data(subject(run, storage, built_since=since))["stages"]
    assert {row["state"] for row in rows} == {state}


def test_scores_are_those_of_the_artifacts_beside_all_baselines(run: Run, data: dict[str, Any]) -> None:
    metrics = run[1]["evaluate heldout"].metrics
    (benchmark,) = data["benchmarks"]
    assert benchmark["columns"] == ["model", "blank images", "before training", "majority answer"]
    *categories, total = benchmark["rows"]
    assert total["cells"][0] == metrics["scores"]["exact_match"]
    assert total["cells"][1]["value"] == 0
    assert total["cells"][3] == {"value": metrics["majority"]["all"]}
    for row in categories:
        model, blank, *_ = row["cells"]
        assert model["value"] == metrics["by_category"][row["category"]]["exact_match"]
        assert model["low"] < model["value"] < model["high"] or model["value"] in (0, 1)
        assert blank["low"] == 0 < blank["high"]
    assert data["headlines"] == [{"benchmark": "heldout", "metric": "exact match", **metrics["scores"]["exact_match"]}]


@pytest.mark.parametrize(
    ("mean", "count", "low", "high"), [(0.0, 10, 0.0, 0.2775), (0.5, 100, 0.4038, 0.5962), (1.0, 10, 0.7225, 1.0)]
)
def test_interval_of_a_mean_is_wilsons(mean: float, count: int, low: float, high: float) -> None:
    assert mean_interval(mean, count) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_published_scores_are_those_of_the_benchmark() -> None:
    assert {row["benchmark"] for row in published_rows("pope")} == {"pope", "pope-f1"}
    assert len(published_rows("gqa")) == 5
    assert published_rows("custom") == published_rows("") == []


def test_paper_scores_stand_beside_those_of_an_official_benchmark(run: Run, storage: Path, tmp_path: Path) -> None:
    artifacts = copy_run(run, storage, tmp_path / "copy")
    artifacts["evaluate heldout"].record["fingerprint_fields"]["benchmark"]["benchmark"] = "gqa"
    page, _ = render_all((run[0], artifacts), tmp_path / "copy")
    assert "What the paper reports" in page
    assert '<data value="0.587">0.587</data>' in page


def test_curves_have_every_metric_of_the_log(data: dict[str, Any]) -> None:
    pretrain, finetune = data["training"]
    assert (pretrain["label"], finetune["label"]) == ("pretrain", "finetune")
    curves = {curve["name"]: curve["points"] for curve in finetune["curves"]}
    assert list(curves) == ["loss", "lr", "grad_norm", "tokens_per_second", "data_wait_fraction"]
    assert curves["loss"][0] == [1, 2.0]
    assert [step for step, _ in curves["lr"]] == list(range(1, STEPS + 1))
    assert finetune["summary"]["steps"] == finetune["recorded_steps"] == STEPS


def test_long_curve_is_averaged_over_consecutive_steps() -> None:
    steps = [{"step": step, "loss": None if step == 3 else float(step)} for step in range(10_000)]
    points = downsample(steps, "loss")
    assert MAX_POINTS / 2 < len(points) <= MAX_POINTS
    assert points[0] == [26, pytest.approx((sum(range(26)) - 3) / 25)], "25 steps, without the one that has no loss"
    assert points[-1][0] == 10_000
    assert downsample(steps, "grad_norm") == []


def test_corpus_figures_are_those_of_the_manifest(run: Run, data: dict[str, Any]) -> None:
    for corpus in data["corpora"]:
        metrics = run[1][corpus["label"]].metrics
        counts = {each["name"]: each["value"] for each in corpus["counts"]}
        assert (counts["samples"], counts["tokens"]) == (metrics["rows"], metrics["tokens"])
        assert sum(corpus["histogram"]) == metrics["rows"]
        assert len(corpus["edges"]) == len(corpus["histogram"]) + 1
        assert corpus["samples"]


def test_gallery_shows_each_question_with_all_answers(run: Run, storage: Path, data: dict[str, Any]) -> None:
    (gallery,) = data["galleries"]
    assert gallery["shown"] == gallery["questions"] == len(gallery["cards"]) == 20
    verdicts = [card["verdict"] for card in gallery["cards"]]
    assert verdicts.count("wrong") == 7
    assert all(card["answer"] in card["references"] for card in gallery["cards"] if card["verdict"] == "right")
    assert gallery["cards"][0]["baselines"] == [
        {"name": "blank images", "answer": "none"},
        {"name": "before training", "answer": "none"},
    ]


def test_large_gallery_is_cut_to_evenly_spaced_questions(run: Run, storage: Path) -> None:
    images: dict[str, str] = {}
    gallery = gallery_data("heldout", evaluations_of("heldout", stages_of_run(run[1])), 5, images)
    assert [card["question_id"] for card in gallery["cards"]] == [
        f"heldout-{number:05}" for number in (0, 5, 10, 14, 19)
    ]
    assert (gallery["shown"], gallery["questions"], len(images)) == (5, 20, 5)


def test_page_says_what_it_leaves_out(run: Run, storage: Path, data: dict[str, Any]) -> None:
    gallery = gallery_data("heldout", evaluations_of("heldout", stages_of_run(run[1])), 5, images := {})
    _, images = render_all(run, storage)
    page = render_report(data | {"galleries": [gallery]}, images)
    assert '<data value="5">5</data> of <data value="20">20</data> questions, evenly spaced' in page


def render_all(run: Run, storage: Path, **changes: Any) -> tuple[str, dict[str, str]]:
    images: dict[str, str] = {}
    data = report_data(subject(run, storage, **changes), images)
    return render_report(data, images), images


def test_page_is_self_contained_with_one_image_per_question_and_sample(
    run: Run, storage: Path, data: dict[str, Any]
) -> None:
    page, images = render_all(run, storage)
    samples = sum(len(corpus["samples"]) for corpus in data["corpora"])
    assert page.count('src="data:image;base64,') == len(images) == 20 + samples
    assert 'src="http' not in page
    assert "default-src 'none'" in page
    assert "No restart, no skipped step, no row left out and no missing answer is recorded." in page


def test_page_holds_the_recipe_that_reproduces_the_run(run: Run, data: dict[str, Any]) -> None:
    recipe = validate(yaml.safe_load(data["reproduce"]["settings"]), "report")
    assert recipe.fingerprint_fields() == run[0].fingerprint_fields()
    assert data["reproduce"]["command"] == "raylava run toy.yaml"


def test_secrets_in_urls_are_on_no_page(tmp_path: Path) -> None:
    command = "raylava run r.yaml data=https://user:hunter2@host/x?sig=planted"
    data = report_data(ReportSubject("toy", [], storage_path(tmp_path), command))
    page = render_report(data, {})
    assert "raylava run r.yaml data=https://…@host/x?…" in page
    assert "hunter2" not in page + json.dumps(data)
    assert "planted" not in page + json.dumps(data)


def copy_run(run: Run, storage: Path, target: Path) -> dict[str, Artifact]:
    """Copy the storage of a run, which a test may then change."""
    shutil.copytree(storage, target)
    return {
        label: load_artifact(str(target / artifact.stage / artifact.fingerprint)) for label, artifact in run[1].items()
    }


def test_text_from_data_is_escaped(run: Run, storage: Path, tmp_path: Path) -> None:
    artifacts = copy_run(run, storage, tmp_path / "copy")
    file = Path((artifacts["evaluate heldout"].path / QUESTIONS_FILE).path)
    first, rest = file.read_text().split("\n", 1)
    question = json.loads(first) | {"text": "</p><script>alert(1)</script>", "references": ['"><img src=x>']}
    file.write_text(json.dumps(question) + "\n" + rest)
    page, _ = render_all((run[0], artifacts), tmp_path / "copy")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_missing_image_is_named_in_its_place(run: Run, storage: Path, tmp_path: Path) -> None:
    artifacts = copy_run(run, storage, tmp_path / "copy")
    file = Path((artifacts["evaluate heldout"].path / QUESTIONS_FILE).path)
    file.write_text(file.read_text().replace("heldout-00000.png", "gone.png"))
    page, images = render_all((run[0], artifacts), tmp_path / "copy")
    assert "image missing: heldout/gone.png" in page
    assert sum(name.startswith("heldout/") for name in images) == 19


def test_stage_that_is_not_built_does_not_fail(run: Run, storage: Path, tmp_path: Path) -> None:
    artifacts = copy_run(run, storage, tmp_path / "copy")
    shutil.rmtree(artifacts["evaluate heldout"].path.path)
    (artifacts["finetune"].path / "artifact.json").delete()
    stages = stages_of_recipe(build_stages(run[0], storage_path(tmp_path / "copy")))
    images: dict[str, str] = {}
    data = report_data(ReportSubject("toy", stages, storage_path(tmp_path / "copy"), "", run[0]), images)
    states = {row["label"]: row["state"] for row in data["stages"]}
    assert (states["evaluate heldout"], states["finetune"], states["pretrain"]) == ("not built", "stopped", "complete")
    assert data["benchmarks"] == data["galleries"] == data["headlines"] == []
    assert data["unanswered"] == ["heldout"]
    assert data["training"][1]["curves"], "what the unfinished stage has logged"
    page = render_report(data, images)
    assert "heldout: not built yet." in page
    assert ">not built<" in page


def test_recipe_of_which_nothing_is_built_has_a_page_without_figures(run: Run, tmp_path: Path) -> None:
    stages = stages_of_recipe(build_stages(run[0], storage_path(tmp_path)))
    data = report_data(ReportSubject("toy", stages, storage_path(tmp_path), "", run[0]))
    assert {row["state"] for row in data["stages"]} == {"not built"}
    assert "Not finished" in render_report(data, {})


@pytest.mark.parametrize("label", ["finetune", "evaluate heldout"])
def test_artifact_stands_for_the_run_that_it_belongs_to(label: str, run: Run) -> None:
    stages = stages_of_artifact(load_artifact(str(run[1][label].path)))
    assert {stage.label for stage in stages} == set(run[1]) - {"untrained"}
    assert [stage.label for stage in stages][:4] == ["prepare alignment", "pretrain", "prepare instruction", "finetune"]


def test_artifact_of_one_stage_has_a_report_without_a_recipe(run: Run, storage: Path) -> None:
    stages = stages_of_artifact(run[1]["pretrain"])
    data = report_data(ReportSubject("pretrain", stages, storage_path(storage), ""))
    assert [row["label"] for row in data["stages"]] == ["prepare alignment", "pretrain"]
    assert data["device_hours"] == 0
    assert set(yaml.safe_load(data["reproduce"]["settings"])) == {"prepare alignment", "pretrain"}
    assert "No benchmark was asked." in render_report(data, dict.fromkeys(_image_names(data), "data:,"))


def _image_names(data: dict[str, Any]) -> list[str]:
    return [name for corpus in data["corpora"] for sample in corpus["samples"] for name in sample["images"]]


def test_failures_of_training_are_counted(tmp_path: Path) -> None:
    path = storage_path(tmp_path) / "finetune" / "abc"
    write_training_logs(path, steps=4, skipped=True, checkpoint_stall_s=0.5)
    (path / "tensorboard" / "events.out.tfevents.2").write_bytes(b"")
    log = path / "steps.jsonl"
    first, *rest = log.read_bytes().decode().splitlines(keepends=True)
    log.write_bytes((first.replace('"world_size": 2', '"world_size": 3') + "".join(rest)).encode())
    failures = stage_failures(ReportStage("finetune", "finetune", "abc", path, (), None))
    assert [(entry["event"], entry["count"]) for entry in failures] == [
        ("restarts of training", 1),
        ("changes of the number of workers", 1),
        ("skipped steps", 4),
        ("seconds that training stood still for checkpoints", 2.0),
    ]
    assert failures[1]["detail"] == "3 → 2 at step 1"


def test_quarantined_rows_and_missing_answers_are_failures(run: Run, storage: Path) -> None:
    evaluation, corpus = run[1]["evaluate heldout"], run[1]["prepare alignment"]
    worse = {
        "evaluate": (evaluation, {"missing": 3}),
        "prepare": (corpus, {"quarantine": {"crashed": 2, "too long": 1}}),
    }
    found = []
    for kind, (artifact, metrics) in worse.items():
        record = artifact.record | {"metrics": artifact.metrics | metrics}
        changed = Artifact(kind, artifact.fingerprint, artifact.path, record)
        found += stage_failures(ReportStage(kind, kind, artifact.fingerprint, artifact.path, (), changed))
    assert [(entry["event"], entry["count"]) for entry in found] == [
        ("questions without an answer", 3),
        ("rows left out: crashed", 2),
        ("rows left out: too long", 1),
    ]


def test_run_ends_with_its_report(run: Run, storage: Path, tmp_path: Path) -> None:
    with (tmp_path / "console.txt").open("w") as stream:
        report_run(*run, storage_path(storage), ["raylava", "demo"], 0.0, Console(stream))
    (page,) = (storage / "reports").glob("toy-????????.html")
    assert (tmp_path / "console.txt").read_text() == f"report: {page}\n"
    assert ">built<" in page.read_text()


def test_report_that_cannot_be_written_is_a_warning(
    tmp_path: Path, console: Console, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "reports").write_text("a file where the folder should be")
    recipe = load_recipe(str(recipes_folder() / "llava-gemma-2b.yaml"))
    with caplog.at_level(logging.WARNING):
        report_run(recipe, {}, storage_path(tmp_path), ["raylava", "demo"], 0.0, console)
    assert "the report could not be written: " in caplog.text


@pytest.fixture(scope="module")
def recipe_file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("recipe") / "toy.yaml"
    file.write_text(json.dumps(run[0].model_dump(mode="json")))  # JSON is YAML
    return str(file)


def test_command_writes_the_page_of_a_recipe_and_prints_its_data(
    recipe_file: str, storage: Path, data: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", recipe_file, "--storage", str(storage), "--output", str(page), "--json"]) == 0
    printed = json.loads(capfd.readouterr().out)
    assert {key: printed[key] for key in ("benchmarks", "training", "corpora", "galleries", "failures")} == {
        key: data[key] for key in ("benchmarks", "training", "corpora", "galleries", "failures")
    }
    assert printed["reproduce"]["command"] == f"raylava run {recipe_file} --storage {storage}"
    assert "<h1>toy</h1>" in page.read_text()


def test_command_writes_the_page_of_an_artifact(run: Run, storage: Path, capfd: pytest.CaptureFixture[str]) -> None:
    artifact = run[1]["finetune"]
    assert main(["report", str(artifact.path)]) == 0
    (page,) = (storage / "reports").glob(f"finetune-{artifact.fingerprint}-*.html")
    assert f"report: {page}" in capfd.readouterr().err


def test_sweep_whose_variants_are_in_storage_is_reported_without_running_it(
    recipe_file: str, storage: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    axes = {"rate": {"unchanged": {"finetune.lr": 1e-3}, "lower": {"finetune.lr": 1e-6}}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({"name": "rates", "recipe": recipe_file, "axes": axes}))
    assert main(["report", str(tmp_path / "sweep.yaml"), "--storage", str(storage), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["results"]
    assert [(row["rate"], row["outcome"]) for row in rows] == [("unchanged", "done"), ("lower", "failed")]
    assert rows[1]["failure"] == "not built: finetune, evaluate heldout, evaluate heldout (blank)"
    folder = storage / "sweeps" / "rates"
    assert "prefers-color-scheme: dark" in (folder / "report.html").read_text()
    assert main(["report", str(folder)]) == 0
    assert str(folder / "report.html") in capfd.readouterr().out
