"""The evaluate stage: a model answers a benchmark and is scored, within a recipe or through `raylava evaluate`."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from raylava.artifacts import RECORD_FILE, Artifact, ArtifactSpec, fingerprint, load_artifact
from raylava.cluster.session import ray_session
from raylava.config.recipe import Benchmark, Resources
from raylava.errors import UserError
from raylava.evaluation.compare import ANSWERS_FILE, PER_QUESTION_SCORES, QUESTIONS_FILE
from raylava.evaluation.endpoint_generation import generate_with_endpoints
from raylava.evaluation.endpoints import EndpointSource
from raylava.evaluation.generation import ActorPool, GenerationConfig, encode_answers, generate_answers
from raylava.evaluation.judge import grade_answers
from raylava.evaluation.loading import LoadedBenchmark
from raylava.evaluation.metrics.exact_match import majority_baseline
from raylava.evaluation.metrics.score_table import BenchmarkResult
from raylava.evaluation.metrics.scoring import SCORING_VERSION, score_answers, score_grades
from raylava.evaluation.prediction_store import PredictionStore
from raylava.evaluation.questions import GeneratedAnswer, questions_fingerprint
from raylava.models.checkpoint import find_checkpoint, legacy_scale
from raylava.models.hub import behavior_identity, is_behavior_file, is_folder, weights_identity
from raylava.models.registry import LlavaCheckpoint
from raylava.pipeline.stage import Stage, run_stage
from raylava.progress import ProgressBar, ProgressReporter
from raylava.storage import StoragePath, storage_path

GRADES_FILE = "grades.json"
OFFICIAL_ANSWERS_FILE = "answers.json"  # the official mapping of question ids to answers, input of a judge


@dataclass(frozen=True)
class ModelRef:
    """The model to evaluate: its checkpoint, its identity, and the artifacts it depends on."""

    checkpoint: LlavaCheckpoint
    identity: str
    inputs: Mapping[str, ArtifactSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationRequest:
    """Everything that defines one evaluation.

    `blank_images` replaces every image by the mean color; `judge` is the command that grades answers which no metric
    can score; `precision` is the dtype in which the model runs, since rounding may change an answer.
    With `endpoints`, servers of the model answer instead of actors that load it.
    """

    model: ModelRef
    benchmark: Benchmark
    loaded: LoadedBenchmark
    actors: ActorPool
    blank_images: bool = False
    judge: str = ""
    precision: str = "auto"
    endpoints: EndpointSource | None = None

    @property
    def max_new_tokens(self) -> int:
        """The limit of an answer: the recipe's or command's, or else the benchmark's own."""
        return self.benchmark.max_new_tokens or self.loaded.max_new_tokens

    def generation_config(self) -> GenerationConfig:
        """Return how answers are generated."""
        return GenerationConfig(
            model=self.model.checkpoint,
            image_root=self.loaded.image_root,
            prompt_suffix=self.benchmark.prompt_suffix,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.benchmark.batch_size,
            blank_images=self.blank_images,
            precision=self.precision,
        )

    def answer_fields(self) -> dict[str, Any]:
        """Return what determines the answers and their scores, except for the judge."""
        fields = {
            "model": self.model.identity,
            "questions": questions_fingerprint(self.loaded.questions, self.loaded.image_sizes),
            "benchmark": self.benchmark.fingerprint_fields() | {"max_new_tokens": self.max_new_tokens},
            "blank_images": self.blank_images,
            "scoring": SCORING_VERSION,
        }
        if self.precision != "auto":
            fields["precision"] = self.precision
        if self.endpoints:
            fields["endpoint"] = self.endpoints.fingerprint_fields()
        return fields


class EvaluateStage(Stage):
    """Generates a model's answers to a benchmark and scores them."""

    unit = "questions"

    def __init__(self, label: str, request: EvaluationRequest, storage: StoragePath) -> None:
        """Raises UserError when none of the benchmark's images exist."""
        _check_images(label, request.loaded)
        super().__init__("evaluate", label, storage, request.model.inputs)
        self._request = request

    def fingerprint_fields(self) -> dict[str, Any]:
        judge = self._request.judge
        # A command may contain a secret, so that only its hash is recorded.
        hidden = {"judge": fingerprint("judge", {"command": judge})} if judge else {}
        return self._request.answer_fields() | hidden

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        request, output = self._request, self.spec().path
        questions = request.loaded.questions
        answers_spec = ArtifactSpec(self.kind, request.answer_fields(), self.storage)  # shared by all judges
        store = PredictionStore(answers_spec.path)
        answers = _generate(request, progress, store)
        result = _score(request, answers, output, progress)
        _write_answers(request, answers, output)
        name = request.benchmark.name
        if result is None:
            return {
                "benchmark": name,
                "official": request.benchmark.benchmark,
                "questions": len(answers),
                "answers_for_a_judge": OFFICIAL_ANSWERS_FILE,
            }
        (output / PER_QUESTION_SCORES).write_bytes(json.dumps(result.per_question).encode())
        has_constant_answer = request.loaded.scoring.has_constant_answer
        majority = {"majority": majority_baseline(questions)} if has_constant_answer else {}
        return result.metrics() | majority | {"images": request.loaded.image_root}


def _generate(request: EvaluationRequest, progress: ProgressBar, store: PredictionStore) -> list[GeneratedAnswer]:
    questions, config, actors = request.loaded.questions, request.generation_config(), request.actors
    if request.endpoints:
        return generate_with_endpoints(questions, config, request.endpoints, actors, progress, store)
    return generate_answers(questions, config, actors, progress, store)


def _check_images(label: str, loaded: LoadedBenchmark) -> None:
    """A missing image is a missing answer; if all are missing, the folder is the wrong one. Raises UserError."""
    images = [question.image for question in loaded.questions if question.image]
    if images and not any(image in loaded.image_sizes for image in images):
        raise UserError(
            f"{label}: none of its images is in {loaded.image_root} (the first is {images[0]}); give the folder that "
            "has them itself, since links out of it are not followed"
        )


def _score(
    request: EvaluationRequest, answers: list[GeneratedAnswer], output: StoragePath, progress: ProgressBar
) -> BenchmarkResult | None:
    """Score the answers; return None where a judge is needed and none is given."""
    name, loaded = request.benchmark.name, request.loaded
    if loaded.scoring.is_judged and not request.judge:
        return None
    if loaded.scoring.is_judged:
        grades = grade_answers(loaded.questions, answers, request.judge, output / GRADES_FILE, progress)
        return score_grades(name, loaded.scoring, loaded.questions, grades)
    texts = {answer.question_id: answer.text for answer in answers}
    return score_answers(name, loaded.scoring, loaded.questions, texts, loaded.protocol)


def _write_answers(request: EvaluationRequest, answers: list[GeneratedAnswer], output: StoragePath) -> None:
    """Write LLaVA's answers file and the questions; for a judge, the official answers mapping as well."""
    (output / ANSWERS_FILE).write_bytes(encode_answers(answers, request.model.identity))
    lines = [json.dumps(dataclasses.asdict(question), ensure_ascii=False) for question in request.loaded.questions]
    (output / QUESTIONS_FILE).write_bytes("".join(line + "\n" for line in lines).encode())
    if request.loaded.scoring.is_judged:
        texts = {answer.question_id: answer.text or "" for answer in answers}
        (output / OFFICIAL_ANSWERS_FILE).write_bytes(json.dumps(texts, ensure_ascii=False, indent=1).encode())


def evaluate_model(request: EvaluationRequest, storage: StoragePath, reporter: ProgressReporter) -> Artifact:
    """Evaluate any model, on the connected Ray cluster or a local one, or without Ray by endpoints that run already."""
    stage = EvaluateStage(f"evaluate {request.benchmark.name}", request, storage)
    actors = request.actors
    local_resources = Resources(workers=actors.max_actors or 1, cpus_per_worker=actors.cpus_per_actor)
    needs_ray = request.endpoints is None or request.endpoints.needs_ray
    with ray_session(local_resources) if needs_ray and not stage.spec().find() else nullcontext():
        return run_stage(stage, reporter)


def _is_edited(artifact: Artifact) -> bool:
    """Return whether files that determine a model's answers differ from its record; in a bucket, all but weights."""
    recorded = artifact.record.get("files")
    if recorded is None:  # older records have no hashes
        return False
    found = behavior_identity(artifact.path.uri)
    if artifact.path.is_local:
        found |= weights_identity(artifact.path.uri, "main")
    expected = {name: digest for name, digest in recorded.items() if name in found or is_behavior_file(name)}
    return found != expected


def model_ref(model: str, transformers_version: str | None = None) -> ModelRef:
    """Identify a model by its artifact's fingerprint, or by its files if it is none or was edited since it was built.

    Raises UserError when there is no model.

    `transformers_version` is the version that saved a model of another program, if its config.json is wrong about it.
    """
    checkpoint = find_checkpoint(model, transformers_version)
    folder = storage_path(checkpoint.name)
    if is_folder(model) and (folder / RECORD_FILE).exists():
        if transformers_version:
            raise UserError(
                f"--transformers-version={transformers_version}: {model} is an artifact of raylava, which knows its "
                "version; omit the option"
            )
        artifact = load_artifact(model)
        if not _is_edited(artifact):
            return ModelRef(checkpoint, artifact.fingerprint)
    fields: dict[str, Any] = {"weights": weights_identity(checkpoint.name, checkpoint.revision)}
    if behavior := behavior_identity(checkpoint.name):
        fields["behavior"] = behavior
    if (scale := legacy_scale(checkpoint)) != 1.0:
        fields["legacy_scale"] = scale
    return ModelRef(checkpoint, fingerprint("model", fields))
