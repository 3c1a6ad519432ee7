"""Anybody's answers to a benchmark → its score: the official files and the answers file in, a Result out."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raylava.config.recipe import Benchmark
from raylava.corpus.sources import sizes_below
from raylava.errors import UserError
from raylava.evaluate.answer_files import joined, read_predictions
from raylava.evaluate.metrics.registry import RULES, judged, score
from raylava.evaluate.metrics.score_table import Result
from raylava.evaluate.official_benchmarks import OFFICIAL, images_of, read_official
from raylava.evaluate.questions import Question, read_questions
from raylava.storage import StoragePath, join, storage_path

OWN = "own"
OWN_RULES = ("exact_match", "vqa_accuracy", "yes_no")


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark ready to be asked: questions, the folder of their images, the rule and protocol of its score."""

    questions: list[Question]
    image_root: str
    rule: str
    protocol: str

    @cached_property
    def image_sizes(self) -> dict[str, int]:
        """Bytes of each image that is there."""
        wanted = {question.image for question in self.questions if question.image}
        return sizes_below(storage_path(self.image_root), wanted)


class BenchmarkCache:
    """Benchmarks, each read once for all that are asked it: a sweep's variants, a model and its baselines."""

    def __init__(self) -> None:
        self._read: dict[tuple[str, str], LoadedBenchmark] = {}

    def of(self, benchmark: Benchmark, root: str) -> LoadedBenchmark:
        """See load_benchmark."""
        key = (benchmark.model_dump_json(), root)
        if key not in self._read:
            self._read[key] = load_benchmark(benchmark, root)
        return self._read[key]


def load_benchmark(benchmark: Benchmark, root: str) -> LoadedBenchmark:
    """Read a benchmark's files; relative places start at `root`.

    Raises UserError for files that are missing, malformed or don't fit each other, and for an unknown protocol.
    """
    data, images = join(root, benchmark.questions), join(root, benchmark.images) if benchmark.images else ""
    if benchmark.benchmark == OWN:
        _check_protocol(OWN, benchmark.metric, benchmark.protocol)
        return LoadedBenchmark(
            read_questions(storage_path(data), benchmark), images or root, benchmark.metric, benchmark.protocol
        )
    return load_official_benchmark(benchmark.benchmark, data, images, benchmark.protocol, benchmark.max_rows)


def load_official_benchmark(
    name: str, data: str, images: str = "", protocol: str = "", limit: int | None = None
) -> LoadedBenchmark:
    """One of the paper's benchmarks, of its official files. Raises UserError as load_benchmark."""
    if name not in OFFICIAL:
        raise UserError(f"{name}: no such benchmark; known here: {', '.join([*OFFICIAL, OWN])}")
    rule = OFFICIAL[name].rule
    _check_protocol(name, rule, protocol)
    questions = read_official(name, storage_path(data))[:limit]
    return LoadedBenchmark(questions, images or images_of(name, storage_path(data)).uri, rule, protocol)


def load_named_benchmark(
    name: str,
    data: str,
    images: str,
    rule: str,
    protocol: str,
    limit: int | None,
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[Benchmark, LoadedBenchmark]:
    """A benchmark as a command names it, and its exam. Raises UserError as load_benchmark."""
    given: dict[str, Any] = {"questions": data, "images": images, "limit": limit, "batch_size": batch_size}
    if name == OWN:
        exam = _own(data, rule, images, limit, protocol)
        given |= {"score": rule, "protocol": protocol}
    else:
        exam = load_official_benchmark(name, data, images, protocol, limit)
        given |= {"protocol": protocol, "kind": name}
    tokens = max_new_tokens or (OFFICIAL[name].max_new_tokens if name in OFFICIAL else 32)
    return Benchmark(name=name, max_new_tokens=tokens, **given), exam


def _check_protocol(name: str, rule: str, protocol: str) -> None:
    known = RULES.get(rule, {})
    if protocol and protocol not in known:
        raise UserError(f"protocol {protocol}: {name} has {', '.join(known) or 'none to choose from'}")


def score_file(
    name: str, data: str, answers: str, rule: str = "exact_match", protocol: str = "", grades: str | None = None
) -> Result:
    """Score a file of answers; of MM-Vet, a judge's file of grades. For one's `own`, `data` is the file of questions.

    Raises UserError for what doesn't fit together.
    """
    exam = (
        _own(data, rule, protocol=protocol) if name == OWN else load_official_benchmark(name, data, protocol=protocol)
    )
    if exam.rule == "judged":
        if grades is None:
            raise UserError(f"{name} is graded by a judge; give its reply file as --grades")
        return judged(name, exam.questions, read_grades(storage_path(grades), exam.questions))
    said = joined(read_predictions(storage_path(answers)), exam.questions, answers)
    return score(name, exam.rule, exam.questions, said, protocol)


def _own(data: str, rule: str, images: str = "", limit: int | None = None, protocol: str = "") -> LoadedBenchmark:
    if rule not in OWN_RULES:
        raise UserError(f"--rule {rule}: known here: {', '.join(OWN_RULES)}")
    given: dict[str, Any] = {"questions": data, "images": images, "score": rule, "limit": limit, "protocol": protocol}
    return load_benchmark(Benchmark(name=OWN, **given), "")


def read_grades(file: StoragePath, questions: list[Question]) -> dict[str, float | None]:
    """A judge's reply file: JSON of grades by question id, each a number or the official `score` list (its mean)."""
    try:
        found: dict[str, float | None] = {
            number: _grade(entry) for number, entry in json.loads(file.read_bytes()).items()
        }
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"{file}: not a file of grades ({type(error).__name__} {error}); it maps question ids to numbers"
        ) from error
    known = {question.question_id for question in questions}
    for number in found:
        if number not in known:
            raise UserError(f"{file}: the grade of {number!r} has no question in the benchmark's files")
    return found


def _grade(entry: Any) -> float:
    if isinstance(entry, dict):
        entry = entry["score"]
    if isinstance(entry, list):
        entry = sum(entry) / len(entry)
    return float(entry)
