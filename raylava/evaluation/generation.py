"""Batch generation with Ray Data: a pool of actors answers questions by greedy decoding.

Each actor holds one copy of a model, which may be any Hugging Face LLaVA folder. Questions of similar length share a
batch to reduce padding. Scoring is in `metrics`.
"""

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from PIL import Image

from raylava.cluster.roles import TRAIN, node_labels_for
from raylava.cluster.session import error_summary
from raylava.config.recipe import Resources
from raylava.corpus.images import decode_image
from raylava.corpus.quarantine import BadRow
from raylava.corpus.row_images import read_image_file
from raylava.errors import RunError, UserError
from raylava.evaluation.engines import TransformersEngine
from raylava.evaluation.prediction_store import PredictionStore
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.models.registry import LlavaCheckpoint
from raylava.progress import ProgressBar
from raylava.storage import StoragePath, storage_path

_MAX_PIXELS = 64_000_000
_MAX_IMAGE_BYTES = 64_000_000


@dataclass(frozen=True)
class GenerationConfig:
    """The model and the decoding settings of an evaluation.

    `image_root` is the folder of the questions' images. With `blank_images`, every image is replaced by one in the mean
    color of the backbone (the blind baseline). `precision` is the dtype of weights and activations: auto (that of the
    checkpoint), fp32, bf16 or fp16.
    """

    model: LlavaCheckpoint
    image_root: str
    prompt_suffix: str = ""
    max_new_tokens: int = 32
    batch_size: int = 32
    blank_images: bool = False
    precision: str = "auto"


@dataclass(frozen=True)
class ActorPool:
    """Size and resources of the actors that hold the model.

    Without `max_actors`, the pool grows to as many actors as the cluster has resources for. `node_labels` is the Ray
    label selector of the nodes that the actors may run on.
    """

    max_actors: int | None = 1
    cpus_per_actor: int = 1
    gpus_per_actor: int = 0
    node_labels: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_resources(cls, resources: Resources) -> Self:
        """Return a pool with the number and the resources of a recipe's training workers."""
        labels = node_labels_for(TRAIN, resources)
        return cls(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, labels)


def generate_answers(
    questions: list[Question],
    config: GenerationConfig,
    actors: ActorPool,
    progress: ProgressBar,
    store: PredictionStore | None = None,
) -> list[GeneratedAnswer]:
    """Return one answer per question, in question order.

    Answers that an earlier attempt left in `store` are reused; new ones are added to it. Raises UserError if the model
    is incomplete, RunError with the first line of the cause if it cannot be loaded or run.
    """
    return collect_answers(questions, lambda unanswered: _generate_batches(unanswered, config, actors), progress, store)


def collect_answers(
    questions: list[Question],
    generate: Callable[[list[Question]], Iterator[list[GeneratedAnswer]]],
    progress: ProgressBar,
    store: PredictionStore | None,
) -> list[GeneratedAnswer]:
    """Return one answer per question, in question order: from `store`, or from `generate`, which yields batches.

    New answers are added to `store`, also those that come before `generate` fails.
    """
    answers = {answer.question_id: answer for answer in store.predictions} if store else {}
    unanswered = [question for question in questions if question.question_id not in answers]
    try:
        for batch in generate(unanswered):
            answers |= {answer.question_id: answer for answer in batch}
            if store:
                store.add(batch)
            progress.update(len(answers), len(questions))
    finally:
        if store:
            store.flush()
    return [answers[question.question_id] for question in questions]


def _generate_batches(
    questions: list[Question], config: GenerationConfig, actors: ActorPool
) -> Iterator[list[GeneratedAnswer]]:
    """Yield the answers to batches of questions of similar length, in order of completion."""
    import ray.data

    if not questions:
        return
    by_length = sorted(questions, key=lambda question: len(question.text))
    size = config.batch_size
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    rows = [{"batch": json.dumps([asdict(question) for question in batch])} for batch in batches]
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _GenerationActor,
        fn_constructor_args=(config, actors),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors.max_actors or len(rows), len(rows))),
        num_cpus=actors.cpus_per_actor,
        num_gpus=actors.gpus_per_actor,
        label_selector=dict(actors.node_labels) or None,
    )
    for row in results.iter_rows():
        if row["problem"]:
            if row["is_user_error"]:
                raise UserError(row["problem"])
            raise RunError(f"generation with {config.model.name} failed: {row['problem']}")
        yield [GeneratedAnswer(**fields) for fields in json.loads(row["answers"])]


def encode_answers(answers: list[GeneratedAnswer], model_id: str) -> bytes:
    """Encode answers as LLaVA's JSONL: question_id, prompt, text, answer_id, model_id and metadata on each line."""
    lines = [
        {
            "question_id": answer.question_id,
            "prompt": answer.prompt,
            "text": answer.text if answer.text is not None else "",
            "answer_id": f"{model_id}-{index}",
            "model_id": model_id,
            "metadata": {"problem": answer.problem} if answer.problem else {},
        }
        for index, answer in enumerate(answers)
    ]
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def decode_answers(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines of an answers file that `encode_answers` wrote."""
    for line in content.decode("utf-8").split("\n"):
        if line:
            yield json.loads(line)


def _question_from_json(fields: dict[str, Any]) -> Question:
    """Rebuild a question, whose tuples JSON turned into lists."""
    history = tuple((question, answer) for question, answer in fields["history"])
    return Question(**fields | {"history": history, "references": tuple(fields["references"])})


def load_image(
    root: StoragePath, question: Question, blank_image: Callable[[Image.Image], Image.Image] | None
) -> Image.Image | BadRow | None:
    """Return a question's image, what `blank_image` makes of it if it is given, or why the image cannot be loaded.

    None for a question without an image.
    """
    if question.image is None:
        return None
    try:
        image = read_rgb_image(root, question.image)
    except BadRow as problem:
        return problem
    return blank_image(image) if blank_image else image


def read_rgb_image(folder: StoragePath, name: str) -> Image.Image:
    """Read an image below a folder. Raises BadRow when it is unusable, OSError when the folder is missing."""
    return Image.fromarray(decode_image(read_image_file(folder, name, _MAX_IMAGE_BYTES), _MAX_PIXELS))


class _GenerationActor:
    """The Ray Data actor: holds the model and answers one batch of questions per call."""

    def __init__(self, config: GenerationConfig, actors: ActorPool) -> None:
        torch.set_num_threads(actors.cpus_per_actor)
        self._config = config
        self._device = torch.device("cuda" if actors.gpus_per_actor else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        questions = [_question_from_json(fields) for fields in json.loads(row["batch"])]
        try:
            answers = json.dumps([asdict(answer) for answer in self._answer(questions)])
            return {"answers": answers, "problem": "", "is_user_error": False}
        except Exception as error:
            problem = error_summary(error)
            return {"answers": "", "problem": problem, "is_user_error": isinstance(error, UserError)}

    @functools.cached_property
    def _image_root(self) -> StoragePath:
        return storage_path(self._config.image_root)

    @functools.cached_property
    def _engine(self) -> TransformersEngine:
        return TransformersEngine(self._config.model, self._device, self._config.precision)

    def _answer(self, questions: list[Question]) -> list[GeneratedAnswer]:
        """Answer a batch; a question whose image cannot be loaded gets a problem instead of a text."""
        blank_image = self._engine.blank_image if self._config.blank_images else None
        loaded = [load_image(self._image_root, question, blank_image) for question in questions]
        images = {index: image for index, image in enumerate(loaded) if not isinstance(image, BadRow)}
        prompts = [question.text + self._config.prompt_suffix for question in questions]
        generated = self._engine.answer(
            [prompts[index] for index in images],
            list(images.values()),
            self._config.max_new_tokens,
            [questions[index].history for index in images],
        )
        texts = dict(zip(images, generated, strict=True))
        return [
            GeneratedAnswer(
                question.question_id,
                prompts[index],
                texts.get(index),
                None if index in texts else str(loaded[index]),
            )
            for index, question in enumerate(questions)
        ]
