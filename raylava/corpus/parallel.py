"""Maps numbered pieces of work on a Ray cluster with Ray Data."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raylava.cluster.nodes import eventual_resources, matching_resources, startable_node_types
from raylava.cluster.session import error_summary
from raylava.errors import RunError

Function = Callable[[int], Mapping[str, Any]]
# Maps items with a function, possibly on other nodes, to columns; yields the results in any order.
MapOnCluster = Callable[[Function, Sequence[int]], Iterator[dict[str, Any]]]


def map_with_ray_data(
    purpose: str,
    function: Function,
    items: Sequence[int],
    node_labels: dict[str, str],
    set_up: Callable[[], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Map items to rows of columns on Ray Data actors; yield them in the order of completion.

    `set_up` is called once in each actor. `function` must not return the column `error`. Raises RunError, which names
    the `purpose`, when it raises.
    """
    if not items:
        return
    import ray.data

    dataset: ray.data.Dataset = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    # Actors rather than tasks: each has a second item queued, so that none idles for Ray Data's scheduling interval
    # (0.2 s per item).
    workers = max(1, min(len(items), int(matching_resources(node_labels).get("CPU", 0))))
    eventual_workers = int(eventual_resources(node_labels).get("CPU", 0))
    # Without a maximum, Ray Data asks the autoscaler for nodes of any type.
    max_workers = None if startable_node_types() is None else max(workers, eventual_workers)
    pool = ray.data.ActorPoolStrategy(
        min_size=1, initial_size=workers, max_size=max_workers, max_tasks_in_flight_per_actor=2
    )
    results = dataset.map(
        _Worker, fn_constructor_args=(function, set_up), compute=pool, label_selector=node_labels or None
    )
    for columns in results.iter_rows():
        error = columns.pop("error")
        if error:
            raise RunError(f"{purpose} failed: {error}")
        yield columns


class _Worker:
    """Ray Data actor that maps an item to the columns that a function returns for it, or to the column `error`."""

    def __init__(self, function: Function, set_up: Callable[[], None] | None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # an actor has one CPU
        if set_up is not None:
            set_up()
        self._function = function
        gc.freeze()  # objects created by importing torch and transformers are permanent; do not scan them again

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {**self._function(int(row["item"])), "error": ""}
        except Exception as error:
            return {"error": error_summary(error)}
