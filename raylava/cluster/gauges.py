"""All metrics that raylava exports to Prometheus through Ray, as gauges named `ray_raylava_…` with the tags of TAGS.

Drivers and workers set them, and cluster/grafana/raylava.json displays them. The permanent record of training is
metrics.jsonl.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

TAGS = ("run", "stage", "rank")  # run: fingerprint of the artifact; rank: of a training worker, or DRIVER
DRIVER = "driver"

GAUGES = {
    # One training step as measured by rank 0, with the names of StepMetrics (train/metrics.py).
    "step": "number of the last step",
    "loss": "loss of the last step",
    "lr": "learning rate of the last step",
    "grad_norm": "gradient norm of the last step",
    "step_time_s": "duration of the last step without waiting for data, in seconds",
    "data_wait_fraction": "fraction of the step's time spent waiting for data",
    "checkpoint_stall_s": "seconds that training was blocked by a checkpoint before the step",
    "samples_per_second": "samples per second",
    "tokens_per_second": "tokens per second",
    "loss_tokens_per_second": "tokens that contribute to the loss, per second",
    "mfu": "model FLOPs utilization",
    "memory_gb": "peak memory of the worker, in GB",
    "skipped": "1 if the step was skipped because its loss or gradient was not finite",
    # Measured by every rank, by the driver, or during preparation.
    "data_wait_s": "seconds that this rank waited for its last packs",
    "checkpoint_time_seconds": "time at which the last checkpoint was committed, in seconds since the epoch",
    "worker_seconds": "worker-seconds used by the current attempt, summed over all workers",
    "lost_workers": "workers lost since this driver started",
    "rows": "rows prepared",
    "quarantined_rows": "rows quarantined",
}


class Gauges:
    """The gauges of one process in one stage of one run."""

    def __init__(self, run: str, stage: str, rank: int | str = DRIVER) -> None:
        self._tags = {"run": run, "stage": stage, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}

    def set(self, **metrics: float | None) -> None:
        """Set gauges by their names in GAUGES. A value of None leaves its gauge unchanged."""
        for name, value in metrics.items():
            if value is not None:
                self._gauge(name).set(float(value))

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"raylava_{name}", description=GAUGES[name], tag_keys=TAGS)
            self._gauges[name].set_default_tags(self._tags)
        return self._gauges[name]


def exported_gauges() -> Mapping[str, str]:
    """Return the description of each gauge by its name in Prometheus."""
    return {f"ray_raylava_{name}": description for name, description in GAUGES.items()}
