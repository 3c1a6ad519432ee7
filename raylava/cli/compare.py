"""`raylava compare`: compare evaluations of the same benchmark."""

from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute, write_output
from raylava.cli.options import AsJson
from raylava.console import Console, escape


def command(
    evaluations: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="evaluate artifacts, of one benchmark or more")
    ],
    html: Annotated[str, typer.Option("--html", metavar="FILE", help="the page to write")] = "compare.html",
    as_json: AsJson = False,
) -> int:
    """Compare evaluations, and show the questions that they answer differently."""
    return execute("compare", as_json, lambda console: _compare(evaluations, html, console))


def _compare(evaluations: list[str], html: str, console: Console) -> CommandResult:
    from raylava.artifacts import load_artifact
    from raylava.cli.tables import comparison_table
    from raylava.evaluation.compare import compare
    from raylava.evaluation.comparison_page import page

    comparisons = compare([load_artifact(path) for path in evaluations])
    write_output("--html", html, page(comparisons).encode())
    for comparison in comparisons:
        console.show(comparison_table(comparison))
    console.show(f"page: [bold]{escape(html)}[/]   (the questions that are scored differently, with their images)")
    return CommandResult(
        {
            comparison.benchmark: {
                "mean_scores": dict(comparison.mean_scores),
                "differences": [vars(difference) for difference in comparison.differences],
            }
            for comparison in comparisons
        }
    )
