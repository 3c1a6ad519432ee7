"""The artifacts of a run without Ray: real blocks, questions and scores, beside logs of training that are made up."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from raylava.artifacts import Artifact
from raylava.config.recipe import Recipe
from raylava.evaluation.compare import ANSWERS_FILE, PER_QUESTION_SCORES, QUESTIONS_FILE
from raylava.evaluation.generation import encode_answers
from raylava.evaluation.metrics.exact_match import majority_baseline
from raylava.evaluation.metrics.scoring import score_answers
from raylava.evaluation.questions import GeneratedAnswer
from raylava.pipeline.evaluation import EvaluateStage
from raylava.pipeline.graph import build_stages
from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import PrepareStage, TrainStage
from raylava.storage import StoragePath, storage_path
from raylava.toy.demo import toy_recipe
from raylava.train.step_log import MECHANISMS, METRICS_LOG, STEP_LOG, summarize_run
from tests.support.corpora import prepare_serially

SECONDS = 12.5  # that each stage is recorded to have taken
STEPS = 30


def build_run(toy_assets: Artifact, storage: Path, *overrides: str) -> tuple[Recipe, dict[str, Artifact]]:
    """Build all stages of the toy recipe; return it with its artifacts by label."""
    recipe = toy_recipe(toy_assets.path, list(overrides))
    stages = build_stages(recipe, storage_path(storage))
    return recipe, {stage.label: _build(stage) for stage in stages}


def _build(stage: Stage) -> Artifact:
    path = stage.spec().path
    if isinstance(stage, PrepareStage):
        metrics = prepare_serially(dataclasses.replace(stage._prepare_spec, output=path.uri)).counts()
    elif isinstance(stage, TrainStage):
        write_training_logs(path)
        metrics = summarize_run(path)
    elif isinstance(stage, EvaluateStage):
        metrics = _answer(stage, path)
    else:
        metrics = {}
    inputs = {role: spec.fingerprint for role, spec in stage.inputs.items()}
    return stage.spec().commit(metrics, inputs, SECONDS)


def write_training_logs(path: StoragePath, steps: int = STEPS, workers: int = 2, **changes: Any) -> None:
    """Write the logs of a training stage: each step takes 0.1 s, of which a fifth is spent waiting for data."""
    logged, measured = [], []
    for step in range(steps):
        loss = 2.0 * math.exp(-step / 10)
        logged.append(
            {"step": step, "loss": loss, "skipped": False, "samples": 8, "tokens": 800, "loss_tokens": 100}
            | {"world_size": workers}
        )
        measured.append(
            {"step": step, "loss": loss, "lr": 1e-3 * (1 - step / steps), "grad_norm": 1.0 + step % 3}
            | {"step_time_s": 0.08, "data_wait_fraction": 0.2, "checkpoint_stall_s": 0.0}
            | {"tokens_per_second": 8000.0 + step, "skipped": False}
            | changes
        )
    for name, lines in ((STEP_LOG, logged), (METRICS_LOG, measured)):
        (path / name).write_bytes("".join(json.dumps(line) + "\n" for line in lines).encode())
    (path / MECHANISMS).write_bytes(b'{"attention": "varlen"}')
    (path / "tensorboard" / "events.out.tfevents.1").write_bytes(b"")


def _answer(stage: EvaluateStage, path: StoragePath) -> dict[str, Any]:
    """Answer every question: the model each third wrongly, the baselines all of them."""
    request = stage._request
    is_baseline = stage.label.endswith(")")
    answers = [
        GeneratedAnswer(question.question_id, question.text, "none" if is_baseline or number % 3 == 0 else reference)
        for number, question in enumerate(request.loaded.questions)
        for reference in question.references[:1]
    ]
    texts = {answer.question_id: answer.text for answer in answers}
    loaded = request.loaded
    result = score_answers(request.benchmark.name, loaded.scoring, loaded.questions, texts, loaded.protocol)
    (path / ANSWERS_FILE).write_bytes(encode_answers(answers, request.model.identity))
    lines = [json.dumps(dataclasses.asdict(question)) + "\n" for question in loaded.questions]
    (path / QUESTIONS_FILE).write_bytes("".join(lines).encode())
    (path / PER_QUESTION_SCORES).write_bytes(json.dumps(result.per_question).encode())
    majority = majority_baseline(loaded.questions)
    return result.metrics() | {"majority": majority, "images": loaded.image_root}
