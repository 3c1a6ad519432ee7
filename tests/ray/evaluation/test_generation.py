"""Ray Data actors answer the questions that are not stored yet; an unreadable image gives a missing answer."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.data
from PIL import Image

from raylava.evaluation.generation import ActorPool, GenerationConfig, generate_answers
from raylava.evaluation.prediction_store import PredictionStore
from raylava.evaluation.questions import GeneratedAnswer, Question
from raylava.models.registry import LlavaCheckpoint
from raylava.progress import NullProgressBar
from raylava.storage import storage_path

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_interrupted_evaluation_answers_only_the_missing_questions(untrained_llava: Path, tmp_path: Path) -> None:
    questions = [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(6)]
    earlier = PredictionStore(storage_path(tmp_path))
    earlier.add([GeneratedAnswer(question.question_id, question.text, "stored") for question in questions[:4]])
    earlier.flush()
    config = GenerationConfig(LlavaCheckpoint(str(untrained_llava)), "", max_new_tokens=2)
    store = PredictionStore(storage_path(tmp_path))
    answers = generate_answers(questions, config, ActorPool(), NullProgressBar(), store)
    assert [answer.question_id for answer in answers] == [question.question_id for question in questions]
    assert [answer.text for answer in answers[:4]] == ["stored"] * 4
    assert all(answer.text != "stored" for answer in answers[4:])
    assert len(PredictionStore(storage_path(tmp_path)).predictions) == 6, "all answers are stored in the end"


def test_unreadable_image_gives_a_missing_answer_with_the_problem(untrained_llava: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    (images / "folder.png").mkdir(parents=True)
    (images / "broken.png").write_bytes(b"no image")
    os.mkfifo(images / "pipe.png")
    (images / "loop.png").symlink_to("loop.png")
    (images / "outside.png").symlink_to(tmp_path / "secret.png")
    for file in (images / "good.png", tmp_path / "secret.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file)
    names = ["absent", "folder", "broken", "pipe", "loop", "outside", "../secret", "/dev/zero", "x" * 300, "good"]
    questions = [Question(name, f"{name}.png", "What?", "all", ("x",)) for name in names]
    config = GenerationConfig(LlavaCheckpoint(str(untrained_llava)), str(images), max_new_tokens=2)
    answers = generate_answers(questions, config, ActorPool(), NullProgressBar())
    assert [answer.question_id for answer in answers if answer.text is None] == names[:-1]
    assert [bool(answer.problem) for answer in answers] == [True] * 9 + [False]


def test_questions_are_answered_in_batches_on_the_nodes_of_the_role(
    untrained_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[dict[str, Any]] = []
    map_rows = ray.data.Dataset.map

    def spy(dataset: ray.data.Dataset, function: Any, **settings: Any) -> ray.data.Dataset:
        requests.append(settings | {"rows": dataset.count()})
        return map_rows(dataset, function, **(settings | {"label_selector": None}))

    monkeypatch.setattr(ray.data.Dataset, "map", spy)
    questions = [Question(str(number), None, f"What is {number}?", "all", ("x",)) for number in range(6)]
    config = GenerationConfig(LlavaCheckpoint(str(untrained_llava)), "", max_new_tokens=2, batch_size=4)
    generate_answers(questions, config, ActorPool(node_labels={"disk": "ssd"}), NullProgressBar())
    assert [(request["rows"], request["label_selector"]) for request in requests] == [(2, {"disk": "ssd"})]
