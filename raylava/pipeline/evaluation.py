"""The evaluate stage: a model answers a benchmark and is scored, as part of a recipe or by itself."""

import dataclasses
import json
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from raylava.artifacts import RECORD, Artifact, ArtifactSpec, fingerprint, load
from raylava.cluster.session import ray_session
from raylava.config.recipe import Benchmark, Resources
from raylava.console import Console, ProgressBar
from raylava.errors import UserError
from raylava.evaluate.benchmarks import LoadedBenchmark
from raylava.evaluate.compare import ANSWERS, CREDIT, QUESTIONS
from raylava.evaluate.engines import check_engine, check_precision
from raylava.evaluate.generation import ActorPool, GenerationConfig, answer, answers_bytes
from raylava.evaluate.judge import graded
from raylava.evaluate.metrics.exact_match import majority
from raylava.evaluate.metrics.registry import SCORING_VERSION, judged, score
from raylava.evaluate.metrics.score_table import Result
from raylava.evaluate.prediction_store import PredictionStore
from raylava.evaluate.questions import Answer, identity
from raylava.models.registry import is_folder, located, weights_identity
from raylava.pipeline.stage import Stage, run_stage
from raylava.storage import StoragePath, storage_path

GRADES = "grades.json"
OFFICIAL_ANSWERS = "answers.json"  # what a judge is given


@dataclass(frozen=True)
class Asked:
    """A model to be asked: where it is (a folder or hub id), what identifies it, the specs that it comes from."""

    model: str
    identity: str
    inputs: dict[str, ArtifactSpec]


def evaluation(
    label: str,
    benchmark: Benchmark,
    exam: LoadedBenchmark,
    asked: Asked,
    storage: StoragePath,
    actors: ActorPool,
    blank: bool = False,
    judge: str = "",
    engine: str = "transformers",
    precision: str = "auto",
) -> Stage:
    """The stage that has a model answer a benchmark, and scores it. `blank` shows the mean colour for each image;
    `judge` is the program that grades what no rule can, `engine` and `precision` are what the model runs by (its
    rounding may decide a word).
    """
    _check_images(label, exam)
    content = {
        "model": asked.identity,
        "questions": identity(exam.questions, exam.image_sizes),
        "benchmark": benchmark.fingerprint_fields(),
        "blank_images": blank,
        "scoring": SCORING_VERSION,
    } | _unusual(engine, precision)
    unjudged = ArtifactSpec("evaluate", content, storage)  # its answers serve any judge
    spec = ArtifactSpec("evaluate", content | {"judge": _hidden(judge)}, storage) if judge else unjudged
    how = (benchmark.prompt_suffix, benchmark.max_new_tokens, benchmark.batch_size)
    asking = GenerationConfig(
        asked.model, exam.image_root, *how, blank_images=blank, engine=engine, precision=precision
    )

    def build(bar: ProgressBar) -> dict[str, Any]:
        answers = answer(exam.questions, asking, actors, bar, PredictionStore(unjudged.path))
        result = _scored(benchmark.name, exam, answers, judge, spec.path, bar)
        _keep(exam, answers, asked.identity, spec.path)
        if result is None:
            return {"benchmark": benchmark.name, "questions": len(answers), "answers_for_a_judge": OFFICIAL_ANSWERS}
        (spec.path / CREDIT).write_bytes(json.dumps(result.credit).encode())
        best = {"majority": majority(exam.questions)} if exam.rule in ("exact_match", "yes_no") else {}
        return result.metrics() | best | {"images": exam.image_root}

    return Stage(label, spec, asked.inputs, "questions", build)


def _unusual(engine: str, precision: str) -> dict[str, str]:
    return ({} if engine == "transformers" else {"engine": engine}) | (
        {} if precision == "auto" else {"precision": precision}
    )


def _check_images(label: str, exam: LoadedBenchmark) -> None:
    """One that is missing is an answer that is missing; when all are, the folder is another."""
    wanted = [question.image for question in exam.questions if question.image]
    if wanted and not any(image in exam.image_sizes for image in wanted):
        raise UserError(
            f"{label}: none of its images is in {exam.image_root} (the first would be {wanted[0]}); name theirs"
        )


def _scored(
    name: str, exam: LoadedBenchmark, answers: list[Answer], judge: str, output: StoragePath, bar: ProgressBar
) -> Result | None:
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


def _keep(exam: LoadedBenchmark, answers: list[Answer], model_id: str, output: StoragePath) -> None:
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
    exam: LoadedBenchmark,
    storage: StoragePath,
    actors: ActorPool,
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
    with nullcontext() if stage.spec.find() else ray_session(local):
        return run_stage(stage, console)


def asked_model(model: str) -> Asked:
    """What identifies a model: its artifact's fingerprint, or its weights'. Raises UserError when there is none."""
    folder = storage_path(model)
    if is_folder(model) and not (folder / "config.json").exists():
        raise UserError(f"{model}: no model there (no config.json); give a finetune artifact or a Hugging Face folder")
    if (folder / RECORD).exists():
        return Asked(folder.uri, load(model).fingerprint, {})
    weights = weights_identity(located(model), "main")
    return Asked(located(model), fingerprint("model", {"weights": weights}), {})
