"""The evaluate stage: a model answers a benchmark and is scored, as part of a recipe or by itself."""

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from raylava.artifacts import RECORD, Artifact, Draft, fingerprint, load
from raylava.console import Bar, Console
from raylava.errors import UserError
from raylava.evaluate.answer import Actors, Asking, answer, answers_bytes
from raylava.evaluate.compare import ANSWERS, CREDIT, QUESTIONS
from raylava.evaluate.engines import check_engine, check_precision
from raylava.evaluate.judge import graded
from raylava.evaluate.kept import KeptAnswers
from raylava.evaluate.questions import Answer, identity
from raylava.evaluate.score.exact import majority
from raylava.evaluate.score.rules import SCORING_VERSION, judged, score
from raylava.evaluate.score.tally import Result
from raylava.evaluate.scoring import Exam
from raylava.model.backbones import is_folder, located, weights_identity
from raylava.recipe import Benchmark, Resources
from raylava.session import ray_session
from raylava.stage import Stage, make
from raylava.storage import Place, place

GRADES = "grades.json"
OFFICIAL_ANSWERS = "answers.json"  # what a judge is given


@dataclass(frozen=True)
class Asked:
    """A model to be asked: where it is (a folder or hub id), what identifies it, the drafts that it comes from."""

    model: str
    identity: str
    inputs: dict[str, Draft]


def evaluation(
    label: str,
    benchmark: Benchmark,
    exam: Exam,
    asked: Asked,
    storage: Place,
    actors: Actors,
    blank: bool = False,
    judge: str = "",
    engine: str = "transformers",
    precision: str = "auto",
) -> Stage:
    """The stage that has a model answer a benchmark, and scores it. `blank` shows the mean colour for each picture;
    `judge` is the program that grades what no rule can, `engine` and `precision` are what the model runs by (its
    rounding may decide a word).
    """
    _check_pictures(label, exam)
    content = {
        "model": asked.identity,
        "questions": identity(exam.questions, exam.pictures),
        "benchmark": benchmark.content(),
        "blank_pictures": blank,
        "scoring": SCORING_VERSION,
    } | _unusual(engine, precision)
    unjudged = Draft("evaluate", content, storage)  # its answers serve any judge
    draft = Draft("evaluate", content | {"judge": _hidden(judge)}, storage) if judge else unjudged
    how = (benchmark.suffix, benchmark.max_new_tokens, benchmark.batch_size)
    asking = Asking(asked.model, exam.images, *how, blank_pictures=blank, engine=engine, precision=precision)

    def build(bar: Bar) -> dict[str, Any]:
        answers = answer(exam.questions, asking, actors, bar, KeptAnswers(unjudged.place))
        result = _scored(benchmark.name, exam, answers, judge, draft.place, bar)
        _keep(exam, answers, asked.identity, draft.place)
        if result is None:
            return {"benchmark": benchmark.name, "questions": len(answers), "answers_for_a_judge": OFFICIAL_ANSWERS}
        (draft.place / CREDIT).write_bytes(json.dumps(result.credit).encode())
        best = {"majority": majority(exam.questions)} if exam.rule in ("exact_match", "yes_no") else {}
        return result.metrics() | best | {"images": exam.images}

    return Stage(label, draft, asked.inputs, "questions", build)


def _unusual(engine: str, precision: str) -> dict[str, str]:
    return ({} if engine == "transformers" else {"engine": engine}) | (
        {} if precision == "auto" else {"precision": precision}
    )


def _check_pictures(label: str, exam: Exam) -> None:
    """One that is missing is an answer that is missing; when all are, the folder is another."""
    wanted = [question.image for question in exam.questions if question.image]
    if wanted and not any(image in exam.pictures for image in wanted):
        raise UserError(
            f"{label}: none of its pictures is in {exam.images} (the first would be {wanted[0]}); name theirs"
        )


def _scored(name: str, exam: Exam, answers: list[Answer], judge: str, output: Place, bar: Bar) -> Result | None:
    """None where a judge is wanted and none is given."""
    if exam.rule == "judged" and not judge:
        return None
    if exam.rule == "judged":
        return judged(name, exam.questions, graded(exam.questions, answers, judge, output / GRADES, bar))
    texts = {item.question_id: item.text for item in answers}
    return score(name, exam.rule, exam.questions, texts, exam.protocol)


def _hidden(command: str) -> str:
    """A command may hold a key: what identifies it is kept, not what it says."""
    return fingerprint("judge", {"command": command})


def _keep(exam: Exam, answers: list[Answer], model_id: str, output: Place) -> None:
    """LLaVA's answers file and the questions; for a judge, the official mapping of ids to answers as well."""
    (output / ANSWERS).write_bytes(answers_bytes(answers, model_id))
    lines = [json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in exam.questions]
    (output / QUESTIONS).write_bytes("".join(line + "\n" for line in lines).encode())
    if exam.rule == "judged":
        texts = {item.question_id: item.text or "" for item in answers}
        (output / OFFICIAL_ANSWERS).write_bytes(json.dumps(texts, ensure_ascii=False, indent=1).encode())


def evaluate_model(
    model: str,
    benchmark: Benchmark,
    exam: Exam,
    storage: Place,
    actors: Actors,
    judge: str,
    engine: str,
    precision: str,
    console: Console,
) -> Artifact:
    """The evaluation of any model: a raylava artifact, a Hugging Face folder of a LLaVA, or a hub id.

    Raises UserError when there is no such model, engine or precision.
    """
    check_engine(engine)
    check_precision(precision)
    label, asked = f"evaluate {benchmark.name}", asked_model(model)
    stage = evaluation(label, benchmark, exam, asked, storage, actors, judge=judge, engine=engine, precision=precision)
    local = Resources(workers=actors.most or 1, cpus_per_worker=actors.cpus)
    with nullcontext() if stage.draft.find() else ray_session(local):
        return make(stage, console)


def asked_model(model: str) -> Asked:
    """What identifies a model: its artifact's fingerprint, or its weights'. Raises UserError when there is none."""
    folder = place(model)
    if is_folder(model) and not (folder / "config.json").exists():
        raise UserError(f"{model}: no model there (no config.json); give a finetune artifact or a Hugging Face folder")
    if (folder / RECORD).exists():
        return Asked(folder.uri, load(model).fingerprint, {})
    weights = weights_identity(located(model), "main")
    return Asked(located(model), fingerprint("model", {"weights": weights}), {})
