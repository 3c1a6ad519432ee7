"""How fast a model answers: raylava's batches beside the usual loop, one question at a time as in LLaVA's scripts.

    python jobs/bench/evaluate.py [--questions N] [--workers W] [--model FOLDER --data FILE --images DIR]

Both ask the same model, in fp32, the same questions on the same cores and must say the same. Without a model, the
demo's toy_assets is made (or found) and its untrained LLaVA is asked, which answers at full length. `steady` leaves out
what raylava needs to start (Ray's actors, loading the model); the loop's model is loaded before its clock starts.
Padding is the share of prompt positions that hold none of a question's tokens.
"""

import argparse
import dataclasses
import logging
import os
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from raylava.cluster.session import ray_session
from raylava.config.recipe import Benchmark, Resources
from raylava.console import Console as Told
from raylava.evaluate.engines import TransformersEngine
from raylava.evaluate.generation import ActorPool, GenerationConfig, answer
from raylava.evaluate.questions import Question, read_questions
from raylava.models.registry import resolve_language, resolve_vision
from raylava.models.untrained import export_untrained
from raylava.storage import storage_path
from raylava.toy.demo import make_toy_assets, toy_recipe

MAX_NEW_TOKENS = 8
PRECISION = "fp32"


class SearchBudget:
    """A bar that notes when the first answers came, and how many they were."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def update(self, done: float, total: float, **figures: float) -> None:
        """See console.ProgressBar."""
        self.first = self.first or (time.monotonic(), done)


def main() -> None:
    given = arguments()
    logging.getLogger().setLevel(logging.ERROR)
    resources = Resources(workers=given.workers)
    model, data, images = given.model, given.data, given.images
    if model is None:
        with ray_session(resources):
            model, data, images = toy_assets_stage(given.storage)
    asked = repeated(read_questions(storage_path(data), Benchmark(name="bench", questions=data)), given.questions)
    loop, loop_seconds = one_by_one(model, asked, images)
    clock = SearchBudget()
    with ray_session(resources):
        started = time.monotonic()
        asking = GenerationConfig(
            model, images, max_new_tokens=MAX_NEW_TOKENS, batch_size=given.batch_size, precision=PRECISION
        )
        answers = answer(asked, asking, ActorPool.of(resources), clock)
        ended = time.monotonic()
    assert clock.first is not None
    steady = (len(asked) - clock.first[1]) / (ended - clock.first[0])
    differ = sum(one.text != other for one, other in zip(answers, loop, strict=True))
    show(len(asked), loop_seconds, ended - started, steady, differ, waste(model, asked, given.batch_size))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8910)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--storage", default="raylava-storage")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--images")
    return parser.parse_args()


def repeated(questions: list[Question], count: int) -> list[Question]:
    """So many, over and over: official benchmarks have thousands."""
    return [dataclasses.replace(questions[number % len(questions)], question_id=str(number)) for number in range(count)]


def toy_assets_stage(storage: str) -> tuple[str, str, str]:
    """The demo's LLaVA before any training, its held-out questions, their images."""
    made = make_toy_assets(storage, Told(open(os.devnull, "w")))  # noqa: SIM115 (for the length of the bench)
    recipe = toy_recipe(made.path, [])
    folder = storage_path(tempfile.mkdtemp(prefix="raylava-bench-"))
    vision, language = resolve_vision(recipe.model.vision), resolve_language(recipe.model.language)
    export_untrained(recipe.model, vision, language, 0, "pad", folder)
    corpus = made.path / "corpus"
    return folder.uri, (corpus / "questions.jsonl").uri, (corpus / "images").uri


def one_by_one(model: str, asked: list[Question], images: str) -> tuple[list[str], float]:
    """The usual loop's answers, and its seconds."""
    torch.set_num_threads(os.cpu_count() or 1)
    chat = TransformersEngine(model, torch.device("cpu"), PRECISION)
    started = time.monotonic()
    found = []
    for question in asked:
        image = Image.open(Path(images) / question.image).convert("RGB") if question.image else None
        found += chat.answer([question.text], [image], MAX_NEW_TOKENS)
    return found, time.monotonic() - started


def waste(model: str, asked: list[Question], batch_size: int) -> tuple[float, float]:
    """The share of padding in batches by length, and in batches as the file has them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    lengths = [len(tokenizer(question.text).input_ids) for question in asked]
    by_length = sorted(range(len(asked)), key=lambda number: len(asked[number].text))
    return _padding([lengths[number] for number in by_length], batch_size), _padding(lengths, batch_size)


def _padding(lengths: list[int], size: int) -> float:
    batches = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def show(count: int, loop: float, whole: float, steady: float, differ: int, padding: tuple[float, float]) -> None:
    table = Table("way", title=f"{count} questions, {os.cpu_count()} cores", title_justify="left")
    for heading in ("answers/s", "of the loop"):
        table.add_column(heading, justify="right")
    rates = {"one by one": count / loop, "raylava, with its start": count / whole, "raylava, steady": steady}
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}", f"{rate * loop / count:.2f}")
    console = Console()
    console.print(table)
    console.print(f"answers that differ: {differ}; padding {padding[0]:.1%} by length, {padding[1]:.1%} in file order")


if __name__ == "__main__":
    main()
