"""How many trials of a sweep run at once: as many as the cluster can train, as it grows and shrinks.

A cluster whose node types are known (its file is that of `ray up`, KubeRay or the local cluster) can hold what its
autoscaler may start. Of any other cluster only its live nodes are known; a few more trials than these can train are
started, whose stages request their resources from the autoscaler, if there is one.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from raylava.cluster.nodes import eventual_resources, startable_node_types
from raylava.config.recipe import Resources

_POLL_SECONDS = 5.0
_WAITING_TRIALS = 2  # beyond the capacity of a cluster that may grow


class ConcurrencyLimit:
    """Returns the number of trials that may run now; called often, it looks at the cluster every few seconds."""

    def __init__(
        self,
        resources: Sequence[Resources],
        node_labels: Mapping[str, str],
        maximum: int | None,
        may_grow: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`maximum` is the sweep's `max_concurrent_trials`, which replaces what the cluster can hold.

        `may_grow` tells that the cluster is not of this process, so that an autoscaler may add nodes to it.
        """
        self._resources, self._node_labels, self._maximum = resources, node_labels, maximum
        self._may_grow, self._clock = may_grow, clock
        self._limit, self._polled_at = 0, -_POLL_SECONDS

    def __call__(self) -> int:
        """Return the limit, at least one."""
        if self._maximum is not None:
            return self._maximum
        if self._clock() - self._polled_at >= _POLL_SECONDS:
            self._polled_at = self._clock()
            waiting = _WAITING_TRIALS if self._may_grow and startable_node_types() is None else 0
            self._limit = concurrent_trials(self._resources, eventual_resources(self._node_labels)) + waiting
        return self._limit


def concurrent_trials(resources: Sequence[Resources], available: Mapping[str, float]) -> int:
    """Return how many trials can train at once on the `available` CPUs and GPUs, at least one.

    Each trial is assumed to need the most CPUs and the most GPUs that any of the recipes requests.
    """
    cpus = max(request.workers * request.cpus_per_worker for request in resources)
    gpus = max(request.workers * request.gpus_per_worker for request in resources)
    capacity = int(available.get("CPU", 0) // cpus)
    if gpus:
        capacity = min(capacity, int(available.get("GPU", 0) // gpus))
    return max(1, capacity)
