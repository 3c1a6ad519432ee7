"""Renders the report of a run as one self-contained HTML page and writes it."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raylava.artifacts import Artifact
from raylava.config.recipe import Recipe
from raylava.console import escape
from raylava.errors import UserError, first_line
from raylava.pages.charts import bar_heights, line_chart, stage_graph
from raylava.pages.render import render
from raylava.pipeline.run_report.data import ReportSubject, report_data
from raylava.pipeline.run_report.stages import stages_of_run
from raylava.progress import ProgressReporter
from raylava.storage import StoragePath

logger = logging.getLogger(__name__)

REPORTS = "reports"  # folder of the storage


def render_report(data: Mapping[str, Any], images: Mapping[str, str]) -> str:
    """Return the page. `data` is that of `report_data`, `images` the data URIs that it refers to by name."""
    charts = {
        (run["label"], curve["name"]): line_chart(curve["points"])
        for run in data["training"]
        for curve in run["curves"]
    }
    return render(
        "run.html",
        script="gallery.js",
        title=f"{data['name']}: report",
        report=data,
        images=images,
        charts=charts,
        graph=stage_graph({row["label"]: row["inputs"] for row in data["stages"]}),
        stages={row["label"]: row for row in data["stages"]},
        bar_heights=bar_heights,
    )


def write_report(subject: ReportSubject, output: str | None = None) -> tuple[str, dict[str, Any]]:
    """Write the report below the storage's folder of reports or to a file; return its location and its data.

    Raises UserError when the file cannot be written.
    """
    images: dict[str, str] = {}
    data = report_data(subject, images)
    content = render_report(data, images).encode()
    if output is None:
        target = subject.storage / REPORTS / f"{subject.name}-{subject.fingerprint}.html"
        target.write_bytes(content)
        return str(target), data
    try:
        Path(output).write_bytes(content)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror}); name another file") from error
    return output, data


def report_run(
    recipe: Recipe,
    artifacts: Mapping[str, Artifact],
    storage: StoragePath,
    command: Sequence[str],
    started: float,
    reporter: ProgressReporter,
) -> None:
    """Write the report at the end of a run and say where it is; a page that cannot be written causes a warning.

    `command` are the words of the command line; `started` is when it began, in seconds since the epoch.
    """
    subject = ReportSubject(
        recipe.name, stages_of_run(artifacts), storage, shlex.join(command), recipe, built_since=started
    )
    try:
        path, _ = write_report(subject)
    except Exception as error:  # the run itself has succeeded
        logger.warning("the report could not be written: %s", first_line(error))
        logger.info("cause of the missing report", exc_info=error)
        return
    reporter.say(f"report: [bold]{escape(path)}[/]")
