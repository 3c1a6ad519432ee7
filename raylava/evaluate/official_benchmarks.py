"""The paper's seven benchmarks, read from their official files: questions as they are asked, and what scores them.

Labels join questions by key, never by position; one without a partner is an error that names it. Scoring is score/'s.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raylava.errors import UserError
from raylava.evaluate.metrics.mme import COGNITION, PERCEPTION
from raylava.evaluate.metrics.multiple_choice import letter
from raylava.evaluate.questions import Question
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

_POPE_SHORTER = "random"  # published with 2,910 questions and with 3,000 labels


@dataclass(frozen=True)
class BenchmarkSpec:
    """A benchmark: how its files are read, where its images lie below them, its rule, how long answers may be."""

    name: str
    read: Callable[[StoragePath], list[Question]]
    images: tuple[str, ...]  # the first that is there
    rule: str
    max_new_tokens: int = 16


def read_official(name: str, data: StoragePath) -> list[Question]:
    """A benchmark's questions. Raises UserError for files that are missing, malformed or don't fit each other."""
    try:
        questions = OFFICIAL[name].read(data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{data}: not {name}'s official files: {type(error).__name__} {error}") from error
    if not questions:
        raise UserError(f"{data}: {name}'s files hold no question")
    return questions


def images_of(name: str, data: StoragePath) -> StoragePath:
    """TrialStatus the images lie."""
    found = [data / folder for folder in OFFICIAL[name].images if (data / folder).is_folder()]
    return found[0] if found else data


_Key = tuple[str, str, str]  # category, image, question


def _pope(data: StoragePath) -> list[Question]:
    """LLaVA's question file where it is there (its ids are what answer files go by), else the label files alone."""
    labels: dict[_Key, dict[str, Any]] = {}
    for category in ("adversarial", "popular", "random"):
        file = _file(data, f"coco_pope_{category}.json", f"coco/coco_pope_{category}.json")
        for line in _json_lines(file):
            key = (category, line["image"], _plain(line["text"]))
            if labels.setdefault(key, line)["label"] != line["label"]:
                raise UserError(f"{file}: {line['image']}: {line['text']!r} is labelled both yes and no")
    asked = _maybe(data, "llava_pope_test.jsonl")
    if asked is not None:
        return _pope_asked(asked, labels)
    return [
        Question(f"{category}-{line['question_id']}", image, _with(line["text"], SHORT), category, (line["label"],))
        for (category, image, _), line in labels.items()
    ]


def _pope_asked(asked: StoragePath, labels: dict[_Key, dict[str, Any]]) -> list[Question]:
    found, used = [], set()
    for line in _json_lines(asked):
        key = (line["category"], line["image"], _plain(line["text"]))
        if key not in labels:
            raise UserError(f"{asked}: question {line['question_id']} ({key[1]}: {key[2]}) has no label in {key[0]}")
        used.add(key)
        label = labels[key]["label"]
        found.append(Question(str(line["question_id"]), key[1], _with(line["text"], SHORT), key[0], (label,)))
    left = {key: line for key, line in labels.items() if key not in used and key[0] != _POPE_SHORTER}
    _no_label_left(left, asked)
    return found


def _gqa(data: StoragePath) -> list[Question]:
    labels = _json(_file(data, "testdev_balanced_questions.json"))
    return [
        Question(
            number,
            f"{one['imageId']}.jpg",
            _with(one["question"], SHORT),
            one.get("types", {}).get("structural") or "all",
            (one["answer"],),
        )
        for number, one in labels.items()
    ]


def _vqav2(data: StoragePath) -> list[Question]:
    asked = _file(data, "v2_OpenEnded_mscoco_val2014_questions.json", "questions.json")
    labels = {
        one["question_id"]: one
        for one in _json(_file(data, "v2_mscoco_val2014_annotations.json", "annotations.json"))["annotations"]
    }
    found = []
    for one in _json(asked)["questions"]:
        label = labels.pop(one["question_id"], None)
        if label is None:
            raise UserError(f"{asked}: question {one['question_id']} has no annotation")
        found.append(
            Question(
                str(one["question_id"]),
                f"COCO_val2014_{int(one['image_id']):012d}.jpg",
                _with(one["question"], SHORT),
                label.get("answer_type", "all"),
                tuple(answer["answer"] for answer in label["answers"]),
            )
        )
    _no_label_left(labels, asked)
    return found


def _mme(data: StoragePath) -> list[Question]:
    """Each task's folder: a text file a image, two lines of question and label."""
    found = []
    for task in (*PERCEPTION, *COGNITION):
        texts = data / task / "questions_answers_YN"
        images = data / task / "images"
        texts, images = (texts, images) if texts.is_folder() else (data / task, data / task)
        if not texts.children():
            raise UserError(f"{data}: MME's task {task} is missing; give the folder of the whole release as --data")
        names = {one.name.rpartition(".")[0]: one.name for one in images.children() if not one.name.endswith(".txt")}
        for file in texts.children():
            stem, _, kind = file.name.rpartition(".")
            if kind == "txt":
                if stem not in names:
                    raise UserError(f"{file}: its image is not in {images}")
                below = f"{task}/images/{names[stem]}" if images.name == "images" else f"{task}/{names[stem]}"
                found += list(_mme_pair(file, task, f"{task}/{stem}", below))
    return found


def _mme_pair(file: StoragePath, task: str, unit: str, image: str) -> Iterator[Question]:
    lines = [line for line in file.read_bytes().decode("utf-8").splitlines() if line.strip()]
    if len(lines) != 2:
        raise UserError(f"{file}: {len(lines)} questions; MME asks two of each image")
    for number, line in enumerate(lines):
        text, _, label = line.rpartition("\t")
        if label.strip().lower() not in ("yes", "no"):
            raise UserError(f"{file}: the label {label!r} is neither Yes nor No")
        asked = text.replace("Please answer yes or no.", "").strip()
        yield Question(f"{image}#{number}", image, _with(asked, SHORT), task, (label.strip().lower(),), unit=unit)


def _mmvp(data: StoragePath) -> list[Question]:
    file = _file(data, "Questions.csv")
    found = []
    for row in csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"))):
        number = int(row["Index"] if "Index" in row else row["lndex"])  # as published, with a small L
        options = [part.strip() for part in re.split(r"\([ab]\)", row["Options"])[1:]]
        text = _with(f"{row['Question']} {row['Options']}", LETTER)
        label = row["Correct Answer"].strip().lower()
        pair = str((number - 1) // 2 + 1)
        found.append(Question(str(number), f"{number}.jpg", text, "all", (label, *options), unit=pair))
    return found


def _science_qa(data: StoragePath) -> list[Question]:
    """LLaVA's conversations of the test split; the letter is in the answer's turn."""
    file = _file(data, "llava_test_CQM-A.json", "questions.json")
    found = []
    for one in _json(file):
        human, answer = (turn["value"] for turn in one["conversations"][:2])
        label = letter(answer.strip())
        if label is None:
            raise UserError(f"{file}: question {one['id']} has {answer!r} where its letter should be")
        text = _with(human.replace(IMAGE_TOKEN, "").strip(), LETTER)
        found.append(Question(str(one["id"]), one.get("image"), text, "image" if "image" in one else "text", (label,)))
    return found


def _mm_vet(data: StoragePath) -> list[Question]:
    return [
        Question(number, one["imagename"], one["question"], ",".join(one["capability"]), (one["answer"],))
        for number, one in _json(_file(data, "mm-vet.json")).items()
    ]


OFFICIAL: Mapping[str, BenchmarkSpec] = {
    one.name: one
    for one in (
        BenchmarkSpec("pope", _pope, ("val2014",), "yes_no"),
        BenchmarkSpec("gqa", _gqa, ("images",), "exact_match"),
        BenchmarkSpec("vqav2", _vqav2, ("val2014",), "vqa_accuracy"),
        BenchmarkSpec("mme", _mme, (), "mme"),
        BenchmarkSpec("mmvp", _mmvp, ("MMVP Images", "images"), "mmvp"),
        BenchmarkSpec("scienceqa", _science_qa, ("images/test", "test", "images"), "science_qa"),
        BenchmarkSpec("mm-vet", _mm_vet, ("images",), "judged", 512),
    )
}


def _no_label_left(labels: Mapping[Any, Any], asked: StoragePath) -> None:
    if labels:
        raise UserError(f"{asked}: {len(labels)} labels have no question there, the first is {next(iter(labels))}")


def _with(text: str, suffix: str) -> str:
    return text if text.endswith(suffix) else text + suffix


def _plain(text: str) -> str:
    """A question without what toolkits hang on it, spelled right (POPE's files say `imange` here and there)."""
    return " ".join(text.removesuffix(SHORT).replace("imange", "image").split())


def _maybe(data: StoragePath, *names: str) -> StoragePath | None:
    return next((data / name for name in names if (data / name).exists()), None)


def _file(data: StoragePath, *names: str) -> StoragePath:
    found = _maybe(data, *names)
    if found is None:
        raise UserError(f"{data}: {names[0]} is missing; give the folder of the official files as --data")
    return found


def _json(file: StoragePath) -> Any:
    return json.loads(file.read_bytes())


def _json_lines(file: StoragePath) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().decode("utf-8").split("\n"):  # splitlines would cut at U+2028 as well
        if line.strip():
            yield json.loads(line)
