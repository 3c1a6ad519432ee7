"""Training stages in a report: learning curves from metrics.jsonl, and what the step log sums up."""

from collections.abc import Mapping, Sequence
from typing import Any

from raylava.pipeline.run_report.stages import ReportStage
from raylava.train.step_log import recorded_steps

TRAINING_STAGES = ("pretrain", "finetune")
MAX_POINTS = 400  # of a curve
# The curves by the name of the metric in metrics.jsonl.
CURVES = {
    "loss": "loss",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens/s",
    "data_wait_fraction": "data wait, share of time",
}
_SUMMARY = ("steps", "samples", "tokens", "loss_tokens", "first_loss", "final_loss", "tokens_per_second")


def training_data(stage: ReportStage) -> dict[str, Any]:
    """Return the curves of a training stage, complete or not, with its totals and the mechanisms in force."""
    steps = recorded_steps(stage.path)
    return {
        "label": stage.label,
        "recorded_steps": len(steps),
        "summary": {name: stage.metrics[name] for name in _SUMMARY if name in stage.metrics},
        "mechanisms": stage.metrics.get("mechanisms", {}),
        "curves": [
            {"name": name, "title": title, "points": points}
            for name, title in CURVES.items()
            if (points := downsample(steps, name))
        ],
    }


def downsample(steps: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Average a metric over consecutive steps into at most MAX_POINTS points [step, value]; steps count from 1.

    Steps without the metric, such as those with a loss that is not finite, are left out.
    """
    values = [(step["step"] + 1, float(step[name])) for step in steps if step.get(name) is not None]
    size = max(1, -(-len(values) // MAX_POINTS))
    windows = [values[start : start + size] for start in range(0, len(values), size)]
    return [[window[-1][0], sum(value for _, value in window) / len(window)] for window in windows]
