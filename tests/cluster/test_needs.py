"""What a recipe wants of a cluster and whether it gets it, computed before Ray is asked."""

import re
from pathlib import Path

import pytest

from raylava.cli import main
from raylava.cluster.nodes import NodeType, read_node_types
from raylava.cluster.placement import ResourceRequest, placements, resource_requests
from raylava.cluster.roles import ROLE, labels_for, matches
from raylava.config.load import load_recipe
from raylava.config.recipe import Recipe, Resources
from raylava.errors import UserError
from raylava.toy.demo import recipes_folder

ROOT = Path(__file__).parents[2]
CPUS = NodeType("cpus", {"CPU": 16}, {ROLE: "prepare"}, 4)
GPUS = NodeType("gpus", {"CPU": 96, "GPU": 8}, {ROLE: "train", "ray.io/market-type": "spot"}, 2)


def recipe(**resources: object) -> Recipe:
    found = load_recipe(str(recipes_folder() / "llava-gemma-2b.yaml"))
    return found.model_copy(update={"resources": Resources(**resources)})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("selector", "meant"),
    [
        ({}, True),
        ({"a": "x"}, True),
        ({"a": "y"}, False),
        ({"b": "x"}, False),
        ({"a": "!y"}, True),
        ({"b": "!x"}, True),
        ({"a": "in(x, y)"}, True),
        ({"a": "!in(x,y)"}, False),
        ({"a": "x", "b": "x"}, False),
    ],
)
def test_a_selector_means_nodes_as_ray_reads_it(selector: dict[str, str], meant: bool) -> None:
    assert matches({"a": "x"}, selector) is meant


def test_preparing_goes_to_cpu_nodes_and_training_to_gpu_nodes_where_the_cluster_has_roles() -> None:
    found = resource_requests(recipe(workers=16, cpus_per_worker=4, gpus_per_worker=1), roles=True)
    assert [(one.stages, one.workers, dict(one.bundle), dict(one.labels)) for one in found] == [
        (("prepare",), 1, {"CPU": 1}, {ROLE: "prepare"}),
        (("pretrain", "finetune"), 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"}),
        (("evaluate",), 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"}),
    ][: len(found)]
    assert all(not one.labels for one in resource_requests(recipe(workers=16), roles=False))


def test_a_recipes_own_labels_come_before_the_clusters_roles() -> None:
    own = Resources(train_node_labels={"ray.io/accelerator-type": "H100"})
    assert labels_for("train", own, roles=True) == {"ray.io/accelerator-type": "H100"}
    assert labels_for("prepare", own, roles=True) == {ROLE: "prepare"}


WANTED = ResourceRequest(("finetune",), 16, 16, {"CPU": 4, "GPU": 1}, {ROLE: "train"})


def test_what_does_not_fit_now_but_will_is_possible() -> None:
    (one,) = placements([WANTED], [], [CPUS, GPUS])
    assert (one.fits_now, one.fits_eventually, one.nodes, one.is_impossible) == (0, 16, 2, False)
    (one,) = placements([WANTED], [NodeType("n1", GPUS.resources, GPUS.labels, 1)], [CPUS, GPUS])
    assert (one.fits_now, one.fits_eventually) == (8, 16)


def test_nothing_is_called_impossible_where_nobody_knows_the_autoscaler() -> None:
    (one,) = placements([WANTED], [], None)
    assert (one.fits_now, one.fits_eventually, one.is_impossible) == (0, None, False)


@pytest.mark.parametrize(
    ("types", "reason"),
    [
        ([CPUS], "no node and no node type has these labels"),
        ([NodeType("small", {"CPU": 2, "GPU": 1}, GPUS.labels, 99)], "one worker does not fit on one node; .*small"),
        ([NodeType("gpus", GPUS.resources, GPUS.labels, 1)], "at most 8 of at least 16 workers fit; raise max_workers"),
    ],
)
def test_what_never_can_be_is_told_with_its_reason(types: list[NodeType], reason: str) -> None:
    (one,) = placements([WANTED], [], types)
    assert one.is_impossible
    assert re.search(reason, one.reason)


@pytest.mark.parametrize(
    "file", ["aws.yaml", "gcp.yaml", "laptop.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
)
def test_the_shipped_clusters_prepare_on_cpus_and_train_on_gpus(file: str) -> None:
    types = read_node_types(ROOT / "cluster" / file)
    cpus = [one for one in types if matches(one.labels, {ROLE: "prepare"})]
    gpus = [one for one in types if matches(one.labels, {ROLE: "train"})]
    assert cpus
    assert all(one.resources.get("CPU", 0) > 0 and not one.resources.get("GPU") for one in cpus)
    assert gpus
    assert all(one.resources.get("GPU", 0) > 0 for one in gpus)
    assert len(cpus) + len(gpus) == len(types)


def test_a_file_that_describes_no_cluster_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Pod\n")
    with pytest.raises(UserError, match="neither a `ray up` file nor a RayCluster"):
        read_node_types(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="not a cluster's file"):
        read_node_types(tmp_path / "none.yaml")


def test_check_says_before_anything_starts_what_a_cluster_never_will_have(capfd: pytest.CaptureFixture[str]) -> None:
    base = ["check", str(recipes_folder() / "llava-gemma-2b.yaml"), "--storage", "s3://bucket/raylava"]
    given = [*base, "--cluster", str(ROOT / "cluster" / "aws.yaml")]
    assert main([*given, "resources.workers=8", "resources.gpus_per_worker=1", "resources.cpus_per_worker=4"]) == 0
    out, err = capfd.readouterr()
    assert "the cluster can run it" in out
    assert "8 × {CPU: 4, GPU: 1} on raylava.io/role=train" in " ".join(err.split())
    assert main([*given, "resources.workers=8", "resources.gpus_per_worker=99"]) == 2
    assert "one worker does not fit on one node" in " ".join(capfd.readouterr().err.split())
