"""Commands that ask models and score what they say: evaluate, score, compare, chat."""

import argparse
from pathlib import Path

from rich.markup import escape

from raylava.cli.command import Add, Outcome, positive
from raylava.console import Console
from raylava.errors import UserError


def register(add: Add) -> None:
    """Add these commands."""
    _takes_evaluation(add("evaluate", _evaluate, "have a model answer a benchmark, and score it"))
    _takes_answers(add("score", _score, "score anybody's file of answers to a benchmark"))
    compare = add("compare", _compare, "two or more evaluations side by side, and where they part")
    compare.add_argument("evaluations", metavar="PATH", nargs="+", help="evaluate artifacts, of one benchmark or more")
    compare.add_argument("--html", metavar="FILE", default="compare.html", help="where the page goes (%(default)s)")
    chat = add("chat", _chat, "ask a model a question about a image")
    chat.add_argument("model", metavar="MODEL", help="a finetune artifact or any Hugging Face folder of a LLaVA")
    chat.add_argument("--image", metavar="FILE")
    chat.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    chat.add_argument("question")


def _takes_evaluation(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument("model", metavar="MODEL", help="a finetune artifact, a Hugging Face folder, or a hub id")
    evaluate.add_argument("--benchmark", metavar="NAME", required=True, help="as for score")
    evaluate.add_argument("--data", metavar="DIR", required=True, help="the official files; for own, the questions")
    evaluate.add_argument("--images", metavar="DIR", default="", help="where the images are, if not below --data")
    evaluate.add_argument("--rule", metavar="RULE", default="exact_match", help="for own, as for score")
    evaluate.add_argument("--protocol", metavar="NAME", default="", help="as for score")
    evaluate.add_argument("--limit", type=positive, metavar="N", help="the first N questions alone")
    evaluate.add_argument("--max-new-tokens", type=positive, metavar="N", help="(16; mm-vet 512)")
    evaluate.add_argument("--batch-size", type=positive, default=32, metavar="N", help="(%(default)s)")
    evaluate.add_argument("--judge", metavar="COMMAND", default="", help="for mm-vet: reads a prompt, prints a grade")
    evaluate.add_argument("--engine", metavar="NAME", default="transformers", help="or vllm, where it is installed")
    evaluate.add_argument("--precision", metavar="NAME", default="auto", help="fp32, bf16, fp16 (as the model is kept)")
    evaluate.add_argument("--workers", type=positive, metavar="N", help="copies of the model (all there is room for)")
    evaluate.add_argument("--gpus-per-worker", type=int, default=0, metavar="G", help="(%(default)s)")


def _takes_answers(score: argparse.ArgumentParser) -> None:
    score.add_argument("benchmark", metavar="NAME", help="pope, gqa, vqav2, mme, mmvp, scienceqa, mm-vet or own")
    score.add_argument("--answers", metavar="FILE", help="JSONL of question_id and text, or an official result file")
    score.add_argument(
        "--data", metavar="DIR", required=True, help="the official files; for own, the file of questions"
    )
    score.add_argument(
        "--rule", metavar="RULE", default="exact_match", help="for own: exact_match, vqa_accuracy, yes_no"
    )
    score.add_argument("--protocol", metavar="NAME", default="", help="where toolkits differ (pope: llava, lmms-eval)")
    score.add_argument("--grades", metavar="FILE", help="for mm-vet: the judge's reply file")


def _evaluate(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cli.tables import result_table, tell_unjudged
    from raylava.cluster.roles import TRAIN, labels_for
    from raylava.config.recipe import Resources
    from raylava.evaluate.benchmarks import load_named_benchmark
    from raylava.evaluate.generation import ActorPool
    from raylava.pipeline.evaluation import evaluate_model
    from raylava.storage import writable

    given = arguments
    benchmark, exam = load_named_benchmark(
        given.benchmark, given.data, given.images, given.rule, given.protocol, given.limit, given.max_new_tokens,
        given.batch_size,
    )  # fmt: skip
    actors = ActorPool(given.workers, gpus=given.gpus_per_worker, labels=labels_for(TRAIN, Resources()))
    storage = writable(given.storage)
    artifact = evaluate_model(
        given.model, benchmark, exam, storage, actors, given.judge, given.engine, given.precision, console
    )
    if "figures" in artifact.metrics:
        console.show(result_table(artifact.metrics))
    else:
        tell_unjudged(artifact, console)
    return Outcome(artifact.record)


def _score(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cli.tables import result_table
    from raylava.evaluate.benchmarks import score_file

    if arguments.answers is None and arguments.grades is None:
        raise UserError("score wants the answers; give --answers FILE (for mm-vet --grades FILE)")
    given = (arguments.answers or "", arguments.rule, arguments.protocol, arguments.grades)
    result = score_file(arguments.benchmark, arguments.data, *given)
    metrics = result.metrics()
    console.show(result_table(metrics))
    if result.missing:
        console.say(f"[yellow]without an answer[/], counted as wrong: {escape(', '.join(result.missing[:10]))}")
    return Outcome(metrics | {"missing": list(result.missing)})


def _compare(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.artifacts import load
    from raylava.cli.tables import comparison_table
    from raylava.evaluate.compare import compare
    from raylava.evaluate.comparison_page import page

    found = compare([load(path) for path in arguments.evaluations])
    Path(arguments.html).write_text(page(found), encoding="utf-8")
    for one in found:
        console.show(comparison_table(one))
    console.say(f"page: [bold]{escape(arguments.html)}[/]   (the questions where they part, with their images)")
    return Outcome(
        {
            one.benchmark: {"credit": one.credit, "differences": [vars(each) for each in one.differences]}
            for one in found
        }
    )


def _chat(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.evaluate.generation import chat_once

    said = chat_once(arguments.model, arguments.image, arguments.question, arguments.max_new_tokens)
    return Outcome({"question": arguments.question, "answer": said}, said)
