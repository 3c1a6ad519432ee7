"""Devices are found by option and by CUDA's name; clusters have a bandwidth and a price."""

from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.perf.hardware import Cluster, device_from_cuda_name, find_device, make_cluster, peak_flops, read_prices


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H800", "H800"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA A40", "A40"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "RTX A6000"),
    ],
)
def test_device_is_found_by_the_name_that_cuda_reports(cuda_name: str, name: str) -> None:
    device = device_from_cuda_name(cuda_name)
    assert device is not None
    assert device.name == name


@pytest.mark.parametrize(
    ("cuda_name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("Tesla T4", 65e12),
        ("Quadro RTX 6000", None),
        ("cpu", None),
    ],
)
def test_peak_flops_is_found_by_the_name_that_cuda_reports(cuda_name: str, peak: float | None) -> None:
    assert peak_flops(cuda_name) == peak


def test_unknown_gpu_is_rejected_with_the_list_of_known_ones() -> None:
    with pytest.raises(UserError, match="--gpu h1000: unknown GPU; choose one of: gb200, b200, "):
        find_device("h1000")


def test_all_network_cards_of_a_node_carry_its_traffic() -> None:
    """NCCL reaches about 370 GB/s over eight cards of 50 GB/s with an NVLink of 450 GB/s."""
    one_node, two_nodes = make_cluster(1, 8, "h100"), make_cluster(2, 8, "h100")
    single_gpu_nodes = make_cluster(2, 1, "h100")
    assert (one_node.bandwidth, two_nodes.bandwidth, single_gpu_nodes.bandwidth) == (450e9, 400e9, 50e9)
    assert isinstance(one_node, Cluster)


def test_prices_are_per_node_type(tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text("h100x8: 60.0\na100-40x8: 20\n")
    prices = read_prices(str(file))
    assert make_cluster(2, 8, "h100", prices).price_per_hour == 60.0
    assert make_cluster(2, 4, "h100", prices).price_per_hour is None


@pytest.mark.parametrize("line", ["h100: 3", "h100x8: free", "h100x8: -1", "h100x0: 5", "gpuxx: 2"])
def test_malformed_price_is_rejected_with_an_example(line: str, tmp_path: Path) -> None:
    file = tmp_path / "prices.yaml"
    file.write_text(line)
    with pytest.raises(UserError, match=r"write such as `h100x8: 60\.0`"):
        read_prices(str(file))
