"""GQA (Hudson & Manning 2019): compositional questions with one-word answers, on the balanced test-dev split."""

from raylava.evaluation.benchmarks.benchmark import OfficialBenchmark
from raylava.evaluation.benchmarks.files import read_json, require_file, short_answer
from raylava.evaluation.metrics.scoring import EXACT_MATCH
from raylava.evaluation.questions import Question
from raylava.storage import StoragePath


def _read(data: StoragePath) -> list[Question]:
    entries = read_json(require_file(data, "testdev_balanced_questions.json"))
    return [
        Question(
            question_id,
            f"{entry['imageId']}.jpg",
            short_answer(entry["question"]),
            entry.get("types", {}).get("structural") or "all",
            (entry["answer"],),
        )
        for question_id, entry in entries.items()
    ]


BENCHMARK = OfficialBenchmark("gqa", _read, EXACT_MATCH, image_folders=("images",))
