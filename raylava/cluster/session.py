"""Connect to a running Ray cluster, or start a local one for the duration of a command.

A local cluster keeps its dashboard on the loopback interface, leaves token authentication enabled and writes to Ray's
temporary folder.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylava.compat.environment import environment_variable
from raylava.config.recipe import Resources
from raylava.errors import first_line

logger = logging.getLogger(__name__)

# On one machine, Ray Train's default of 2 s is most of the time between the last step of a stage and its result, and
# there are no preemption notices, for which it would start a process per stage.
_LOCAL_TRAINING = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
_TRACK_TRAINING = "RAY_TRAIN_ENABLE_STATE_TRACKING"  # an actor of Ray Train keeps the state that the dashboard shows


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Provide Ray inside a `with` block: join the cluster of RAY_ADDRESS if it is set, else start a local cluster.

    On a cluster that it joins, the settings and logs of Ray's libraries are left as the user configured them, and Ray's
    dashboard shows the training runs. A local cluster declares at least the CPUs that the recipe's workers request; a
    machine with fewer oversubscribes. Does nothing if Ray is initialized already.
    """
    if ray.is_initialized():
        yield
        return
    joined = joins_running_cluster()
    configure_ray_libraries(joined)
    if joined:
        ray.init(log_to_driver=False)
    else:
        _start_local_cluster(max(os.cpu_count() or 1, resources.workers * resources.cpus_per_worker))
    try:
        yield
    finally:
        ray.shutdown()


def joins_running_cluster() -> bool:
    """Return whether RAY_ADDRESS names a cluster that `ray_session` joins."""
    return bool(os.environ.get("RAY_ADDRESS"))


def _start_local_cluster(cpus: int) -> None:
    """Start a single-node cluster and pass its API address to all of its processes.

    Without the address, Ray's helpers query the cluster that was last started on this machine. If that cluster does
    not know Train's controller, they consider the controller dead and remove the placement group of a running stage;
    if it was killed, they wait ten seconds for it at the end of every stage.
    """
    (port,) = free_ports(1)
    with environment_variable("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}"):  # inherited by Ray's processes
        ray.init(
            "local",  # otherwise Ray joins the cluster that was last started here, even if it was killed
            num_cpus=cpus,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )


def free_ports(count: int) -> list[int]:
    """Return `count` distinct TCP ports that are free on the loopback interface."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def on_driver_node() -> NodeAffinitySchedulingStrategy:
    """Return a strategy that pins an actor to the driver's node, which outlives the autoscaled worker nodes."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def configure_ray_libraries(joined: bool) -> None:
    """Make Ray Train's runs visible in the dashboard of a cluster that was `joined`, and change nothing else there.

    On a cluster of raylava's own, disable the progress bars and log output of Ray Data and Ray Train in this process,
    which would interfere with the console, and let Ray Train poll its workers often. Must be called before any dataset
    is created.
    """
    import ray.data

    if joined:
        os.environ.setdefault(_TRACK_TRAINING, "1")
        return
    for name, value in _LOCAL_TRAINING.items():
        os.environ.setdefault(name, value)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # polling walks the page tables of a busy worker every second
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def error_summary(error: Exception) -> str:
    """Return a task's error as one line, to be stored in its result, and log the traceback on the worker.

    Tasks return the line instead of raising: Ray Data wraps exceptions so that their first line loses the cause.
    """
    logger.error("a task failed", exc_info=error)
    return first_line(error)


@ray.remote(num_cpus=0)
class ProgressCounter:
    """Actor that counts the units of work done by remote tasks; the driver polls it."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, units: int) -> None:
        """Add `units` completed units."""
        self._count += units

    def count(self) -> int:
        """Return the number of completed units."""
        return self._count
