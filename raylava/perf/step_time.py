"""How long a step takes: arithmetic at a sustained rate, what each pack and step costs besides, network, update. Pure.

A rate is stated (a share of the device's peak) or was measured on the machine at hand (estimate/calibrate.py).
"""

from dataclasses import dataclass

from raylava.perf.hardware import Device
from raylava.perf.memory import ExecutionConfig, PackShape, TrainableModel
from raylava.perf.traffic import Traffic

STATED_MFU = 0.4
_LATENCY = 20e-6  # seconds for each neighbour in a ring and collective: NCCL's order over InfiniBand or EFA
_UPDATE_BYTES = 28  # of each parameter: gradient, weight and two moments read, three of them written, in fp32
_UPDATE_RATE = 1e12  # bytes/s, what an AdamW kernel sustains of a data-centre GPU's memory
_HOST_RATE = 2e10  # bytes/s, what the same does on a worker's share of its host
_TO_HOST = 2e10  # bytes/s between a device and its host, PCIe 4 in practice
_PACK = 5e-3  # seconds: launches, hooks, what does not shrink with a pack


@dataclass(frozen=True)
class Speed:
    """One worker's. `flops` in FLOP/s sustained; seconds for each pack, each step, each trained parameter of its shard;
    `latency` in seconds a neighbour and collective; `source` says where this is from, `peak` is the device's in FLOP/s;
    `image` seconds for each to be decoded, where the cores that do it are those that compute.
    """

    flops: float
    pack: float
    step: float
    update: float
    latency: float
    source: str
    peak: float | None = None
    image: float = 0.0


@dataclass(frozen=True)
class JobSpec:
    """A step of packs of one size, on the slowest rank: FLOPs forward and backward, those of the language model's body
    forward alone (what is recomputed), images, and the fullest pack of the run. `packs` is a mean over steps.
    """

    load: PackShape
    packs: float
    most_packs: int
    flops: float
    body_forward: float
    images: float


@dataclass(frozen=True)
class StepSeconds:
    """A step's, of the slowest worker, by what it is spent on."""

    compute: float
    packs: float
    decoding: float
    network: float
    update: float

    @property
    def total(self) -> float:
        """All of it: nothing overlaps (the engine leaves DeepSpeed's overlap_comm off)."""
        return self.compute + self.packs + self.decoding + self.network + self.update


def nominal_speed(device: Device, mfu: float = STATED_MFU) -> Speed:
    """A device at a share of its peak."""
    told = f"{mfu:.0%} of {device.name}'s peak, stated"
    return Speed(device.flops * mfu, _PACK, 0.0, _UPDATE_BYTES / _UPDATE_RATE, _LATENCY, told, device.flops)


def step_seconds(
    speed: Speed,
    work: JobSpec,
    sent: Traffic,
    model: TrainableModel,
    way: ExecutionConfig,
    world_size: int,
    bandwidth: float,
) -> StepSeconds:
    """Of the work of the slowest rank; `bandwidth` in bytes/s."""
    shards = world_size if way.zero_stage else 1
    flops = work.flops + work.body_forward * way.activation_checkpointing
    waiting = sent.collectives * speed.latency * (world_size - 1)
    return StepSeconds(
        compute=flops / speed.flops,
        packs=work.packs * (speed.pack + _fetched(model, way)) + speed.step,
        decoding=work.images * speed.image,
        network=sent.sent(world_size) / bandwidth + waiting,
        update=model.parameters / shards * (_host_update(model) if way.offload_optimizer else speed.update),
    )


def _host_update(model: TrainableModel) -> float:
    """Seconds a parameter whose optimizer is on the host: gradients there, the update, weights back."""
    return _UPDATE_BYTES / _HOST_RATE + (4 + model.value) / _TO_HOST


def _fetched(model: TrainableModel, way: ExecutionConfig) -> float:
    """Seconds in which a pack brings weights from the host, forward and backward, where these are there."""
    return 2 * way.offload_parameters * model.shape.parameters * model.value / _TO_HOST
