"""Join the Ray cluster that is there, or start one on this machine for the length of a command.

Started here, its dashboard stays on loopback and its token authentication on; what Ray writes goes to its own folder.
"""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raylava.config.recipe import Resources
from raylava.errors import first_line

logger = logging.getLogger(__name__)


@contextmanager
def ray_session(resources: Resources) -> Iterator[None]:
    """Ray for the length of a `with`: RAY_ADDRESS names a cluster to join, else this machine becomes one.

    On this machine Ray is told of at least the CPUs that the recipe's workers ask for: a laptop with fewer shares them.
    """
    if ray.is_initialized():
        yield
        return
    silence_ray_logs()
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    else:
        _start(max(os.cpu_count() or 1, resources.workers * resources.cpus_per_worker))
    try:
        yield
    finally:
        ray.shutdown()


def _start(cpus: int) -> None:
    """A cluster of this machine alone.

    Its workers must be told where its API is: else Ray's own helpers ask the cluster that was last started here, take
    Train's controller for dead when that one has never heard of it, and remove the placement group of a running stage;
    or, when that one was killed, wait ten seconds for it at the end of every stage.
    """
    (port,) = free_ports(1)
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = f"http://127.0.0.1:{port}"  # all of Ray's processes inherit it
    try:
        ray.init(
            "local",  # without it, Ray joins whatever cluster was last started here, even one that was killed
            num_cpus=cpus,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def free_ports(count: int) -> list[int]:
    """So many ports of this machine that nobody listens on, all of them different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def here() -> NodeAffinitySchedulingStrategy:
    """The driver's own node: what watches a run must not go with the nodes that come and go."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def silence_ray_logs() -> None:
    """Ray Data's own progress bars would fight with ours. Both calls must come before datasets are made."""
    import ray.data

    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.memory_usage_poll_interval_s = None  # walks the page tables of a busy worker every second
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    logging.getLogger("ray.train").setLevel(logging.ERROR)


def told(error: Exception) -> str:
    """A task's error as a line for its result; the traceback stays in this worker's log.

    Returned and not raised: Ray Data wraps what is raised so that its first line no longer says what happened.
    """
    logger.error("a task failed", exc_info=error)
    return first_line(error)


@ray.remote(num_cpus=0)
class Progress:
    """How far remote work is: workers add to it, the driver asks it now and then."""

    def __init__(self) -> None:
        self._count = 0

    def add(self, units: int) -> None:
        """So many more units are done."""
        self._count += units

    def count(self) -> int:
        """Units done."""
        return self._count
