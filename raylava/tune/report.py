"""What a sweep found out: a CSV of its variants, and a page in Markdown.

The page has each cell's scores over seeds, what each axis buys, who failed why, and how to make each row again.
"""

import json
import shlex
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from raylava.artifacts import Artifact
from raylava.evaluate.score import matches
from raylava.report import benchmarks
from raylava.storage import Place
from raylava.tune.effects import Effect, Graded, effects
from raylava.tune.plan import SweepPlan
from raylava.tune.sweep import Sweep
from raylava.tune.table import results, results_csv
from raylava.tune.variants import Variant

_EVALUATE = "evaluate "


def write_results(
    sweep: Sweep, sweep_plan: SweepPlan, failures: list[str | None], overrides: list[str], folder: Place
) -> list[dict[str, Any]]:
    """Write results.csv and report.md into `folder`; returns the CSV's rows."""
    rows = results(sweep_plan, failures)
    (folder / "results.csv").write_bytes(results_csv(rows))
    (folder / "report.md").write_bytes(report(sweep, sweep_plan, failures, overrides).encode())
    return rows


def report(sweep: Sweep, sweep_plan: SweepPlan, failures: list[str | None], overrides: list[str]) -> str:
    """The whole page. `failures` are in the variants' order, None for one that ended well."""
    found = [sweep_plan.artifacts(number) for number in range(len(sweep_plan.variants))]
    lines = [f"# {sweep.name}", "", f"{len(found)} variants of `{sweep.recipe}`.", ""]
    for benchmark in dict.fromkeys(name for artifacts in found for name in benchmarks(artifacts)):
        lines += [f"## {benchmark}", ""]
        lines += [*_cells(sweep_plan, found, benchmark), ""]
        lines += [*_effects(sweep, sweep_plan, found, benchmark), ""]
    lines += [*_failed(sweep_plan, failures)]
    lines += ["## To make a row again", "", "```sh", *_commands(sweep, sweep_plan.variants, overrides), "```", ""]
    return "\n".join(lines)


def _cells(sweep_plan: SweepPlan, found: list[dict[str, Artifact]], benchmark: str) -> Iterator[str]:
    """A row a combination of levels: the mean over its seeds, and their standard deviation."""
    scores: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for variant, artifacts in zip(sweep_plan.variants, found, strict=True):
        own = scores[tuple(variant.levels.values())]
        if _EVALUATE + benchmark in artifacts:
            own.append(artifacts[_EVALUATE + benchmark].metrics["overall"]["exact_match"])
    yield _row([*sweep_plan.variants[0].levels, "exact match", "seeds"])
    yield _row(["---"] * (len(sweep_plan.variants[0].levels) + 2))
    for levels, values in scores.items():
        mean = f"{statistics.mean(values):.3f}" if values else "failed"
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        yield _row([*levels, mean + spread, str(len(values))])


def _effects(sweep: Sweep, sweep_plan: SweepPlan, found: list[dict[str, Artifact]], benchmark: str) -> Iterator[str]:
    graded = [
        Graded(variant.levels, variant.seed, _graded(artifacts[_EVALUATE + benchmark]))
        for variant, artifacts in zip(sweep_plan.variants, found, strict=True)
        if _EVALUATE + benchmark in artifacts
    ]
    measured = effects(graded, {axis: list(levels) for axis, levels in sweep.axes.items()})
    if not measured:
        return
    yield "What a level buys, all else and the seed being equal: the difference in the share of right answers, with its"
    yield "95 % interval (paired bootstrap over runs and questions)."
    yield ""
    yield _row(["axis", "level", "against", "difference", "95 % interval", "pairs of runs", ""])
    yield _row(["---"] * 7)
    for one in measured:
        yield _row(_told(one))


def _told(one: Effect) -> list[str]:
    verdict = "the interval spans zero: these runs don't tell" if one.spans_zero else ""
    interval = f"{one.low:+.3f} to {one.high:+.3f}"
    return [one.axis, one.level, one.against, f"{one.difference:+.3f}", interval, str(one.pairs), verdict]


def _graded(evaluation: Artifact) -> dict[str, bool]:
    """By question id, whether the answer was right. Answers join questions by id, never by position."""
    references = {line["question_id"]: line["reference"] for line in _lines(evaluation, "questions.jsonl")}
    return {
        line["question_id"]: matches(line["text"], references[line["question_id"]])
        for line in _lines(evaluation, "answers.jsonl")
    }


def _lines(artifact: Artifact, file: str) -> Iterator[dict[str, str]]:
    for line in (artifact.place / file).read_bytes().splitlines():
        yield json.loads(line)


def _failed(sweep_plan: SweepPlan, failures: list[str | None]) -> Iterator[str]:
    told = [(variant, failure) for variant, failure in zip(sweep_plan.variants, failures, strict=True) if failure]
    if not told:
        return
    yield from ("## Failed", "")
    for variant, failure in told:
        yield f"- {variant.name}: {failure}"
    yield ""


def _commands(sweep: Sweep, variants: tuple[Variant, ...], overrides: list[str]) -> Iterator[str]:
    for variant in variants:
        settings = [f"{key}={json.dumps(value)}" for key, value in variant.settings.items()]
        words = [shlex.quote(word) for word in (sweep.recipe, *settings, *overrides)]
        yield f"raylava run {' '.join(words)}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
