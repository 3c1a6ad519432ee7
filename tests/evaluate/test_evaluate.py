"""Any LLaVA is asked and scored by one command; a killed evaluation goes on; two evaluations are compared."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from raylava.artifacts import Artifact, load
from raylava.cli import main
from raylava.config.recipe import Model
from raylava.console import NullProgressBar
from raylava.errors import RunError, UserError
from raylava.evaluate.compare import compare
from raylava.evaluate.comparison_page import page
from raylava.evaluate.engines import TransformersEngine
from raylava.evaluate.generation import ActorPool, GenerationConfig, answer
from raylava.evaluate.judge import graded
from raylava.evaluate.metrics.score_table import paired_interval
from raylava.evaluate.prediction_store import PredictionStore
from raylava.evaluate.questions import Answer, Question
from raylava.models.registry import LanguageSpec, VisionSpec
from raylava.models.untrained import export_untrained
from raylava.storage import storage_path
from tests.processes import kill_with_children


@pytest.fixture(scope="module")
def model(
    toy_model: Model, vision: VisionSpec, language: LanguageSpec, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gemma"
    export_untrained(toy_model, vision, language, 0, "pad", storage_path(folder))
    return folder


@pytest.fixture(scope="module")
def llama(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that is not ours: a Llama with random weights, and the processor of another folder."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    told = json.loads((model / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(model)
    text = LlamaConfig(
        vocab_size=told["text_config"]["vocab_size"],
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**told["vision_config"]),
        text_config=text,
        image_token_index=told["image_token_index"],
        vision_feature_layer=-2,
    )
    torch.manual_seed(1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    for file in model.iterdir():
        if not (folder / file.name).exists() and "model" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def run(
    toy_assets: Artifact, model: Path, storage: Path, capfd: pytest.CaptureFixture[str], *more: str
) -> dict[str, object]:
    corpus = Path((toy_assets.path / "corpus").path)
    given = ["--benchmark", "custom", "--data", str(corpus / "questions.jsonl"), "--images", str(corpus / "images")]
    assert main(["evaluate", str(model), *given, "--storage", str(storage), "--json", *more]) == 0
    return json.loads(capfd.readouterr().out)


def test_a_folder_is_asked_scored_and_found_again(
    toy_assets: Artifact, model: Path, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = run(toy_assets, model, tmp_path, capfd, "--max-new-tokens", "3")
    metrics = first["metrics"]
    assert isinstance(metrics, dict)
    assert (metrics["questions"], metrics["missing"], metrics["headline"]) == (20, 0, "exact_match")
    again = run(toy_assets, model, tmp_path, capfd, "--max-new-tokens", "3", "--batch-size", "7")
    assert again["finished"] == first["finished"], "how many at once does not make it another evaluation"


def test_a_llava_on_llama_answers_as_well_and_two_are_compared(
    toy_assets: Artifact, model: Path, llama: Path, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = [run(toy_assets, one, tmp_path, capfd, "--max-new-tokens", "3") for one in (model, llama)]
    folders = [tmp_path / "evaluate" / str(one["fingerprint"]) for one in made]
    (only,) = compare([load(str(folder)) for folder in folders])
    assert only.benchmark == "custom"
    assert list(only.credit.values()) == [one["metrics"]["figures"]["exact_match"]["value"] for one in made]  # type: ignore[index]
    html = page([only])
    assert "http" not in html.replace("http-equiv", "")
    command = ["compare", *map(str, folders), "--html", str(tmp_path / "page.html")]
    assert main(command) == 0
    assert "20 questions, on " in capfd.readouterr().err
    assert (tmp_path / "page.html").read_text() == html


def doctored(evaluation: Path, folder: Path, right: set[str]) -> Path:
    """A copy of an evaluation that earned something."""
    folder.mkdir()
    for name in ("artifact.json", "questions.jsonl", "answers.jsonl"):
        (folder / name).write_bytes((evaluation / name).read_bytes())
    credit = json.loads((evaluation / "credit.json").read_text())
    (folder / "credit.json").write_text(json.dumps({number: float(number in right) for number in credit}))
    return folder


def test_the_page_shows_where_they_part_with_images(
    toy_assets: Artifact, model: Path, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = run(toy_assets, model, tmp_path, capfd, "--max-new-tokens", "3")
    evaluation = tmp_path / "evaluate" / str(made["fingerprint"])
    numbers = sorted(json.loads((evaluation / "credit.json").read_text()))
    worse = doctored(evaluation, tmp_path / "worse", set())
    better = doctored(evaluation, tmp_path / "better", set(numbers[:15]))
    (only,) = compare([load(str(worse)), load(str(better))])
    (difference,) = only.differences
    assert difference.difference == 0.75
    assert not difference.spans_zero
    assert sum(asked.parts for asked in only.asked) == 15
    html = page([only])
    assert html.count("<figure>") == html.count("data:image;base64,") == 15
    assert "15 of 20 questions" in html


def test_what_cannot_be_compared_is_told(
    toy_assets: Artifact, model: Path, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = run(toy_assets, model, tmp_path, capfd, "--max-new-tokens", "3")
    part = run(toy_assets, model, tmp_path, capfd, "--max-new-tokens", "3", "--limit", "5")
    artifacts = [load(str(tmp_path / "evaluate" / str(one["fingerprint"]))) for one in (whole, part)]
    with pytest.raises(UserError, match="other questions than in"):
        compare(artifacts)
    with pytest.raises(UserError, match="the only evaluation of own"):
        compare(artifacts[:1])
    with pytest.raises(UserError, match="no scored evaluation"):
        compare([toy_assets, toy_assets])


def questions(count: int) -> list[Question]:
    return [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(count)]


def test_an_evaluation_that_was_killed_asks_only_what_is_missing(
    model: Path, ray_cluster: None, tmp_path: Path
) -> None:
    asked = questions(6)
    kept = PredictionStore(storage_path(tmp_path))
    kept.add([Answer(one.question_id, one.text, "said before") for one in asked[:4]])
    kept.flush()
    bar = NullProgressBar()
    found = answer(
        asked,
        GenerationConfig(str(model), "", max_new_tokens=2),
        ActorPool(),
        bar,
        PredictionStore(storage_path(tmp_path)),
    )
    assert [one.question_id for one in found] == [one.question_id for one in asked]
    assert [one.text for one in found[:4]] == ["said before"] * 4
    assert all(one.text != "said before" for one in found[4:])
    assert len(PredictionStore(storage_path(tmp_path)).known) == 6, "all are kept in the end"


def test_a_broken_image_is_answered_as_missing_and_told(model: Path, ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    asked = [Question(name, f"{name}.png", "What?", "all", ("x",)) for name in ("broken", "good", "absent")]
    found = answer(asked, GenerationConfig(str(model), str(tmp_path), max_new_tokens=2), ActorPool(), NullProgressBar())
    assert [one.text is None for one in found] == [True, False, True]
    assert [bool(one.problem) for one in found] == [True, False, True]


def test_order_and_batch_size_change_no_answer(model: Path) -> None:
    chat = TransformersEngine(str(model), torch.device("cpu"), "fp32")
    image = Image.fromarray(np.full((48, 48, 3), 90, np.uint8))
    asked = [f"What {'very ' * number}thing is it?" for number in range(5)]
    together = chat.answer(asked, [image] * 5, 4)
    backwards = chat.answer(asked[::-1], [image] * 5, 4)[::-1]
    alone = [chat.answer([one], [image], 4)[0] for one in asked]
    assert together == backwards == alone


JUDGE = "import sys; asked = sys.stdin.read(); print('I say', 0.5 if 'What is 1?' in asked else 1.0)"


def test_a_judge_is_a_program_that_reads_a_prompt_and_prints_a_grade(tmp_path: Path) -> None:
    answers, kept = (
        [Answer("0", "", "a"), Answer("1", "", "b"), Answer("2", "", None)],
        storage_path(tmp_path / "grades.json"),
    )
    found = graded(questions(3), answers, f'{sys.executable} -c "{JUDGE}"', kept, NullProgressBar())
    assert found == {"0": 1.0, "1": 0.5, "2": None}
    assert graded(questions(3), answers, "/no/such/judge", kept, NullProgressBar()) == found, "nothing is asked twice"


@pytest.mark.parametrize(
    ("program", "told"),
    [("print('good')", "printed no number but 'good"), ("print(7)", "printed 7.0"), ("1/0", "division by zero")],
)
def test_a_judge_that_gives_no_grade_is_told(program: str, told: str, tmp_path: Path) -> None:
    answers, kept = [Answer("0", "", "a")], storage_path(tmp_path / "grades.json")
    with pytest.raises(RunError, match=told):
        graded(questions(1), answers, f'{sys.executable} -c "{program}"', kept, NullProgressBar())
    with pytest.raises(UserError, match="cannot be run"):
        graded(questions(1), answers, "/no/such/judge", kept, NullProgressBar())
    with pytest.raises(UserError, match="quote it as for a shell"):
        graded(questions(1), answers, "judge 'half", kept, NullProgressBar())


def test_mm_vet_is_answered_once_for_every_judge_and_a_judges_command_stays_secret(
    model: Path, ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = {"imagename": "v1_0.png", "question": "What is 1?", "answer": "x", "capability": ["ocr"]}
    (tmp_path / "images").mkdir()
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": one}))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "images" / "v1_0.png")
    storage = tmp_path / "storage"
    command = ["evaluate", str(model), "--benchmark", "mm-vet", "--data", str(tmp_path), "--storage", str(storage)]
    command += ["--max-new-tokens", "2", "--json"]
    assert main(command) == 0
    plain = json.loads(capfd.readouterr().out)
    official = storage / "evaluate" / plain["fingerprint"] / plain["metrics"]["answers_for_a_judge"]
    assert json.loads(official.read_text()).keys() == {"v1_0"}
    judge = f'{sys.executable} -c "{JUDGE}" --key planted-secret'
    assert main([*command, "--judge", judge]) == 0
    judged = json.loads(capfd.readouterr().out)
    assert judged["metrics"]["figures"]["total"]["value"] == 50.0
    assert not (storage / "evaluate" / judged["fingerprint"] / "answers").exists(), "the first's answers were graded"
    for file in storage.rglob("*"):
        assert file.is_dir() or b"planted-secret" not in file.read_bytes()


OFTEN = """
import sys
from raylava.cli import main
from raylava.evaluate import kept
kept._EVERY_SECONDS = 0.0
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_an_evaluation_killed_on_the_way_is_finished_by_the_same_command(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = "".join(json.dumps({"question_id": n, "text": f"What is {n}?", "answer": "x"}) + "\n" for n in range(400))
    (tmp_path / "q.jsonl").write_text(asked)
    storage = tmp_path / "storage"
    given = ["evaluate", str(model), "--benchmark", "custom", "--data", str(tmp_path / "q.jsonl"), "--batch-size", "1"]
    command = [sys.executable, "-c", OFTEN, *given, "--max-new-tokens", "3", "--storage", str(storage), "--json"]
    ran = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while len(list(storage.glob("evaluate/*/answers/*.parquet"))) < 3 and ran.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill_with_children(ran)
    before = {file: file.stat().st_mtime_ns for file in storage.glob("evaluate/*/answers/*.parquet")}
    kept = PredictionStore(storage_path(next(storage.glob("evaluate/*"))))
    assert 0 < len(kept.known) < 400, "it was killed on the way"
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert json.loads(done.stdout)["metrics"]["questions"] == 400
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in before.items()), "those are not asked again"
    answers = PredictionStore(storage_path(next(storage.glob("evaluate/*")))).known
    assert sorted(int(one.question_id) for one in answers) == list(range(400)), "each is asked once"


def test_a_model_that_is_not_there_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "a", "answer": "b"}\n')
    given = ["--benchmark", "custom", "--data", str(tmp_path / "q.jsonl"), "--storage", str(tmp_path)]
    assert main(["evaluate", str(tmp_path), *given]) == 2
    assert "no model there (no config.json)" in capfd.readouterr().err
    assert main(["evaluate", str(tmp_path), *given, "--engine", "llamacpp"]) == 2
    assert "--engine llamacpp: known here: transformers, vllm" in capfd.readouterr().err
    assert main(["evaluate", str(tmp_path), *given, "--precision", "int4"]) == 2
    assert "--precision int4: known here: auto, fp32, bf16, fp16" in capfd.readouterr().err


def test_a_paired_interval_narrows_with_questions_and_holds_the_mean() -> None:
    generator = np.random.default_rng(1)
    differences = generator.choice([-1.0, 0.0, 0.0, 1.0, 1.0], (1, 2000))
    wide, narrow = paired_interval(differences[:, :100]), paired_interval(differences)
    assert narrow[0] < differences.mean() < narrow[1]
    assert narrow[1] - narrow[0] < wide[1] - wide[0]
