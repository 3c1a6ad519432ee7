"""The report as one self-contained HTML page: its Markdown rendered, with plots by plotly and, for searches, Optuna."""

import html
import re
from collections import defaultdict
from collections.abc import Iterator

import optuna
import plotly.graph_objects as go
from markdown_it import MarkdownIt
from markupsafe import Markup
from optuna.trial import create_trial

from raylava.pages.render import render_with_plots, trusted
from raylava.tune.effects import Effect
from raylava.tune.results import SweepResults, TrialRow
from raylava.tune.study import RUNGS, distributions
from raylava.tune.sweep import SearchConfig
from raylava.tune.variants import TrialRecord

# Titles of the report's sections.
COMMANDS_TITLE, CURVES_TITLE, SEARCH_TITLE = "Commands to reproduce each row", "Finetuning loss", "Search"
PARETO_TITLE = "Best trials by several objectives"

_INK, _ACCENT, _MUTED = "#1d1d22", "#3454d1", "#8a8a96"
_COLOURS = ("#3454d1", "#d1495b", "#2a9d8f", "#e09f3e", "#7b2d8b", "#5c677d", "#9c6644", "#00798c")
_HEIGHT = 360  # pixels
_MIN_TRIALS = 4  # with fewer trials, plots of searched settings are omitted


def render_html(results: SweepResults, markdown: str) -> str:
    """Return the report as an HTML page that opens without network access; each section is followed by its plots."""
    renderer = MarkdownIt("commonmark", {"html": False}).enable("table")
    plots = _PlotRenderer()
    sections = []
    for section in re.split(r"(?=<h2>)", renderer.render(markdown)):
        title, _, rest = section.removeprefix("<h2>").partition("</h2>")
        folded = title == COMMANDS_TITLE
        sections.append(
            {
                "title": html.unescape(title),
                "folded": folded,
                "html": trusted(_with_scrolling_tables(rest if folded else section)),
                "plots": [
                    {"caption": caption, "html": plots.html(figure)}
                    for caption, figure in _plots(results, html.unescape(title))
                ],
            }
        )
    return render_with_plots("sweep.html", title=f"raylava sweep: {results.sweep.name}", sections=sections)


def _with_scrolling_tables(section: str) -> str:
    """Put each table into a box of its own that scrolls, so that a wide one does not widen the page."""
    return section.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")


class _PlotRenderer:
    """Renders plots as HTML; the first one embeds plotly's script."""

    def __init__(self) -> None:
        self._embed_script = True

    def html(self, figure: go.Figure) -> Markup:
        plot = figure.to_html(full_html=False, include_plotlyjs=self._embed_script, config={"displayModeBar": False})
        self._embed_script = False
        return trusted(plot)


def _plots(results: SweepResults, section: str) -> Iterator[tuple[str, go.Figure]]:
    """Yield (caption, figure) for each plot of a section of the report; plots without data are omitted."""
    if section in results.benchmarks:
        effects = results.effects(section)
        if effects:
            yield (
                "Effect of each level, with 95 % intervals over runs and questions; grey if the interval spans zero",
                _effects_plot(effects),
            )
            yield "Score of each run, by cell", _scores_plot(results, section)
    elif section == CURVES_TITLE:
        yield (
            "One line per run, averaged over consecutive steps; pale if the run was stopped early",
            _curves_plot(list(results.loss_curves())),
        )
    elif section == SEARCH_TITLE and results.sweep.search:
        yield from _search_plots(results, results.sweep.search)
    elif section == PARETO_TITLE and results.sweep.search:
        yield "Every finished trial; those that no other trial surpasses in both are joined", _pareto_plot(results)


def _effects_plot(effects: list[Effect]) -> go.Figure:
    """Return a forest plot: one line per effect with its interval."""
    names = [f"{effect.axis}: {effect.level} instead of {effect.reference_level}" for effect in effects]
    figure = go.Figure(
        go.Scatter(
            x=[effect.difference for effect in effects],
            y=names,
            mode="markers",
            marker={"size": 12, "color": [_MUTED if effect.spans_zero else _ACCENT for effect in effects]},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [effect.high - effect.difference for effect in effects],
                "arrayminus": [effect.difference - effect.low for effect in effects],
                "color": _INK,
                "thickness": 1.5,
            },
        )
    )
    figure.add_vline(x=0, line={"color": _MUTED, "dash": "dot"})
    figure.update_yaxes(autorange="reversed")
    return _styled(figure, "difference in the fraction of correct answers", "", height=120 + 50 * len(effects))


def _scores_plot(results: SweepResults, benchmark: str) -> go.Figure:
    """Return a plot with one point per run."""
    rows = [row for row in results.best_rows if benchmark in row.scores]
    figure = go.Figure(
        go.Scatter(
            x=[row.scores[benchmark] for row in rows],
            y=[" · ".join(row.levels) or "the only cell" for row in rows],
            text=[row.trial.variant.name for row in rows],
            mode="markers",
            marker={"size": 11, "color": _ACCENT, "opacity": 0.75},
        )
    )
    figure.update_yaxes(autorange="reversed")
    height = 120 + 34 * len({row.levels for row in rows})
    return _styled(figure, results.headline_metric(benchmark), "", height=height)


def _pareto_plot(results: SweepResults) -> go.Figure:
    """Return the trials by their first two objectives."""
    search = results.sweep.search
    assert search is not None
    first, second = list(search.objective)[:2]
    best = {id(row) for row in results.pareto_rows}
    figure = go.Figure()
    for name, chosen, color in (("other trials", False, _MUTED), ("best", True, _ACCENT)):
        rows = [row for row in results.rows if {first, second} <= row.objectives.keys() and (id(row) in best) == chosen]
        rows.sort(key=lambda row: row.objectives[first])
        figure.add_scatter(
            x=[row.objectives[first] for row in rows],
            y=[row.objectives[second] for row in rows],
            text=[row.trial.variant.name for row in rows],
            name=name,
            mode="lines+markers" if chosen else "markers",
            line={"shape": "hv", "dash": "dot"},
            marker={"size": 10, "color": color},
        )
    return _styled(figure, first, second, height=_HEIGHT)


def _curves_plot(curves: list[tuple[TrialRow, list[tuple[int, float]]]]) -> go.Figure:
    """Return the loss curves, one colour per cell, or per trial if the sweep has no axes."""
    figure = go.Figure()
    cells = list(dict.fromkeys(row.levels or (row.trial.variant.name,) for row, _ in curves))
    for row, points in curves:
        cell = row.levels or (row.trial.variant.name,)
        figure.add_scatter(
            x=[step for step, _ in points],
            y=[loss for _, loss in points],
            name=" · ".join(cell),
            legendgroup=" · ".join(cell),
            showlegend=cell not in {trace.meta for trace in figure.data},
            meta=cell,
            text=row.trial.variant.name,
            line={"color": _COLOURS[cells.index(cell) % len(_COLOURS)], "width": 1.5},
            opacity=0.45 if row.trial.outcome == "stopped" else 0.9,
        )
    figure.update_yaxes(type="log")
    return _styled(figure, "step", "loss", height=_HEIGHT + 60)


def _search_plots(results: SweepResults, search: SearchConfig) -> Iterator[tuple[str, go.Figure]]:
    """Yield Optuna's plots of each variant's study, for each compared value."""
    studies: dict[str, list[TrialRecord]] = defaultdict(list)
    for row in results.rows:
        seed = "" if row.trial.variant.seed is None else f" seed {row.trial.variant.seed}"
        if row.trial.record:
            studies[f"{' · '.join(row.levels)}{seed}: ".removeprefix(": ")].append(row.trial.record)
    for prefix, trials in studies.items():
        for name, valued_trials in _compared_values(search, trials):
            if len(valued_trials) >= _MIN_TRIALS:
                yield from _study_plots(search, f"{prefix}{name}", valued_trials)


ValuedTrials = list[tuple[TrialRecord, float]]


def _compared_values(search: SearchConfig, trials: list[TrialRecord]) -> Iterator[tuple[str, ValuedTrials]]:
    """Yield (name, trials with values) for each objective and, with early stopping, for the loss at the first rung.

    Objectives exist only for finished trials, the loss at the first rung also for those that were stopped.
    """
    for objective in search.objective:
        yield objective, [(trial, trial.objectives[objective]) for trial in trials if objective in trial.objectives]
    if search.early_stopping:
        first_rung = round(RUNGS * search.early_stopping.grace)
        name = f"loss after {100 * first_rung // RUNGS} % of finetuning"
        yield name, [(trial, trial.losses[first_rung]) for trial in trials if first_rung in trial.losses]


def _study_plots(search: SearchConfig, caption: str, valued_trials: ValuedTrials) -> Iterator[tuple[str, go.Figure]]:
    study = optuna.create_study()
    space = distributions(search)
    for trial, value in valued_trials:
        study.add_trial(create_trial(params=dict(trial.settings), distributions=space, value=value))
    plots, name = optuna.visualization, caption.rpartition(": ")[2]
    yield f"{caption}: trials by their settings", _styled(plots.plot_parallel_coordinate(study, target_name=name))
    if len(search.space) > 1:
        figure = plots.plot_param_importances(study, target_name=name)
        yield f"{caption}: fraction of the variance explained by each setting (fANOVA)", _styled(figure, height=240)


def _styled(
    figure: go.Figure, x_title: str | None = None, y_title: str | None = None, height: int = _HEIGHT
) -> go.Figure:
    figure.update_layout(
        template="simple_white",
        height=height,
        margin={"l": 10, "r": 20, "t": 20, "b": 40},
        font={"family": "system-ui, sans-serif", "size": 14, "color": _INK},
        title=None,
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},  # beside the plot, a phone has no room
    )
    if x_title is not None:
        figure.update_xaxes(title=x_title, automargin=True)
        figure.update_yaxes(title=y_title, automargin=True)
    return figure
