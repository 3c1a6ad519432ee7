"""`raylava score`: score a file of answers to a benchmark."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson, BenchmarkData
from raylava.console import Console, escape
from raylava.errors import UserError

_MAX_IDS = 10


def command(
    benchmark: Annotated[
        str, typer.Argument(metavar="NAME", help="an official benchmark (see docs/evaluation.md), or custom")
    ],
    data: BenchmarkData,
    answers: Annotated[
        str | None,
        typer.Option("--answers", metavar="FILE", help="JSONL of question_id and text, or an official result file"),
    ] = None,
    metric: Annotated[
        str, typer.Option("--metric", metavar="NAME", help="for custom: exact_match, vqa_accuracy, yes_no")
    ] = "exact_match",
    protocol: Annotated[
        str, typer.Option("--protocol", metavar="NAME", help="whose scoring rules, where toolkits differ")
    ] = "",
    grades: Annotated[
        str | None, typer.Option("--grades", metavar="FILE", help="for a judged benchmark: the judge's file of grades")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Score a file of answers to a benchmark, produced by any program."""
    return execute(
        "score", as_json, lambda console: _score(benchmark, data, answers, metric, protocol, grades, console)
    )


def _score(
    benchmark: str,
    data: str,
    answers: str | None,
    metric: str,
    protocol: str,
    grades: str | None,
    console: Console,
) -> CommandResult:
    from raylava.cli.tables import result_table
    from raylava.evaluation.loading import score_file

    if answers is None and grades is None:
        raise UserError("score needs answers; give --answers FILE (--grades FILE where a judge grades)")
    result = score_file(benchmark, data, answers or "", metric, protocol, grades)
    metrics = result.metrics()
    console.show(result_table(metrics))
    if result.missing:
        console.say(f"[yellow]without an answer[/], scored as wrong: {escape(', '.join(result.missing[:_MAX_IDS]))}")
    return CommandResult(metrics | {"missing": list(result.missing)})
