"""What computes, and what it costs: devices by name, a cluster of them, a table of prices the user gives. Pure."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylava.config.load import read_mapping
from raylava.errors import UserError


@dataclass(frozen=True)
class Device:
    """A GPU. `flops` is its dense bf16 peak in FLOP/s (of fp16 where it has no bf16: V100, T4), `memory` in bytes, both
    from the makers' data sheets; `link` is the bandwidth to its neighbours in a node, `network` its share of the
    node's, both in bytes/s and one direction, as clouds commonly sell it.
    """

    name: str
    flops: float
    memory: float
    link: float
    network: float


def _device(name: str, teraflops: float, gigabytes: float, link: float, network: float) -> Device:
    return Device(name, teraflops * 1e12, gigabytes * 1e9, link * 1e9, network * 1e9)


# The first whose every word is in a device's name is taken: more words stand before fewer.
DEVICES = {
    "b200": _device("B200", 2250, 180, 900, 50),
    "h200": _device("H200", 989, 141, 450, 50),
    "h100-pcie": _device("H100 PCIe", 756, 80, 64, 25),
    "h100": _device("H100", 989, 80, 450, 50),
    "a100-40": _device("A100 40GB", 312, 40, 300, 6.25),
    "a100": _device("A100", 312, 80, 300, 12.5),
    "a800": _device("A800", 312, 80, 200, 12.5),
    "l40s": _device("L40S", 362, 48, 32, 6.25),
    "l4": _device("L4", 121, 24, 16, 3.1),
    "a10g": _device("A10G", 70, 24, 16, 3.1),
    "a10": _device("A10", 125, 24, 16, 3.1),
    "v100": _device("V100", 125, 16, 150, 3.1),
    "t4": _device("T4", 65, 16, 8, 1.5),
    "rtx-4090": _device("RTX 4090", 165, 24, 16, 1.25),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs of one kind. `price` is a node's for an hour, None where no table names it."""

    nodes: int
    gpus: int  # of a node
    device: Device
    price: float | None = None

    @property
    def world_size(self) -> int:
        """All GPUs, one worker each."""
        return self.nodes * self.gpus

    @property
    def bandwidth(self) -> float:
        """Bytes/s that a GPU sends in rings over all of them, one direction.

        Of a node's GPUs one sends to the next node in each ring, the others to their neighbours; with as many rings as
        network cards, all cards carry a share of every GPU's bytes.
        """
        if self.nodes == 1:
            return self.device.link
        return min(self.device.link, self.device.network * self.gpus)


def device(name: str) -> Device:
    """The device of an option's value. Raises UserError for one that is not listed."""
    found = DEVICES.get(name.lower())
    if found is None:
        raise UserError(f"--gpu {name}: not known; known: {', '.join(DEVICES)}")
    return found


def device_named(reported: str) -> Device | None:
    """The device that CUDA reports under this name ("NVIDIA H100 80GB HBM3"), None for one that is not listed."""
    words = set(re.findall(r"\w+", reported))
    return next((one for one in DEVICES.values() if words.issuperset(one.name.split())), None)


def peak_flops(reported: str) -> float | None:
    """The dense bf16 peak in FLOP/s of the device that is reported so; None for one that is not listed (a CPU)."""
    found = device_named(reported)
    return None if found is None else found.flops


def read_prices(path: str) -> dict[str, float]:
    """A price table: YAML, `<gpu>x<gpus of the node>: price of the node for an hour`, in whatever currency.

    Raises UserError for a file that is none.
    """
    found: dict[str, Any] = read_mapping(Path(path), "price table")
    for key, value in found.items():
        name, _, gpus = str(key).rpartition("x")
        if (
            name not in DEVICES
            or not gpus.isdigit()
            or not int(gpus)
            or not isinstance(value, int | float)
            or value < 0
        ):
            raise UserError(f"{path}: {key}: {value!r}: write such as `h100x8: 60.0`, a node's price for an hour")
    return {str(key): float(value) for key, value in found.items()}


def cluster(nodes: int, gpus: int, gpu: str, prices: dict[str, float] | None = None) -> Cluster:
    """A cluster as options name it, at the price that the table has for it."""
    return Cluster(nodes, gpus, device(gpu), (prices or {}).get(f"{gpu.lower()}x{gpus}"))
