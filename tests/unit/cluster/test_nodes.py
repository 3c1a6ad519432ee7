"""Node types read from cluster files."""

from pathlib import Path

import pytest

from raylava.cluster.nodes import read_node_types
from raylava.cluster.roles import ROLE, matches_selector
from raylava.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "file", ["aws.yaml", "gcp.yaml", "local-cluster.yaml", "kuberay/raycluster.yaml", "kuberay/rayjob.yaml"]
)
def test_shipped_clusters_prepare_on_cpu_nodes_and_train_on_gpu_nodes(file: str) -> None:
    types = read_node_types(ROOT / "cluster" / file)
    prepare_types = [node for node in types if matches_selector(node.labels, {ROLE: "prepare"})]
    train_types = [node for node in types if matches_selector(node.labels, {ROLE: "train"})]
    assert prepare_types
    assert all(node.resources.get("CPU", 0) > 0 and not node.resources.get("GPU") for node in prepare_types)
    assert train_types
    assert all(node.resources.get("GPU", 0) > 0 for node in train_types)
    assert len(prepare_types) + len(train_types) == len(types)


def test_file_that_describes_no_cluster_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("kind: Pod\n")
    with pytest.raises(UserError, match="neither a `ray up` file nor a RayCluster"):
        read_node_types(tmp_path / "a.yaml")
    with pytest.raises(UserError, match="not a valid cluster file"):
        read_node_types(tmp_path / "none.yaml")
