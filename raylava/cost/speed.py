"""How long a step takes: arithmetic at a sustained rate, what each pack and step costs besides, network, update. Pure.

A rate is stated (a share of the device's peak) or was measured on the machine at hand (estimate/calibrate.py).
"""

from dataclasses import dataclass

from raylava.cost.hardware import Device
from raylava.cost.memory import Trained, Way
from raylava.cost.traffic import Traffic

STATED_MFU = 0.4
_LATENCY = 20e-6  # seconds for each neighbour in a ring and collective: NCCL's order over InfiniBand or EFA
_UPDATE_BYTES = 28  # of each parameter: gradient, weight and two moments read, three of them written, in fp32
_UPDATE_RATE = 1e12  # bytes/s, what an AdamW kernel sustains of a data-centre GPU's memory


@dataclass(frozen=True)
class Speed:
    """One worker's. `flops` in FLOP/s sustained; seconds for each pack, each step, each trained parameter of its shard;
    `latency` in seconds a neighbour and collective; `source` says where this is from, `peak` is the device's in FLOP/s.
    """

    flops: float
    pack: float
    step: float
    update: float
    latency: float
    source: str
    peak: float | None = None


@dataclass(frozen=True)
class StepSeconds:
    """A step's, of the slowest worker, by what it is spent on."""

    compute: float
    packs: float
    network: float
    update: float

    @property
    def total(self) -> float:
        """All of it: nothing overlaps (the engine leaves DeepSpeed's overlap_comm off)."""
        return self.compute + self.packs + self.network + self.update


def stated(device: Device, mfu: float = STATED_MFU) -> Speed:
    """A device at a share of its peak."""
    told = f"{mfu:.0%} of {device.name}'s peak, stated"
    return Speed(device.flops * mfu, 0.0, 0.0, _UPDATE_BYTES / _UPDATE_RATE, _LATENCY, told, device.flops)


def step_seconds(
    speed: Speed, flops: float, packs: float, sent: Traffic, model: Trained, way: Way, world_size: int, bandwidth: float
) -> StepSeconds:
    """`flops` and `packs` of the slowest rank, recomputed ones included; `bandwidth` in bytes/s."""
    shards = world_size if way.zero_stage else 1
    waiting = sent.collectives * speed.latency * (world_size - 1)
    return StepSeconds(
        compute=flops / speed.flops,
        packs=packs * speed.pack + speed.step,
        network=sent.sent(world_size) / bandwidth + waiting,
        update=model.parameters / shards * speed.update,
    )
