"""The number of concurrent trials follows the most demanding recipe and the cluster as it grows and shrinks."""

import pytest

from raylava.cluster.nodes import NodeType
from raylava.config.recipe import Resources
from raylava.tune import concurrency
from raylava.tune.concurrency import ConcurrencyLimit, concurrent_trials

TWO_GPUS = [Resources(workers=2, gpus_per_worker=1)]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> list[NodeType]:
    """The live nodes of a cluster whose file is unknown."""
    nodes: list[NodeType] = []
    monkeypatch.setattr("raylava.cluster.nodes.live_nodes", lambda: nodes)
    monkeypatch.setattr("raylava.cluster.nodes.startable_node_types", lambda: None)
    monkeypatch.setattr(concurrency, "startable_node_types", lambda: None)
    return nodes


def gpu_node() -> NodeType:
    return NodeType("gpu", {"CPU": 8.0, "GPU": 2.0}, {}, 1)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 10.0
        return self.now


def test_concurrent_trials_are_limited_by_the_most_demanding_recipe() -> None:
    resources = [Resources(workers=2, gpus_per_worker=1), Resources(workers=4, gpus_per_worker=1, cpus_per_worker=2)]
    assert concurrent_trials(resources, {"CPU": 64.0, "GPU": 8.0}) == 2
    assert concurrent_trials(resources, {"CPU": 9.0, "GPU": 8.0}) == 1
    assert concurrent_trials(resources, {"CPU": 1.0}) == 1, "an autoscaling cluster may start without resources"


def test_cluster_without_gpu_nodes_gets_trials_whose_stages_ask_its_autoscaler(cluster: list[NodeType]) -> None:
    """As on KubeRay: the cluster starts with a head, and no file tells what it may become."""
    limit = ConcurrencyLimit(TWO_GPUS, {}, None, may_grow=True, clock=Clock())
    cluster.append(NodeType("head", {"CPU": 4.0}, {}, 1))
    assert limit() == 3, "one, and two that wait for nodes"
    cluster += [gpu_node(), gpu_node(), gpu_node()]
    assert limit() == 5
    cluster += [gpu_node()] * 5
    assert limit() == 10
    del cluster[2:]
    assert limit() == 3


def test_cluster_of_this_process_does_not_grow(cluster: list[NodeType]) -> None:
    cluster.append(gpu_node())
    assert ConcurrencyLimit(TWO_GPUS, {}, None, may_grow=False, clock=Clock())() == 1


def test_sweep_can_lower_and_raise_the_number(cluster: list[NodeType]) -> None:
    cluster += [gpu_node(), gpu_node()]
    assert ConcurrencyLimit(TWO_GPUS, {}, 1, may_grow=True, clock=Clock())() == 1
    assert ConcurrencyLimit(TWO_GPUS, {}, 9, may_grow=True, clock=Clock())() == 9


def test_cluster_is_looked_at_every_few_seconds_only(cluster: list[NodeType]) -> None:
    limit = ConcurrencyLimit(TWO_GPUS, {}, None, may_grow=False, clock=lambda: 100.0)
    cluster.append(gpu_node())
    assert limit() == 1
    cluster += [gpu_node(), gpu_node()]
    assert limit() == 1
