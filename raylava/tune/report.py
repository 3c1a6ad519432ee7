"""What a sweep found out, for people: a page in Markdown, the same as HTML with plots (page.py), and a CSV.

First what each level buys, in words; then each cell's scores over seeds, beside the paper's where it has that cell;
what a search tried; what it cost; who failed why; and how to make each row again.
"""

import csv
import io
import json
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from raylava.storage import StoragePath
from raylava.tune.effects import Effect
from raylava.tune.html_report import COMMANDS, CURVES, SEARCH, page
from raylava.tune.published_scores import SOURCE, published
from raylava.tune.results import Row, SweepResults
from raylava.tune.study import RUNGS
from raylava.tune.variants import shown

_TRIALS = 30  # of a search, in the page; results.csv has all


def write_report(findings: SweepResults, folder: StoragePath) -> None:
    """Write report.md, report.html and results.csv into `folder`."""
    text = report(findings)
    (folder / "results.csv").write_bytes(_csv(findings).encode())
    (folder / "report.md").write_bytes(text.encode())
    (folder / "report.html").write_bytes(page(findings, text).encode())


def report(findings: SweepResults) -> str:
    """The page in Markdown."""
    sections: list[Iterable[str]] = [_opening(findings)]
    for benchmark in findings.benchmarks:
        sections.append(
            [f"## {benchmark}", *_statements(findings.effects(benchmark)), "", *_cells(findings, benchmark)]
        )
        sections.append(_effects(findings.effects(benchmark)))
    sections += [_published(findings), _curves(findings), _search(findings), _cost(findings), _failed(findings)]
    sections.append(_commands(findings))
    return "\n".join(line for section in sections for line in (*section, ""))


def _csv(findings: SweepResults) -> str:
    rows = findings.table()
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _opening(findings: SweepResults) -> Iterator[str]:
    counts = Counter(row.ended.how for row in findings.rows)
    told = ", ".join(f"{count} {how}" for how, count in counts.items())
    yield f"# {findings.sweep.name}"
    yield ""
    yield f"{len(findings.rows)} trials of `{findings.sweep.recipe}`: {told}."


def _statements(found: Iterable[Effect]) -> Iterator[str]:
    """What each level buys, in a sentence each; points are hundredths of the credit that questions give."""
    yield ""
    for one in found:
        change = f"{one.axis}: {one.level} instead of {one.against}"
        interval = f"(95 % interval {100 * one.low:+.1f} to {100 * one.high:+.1f})"
        points = f"{100 * abs(one.difference):.1f} points"
        if one.spans_zero:
            verb = "more" if one.difference > 0 else "less"
            yield f"- {change}: {points} {verb} {interval}. The interval spans zero: these runs don't tell."
        else:
            yield f"- **{change} {'gains' if one.difference > 0 else 'costs'} {points}** {interval}."


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _cells(findings: SweepResults, benchmark: str) -> Iterator[str]:
    """A row a combination of levels: the mean over its seeds, their standard deviation, and what the paper has."""
    cells: dict[tuple[str, ...], list[float]] = defaultdict(list)
    papers: dict[tuple[str, ...], float] = {}
    for row in findings.rows:
        cells[row.levels] += []
        if benchmark in published(row.ended.variant.recipe):
            papers[row.levels] = published(row.ended.variant.recipe)[benchmark]
    for row in findings.chosen:
        if benchmark in row.scores:
            cells[row.levels].append(row.scores[benchmark])
    yield from _head([*findings.sweep.axes, findings.headline(benchmark), "seeds", *(["published"] if papers else [])])
    for levels, values in cells.items():
        mean = f"{statistics.mean(values):.3f}" if values else "failed"
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        paper = [str(papers.get(levels, ""))] if papers else []
        yield _row([*levels, mean + spread, str(len(values)), *paper])


def _effects(found: list[Effect]) -> Iterator[str]:
    if not found:
        return
    yield "What a level buys, all else and the seed being equal: the difference in the share of right answers, with its"
    yield "95 % interval (paired bootstrap over runs and questions)."
    yield ""
    yield from _head(["axis", "level", "against", "difference", "95 % interval", "pairs of runs", "questions"])
    for one in found:
        interval = f"{_signed(one.low)} to {_signed(one.high)}"
        figures = [_signed(one.difference), interval, str(one.pairs), str(one.questions)]
        yield _row([one.axis, one.level, one.against, *figures])


def _published(findings: SweepResults) -> Iterator[str]:
    """The paper's table, where the sweep has its cells."""
    cells = {row.levels: published(row.ended.variant.recipe) for row in findings.rows}
    found = {levels: scores for levels, scores in cells.items() if scores}
    if not found:
        return
    names = list(dict.fromkeys(name for scores in found.values() for name in scores))
    yield "## Published"
    yield ""
    yield f"The paper's figures for these cells ({SOURCE}): one run each, so a difference of a point may be chance."
    yield ""
    yield from _head([*findings.sweep.axes, *names])
    for levels, scores in found.items():
        yield _row([*levels, *(f"{scores[name]:g}" if name in scores else "" for name in names)])


def _curves(findings: SweepResults) -> Iterator[str]:
    """Where each cell's loss came to; the page has the curves."""
    losses: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in findings.rows:
        if "loss" in row.values:
            losses[row.levels].append(row.values["loss"])
    if not losses:
        return
    yield f"## {CURVES}"
    yield ""
    yield "The mean of the last twentieth of the steps; report.html has the curves."
    yield ""
    yield from _head([*findings.sweep.axes, "loss", "lowest", "highest", "runs"])
    for levels, values in losses.items():
        yield _row(
            [*levels, *(f"{one:.3f}" for one in (statistics.mean(values), min(values), max(values))), str(len(values))]
        )


def _search(findings: SweepResults) -> Iterator[str]:
    """The trials of a search, the best first."""
    search = findings.sweep.search
    if search is None:
        return
    name, direction = next(iter(search.objective.items()))
    rows = sorted(findings.rows, key=lambda row: _rank(row, name, direction))
    yield f"## {SEARCH}"
    yield ""
    yield f"Each variant's best trial, by {name}, stands in the tables above. Where that is a benchmark's score, it"
    yield "flatters the trial a little: it was chosen among many by it."
    yield ""
    yield from _head(
        [*findings.sweep.axes, *(["seed"] if findings.sweep.seeds else []), *search.space, *search.objective, "ended"]
    )
    for row in rows[:_TRIALS]:
        variant = row.ended.variant
        seed = [str(variant.seed)] if findings.sweep.seeds else []
        values = [f"{row.values[one]:.4g}" if one in row.values else "" for one in search.objective]
        settings = [shown(value) for value in variant.searched.values()]
        yield _row([*row.levels, *seed, *settings, *values, _how(row)])
    if len(rows) > _TRIALS:
        yield ""
        yield f"{len(rows) - _TRIALS} more in results.csv."


def _rank(row: Row, name: str, direction: str) -> tuple[bool, float]:
    value = row.values.get(name, 0.0)
    return name not in row.values, -value if direction == "max" else value


def _how(row: Row) -> str:
    if row.ended.how != "stopped" or row.ended.tried is None:
        return row.ended.how
    marks = row.ended.tried.losses
    return f"stopped at {100 * max(marks) // RUNGS} %, loss {marks[max(marks)]:.3f}" if marks else "stopped"


def _cost(findings: SweepResults) -> Iterator[str]:
    """Device-hours, with and without sharing."""
    if not findings.unshared:
        return
    gpus = any(row.ended.variant.recipe.resources.gpus_per_worker for row in findings.rows)
    unit = "GPU-hours" if gpus else "CPU-core-hours"
    saved = findings.unshared - findings.paid
    needed = sum(work.users for work in findings.plan.works)
    yield "## Cost"
    yield ""
    yield (
        f"{findings.paid:.2f} {unit} of training; one by one the trials would have taken "
        f"{findings.unshared:.2f}: sharing saved {saved:.2f} ({saved / findings.unshared:.0%}). The trials need "
        f"{needed} stages, preparations and evaluations among them, of which {len(findings.plan.works)} are distinct."
    )
    yield ""
    yield from _head(["trial", "all it needs", "its share"])
    for row in findings.rows[:_TRIALS]:
        yield _row([row.ended.variant.name or "the only one", f"{row.cost:.3f}", f"{row.share:.3f}"])


def _failed(findings: SweepResults) -> Iterator[str]:
    told = [row.ended for row in findings.rows if row.ended.failure]
    if not told:
        return
    yield from ("## Failed", "")
    for ended in told:
        yield f"- {ended.variant.name}: {ended.failure}"


def _commands(findings: SweepResults) -> Iterator[str]:
    yield from (f"## {COMMANDS}", "", "```sh")
    for row in findings.rows:
        settings = [f"{key}={json.dumps(value)}" for key, value in row.ended.variant.settings.items()]
        words = [shlex.quote(word) for word in (findings.sweep.recipe, *settings, *findings.overrides)]
        yield f"raylava run {' '.join(words)}"
    yield "```"


def _head(cells: list[str]) -> Iterator[str]:
    yield _row(cells)
    yield _row(["---"] * len(cells))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
