"""GPU data sheets, clusters of GPUs and price tables.

All functions are pure except `read_prices`, which reads a file.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylava.config.load import read_mapping
from raylava.errors import UserError


@dataclass(frozen=True)
class Device:
    """A GPU model.

    `flops` is the dense bf16 peak in FLOP/s (fp16 on V100 and T4, which lack bf16) and `memory` is in bytes, both from
    the vendor's data sheet. `link` is the bandwidth to other GPUs of the node and `network` the GPU's share of the
    node's network bandwidth as cloud providers commonly offer it, both in bytes/s per direction.
    """

    name: str
    flops: float
    memory: float
    link: float
    network: float


def _device(name: str, teraflops: float, gigabytes: float, link: float, network: float) -> Device:
    return Device(name, teraflops * 1e12, gigabytes * 1e9, link * 1e9, network * 1e9)


# device_from_cuda_name() returns the first entry whose words all occur in the reported name, so that a more specific
# name ("H100 PCIe") must precede a more general one ("H100").
DEVICES = {
    "gb200": _device("GB200", 2500, 186, 900, 50),
    "b200": _device("B200", 2250, 180, 900, 50),
    "gh200": _device("GH200", 989, 96, 450, 50),
    "h200": _device("H200", 989, 141, 450, 50),
    "h100-pcie": _device("H100 PCIe", 756, 80, 64, 25),
    "h100-nvl": _device("H100 NVL", 835, 94, 300, 25),
    "h100": _device("H100", 989, 80, 450, 50),
    "h800": _device("H800", 989, 80, 200, 50),
    "h20": _device("H20", 148, 96, 450, 50),
    "a100-40": _device("A100 40GB", 312, 40, 300, 6.25),
    "a100": _device("A100", 312, 80, 300, 12.5),
    "a800": _device("A800", 312, 80, 200, 12.5),
    "l40s": _device("L40S", 362, 48, 32, 6.25),
    "l40": _device("L40", 181, 48, 32, 6.25),
    "a40": _device("A40", 150, 48, 32, 6.25),
    "l4": _device("L4", 121, 24, 16, 3.1),
    "a10g": _device("A10G", 70, 24, 16, 3.1),
    "a10": _device("A10", 125, 24, 16, 3.1),
    "v100": _device("V100", 125, 16, 150, 3.1),
    "t4": _device("T4", 65, 16, 8, 1.5),
    "rtx-6000-ada": _device("RTX 6000 Ada", 364, 48, 32, 3.1),
    "rtx-a6000": _device("RTX A6000", 155, 48, 32, 3.1),
    "rtx-4090": _device("RTX 4090", 165, 24, 16, 1.25),
}


_CPU = "cpu"  # in place of a GPU's name in price tables


@dataclass(frozen=True)
class Cluster:
    """Identical nodes with `gpus` GPUs each. `price_per_hour` is the price of one node, None if unknown."""

    nodes: int
    gpus: int
    device: Device
    price_per_hour: float | None = None

    @property
    def world_size(self) -> int:
        """Number of workers, one per GPU."""
        return self.nodes * self.gpus

    @property
    def bandwidth(self) -> float:
        """Bytes/s per direction that a GPU sends in ring collectives over the whole cluster.

        In each ring one GPU of a node sends to the next node and the others send to their neighbours. NCCL builds as
        many rings as the node has network cards, so that all cards together carry the bytes of every GPU.
        """
        if self.nodes == 1:
            return self.device.link
        return min(self.device.link, self.device.network * self.gpus)


def find_device(name: str) -> Device:
    """Return the GPU that `--gpu` names. Raises UserError for an unknown name."""
    device = DEVICES.get(name.lower())
    if device is None:
        raise UserError(f"--gpu {name}: unknown GPU; choose one of: {', '.join(DEVICES)}")
    return device


def device_from_cuda_name(cuda_name: str) -> Device | None:
    """Return the GPU with the name that CUDA reports, such as "NVIDIA H100 80GB HBM3"; None if it is not listed."""
    words = set(re.findall(r"\w+", cuda_name))
    return next((device for device in DEVICES.values() if words.issuperset(device.name.split())), None)


def peak_flops(cuda_name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of the GPU that CUDA reports under this name; None if it is not listed."""
    device = device_from_cuda_name(cuda_name)
    return None if device is None else device.flops


def read_prices(path: str) -> dict[str, float]:
    """Read a price table: a YAML mapping of `<gpu>x<gpus per node>` to the price of such a node per hour.

    A node without GPUs is `cpux<cores>`. The currency is the user's. Raises UserError if the file cannot be read or an
    entry has another form.
    """
    prices: dict[str, Any] = read_mapping(Path(path), "price table")
    for key, price in prices.items():
        if not _is_node_type(str(key)) or not isinstance(price, int | float) or price < 0:
            raise UserError(
                f"{path}: {key}: {price!r} is not a price; write such as `h100x8: 60.0`, a node's price per hour"
            )
    return {str(key): float(price) for key, price in prices.items()}


def _is_node_type(key: str) -> bool:
    name, _, gpus = key.rpartition("x")
    return name in (*DEVICES, _CPU) and gpus.isdigit() and int(gpus) > 0


def device_hour_price(prices: dict[str, float], uses_gpus: bool, gpu: str | None, gpus_per_node: int | None) -> float:
    """Return the price of one GPU (or CPU core) for an hour, as its share of a node's.

    `gpu` and `gpus_per_node` select among the node types of the table. Raises UserError unless they leave one price.
    """
    device_prices = set()
    for key, price in prices.items():
        name, _, count = key.rpartition("x")
        if (name != _CPU) == uses_gpus and gpu in (None, name) and gpus_per_node in (None, int(count)):
            device_prices.add(price / int(count))
    if len(device_prices) != 1:
        kind = "GPU" if uses_gpus else "CPU (such as `cpux8: 0.4`)"
        problem = f"lists {len(device_prices)} prices of a {kind}" if device_prices else f"lists no price of a {kind}"
        raise UserError(f"--prices: the table {problem}; list one, or select it by --gpu and --gpus-per-node")
    return device_prices.pop()


def make_cluster(nodes: int, gpus: int, gpu: str, prices: dict[str, float] | None = None) -> Cluster:
    """Return a cluster of `nodes` nodes with `gpus` GPUs of type `gpu`, priced by the table if it lists this node type.

    Raises UserError for an unknown GPU.
    """
    return Cluster(nodes, gpus, find_device(gpu), (prices or {}).get(f"{gpu.lower()}x{gpus}"))
