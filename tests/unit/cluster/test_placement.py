"""The resource requests of a recipe and their placement on a cluster, computed without Ray."""

import re
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.cluster.nodes import NodeType
from raylava.cluster.placement import ResourceRequest, placements, resource_requests
from raylava.cluster.roles import ROLE
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.toy.demo import recipes_folder

ROOT = Path(__file__).parents[3]
CPU_NODES = NodeType("cpus", {"CPU": 16}, {ROLE: "prepare"}, 4)
GPU_NODES = NodeType("gpus", {"CPU": 96, "GPU": 8}, {ROLE: "train", "ray.io/market-type": "spot"}, 2)
REQUEST = ResourceRequest(("finetune",), 16, 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"})


def recipe(**resources: object) -> Recipe:
    shipped = load_recipe(str(recipes_folder() / "llava-gemma-2b.yaml"))
    return shipped.model_copy(update={"resources": Resources(**resources)})  # type: ignore[arg-type]


def test_preparation_requests_cpu_nodes_and_training_gpu_nodes_on_a_cluster_with_roles() -> None:
    requests = resource_requests(recipe(workers=16, cpus_per_worker=4, gpus_per_worker=1), roles=True)
    assert [(request.stages, request.workers, dict(request.bundle), dict(request.labels)) for request in requests] == [
        (("prepare",), 1, {"CPU": 1}, {ROLE: "prepare"}),
        (("pretrain", "finetune"), 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"}),
        (("evaluate",), 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"}),
    ][: len(requests)]
    assert all(not request.labels for request in resource_requests(recipe(workers=16), roles=False))


def test_request_that_fits_only_after_autoscaling_is_possible() -> None:
    (placement,) = placements([REQUEST], [], [CPU_NODES, GPU_NODES])
    assert (placement.fits_now, placement.fits_eventually) == (0, 16)
    assert (placement.nodes, placement.is_impossible) == (2, False)
    live_node = NodeType("n1", GPU_NODES.resources, GPU_NODES.labels, 1)
    (placement,) = placements([REQUEST], [live_node], [CPU_NODES, GPU_NODES])
    assert (placement.fits_now, placement.fits_eventually) == (8, 16)


def test_no_request_is_impossible_while_the_autoscalers_node_types_are_unknown() -> None:
    (placement,) = placements([REQUEST], [], None)
    assert (placement.fits_now, placement.fits_eventually, placement.is_impossible) == (0, None, False)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ([CPU_NODES], "no node and no node type has these labels"),
        (
            [NodeType("small", {"CPU": 2, "GPU": 1}, GPU_NODES.labels, 99)],
            "one worker does not fit on one node; .*small",
        ),
        (
            [NodeType("gpus", GPU_NODES.resources, GPU_NODES.labels, 1)],
            "at most 8 of at least 16 workers fit; raise max_workers",
        ),
    ],
)
def test_impossible_request_states_its_reason(types: list[NodeType], reason: str) -> None:
    (placement,) = placements([REQUEST], [], types)
    assert placement.is_impossible
    assert re.search(reason, placement.reason)


def test_check_reports_requests_that_a_cluster_can_never_satisfy(capfd: pytest.CaptureFixture[str]) -> None:
    base = ["check", str(recipes_folder() / "llava-gemma-2b.yaml"), "--storage", "s3://bucket/raylava"]
    command = [*base, "--cluster", str(ROOT / "cluster" / "aws.yaml")]
    assert main([*command, "resources.workers=8", "resources.gpus_per_worker=1", "resources.cpus_per_worker=4"]) == 0
    out, err = capfd.readouterr()
    assert "the cluster can run it" in out
    assert "8 × {CPU: 4, GPU: 1} on raylava.io/role=train" in " ".join(err.split())
    assert main([*command, "resources.workers=8", "resources.gpus_per_worker=1", "resources.cpus_per_worker=999"]) == 2
    assert "one worker does not fit on one node" in " ".join(capfd.readouterr().err.split())
