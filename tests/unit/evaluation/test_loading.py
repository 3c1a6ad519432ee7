"""Scoring files of answers by benchmark name, through the library and `raylava score`."""

import json
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.errors import UserError
from raylava.evaluation.loading import score_file
from tests.support.official_files import write_gqa, write_mm_vet, write_pope

GOLDEN = Path(__file__).parents[4] / "shared" / "golden" / "scienceqa"


def test_unanswered_question_is_wrong_and_listed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_gqa(tmp_path)
    entry = {"question_id": "201", "text": "", "metadata": {"problem": "the image is missing"}}
    (tmp_path / "answers.json").write_text(json.dumps([entry]))
    command = ["score", "gqa", "--data", str(tmp_path), "--answers", str(tmp_path / "answers.json"), "--json"]
    assert main(command) == 0
    metrics = json.loads(capfd.readouterr().out)
    assert (metrics["questions"], metrics["missing"]) == (1, ["201"])
    assert metrics["scores"]["exact_match"]["value"] == 0.0


def test_mm_vet_is_scored_from_the_judges_official_reply_file(tmp_path: Path) -> None:
    write_mm_vet(tmp_path)
    with pytest.raises(UserError, match="graded by a judge"):
        score_file("mm-vet", str(tmp_path), "")
    (tmp_path / "grades.json").write_text(json.dumps({"v1_0": {"content": ["0.5"], "score": [0.5, 1.0]}}))
    result = score_file("mm-vet", str(tmp_path), "", grades=str(tmp_path / "grades.json"))
    assert result.scores["total"].value == 75.0


@pytest.mark.parametrize("grade", [1.01, -0.1, True, "0.5", None, [0.5, 2], [], float("nan"), 10**400])
def test_grade_that_is_not_from_0_to_1_is_refused_by_file_and_question(grade: object, tmp_path: Path) -> None:
    write_mm_vet(tmp_path)
    (tmp_path / "grades.json").write_text(json.dumps({"v1_0": {"score": grade}}))
    with pytest.raises(UserError, match=r"grades\.json: not a file of grades"):
        score_file("mm-vet", str(tmp_path), "", grades=str(tmp_path / "grades.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["popee", "--answers", "x"], "unknown benchmark; choose one of: pope, "),
        (["gqa"], "give --answers FILE"),
        (["gqa", "--answers", "nowhere"], "nowhere: no such file"),
        (
            ["pope", "--answers", "x", "--protocol", "vlmevalkit"],
            "protocol vlmevalkit: unknown for pope; choose one of: llava, lmms-eval",
        ),
    ],
)
def test_command_error_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_gqa(tmp_path)
    write_pope(tmp_path)
    assert main(["score", *arguments, "--data", str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert message in error.replace("\n", " ")


@pytest.mark.skipif(not GOLDEN.exists(), reason="shared/golden/scienceqa (published predictions) is not available")
def test_llava_13b_reproduces_its_published_science_qa_scores() -> None:
    result = score_file("scienceqa", str(GOLDEN), str(GOLDEN / "answers.jsonl"))
    assert result.questions == 4241
    assert round(result.scores["accuracy"].value * 4241, 6) == 3155
    assert round(result.scores["image_accuracy"].value * 2017, 6) == 1445
