"""The seven official benchmarks: reading the questions from their published files, and what each is scored by.

Labels are joined to questions by key, never by position; a label or question without a partner is an error that names
it. Scoring is in `metrics`.
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
from raylava.evaluate.metrics.multiple_choice import parse_letter
from raylava.evaluate.questions import Question
from raylava.models.templates import IMAGE_TOKEN
from raylava.storage import StoragePath

SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."
OPTION_LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."

_POPE_UNBALANCED_CATEGORY = "random"  # published with 2,910 questions but 3,000 labels


@dataclass(frozen=True)
class BenchmarkSpec:
    """An official benchmark: how to read its files, where its images are, its metric and the length of its answers.

    `image_folders` are candidates below the data folder; the first that exists is used, or the data folder itself.
    """

    name: str
    read: Callable[[StoragePath], list[Question]]
    image_folders: tuple[str, ...]
    metric: str
    max_new_tokens: int = 16


def read_official_questions(name: str, data: StoragePath) -> list[Question]:
    """Read a benchmark's questions. Raises UserError for files that are missing, malformed or inconsistent."""
    try:
        questions = OFFICIAL_BENCHMARKS[name].read(data)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{data}: not the official files of {name}: {type(error).__name__} {error}") from error
    if not questions:
        raise UserError(f"{data}: the files of {name} contain no question")
    return questions


def official_image_root(name: str, data: StoragePath) -> StoragePath:
    """Return the folder of a benchmark's images."""
    candidates = (data / folder for folder in OFFICIAL_BENCHMARKS[name].image_folders)
    return next((folder for folder in candidates if folder.is_folder()), data)


_PopeKey = tuple[str, str, str]  # category, image, normalized question


def _pope(data: StoragePath) -> list[Question]:
    """Read LLaVA's question file if it exists, because answer files use its ids; otherwise the label files alone."""
    labels: dict[_PopeKey, dict[str, Any]] = {}
    for category in ("adversarial", "popular", "random"):
        file = _require_file(data, f"coco_pope_{category}.json", f"coco/coco_pope_{category}.json")
        for line in _read_jsonl(file):
            key = (category, line["image"], _normalize_pope_question(line["text"]))
            if labels.setdefault(key, line)["label"] != line["label"]:
                raise UserError(f"{file}: {line['image']}: {line['text']!r} is labelled both yes and no")
    question_file = _find_file(data, "llava_pope_test.jsonl")
    if question_file is not None:
        return _pope_from_question_file(question_file, labels)
    return [
        Question(f"{category}-{line['question_id']}", image, _short_answer(line["text"]), category, (line["label"],))
        for (category, image, _), line in labels.items()
    ]


def _pope_from_question_file(file: StoragePath, labels: dict[_PopeKey, dict[str, Any]]) -> list[Question]:
    questions, used = [], set()
    for line in _read_jsonl(file):
        key = (line["category"], line["image"], _normalize_pope_question(line["text"]))
        category, image, text = key
        if key not in labels:
            raise UserError(f"{file}: question {line['question_id']} ({image}: {text}) has no label in {category}")
        used.add(key)
        label = labels[key]["label"]
        questions.append(Question(str(line["question_id"]), image, _short_answer(line["text"]), category, (label,)))
    unused = {key: line for key, line in labels.items() if key not in used and key[0] != _POPE_UNBALANCED_CATEGORY}
    _check_no_label_left(unused, file)
    return questions


def _gqa(data: StoragePath) -> list[Question]:
    entries = _read_json(_require_file(data, "testdev_balanced_questions.json"))
    return [
        Question(
            question_id,
            f"{entry['imageId']}.jpg",
            _short_answer(entry["question"]),
            entry.get("types", {}).get("structural") or "all",
            (entry["answer"],),
        )
        for question_id, entry in entries.items()
    ]


def _vqav2(data: StoragePath) -> list[Question]:
    question_file = _require_file(data, "v2_OpenEnded_mscoco_val2014_questions.json", "questions.json")
    annotation_file = _require_file(data, "v2_mscoco_val2014_annotations.json", "annotations.json")
    labels = {label["question_id"]: label for label in _read_json(annotation_file)["annotations"]}
    questions = []
    for entry in _read_json(question_file)["questions"]:
        label = labels.pop(entry["question_id"], None)
        if label is None:
            raise UserError(f"{question_file}: question {entry['question_id']} has no annotation")
        questions.append(
            Question(
                str(entry["question_id"]),
                f"COCO_val2014_{int(entry['image_id']):012d}.jpg",
                _short_answer(entry["question"]),
                label.get("answer_type", "all"),
                tuple(answer["answer"] for answer in label["answers"]),
            )
        )
    _check_no_label_left(labels, question_file)
    return questions


def _mme(data: StoragePath) -> list[Question]:
    """Read the folder of each task: one text file per image, with two lines of question and label."""
    questions: list[Question] = []
    for task in (*PERCEPTION, *COGNITION):
        texts, images = data / task / "questions_answers_YN", data / task / "images"
        if not texts.is_folder():
            texts = images = data / task
        if not texts.children():
            raise UserError(f"{data}: MME's task {task} is missing; give the folder of the whole release as --data")
        questions += _mme_task(task, texts, images)
    return questions


def _mme_task(task: str, texts: StoragePath, images: StoragePath) -> Iterator[Question]:
    by_stem = {file.name.rpartition(".")[0]: file.name for file in images.children() if not file.name.endswith(".txt")}
    for file in texts.children():
        stem, _, extension = file.name.rpartition(".")
        if extension != "txt":
            continue
        if stem not in by_stem:
            raise UserError(f"{file}: its image is not in {images}")
        image = f"{task}/images/{by_stem[stem]}" if images.name == "images" else f"{task}/{by_stem[stem]}"
        yield from _mme_pair(file, task, f"{task}/{stem}", image)


def _mme_pair(file: StoragePath, task: str, unit: str, image: str) -> Iterator[Question]:
    lines = [line for line in file.read_bytes().decode("utf-8").splitlines() if line.strip()]
    if len(lines) != 2:
        raise UserError(f"{file}: {len(lines)} questions; MME has two for each image")
    for index, line in enumerate(lines):
        text, _, label = line.rpartition("\t")
        reference = label.strip().lower()
        if reference not in ("yes", "no"):
            raise UserError(f"{file}: the label {label!r} is neither yes nor no")
        text = _short_answer(text.replace("Please answer yes or no.", "").strip())
        yield Question(f"{image}#{index}", image, text, task, (reference,), unit=unit)


def _mmvp(data: StoragePath) -> list[Question]:
    file = _require_file(data, "Questions.csv")
    questions = []
    for row in csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"))):
        number = int(row["Index"] if "Index" in row else row["lndex"])  # the published header is misspelled
        options = [option.strip() for option in re.split(r"\([ab]\)", row["Options"])[1:]]
        text = _append_once(f"{row['Question']} {row['Options']}", OPTION_LETTER_SUFFIX)
        label = row["Correct Answer"].strip().lower()
        pair = str((number - 1) // 2 + 1)
        questions.append(Question(str(number), f"{number}.jpg", text, "all", (label, *options), unit=pair))
    return questions


def _science_qa(data: StoragePath) -> list[Question]:
    """Read LLaVA's conversations of the test split; the label is the letter in the answer's turn."""
    file = _require_file(data, "llava_test_CQM-A.json", "questions.json")
    questions = []
    for entry in _read_json(file):
        human, answer = (turn["value"] for turn in entry["conversations"][:2])
        label = parse_letter(answer.strip())
        if label is None:
            raise UserError(f"{file}: question {entry['id']} has the answer {answer!r}, which contains no letter")
        text = _append_once(human.replace(IMAGE_TOKEN, "").strip(), OPTION_LETTER_SUFFIX)
        category = "image" if "image" in entry else "text"
        questions.append(Question(str(entry["id"]), entry.get("image"), text, category, (label,)))
    return questions


def _mm_vet(data: StoragePath) -> list[Question]:
    entries = _read_json(_require_file(data, "mm-vet.json"))
    return [
        Question(question_id, entry["imagename"], entry["question"], ",".join(entry["capability"]), (entry["answer"],))
        for question_id, entry in entries.items()
    ]


OFFICIAL_BENCHMARKS: Mapping[str, BenchmarkSpec] = {
    spec.name: spec
    for spec in (
        BenchmarkSpec("pope", _pope, ("val2014",), "yes_no"),
        BenchmarkSpec("gqa", _gqa, ("images",), "exact_match"),
        BenchmarkSpec("vqav2", _vqav2, ("val2014",), "vqa_accuracy"),
        BenchmarkSpec("mme", _mme, (), "mme"),
        BenchmarkSpec("mmvp", _mmvp, ("MMVP Images", "images"), "mmvp"),
        BenchmarkSpec("scienceqa", _science_qa, ("images/test", "test", "images"), "science_qa"),
        BenchmarkSpec("mm-vet", _mm_vet, ("images",), "judged", 512),
    )
}


def _check_no_label_left(labels: Mapping[Any, Any], question_file: StoragePath) -> None:
    if labels:
        raise UserError(f"{question_file}: {len(labels)} labels have no question; the first is {next(iter(labels))}")


def _append_once(text: str, suffix: str) -> str:
    return text if text.endswith(suffix) else text + suffix


def _short_answer(text: str) -> str:
    return _append_once(text, SHORT_ANSWER_SUFFIX)


def _normalize_pope_question(text: str) -> str:
    """Return a question without LLaVA's suffix and with POPE's misspelling `imange` corrected, to join by."""
    return " ".join(text.removesuffix(SHORT_ANSWER_SUFFIX).replace("imange", "image").split())


def _find_file(data: StoragePath, *names: str) -> StoragePath | None:
    return next((data / name for name in names if (data / name).exists()), None)


def _require_file(data: StoragePath, *names: str) -> StoragePath:
    """Return the first of the named files that exists. Raises UserError if none does."""
    file = _find_file(data, *names)
    if file is None:
        raise UserError(f"{data}: {names[0]} is missing; give the folder of the official files as --data")
    return file


def _read_json(file: StoragePath) -> Any:
    return json.loads(file.read_bytes())


def _read_jsonl(file: StoragePath) -> Iterator[dict[str, Any]]:
    for line in file.read_bytes().decode("utf-8").split("\n"):  # splitlines would also split at U+2028
        if line.strip():
            yield json.loads(line)
