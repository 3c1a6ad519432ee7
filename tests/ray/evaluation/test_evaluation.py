"""`raylava evaluate` answers and scores a benchmark with any LLaVA; `raylava compare` compares evaluations."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from raylava.artifacts import Artifact, load_artifact
from raylava.cli import main
from raylava.errors import UserError
from raylava.evaluation.compare import compare
from raylava.evaluation.comparison_page import page
from tests.ray.evaluation.test_judge import JUDGE

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def llama_llava(untrained_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that raylava did not export: a randomly initialized Llama with the processor of another folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    gemma_config = json.loads((untrained_llava / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(untrained_llava)
    text_config = LlamaConfig(
        vocab_size=gemma_config["text_config"]["vocab_size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**gemma_config["vision_config"]),
        text_config=text_config,
        image_token_index=gemma_config["image_token_index"],
        vision_feature_layer=-2,
    )
    torch.manual_seed(1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    for file in untrained_llava.iterdir():
        if not (folder / file.name).exists() and "model" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage that tests share, so that each evaluation is computed once."""
    return tmp_path_factory.mktemp("storage")


def evaluate(
    toy_assets: Artifact, model: Path, storage: Path, capfd: pytest.CaptureFixture[str], *options: str
) -> dict[str, object]:
    """Run `raylava evaluate` on the toy questions and return the record of its artifact."""
    corpus = Path((toy_assets.path / "corpus").path)
    benchmark = ["--benchmark", "custom", "--data", str(corpus / "questions.jsonl"), "--images", str(corpus / "images")]
    arguments = [*benchmark, "--storage", str(storage), "--json", "--max-new-tokens", "3", *options]
    assert main(["evaluate", str(model), *arguments]) == 0
    return json.loads(capfd.readouterr().out)


def test_evaluation_is_scored_and_reused(
    toy_assets: Artifact, untrained_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(toy_assets, untrained_llava, tmp_path, capfd)
    metrics = record["metrics"]
    assert isinstance(metrics, dict)
    assert (metrics["questions"], metrics["missing"], metrics["headline"]) == (20, 0, "exact_match")
    repeated = evaluate(toy_assets, untrained_llava, tmp_path, capfd, "--batch-size", "7")
    assert repeated["finished"] == record["finished"], "the batch size is not part of the fingerprint"


def test_evaluations_of_different_architectures_are_compared(
    toy_assets: Artifact,
    untrained_llava: Path,
    llama_llava: Path,
    storage: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    records = [evaluate(toy_assets, model, storage, capfd) for model in (untrained_llava, llama_llava)]
    folders = [storage / "evaluate" / str(record["fingerprint"]) for record in records]
    (comparison,) = compare([load_artifact(str(folder)) for folder in folders])
    assert comparison.benchmark == "custom"
    values = [record["metrics"]["scores"]["exact_match"]["value"] for record in records]  # type: ignore[index]
    assert list(comparison.mean_scores.values()) == values
    html = page([comparison])
    assert "http" not in html.replace("http-equiv", "")
    command = ["compare", *map(str, folders), "--html", str(tmp_path / "page.html")]
    assert main(command) == 0
    assert "20 questions, " in capfd.readouterr().err
    assert (tmp_path / "page.html").read_text() == html


def copy_with_scores(evaluation: Path, folder: Path, correct: set[str]) -> Path:
    """Copy an evaluation and replace its scores: 1 for the ids in `correct`, 0 for the others."""
    folder.mkdir()
    for name in ("artifact.json", "questions.jsonl", "answers.jsonl"):
        (folder / name).write_bytes((evaluation / name).read_bytes())
    question_ids = json.loads((evaluation / "per_question_scores.json").read_text())
    scores = {question_id: float(question_id in correct) for question_id in question_ids}
    (folder / "per_question_scores.json").write_text(json.dumps(scores))
    return folder


def test_page_shows_the_questions_that_differ_with_their_images(
    toy_assets: Artifact, untrained_llava: Path, storage: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = evaluate(toy_assets, untrained_llava, storage, capfd)
    evaluation = storage / "evaluate" / str(record["fingerprint"])
    question_ids = sorted(json.loads((evaluation / "per_question_scores.json").read_text()))
    worse = copy_with_scores(evaluation, tmp_path / "worse", set())
    better = copy_with_scores(evaluation, tmp_path / "better", set(question_ids[:15]))
    (comparison,) = compare([load_artifact(str(worse)), load_artifact(str(better))])
    (difference,) = comparison.differences
    assert difference.difference == 0.75
    assert not difference.spans_zero
    assert sum(question.differs for question in comparison.questions) == 15
    html = page([comparison])
    assert html.count("<figure ") == html.count("data:image;base64,") == 15
    assert "15 of 20 questions" in html


def test_incomparable_evaluations_are_rejected(
    toy_assets: Artifact, untrained_llava: Path, storage: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    full = evaluate(toy_assets, untrained_llava, storage, capfd)
    partial = evaluate(toy_assets, untrained_llava, storage, capfd, "--limit", "5")
    artifacts = [load_artifact(str(storage / "evaluate" / str(record["fingerprint"]))) for record in (full, partial)]
    with pytest.raises(UserError, match="other questions than in"):
        compare(artifacts)
    with pytest.raises(UserError, match="the only evaluation of custom"):
        compare(artifacts[:1])
    with pytest.raises(UserError, match="not a scored evaluation"):
        compare([toy_assets, toy_assets])


def test_mm_vet_is_answered_once_for_all_judges_and_the_judges_command_is_not_stored(
    untrained_llava: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    question = {"imagename": "v1_0.png", "question": "What is 1?", "answer": "x", "capability": ["ocr"]}
    (tmp_path / "images").mkdir()
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": question}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "v1_0.png")
    storage = tmp_path / "storage"
    command = ["evaluate", str(untrained_llava), "--benchmark", "mm-vet", "--data", str(tmp_path)]
    command += ["--storage", str(storage), "--max-new-tokens", "2", "--json"]
    assert main(command) == 0
    unjudged = json.loads(capfd.readouterr().out)
    official_answers = storage / "evaluate" / unjudged["fingerprint"] / unjudged["metrics"]["answers_for_a_judge"]
    assert json.loads(official_answers.read_text()).keys() == {"v1_0"}
    judge = f'{sys.executable} -c "{JUDGE}" --key planted-secret'
    assert main([*command, "--judge", judge]) == 0
    judged = json.loads(capfd.readouterr().out)
    assert judged["metrics"]["scores"]["total"]["value"] == 50.0
    assert not (storage / "evaluate" / judged["fingerprint"] / "answers").exists(), "stored answers were graded"
    for file in storage.rglob("*"):
        assert file.is_dir() or b"planted-secret" not in file.read_bytes()
