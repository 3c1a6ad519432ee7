"""The report as one self-contained HTML page: its Markdown rendered, and plots (plotly; Optuna's own for searches)."""

import html
import re
from collections import defaultdict
from collections.abc import Iterator

import optuna
import plotly.graph_objects as go
from markdown_it import MarkdownIt
from optuna.trial import create_trial

from raylava.tune.effects import Effect
from raylava.tune.records import TrialRecord
from raylava.tune.results import Row, SweepResults
from raylava.tune.study import RUNGS, distribution
from raylava.tune.sweep import Search

COMMANDS, CURVES, SEARCH = "To make a row again", "Finetuning loss", "Search"  # titles of the report's sections

_INK, _ACCENT, _MUTED = "#1d1d22", "#3454d1", "#8a8a96"
_COLOURS = ("#3454d1", "#d1495b", "#2a9d8f", "#e09f3e", "#7b2d8b", "#5c677d", "#9c6644", "#00798c")
_HEIGHT = 360  # pixels
_ENOUGH = 4  # trials without which a plot of parameters says nothing


def page(findings: SweepResults, text: str) -> str:
    """The whole page; opens without network. `text` is the report's Markdown: each section gets its plots below it."""
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    plots = _Plots()
    body = []
    for section in re.split(r"(?=<h2>)", markdown.render(text)):
        title, _, rest = section.removeprefix("<h2>").partition("</h2>")
        if title == COMMANDS:
            body.append(f"<details><summary>{title}</summary>{rest}</details>")
        else:
            body += [section, *(plots.html(*one) for one in _figures(findings, html.unescape(title)))]
    return _TOP.format(title=html.escape(findings.sweep.name)) + "\n".join(body) + "</html>\n"


class _Plots:
    """Figures as HTML; the first brings plotly's own script along."""

    def __init__(self) -> None:
        self._script = True

    def html(self, caption: str, figure: go.Figure) -> str:
        plot = figure.to_html(full_html=False, include_plotlyjs=self._script, config={"displayModeBar": False})
        self._script = False
        return f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _figures(findings: SweepResults, section: str) -> Iterator[tuple[str, go.Figure]]:
    """(caption, figure) for a section of the report; those that have nothing to show are left out."""
    if section in findings.benchmarks:
        found = findings.effects(section)
        if found:
            yield (
                "What each level buys, with 95 % intervals over runs and questions; grey where one spans zero",
                _forest(found),
            )
            yield "Every run, by cell", _runs(findings, section)
    elif section == CURVES:
        yield (
            "A line a run; means of neighbouring steps; pale where a run was stopped early",
            _curves(list(findings.curves())),
        )
    elif section == SEARCH and findings.sweep.search:
        yield from _searched(findings, findings.sweep.search)


def _forest(found: list[Effect]) -> go.Figure:
    """Differences and their intervals, a line each."""
    names = [f"{one.axis}: {one.level} instead of {one.against}" for one in found]
    figure = go.Figure(
        go.Scatter(
            x=[one.difference for one in found],
            y=names,
            mode="markers",
            marker={"size": 12, "color": [_MUTED if one.spans_zero else _ACCENT for one in found]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [one.high - one.difference for one in found],
                "arrayminus": [one.difference - one.low for one in found],
                "color": _INK,
                "thickness": 1.5,
            },
        )
    )
    figure.add_vline(x=0, line={"color": _MUTED, "dash": "dot"})
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, "difference in the share of right answers", "", height=120 + 50 * len(found))


def _runs(findings: SweepResults, benchmark: str) -> go.Figure:
    """A point a run."""
    rows = [row for row in findings.chosen if benchmark in row.scores]
    figure = go.Figure(
        go.Scatter(
            x=[row.scores[benchmark] for row in rows],
            y=[" · ".join(row.levels) or "the only cell" for row in rows],
            text=[row.ended.variant.name for row in rows],
            mode="markers",
            marker={"size": 11, "color": _ACCENT, "opacity": 0.75},
        )
    )
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, findings.headline(benchmark), "", height=120 + 34 * len({row.levels for row in rows}))


def _curves(curves: list[tuple[Row, list[tuple[int, float]]]]) -> go.Figure:
    """A colour a cell, or a trial's when there are no cells."""
    figure = go.Figure()
    cells = list(dict.fromkeys(row.levels or (row.ended.variant.name,) for row, _ in curves))
    for row, points in curves:
        cell = row.levels or (row.ended.variant.name,)
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[loss for _, loss in points],
            name=" · ".join(cell),
            legendgroup=" · ".join(cell),
            showlegend=cell not in {trace.meta for trace in figure.data},
            meta=cell,
            text=row.ended.variant.name,
            line={"color": _COLOURS[cells.index(cell) % len(_COLOURS)], "width": 1.5},
            opacity=0.45 if row.ended.how == "stopped" else 0.9,
        )
    figure.update_yaxes(type="log")
    return _styled(figure, "step", "loss", height=_HEIGHT + 60)


def _searched(findings: SweepResults, search: Search) -> Iterator[tuple[str, go.Figure]]:
    """Optuna's own plots of each variant's study, for each objective."""
    studies: dict[str, list[TrialRecord]] = defaultdict(list)
    for row in findings.rows:
        seed = "" if row.ended.variant.seed is None else f" seed {row.ended.variant.seed}"
        if row.ended.tried:
            studies[f"{' · '.join(row.levels)}{seed}: ".removeprefix(": ")].append(row.ended.tried)
    for name, tried in studies.items():
        for caption, values in _weighed(search, tried):
            if len(values) >= _ENOUGH:
                yield from _plots_of(search, f"{name}{caption}", values)


Weighed = list[tuple[TrialRecord, float]]


def _weighed(search: Search, tried: list[TrialRecord]) -> Iterator[tuple[str, Weighed]]:
    """What trials are compared by: the objectives, of those that reached them; early losses, of those stopped too."""
    for objective in search.objective:
        yield objective, [(one, one.values[objective]) for one in tried if objective in one.values]
    if search.asha:
        first = round(RUNGS * search.asha.grace)
        caption = f"loss after {100 * first // RUNGS} % of finetuning"
        yield caption, [(one, one.losses[first]) for one in tried if first in one.losses]


def _plots_of(search: Search, caption: str, weighed: Weighed) -> Iterator[tuple[str, go.Figure]]:
    study = optuna.create_study()
    space = {key: distribution(one) for key, one in search.space.items()}
    for one, value in weighed:
        study.add_trial(create_trial(params=dict(one.settings), distributions=space, value=value))
    plots, name = optuna.visualization, caption.rpartition(": ")[2]
    yield f"{caption}, trials by their settings", _styled(plots.plot_parallel_coordinate(study, target_name=name))
    if len(search.space) > 1:
        figure = plots.plot_param_importances(study, target_name=name)
        yield (
            f"{caption}: the share of its differences that each setting explains (fANOVA)",
            _styled(figure, height=240),
        )


def _styled(figure: go.Figure, across: str | None = None, up: str | None = None, height: int = _HEIGHT) -> go.Figure:
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 10, "r": 20, "t": 20, "b": 40},
        font={"family": "system-ui, sans-serif", "size": 14, "color": _INK},
        title=None,
    )
    if across is not None:
        figure.update_xaxes(title=across, automargin=True)
        figure.update_yaxes(title=up, automargin=True)
    return figure


_TOP = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>raylava sweep: {title}</title>
<style>
  body {{ font: 16px/1.5 system-ui, sans-serif; margin: 3rem auto; max-width: 62rem; padding: 0 1.25rem }}
  body {{ color: #1d1d22 }} h1 {{ margin-bottom: .25rem }}
  h2 {{ margin: 2.5rem 0 .5rem; border-bottom: 1px solid #dcdce4; padding-bottom: .25rem }}
  article {{ overflow-x: auto }}
  table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
  th, td {{ text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid #ececf1 }}
  th {{ font-weight: 600; color: #55555f }}
  figure {{ margin: 2.5rem 0 }} figcaption {{ color: #55555f; font-size: .92rem }}
  pre {{ background: #f5f5f8; padding: 1rem; border-radius: .5rem; overflow-x: auto; font-size: .85rem }}
  summary {{ font-weight: 600; cursor: pointer; margin-top: 2rem }}
</style>
"""
