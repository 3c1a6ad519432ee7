"""A model's answers, by Ray Data: actors that hold the model, batches of questions of like length, greedy decoding.

The model is any Hugging Face folder of a LLaVA; it is asked as plain transformers would ask it. Scoring is score/'s.
"""

import functools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from PIL import Image

from raylava.cluster.roles import TRAIN, labels_for
from raylava.cluster.session import told
from raylava.config.recipe import Resources
from raylava.console import ProgressBar
from raylava.corpus.images import decode
from raylava.corpus.quarantine import BadRow, Reason
from raylava.corpus.sources import image_place
from raylava.errors import RunError, UserError
from raylava.evaluate.engines import Engine, TransformersEngine, engine
from raylava.evaluate.prediction_store import PredictionStore
from raylava.evaluate.questions import Answer, Question
from raylava.storage import StoragePath, storage_path

logger = logging.getLogger(__name__)

_MAX_PIXELS = 64_000_000


@dataclass(frozen=True)
class GenerationConfig:
    """How questions are put. `blank_images` shows the mean colour instead of each image: the blind baseline;
    `precision` is that of the model's weights and sums: auto (as they are kept), fp32, bf16 or fp16.
    """

    model: str
    images: str
    prompt_suffix: str = ""
    max_new_tokens: int = 32
    batch_size: int = 32
    blank_images: bool = False
    engine: str = "transformers"
    precision: str = "auto"


@dataclass(frozen=True)
class ActorPool:
    """Those that hold the model and answer: `most` of them at once, or as many as the cluster has room for (None)."""

    most: int | None = 1
    cpus: int = 1
    gpus: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)  # of the nodes they may be on, as Ray selects them

    @classmethod
    def of(cls, resources: Resources) -> Self:
        """As many as a recipe's training has workers, each with what a worker has."""
        labels = labels_for(TRAIN, resources)
        return cls(resources.workers, resources.cpus_per_worker, resources.gpus_per_worker, labels)


def answer(
    questions: list[Question],
    asking: GenerationConfig,
    actors: ActorPool,
    bar: ProgressBar,
    kept: PredictionStore | None = None,
) -> list[Answer]:
    """One answer for each question, in the questions' order; `kept` has those of an earlier attempt, and gets more.

    Raises RunError, with its first line, when the model cannot be asked.
    """
    found = {one.question_id: one for one in kept.known} if kept else {}
    missing = [question for question in questions if question.question_id not in found]
    for answers in _asked(missing, asking, actors):
        found |= {one.question_id: one for one in answers}
        if kept:
            kept.add(answers)
        bar.update(len(found), len(questions))
    if kept:
        kept.flush()
    return [found[question.question_id] for question in questions]


def _asked(questions: list[Question], asking: GenerationConfig, actors: ActorPool) -> Iterator[list[Answer]]:
    """Answers to batches of questions of like length, as they come."""
    import ray.data

    if not questions:
        return
    by_length = sorted(questions, key=lambda question: len(question.text))
    size = asking.batch_size
    batches = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    rows = [{"batch": json.dumps([asdict(question) for question in batch])} for batch in batches]
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _GenerationActor,
        fn_constructor_args=(asking, actors),
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(actors.most or len(rows), len(rows))),
        num_cpus=actors.cpus,
        num_gpus=actors.gpus,
        label_selector=dict(actors.labels) or None,
    )
    for row in answered.iter_rows():
        if row["problem"]:
            raise RunError(f"answering with {asking.model} failed: {row['problem']}")
        yield [Answer(**item) for item in json.loads(row["answers"])]


def answers_bytes(answers: list[Answer], model_id: str) -> bytes:
    """LLaVA's official answers file: JSONL of question_id, prompt, text, answer_id, model_id, metadata."""
    lines = [
        {
            "question_id": item.question_id,
            "prompt": item.prompt,
            "text": item.text if item.text is not None else "",
            "answer_id": f"{model_id}-{number}",
            "model_id": model_id,
            "metadata": {"problem": item.problem} if item.problem else {},
        }
        for number, item in enumerate(answers)
    ]
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _question(item: dict[str, Any]) -> Question:
    """A question that went through JSON."""
    history = tuple((asked, said) for asked, said in item["history"])
    return Question(**item | {"history": history, "references": tuple(item["references"])})


class _GenerationActor:
    """The Ray Data actor: a model, and a batch of questions at a time."""

    def __init__(self, asking: GenerationConfig, actors: ActorPool) -> None:
        torch.set_num_threads(actors.cpus)
        self._asking = asking
        self._device = torch.device("cuda" if actors.gpus else "cpu")

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        questions = [_question(item) for item in json.loads(row["batch"])]
        try:
            answers = json.dumps([asdict(item) for item in self._answer(questions)])
            return {"answers": answers, "problem": ""}
        except Exception as error:
            return {"answers": "", "problem": told(error)}

    @functools.cached_property
    def _chat(self) -> Engine:
        return engine(self._asking.engine, self._asking.model, self._device, self._asking.precision)

    def _answer(self, questions: list[Question]) -> list[Answer]:
        shown = [self._image(question) for question in questions]
        askable = [number for number, image in enumerate(shown) if not isinstance(image, BadRow)]
        prompts = [questions[number].text + self._asking.prompt_suffix for number in askable]
        images = [shown[number] for number in askable]
        histories = [questions[number].history for number in askable]
        texts = self._chat.answer(prompts, images, self._asking.max_new_tokens, histories)  # type: ignore[arg-type]
        said = dict(zip(askable, texts, strict=True))
        return [
            Answer(
                question.question_id,
                question.text + self._asking.prompt_suffix,
                said.get(number),
                None if number in said else str(shown[number]),
            )
            for number, question in enumerate(questions)
        ]

    def _image(self, question: Question) -> Image.Image | BadRow | None:
        if question.image is None:
            return None
        try:
            image = _opened(image_place(storage_path(self._asking.images), question.image))
        except FileNotFoundError:
            return BadRow(Reason.IMAGE_MISSING, question.image)
        except BadRow as bad:
            return bad
        return self._chat.blank(image) if self._asking.blank_images else image


def chat_once(model: str, image: str | None, question: str, max_new_tokens: int) -> str:
    """One answer on this machine, for `raylava chat`. Raises UserError for a model or image that can't be used."""
    folder = storage_path(model)
    if not (folder / "config.json").exists():
        raise UserError(f"{model}: no model there (no config.json); give a finetune artifact or a Hugging Face folder")
    image = None
    if image is not None:
        try:
            image = _opened(storage_path(image))
        except (FileNotFoundError, BadRow) as error:
            raise UserError(f"--image {image}: {error}") from error
    return TransformersEngine(model, torch.device("cuda" if torch.cuda.is_available() else "cpu")).answer(
        [question], [image], max_new_tokens
    )[0]


def _opened(file: StoragePath) -> Image.Image:
    """Raises FileNotFoundError, or BadRow for what is not a image or is too large."""
    return Image.fromarray(decode(file.read_bytes(), _MAX_PIXELS))


def read_answers(content: bytes) -> Iterator[dict[str, Any]]:
    """The lines of an answers file."""
    for line in content.decode("utf-8").split("\n"):
        if line:
            yield json.loads(line)
