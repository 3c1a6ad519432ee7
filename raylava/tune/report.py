"""Report of a sweep: a Markdown page, the same page as HTML with plots (html_report.py), and a CSV file.

For each benchmark the page states the effect of each level and lists each cell's scores over seeds. Further sections
list the paper's scores, losses, the trials of a search, device-hours, failures, and the commands to reproduce the rows.
"""

import csv
import io
import json
import shlex
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from raylava.errors import redact_urls
from raylava.evaluation.published_scores import SOURCE, published_scores
from raylava.storage import StoragePath
from raylava.tune.effects import Effect
from raylava.tune.html_report import COMMANDS_TITLE, CURVES_TITLE, PARETO_TITLE, SEARCH_TITLE, render_html
from raylava.tune.results import SweepResults, TrialRow
from raylava.tune.study import RUNGS
from raylava.tune.variants import format_value

_MAX_TRIALS = 30  # trials listed in a table of the page; results.csv lists all


def write_report(results: SweepResults, folder: StoragePath) -> None:
    """Write report.md, report.html and results.csv into `folder`."""
    markdown = render_markdown(results)
    (folder / "results.csv").write_bytes(_csv(results).encode())
    (folder / "report.md").write_bytes(markdown.encode())
    (folder / "report.html").write_bytes(render_html(results, markdown).encode())


def render_markdown(results: SweepResults) -> str:
    """Return the report as Markdown, without secrets in URLs."""
    sections: list[Iterable[str]] = [_summary(results)]
    for benchmark in results.benchmarks:
        effects = results.effects(benchmark)
        sections.append([f"## {benchmark}", *_effect_sentences(effects), "", *_score_table(results, benchmark)])
        sections.append(_effect_table(effects))
    sections += [
        _published(results),
        _losses(results),
        _search(results),
        _pareto(results),
        _cost(results),
        _failures(results),
    ]
    sections.append(_commands(results))
    return redact_urls("\n".join(line for section in sections for line in (*section, "")))


def _csv(results: SweepResults) -> str:
    rows = results.table()
    if not rows:
        return ""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: redact_urls(value) if isinstance(value, str) else value for name, value in row.items()})
    return text.getvalue()


def _summary(results: SweepResults) -> Iterator[str]:
    counts = Counter(row.trial.outcome for row in results.rows)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    yield f"# {results.sweep.name}"
    yield ""
    yield f"{len(results.rows)} trials of `{results.sweep.recipe}`: {outcomes}."


def _effect_sentences(effects: Iterable[Effect]) -> Iterator[str]:
    """Yield one sentence per effect, in points (hundredths of the mean score per question)."""
    yield ""
    for effect in effects:
        change = f"{effect.axis}: {effect.level} instead of {effect.reference_level}"
        interval = f"(95 % interval {100 * effect.low:+.1f} to {100 * effect.high:+.1f})"
        points = f"{100 * abs(effect.difference):.1f} points"
        if effect.spans_zero:
            direction = "more" if effect.difference > 0 else "less"
            yield f"- {change}: {points} {direction} {interval}. The interval spans zero: no significant difference."
        else:
            yield f"- **{change} {'gains' if effect.difference > 0 else 'costs'} {points}** {interval}."


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _score_table(results: SweepResults, benchmark: str) -> Iterator[str]:
    """Yield a row per combination of levels: mean and standard deviation over its seeds, and the published score."""
    scores: dict[tuple[str, ...], list[float]] = defaultdict(list)
    published: dict[tuple[str, ...], float] = {}
    for row in results.rows:
        scores[row.levels] += []
        paper_scores = published_scores(row.trial.variant.recipe)
        if benchmark in paper_scores:
            published[row.levels] = paper_scores[benchmark]
    for row in results.best_rows:
        if benchmark in row.scores:
            scores[row.levels].append(row.scores[benchmark])
    metric = results.headline_metric(benchmark)
    yield from _table_head([*results.sweep.axes, metric, "seeds", *(["published"] if published else [])])
    for levels, values in scores.items():
        mean = f"{statistics.mean(values):.3f}" if values else "failed"
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        paper = [str(published.get(levels, ""))] if published else []
        yield _table_row([*levels, mean + deviation, str(len(values)), *paper])


def _effect_table(effects: list[Effect]) -> Iterator[str]:
    if not effects:
        return
    yield "Effect of each level with all other levels and the seed fixed: the difference in the fraction of correct"
    yield "answers, with its 95 % interval (paired bootstrap over runs and questions)."
    yield ""
    yield from _table_head(["axis", "level", "instead of", "difference", "95 % interval", "pairs of runs", "questions"])
    for effect in effects:
        interval = f"{_signed(effect.low)} to {_signed(effect.high)}"
        values = [_signed(effect.difference), interval, str(effect.pairs), str(effect.questions)]
        yield _table_row([effect.axis, effect.level, effect.reference_level, *values])


def _published(results: SweepResults) -> Iterator[str]:
    """Yield the paper's scores for the cells of the sweep that the paper reports."""
    cells = {row.levels: published_scores(row.trial.variant.recipe) for row in results.rows}
    published = {levels: scores for levels, scores in cells.items() if scores}
    if not published:
        return
    names = list(dict.fromkeys(name for scores in published.values() for name in scores))
    yield "## Published"
    yield ""
    yield f"The paper's scores for these cells ({SOURCE}). Each is a single run: a difference of a point may be noise."
    yield ""
    yield from _table_head([*results.sweep.axes, *names])
    for levels, scores in published.items():
        yield _table_row([*levels, *(f"{scores[name]:g}" if name in scores else "" for name in names)])


def _losses(results: SweepResults) -> Iterator[str]:
    """Yield the final finetuning loss of each cell; the HTML page adds the curves."""
    losses: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in results.rows:
        if "loss" in row.objectives:
            losses[row.levels].append(row.objectives["loss"])
    if not losses:
        return
    yield f"## {CURVES_TITLE}"
    yield ""
    yield "Mean over the last twentieth of the steps; report.html shows the curves."
    yield ""
    yield from _table_head([*results.sweep.axes, "loss", "lowest", "highest", "runs"])
    for levels, values in losses.items():
        statistic_cells = [f"{value:.3f}" for value in (statistics.mean(values), min(values), max(values))]
        yield _table_row([*levels, *statistic_cells, str(len(values))])


def _search(results: SweepResults) -> Iterator[str]:
    """Yield the trials of a search, best first."""
    search = results.sweep.search
    if search is None:
        return
    name, direction = next(iter(search.objective.items()))
    rows = sorted(results.rows, key=lambda row: _sort_key(row, name, direction))
    seed_column = ["seed"] if results.sweep.seeds else []
    yield f"## {SEARCH_TITLE}"
    yield ""
    yield f"The tables above show each variant's best trial by {name}. If the objective is a benchmark's score, that"
    yield "score is biased, because the trial was selected by it."
    yield ""
    yield from _table_head([*results.sweep.axes, *seed_column, *search.space, *search.objective, "outcome"])
    for row in rows[:_MAX_TRIALS]:
        variant = row.trial.variant
        seed = [str(variant.seed)] if results.sweep.seeds else []
        objectives = [
            f"{row.objectives[objective]:.4g}" if objective in row.objectives else "" for objective in search.objective
        ]
        settings = [format_value(value) for value in variant.searched.values()]
        yield _table_row([*row.levels, *seed, *settings, *objectives, _outcome(row)])
    if len(rows) > _MAX_TRIALS:
        yield ""
        yield f"results.csv lists {len(rows) - _MAX_TRIALS} more trials."


def _pareto(results: SweepResults) -> Iterator[str]:
    """Yield the trials of a search for several objectives between which only a preference can decide."""
    search = results.sweep.search
    if search is None or len(search.objective) < 2 or not results.pareto_rows:
        return
    first = next(iter(search.objective))
    yield f"## {PARETO_TITLE}"
    yield ""
    yield "No other trial is better in one objective without being worse in another."
    yield ""
    yield from _table_head([*results.sweep.axes, *search.space, *search.objective])
    for row in sorted(results.pareto_rows, key=lambda row: _sort_key(row, first, search.objective[first])):
        settings = [format_value(value) for value in row.trial.variant.searched.values()]
        objectives = [f"{row.objectives[objective]:.4g}" for objective in search.objective]
        yield _table_row([*row.levels, *settings, *objectives])


def _sort_key(row: TrialRow, name: str, direction: str) -> tuple[bool, float]:
    value = row.objectives.get(name, 0.0)
    return name not in row.objectives, -value if direction == "max" else value


def _outcome(row: TrialRow) -> str:
    """Return the trial's outcome; of a trial that was stopped early also the last rung it reached and its loss."""
    if row.trial.outcome != "stopped" or row.trial.record is None:
        return row.trial.outcome
    losses = row.trial.record.losses
    return f"stopped at {100 * max(losses) // RUNGS} %, loss {losses[max(losses)]:.3f}" if losses else "stopped"


def _cost(results: SweepResults) -> Iterator[str]:
    """Yield the device-hours of training, with and without sharing stages."""
    if not results.unshared_device_hours:
        return
    gpus = any(row.trial.variant.recipe.resources.gpus_per_worker for row in results.rows)
    unit = "GPU-hours" if gpus else "CPU-core-hours"
    total, unshared = results.total_device_hours, results.unshared_device_hours
    needed = sum(stage.users for stage in results.plan.planned_stages)
    yield "## Cost"
    yield ""
    yield (
        f"Training took {total:.2f} {unit}. Without shared stages, the same trials would have taken {unshared:.2f}: "
        f"sharing saved {unshared - total:.2f} ({(unshared - total) / unshared:.0%}). "
        f"The trials need {needed} stages, including preparation and evaluation, of which "
        f"{len(results.plan.planned_stages)} are distinct."
    )
    yield ""
    price = results.price
    if price is not None:
        yield (
            f"At {price:g} for one of them, training cost {price * total:.2f}; sharing saved "
            f"{price * (unshared - total):.2f}."
        )
        yield ""
    prices = [] if price is None else ["cost", "cost, shared stages split"]
    yield from _table_head(["trial", unit, f"{unit}, shared stages split", *prices])
    for row in results.rows[:_MAX_TRIALS]:
        hours = (row.device_hours, row.shared_device_hours)
        costs = [] if price is None else [f"{price * value:.2f}" for value in hours]
        yield _table_row([row.trial.variant.name or "the only variant", *(f"{value:.3f}" for value in hours), *costs])


def _failures(results: SweepResults) -> Iterator[str]:
    failed = [row.trial for row in results.rows if row.trial.failure]
    if not failed:
        return
    yield from ("## Failed trials", "")
    for trial in failed:
        yield f"- {trial.variant.name}: {trial.failure}"


def _commands(results: SweepResults) -> Iterator[str]:
    """Yield the command that reproduces each row."""
    yield from (f"## {COMMANDS_TITLE}", "", "```sh")
    for row in results.rows:
        settings = [f"{key}={json.dumps(value)}" for key, value in row.trial.variant.settings.items()]
        words = [shlex.quote(word) for word in (results.sweep.recipe, *settings, *results.overrides)]
        yield f"raylava run {' '.join(words)}"
    yield "```"


def _table_head(cells: list[str]) -> Iterator[str]:
    yield _table_row(cells)
    yield _table_row(["---"] * len(cells))


def _table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
