"""Loading the benchmarks that recipes and commands name, and scoring files of answers to them."""

import csv
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raylava.config.recipe import Benchmark
from raylava.corpus.row_images import is_within
from raylava.corpus.sources import file_sizes
from raylava.errors import UserError, first_line
from raylava.evaluation.answer_files import join_predictions, read_predictions
from raylava.evaluation.benchmarks import CUSTOM, official_benchmarks
from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.metrics.score_table import BenchmarkResult
from raylava.evaluation.metrics.scoring import CUSTOM_METRICS, Scoring, score_answers, score_grades
from raylava.evaluation.questions import Question, read_questions
from raylava.storage import StoragePath, join, storage_path

_CUSTOM_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class LoadedBenchmark:
    """A benchmark in memory: its questions, the folder of their images, its scoring and protocol."""

    questions: list[Question]
    image_root: str
    scoring: Scoring
    protocol: str
    max_new_tokens: int = _CUSTOM_MAX_NEW_TOKENS  # the benchmark's own limit

    @cached_property
    def image_sizes(self) -> dict[str, int]:
        """Size in bytes of each image that exists, by path below `image_root`; links out of it are not followed."""
        names = {question.image for question in self.questions if question.image}
        root = storage_path(self.image_root)
        return {name: size for name, size in file_sizes(root, names).items() if is_within(root, name)}


class BenchmarkCache:
    """Loads each benchmark once, for evaluations that share it: the variants of a sweep, a model and its baselines."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str], LoadedBenchmark] = {}

    def get(self, benchmark: Benchmark, root: str) -> LoadedBenchmark:
        """See load_benchmark."""
        key = (benchmark.model_dump_json(), root)
        if key not in self._loaded:
            self._loaded[key] = load_benchmark(benchmark, root)
        return self._loaded[key]


def validate_benchmark(benchmark: Benchmark) -> None:
    """Refuse an unknown benchmark or protocol without reading a file. Raises UserError."""
    scoring = CUSTOM_METRICS[benchmark.metric] if benchmark.benchmark == CUSTOM else _find(benchmark.benchmark).scoring
    _check_protocol(benchmark.benchmark, scoring, benchmark.protocol)


def load_benchmark(benchmark: Benchmark, root: str) -> LoadedBenchmark:
    """Load a recipe's benchmark; relative paths start at `root`.

    Raises UserError for files that are missing, malformed or inconsistent, and for an unknown protocol.
    """
    data, images = join(root, benchmark.questions), join(root, benchmark.images) if benchmark.images else ""
    if benchmark.benchmark == CUSTOM:
        validate_benchmark(benchmark)
        questions = read_questions(storage_path(data), benchmark)
        # In full, since workers may have another working directory.
        folder = storage_path(images).uri if images else storage_path(data).uri.rpartition("/")[0]
        return LoadedBenchmark(questions, folder, CUSTOM_METRICS[benchmark.metric], benchmark.protocol)
    return load_official_benchmark(benchmark.benchmark, data, images, benchmark.protocol, benchmark.max_rows)


def load_official_benchmark(
    name: str, data: str, images: str = "", protocol: str = "", max_rows: int | None = None
) -> LoadedBenchmark:
    """Load the first `max_rows` questions of an official benchmark. Raises UserError like load_benchmark."""
    official = _find(name)
    _check_protocol(name, official.scoring, protocol)
    questions = read_official_questions(official, storage_path(data))[:max_rows]
    image_root = (storage_path(images) if images else official.image_root(storage_path(data))).uri
    return LoadedBenchmark(questions, image_root, official.scoring, protocol, official.max_new_tokens)


def read_official_questions(official: OfficialBenchmark, data: StoragePath) -> list[Question]:
    """Read a benchmark's questions. Raises UserError for files that are missing, malformed or inconsistent."""
    try:
        questions = official.read(data)
    except (LookupError, TypeError, ValueError, AttributeError, OSError, csv.Error) as error:
        raise UserError(
            f"{data}: not the official files of {official.name} ({first_line(error)}); give their folder as --data"
        ) from error
    if not questions:
        raise UserError(f"{data}: the files of {official.name} contain no question")
    return questions


def load_named_benchmark(
    name: str,
    data: str,
    images: str,
    metric: str,
    protocol: str,
    max_rows: int | None,
    max_new_tokens: int | None,
    batch_size: int,
) -> tuple[Benchmark, LoadedBenchmark]:
    """Return the benchmark that command-line options describe, as a recipe section and loaded.

    `metric` applies to the custom benchmark only. Raises UserError like load_benchmark.
    """
    fields: dict[str, Any] = {"questions": data, "images": images, "max_rows": max_rows, "batch_size": batch_size}
    if name == CUSTOM:
        loaded = _load_custom(data, metric, images, max_rows, protocol)
        fields |= {"metric": metric, "protocol": protocol}
    else:
        loaded = load_official_benchmark(name, data, images, protocol, max_rows)
        fields |= {"benchmark": name, "protocol": protocol}
    return Benchmark(name=name, max_new_tokens=max_new_tokens, **fields), loaded


def score_file(
    name: str, data: str, answers: str, metric: str = "exact_match", protocol: str = "", grades: str | None = None
) -> BenchmarkResult:
    """Score a file of answers, or a judge's file of grades where the benchmark is judged.

    `data` is the folder of the official files; for the custom benchmark it is the file of questions. Raises UserError
    for files that are missing, malformed or inconsistent.
    """
    if name == CUSTOM:
        benchmark = _load_custom(data, metric, protocol=protocol)
    else:
        benchmark = load_official_benchmark(name, data, protocol=protocol)
    if benchmark.scoring.is_judged:
        if grades is None:
            raise UserError(f"{name} is graded by a judge; give the judge's reply file as --grades")
        judged = read_grades(storage_path(grades), benchmark.questions)
        return score_grades(name, benchmark.scoring, benchmark.questions, judged)
    texts = join_predictions(read_predictions(storage_path(answers)), benchmark.questions, answers)
    return score_answers(name, benchmark.scoring, benchmark.questions, texts, protocol)


def read_grades(file: StoragePath, questions: list[Question]) -> dict[str, float | None]:
    """Read a judge's reply file: JSON of grades by question id, each a number or the official `score` list (its mean).

    Raises UserError if the file is malformed or grades an unknown question.
    """
    try:
        entries = json.loads(file.read_bytes())
        grades: dict[str, float | None] = {}
        for question_id, entry in entries.items():
            grades[question_id] = _parse_grade(question_id, entry)
    except (OSError, ValueError, TypeError, AttributeError, KeyError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{file}: not a file of grades ({first_line(error)}); it must map question ids to numbers"
        ) from error
    known_ids = {question.question_id for question in questions}
    for question_id in grades:
        if question_id not in known_ids:
            raise UserError(f"{file}: the grade of {question_id!r} has no question in the benchmark's files")
    return grades


def _find(name: str) -> OfficialBenchmark:
    benchmarks = official_benchmarks()
    if name not in benchmarks:
        raise UserError(f"{name}: unknown benchmark; choose one of: {', '.join([*benchmarks, CUSTOM])}")
    return benchmarks[name]


def _check_protocol(name: str, scoring: Scoring, protocol: str) -> None:
    if not protocol or protocol in scoring.protocols:
        return
    if not scoring.protocols:
        raise UserError(f"protocol {protocol}: {name} has no protocols; leave the protocol out")
    raise UserError(f"protocol {protocol}: unknown for {name}; choose one of: {', '.join(scoring.protocols)}")


def _load_custom(
    data: str, metric: str, images: str = "", max_rows: int | None = None, protocol: str = ""
) -> LoadedBenchmark:
    if metric not in CUSTOM_METRICS:
        raise UserError(f"--metric {metric}: unknown metric; choose one of: {', '.join(CUSTOM_METRICS)}")
    fields: dict[str, Any] = {"images": images, "metric": metric, "max_rows": max_rows, "protocol": protocol}
    return load_benchmark(Benchmark(name=CUSTOM, questions=data, **fields), "")


def _parse_grade(question_id: str, entry: Any) -> float:
    """Return a grade from a number or a list of them. Raises ValueError for one that is not from 0 to 1."""
    if isinstance(entry, dict):
        entry = entry["score"]
    for grade in entry if isinstance(entry, list) else [entry]:
        if isinstance(grade, bool) or not isinstance(grade, int | float) or not 0 <= grade <= 1:
            raise ValueError(f"the grade of {question_id!r} is {str(grade)[:100]}, not a number from 0 to 1")
    return float(sum(entry) / len(entry) if isinstance(entry, list) else entry)
