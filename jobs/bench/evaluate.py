"""Generation throughput: raylava's batches compared with a loop over single questions, as in LLaVA's scripts.

    python jobs/bench/evaluate.py [--questions N] [--workers W] [--model FOLDER --data FILE --images DIR]

Both run the same model in fp32 on the same questions and cores, and must give the same answers. Without --model, the
toy assets are built or reused, and their LLaVA is evaluated before training, so that answers have full length. The
`steady` rate leaves out raylava's startup (Ray's actors, loading the model); the loop loads its model before its clock
starts. Padding is the fraction of prompt positions that hold no token of a question.
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
from rich.console import Console as RichConsole
from rich.table import Table

from raylava.cluster.session import ray_session
from raylava.config.recipe import Benchmark, Resources
from raylava.console import Console
from raylava.evaluation.engines import TransformersEngine
from raylava.evaluation.generation import ActorPool, GenerationConfig, generate_answers
from raylava.evaluation.questions import Question, read_questions
from raylava.models.export import export_untrained
from raylava.models.registry import LlavaCheckpoint, resolve_model
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.toy.demo import make_toy_assets, toy_recipe

MAX_NEW_TOKENS = 8
PRECISION = "fp32"


class FirstUpdateTimer(NullProgressBar):
    """A progress bar that records when the first answers arrived, and their number."""

    def __init__(self) -> None:
        self.first: tuple[float, float] | None = None

    def update(self, done: float, total: float, **metrics: float) -> None:
        """See progress.ProgressBar."""
        self.first = self.first or (time.monotonic(), done)


def main() -> None:
    """Measure both and print the rates."""
    arguments = parse_arguments()
    logging.getLogger().setLevel(logging.ERROR)
    resources = Resources(workers=arguments.workers)
    model, data, images = arguments.model, arguments.data, arguments.images
    if model is None:
        with ray_session(resources):
            model, data, images = untrained_toy_model(arguments.storage)
    benchmark = Benchmark(name="bench", questions=data)
    questions = repeat(read_questions(storage_path(data), benchmark), arguments.questions)
    loop_answers, loop_seconds = answer_one_by_one(model, questions, images)
    timer = FirstUpdateTimer()
    config = GenerationConfig(
        LlavaCheckpoint(model),
        images,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=arguments.batch_size,
        precision=PRECISION,
    )
    with ray_session(resources):
        started = time.monotonic()
        answers = generate_answers(questions, config, ActorPool.from_resources(resources), timer)
        ended = time.monotonic()
    assert timer.first is not None
    steady_rate = (len(questions) - timer.first[1]) / (ended - timer.first[0])
    differing = sum(answer.text != text for answer, text in zip(answers, loop_answers, strict=True))
    padding = padding_fractions(model, questions, arguments.batch_size)
    print_rates(len(questions), loop_seconds, ended - started, steady_rate, differing, padding)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=8910)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--storage", default="raylava-storage")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--images")
    return parser.parse_args()


def repeat(questions: list[Question], count: int) -> list[Question]:
    """Cycle through the questions up to `count`, since official benchmarks have thousands."""
    return [dataclasses.replace(questions[index % len(questions)], question_id=str(index)) for index in range(count)]


def untrained_toy_model(storage: str) -> tuple[str, str, str]:
    """Return the toy LLaVA before training, the file of its held-out questions, and the folder of their images."""
    toy_assets = make_toy_assets(storage, Console(open(os.devnull, "w")))  # noqa: SIM115 (open until the bench ends)
    recipe = toy_recipe(toy_assets.path, [])
    folder = storage_path(tempfile.mkdtemp(prefix="raylava-bench-"))
    export_untrained(resolve_model(recipe.model), 0, "pad", folder.uri)
    corpus = toy_assets.path / "corpus"
    return folder.uri, (corpus / "questions.jsonl").uri, (corpus / "images").uri


def answer_one_by_one(model: str, questions: list[Question], images: str) -> tuple[list[str], float]:
    """Return the answers of a loop over single questions, and its seconds."""
    torch.set_num_threads(os.cpu_count() or 1)
    engine = TransformersEngine(LlavaCheckpoint(model), torch.device("cpu"), PRECISION)
    started = time.monotonic()
    answers = []
    for question in questions:
        image = Image.open(Path(images) / question.image).convert("RGB") if question.image else None
        answers += engine.answer([question.text], [image], MAX_NEW_TOKENS)
    return answers, time.monotonic() - started


def padding_fractions(model: str, questions: list[Question], batch_size: int) -> tuple[float, float]:
    """Return the fraction of padding in batches by length, and in batches in file order."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    lengths = [len(tokenizer(question.text).input_ids) for question in questions]
    by_length = sorted(range(len(questions)), key=lambda index: len(questions[index].text))
    return _padding([lengths[index] for index in by_length], batch_size), _padding(lengths, batch_size)


def _padding(lengths: list[int], batch_size: int) -> float:
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def print_rates(
    count: int,
    loop_seconds: float,
    raylava_seconds: float,
    steady_rate: float,
    differing: int,
    padding: tuple[float, float],
) -> None:
    """Print answers per second, absolute and relative to the loop, and the padding."""
    table = Table("method", title=f"{count} questions, {os.cpu_count()} cores", title_justify="left")
    for heading in ("answers/s", "relative to loop"):
        table.add_column(heading, justify="right")
    rates = {
        "one by one": count / loop_seconds,
        "raylava, with startup": count / raylava_seconds,
        "raylava, steady": steady_rate,
    }
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.1f}", f"{rate * loop_seconds / count:.2f}")
    console = RichConsole()
    console.print(table)
    console.print(
        f"answers that differ: {differing}; padding {padding[0]:.1%} by length, {padding[1]:.1%} in file order"
    )


if __name__ == "__main__":
    main()
