"""The driver of a training stage: starts Ray Train's workers, displays progress, and avoids nodes with broken GPUs.

`run` starts a TorchTrainer whose workers run trainer.Trainer. Ray Train restarts the workers after every failure;
`RestartPolicy`, which runs in its controller, ends the run instead where a restart cannot help.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

from raylava.cluster.gauges import Gauges
from raylava.cluster.nodes import live_nodes, startable_node_types
from raylava.cluster.placement import placements, training_request, worker_bundle
from raylava.cluster.roles import TRAIN, node_labels_for
from raylava.cluster.session import joins_running_cluster, on_driver_node
from raylava.config.recipe import Resources
from raylava.errors import RunError, first_line
from raylava.perf.memory import ExecutionConfig
from raylava.progress import ProgressBar, poll_in_background
from raylava.storage import StoragePath, storage_path
from raylava.train.process_environment import process_environment
from raylava.train.ray.failures import RestartPolicy
from raylava.train.ray.monitor import MonitorReport, RunMonitor
from raylava.train.ray.process_group import ProcessGroupConfig
from raylava.train.ray.worker import train_loop_per_worker
from raylava.train.spec import TrainSpec
from raylava.train.step_log import CHECKPOINTS, SNAPSHOT, summarize_run

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

logger = logging.getLogger(__name__)

_COLLECTIVE_TIMEOUT_S = 1800
_STALL_WARNING_S = 120.0  # without progress for this long, the stalled rank is reported
_MAX_START_FAILURES = 8
_NODE_ID = "ray.io/node-id"  # the label that Ray gives each node


def run(spec: TrainSpec, resources: Resources, progress: ProgressBar) -> dict[str, Any]:
    """Train the stage to its end, from its latest checkpoint if there is one. Return the run's metrics.

    Raises RunError with the first line of the root cause when training fails.
    """
    output = storage_path(spec.output)
    monitor = RunMonitor.options(scheduling_strategy=on_driver_node()).remote()  # type: ignore[attr-defined]
    with report_progress(monitor, progress, spec.stage, Gauges(output.name, spec.stage)):
        fit(spec, resources, monitor, output / CHECKPOINTS / SNAPSHOT)
    (output / CHECKPOINTS).delete()
    return summarize_run(output)


def build_trainer(
    spec: TrainSpec, resources: Resources, monitor: Any, avoided_nodes: Sequence[str] = ()
) -> "TorchTrainer":
    """Return Ray Train's trainer of a stage, whose workers report to a RunMonitor, on other nodes than the avoided."""
    from ray.train.torch import TorchTrainer

    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "spec": spec,
            "monitor": monitor,
            "threads": resources.cpus_per_worker,
            "cache_bytes": 1e9 * resources.cache_gb,
        },
        torch_config=ProcessGroupConfig(  # type: ignore[arg-type]  # Ray Train asks for no more than a BackendConfig
            backend="nccl" if resources.gpus_per_worker else "gloo",
            timeout_s=_COLLECTIVE_TIMEOUT_S,
            environment=process_environment(spec.training),
        ),
        scaling_config=_scaling_config(resources, avoided_nodes),
        run_config=_run_config(spec, monitor, len(avoided_nodes)),
    )


def _scaling_config(resources: Resources, avoided_nodes: Sequence[str]) -> ScalingConfig:
    workers = (resources.min_workers, resources.workers) if resources.min_workers else resources.workers
    return ScalingConfig(
        num_workers=workers,
        use_gpu=resources.gpus_per_worker > 0,
        resources_per_worker=worker_bundle(resources),
        label_selector=_node_labels(resources, avoided_nodes) or None,
    )


def _run_config(spec: TrainSpec, monitor: Any, broken_nodes: int) -> RunConfig:
    config, output = spec.training.checkpoint, storage_path(spec.output)
    root, stage, fingerprint = output.path.rsplit("/", 2)
    return RunConfig(
        name=f"{stage}/{fingerprint}/{CHECKPOINTS}",  # also the run's name in Ray's dashboard
        storage_path=root,
        storage_filesystem=output.filesystem,
        failure_config=FailureConfig(max_failures=-1),  # RestartPolicy ends runs that a restart cannot help
        callbacks=[RestartPolicy(monitor, broken_nodes=broken_nodes)],
        checkpoint_config=ray.train.CheckpointConfig(
            num_to_keep=config.keep_latest,
            checkpoint_score_attribute="loss" if config.keep_best else None,
            checkpoint_score_order="min",
        ),
    )


def _node_labels(resources: Resources, avoided_nodes: Sequence[str]) -> dict[str, str]:
    """Return the label selector of the workers' nodes."""
    avoided = {_NODE_ID: f"!in({','.join(avoided_nodes)})"} if avoided_nodes else {}
    return node_labels_for(TRAIN, resources) | avoided


def fit(spec: TrainSpec, resources: Resources, monitor: Any, snapshot: StoragePath) -> None:
    """Train, while Ray Train restarts lost workers. Raises RunError with the reason when RestartPolicy ends the run.

    Ray Train 2.60 retries neither a worker's death while it starts the training function nor its controller's: then it
    is started again here, up to eight times without a new checkpoint in its `snapshot`; so it is on other nodes once
    the GPU of a node has failed, and with other `auto` settings once the memory dry run has failed.
    """
    failures, last_snapshot = 0, b""
    avoided: list[str] = []
    while True:
        try:
            build_trainer(spec, resources, monitor, avoided).fit()
            return
        except (TrainingFailedError, RayActorError) as error:
            reason = error.controller_failure if isinstance(error, ControllerError) else error
            broken: dict[str, str] = ray.get(monitor.broken_nodes.remote())
            if len(broken) > len(avoided):
                avoided = sorted(broken)
                ray.get(monitor.take_error.remote())  # of a peer, as a consequence
                resources = _resources_elsewhere(spec.stage, resources, broken)
                logger.warning("%s: %s; resuming on other nodes", spec.stage, "; ".join(broken.values()))
                continue
            rejected: list[ExecutionConfig] = ray.get(monitor.rejected_configs.remote())
            if len(rejected) > len(spec.rejected_configs):
                spec = replace(spec, rejected_configs=tuple(rejected))
                ray.get(monitor.take_error.remote())  # of another rank that ran out of memory
                logger.warning(
                    "%s: out of memory with %s; starting again with less", spec.stage, rejected[-1].description
                )
                continue
            content = snapshot.read_bytes() if snapshot.exists() else b""
            failures, last_snapshot = (failures + 1 if content == last_snapshot else 1), content
            if not isinstance(reason, RayActorError) or failures > _MAX_START_FAILURES:
                raise RunError(f"{spec.stage} failed: {first_line(reason)}") from error
            logger.warning("%s: lost a worker while the workers were starting; starting them again", spec.stage)


def _resources_elsewhere(stage: str, resources: Resources, broken: Mapping[str, str]) -> Resources:
    """Return the resources with no more workers than fit on other nodes, now or after autoscaling.

    Ray Train 2.60 counts all nodes when it chooses the number of workers, also those that the label selector excludes.
    Raises RunError when the other nodes do not suffice.
    """
    request = training_request((stage,), resources, _node_labels(resources, sorted(broken)))
    (placement,) = placements([request], live_nodes(), startable_node_types() if joins_running_cluster() else [])
    if placement.is_impossible:
        failures = "; ".join(broken.values())
        raise RunError(f"{stage} failed: {failures}; the other nodes do not suffice ({placement.reason})")
    fits = placement.fits_now if placement.fits_eventually is None else placement.fits_eventually
    return resources.model_copy(update={"workers": min(resources.workers, max(request.min_workers, fits))})


@contextmanager
def report_progress(monitor: Any, progress: ProgressBar, stage: str, gauges: Gauges) -> Iterator[None]:
    """While `fit` blocks, update the progress bar, report lost workers, and warn once when a rank stalls."""
    last_stall: str | None = None
    total_lost = 0
    gauges.set(lost_workers=total_lost)

    def poll() -> None:
        nonlocal last_stall, total_lost
        report: MonitorReport = ray.get(monitor.poll.remote(_STALL_WARNING_S))
        for line in report.lines:
            progress.say(line)
        for done, total, metrics in report.updates:
            progress.update(done, total, **metrics)
        for lost in report.losses:
            total_lost += len(lost)
            gauges.set(lost_workers=total_lost)
            logger.warning("%s: lost %s; resuming from the last checkpoint", stage, ", ".join(lost))
        if report.stall and not last_stall:
            logger.warning("%s is stalled: %s", stage, report.stall)
        last_stall = report.stall

    with poll_in_background(poll):
        yield
