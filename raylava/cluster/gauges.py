"""What raylava exports to Prometheus through Ray, all of it: each gauge's name (`ray_raylava_…` there) and its tags.

cluster/grafana/raylava.json draws these. Drivers and workers set them; the figures that stay are in metrics.jsonl.
"""

from collections.abc import Mapping

from ray.util.metrics import Gauge

TAGS = ("run", "stage", "rank")  # run: the artifact's fingerprint; rank: of a training worker, or `driver`
DRIVER = "driver"

KNOWN = {
    # a training step as rank 0 saw it: StepMetrics (train/figures.py), name by name
    "step": "number of the last step",
    "loss": "its loss",
    "lr": "its learning rate",
    "grad_norm": "its gradient's norm",
    "seconds": "how long it took, waiting for data left out",
    "data_wait_fraction": "the share of its time that went on waiting for data",
    "checkpoint_stall_s": "how long training stood still for a checkpoint before it",
    "samples_per_second": "samples a second",
    "tokens_per_second": "tokens a second",
    "loss_tokens_per_second": "tokens that the loss counts, a second",
    "mfu": "model FLOPs utilisation",
    "memory_gb": "the worker's memory at its highest",
    "skipped": "1 when the step was skipped, for it was not finite",
    # of each rank, of the driver, of preparing
    "data_wait_seconds": "how long this rank waited for its last packs",
    "checkpoint_time_seconds": "when the last checkpoint was in storage, in seconds since the epoch",
    "worker_seconds": "how long this attempt's workers have been at it, all of them together",
    "lost_workers": "workers that were lost since this driver started",
    "rows": "rows that are prepared",
    "quarantined_rows": "rows that are set aside",
}


class Gauges:
    """The gauges of one process at one stage of one run."""

    def __init__(self, run: str, stage: str, rank: int | str = DRIVER) -> None:
        self._tags = {"run": run, "stage": stage, "rank": str(rank)}
        self._gauges: dict[str, Gauge] = {}

    def set(self, **figures: float | None) -> None:
        """Show figures by name, without `raylava_`; one that is None is left as it is."""
        for name, value in figures.items():
            if value is not None:
                self._gauge(name).set(float(value))

    def _gauge(self, name: str) -> Gauge:
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"raylava_{name}", description=KNOWN[name], tag_keys=TAGS)
            self._gauges[name].set_default_tags(self._tags)
        return self._gauges[name]


def exported() -> Mapping[str, str]:
    """Prometheus's name of each gauge → what it means."""
    return {f"ray_raylava_{name}": about for name, about in KNOWN.items()}
