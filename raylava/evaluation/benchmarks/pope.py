"""POPE (Li et al. 2023): is an object in the image? Three categories of how absent objects are chosen."""

from typing import Any

from raylava.errors import UserError
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import (
    SHORT_ANSWER_SUFFIX,
    check_no_label_left,
    find_file,
    read_jsonl,
    require_file,
    short_answer,
)
from raylava.evaluation.metrics.scoring import YES_NO
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath

_UNBALANCED_CATEGORY = "random"  # published with 2,910 questions but 3,000 labels
_Key = tuple[str, str, str]  # category, image, normalized question


def _read(data: StoragePath) -> list[Question]:
    """Read LLaVA's question file if it exists, because answer files use its ids; otherwise the label files alone."""
    labels: dict[_Key, dict[str, Any]] = {}
    for category in ("adversarial", "popular", "random"):
        file = require_file(data, f"coco_pope_{category}.json", f"coco/coco_pope_{category}.json")
        for line in read_jsonl(file):
            key = (category, line["image"], _normalize_question(line["text"]))
            if labels.setdefault(key, line)["label"] != line["label"]:
                raise UserError(f"{file}: {line['image']}: {line['text']!r} is labelled both yes and no")
    question_file = find_file(data, "llava_pope_test.jsonl")
    if question_file is not None:
        return _from_question_file(question_file, labels)
    return [
        Question(f"{category}-{line['question_id']}", image, short_answer(line["text"]), category, (line["label"],))
        for (category, image, _), line in labels.items()
    ]


def _from_question_file(file: StoragePath, labels: dict[_Key, dict[str, Any]]) -> list[Question]:
    questions, used = [], set()
    for line in read_jsonl(file):
        key = (line["category"], line["image"], _normalize_question(line["text"]))
        category, image, text = key
        if key not in labels:
            raise UserError(f"{file}: question {line['question_id']} ({image}: {text}) has no label in {category}")
        used.add(key)
        label = labels[key]["label"]
        questions.append(Question(str(line["question_id"]), image, short_answer(line["text"]), category, (label,)))
    unused = {key: line for key, line in labels.items() if key not in used and key[0] != _UNBALANCED_CATEGORY}
    check_no_label_left(unused, file)
    return questions


def _normalize_question(text: str) -> str:
    """Return a question without LLaVA's suffix and with POPE's misspelling `imange` corrected, to join by."""
    return " ".join(text.removesuffix(SHORT_ANSWER_SUFFIX).replace("imange", "image").split())


BENCHMARK = OfficialBenchmark("pope", _read, YES_NO, image_folders=("val2014",))
