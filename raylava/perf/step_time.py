"""Time of one training step on the slowest worker: compute, per-pack overhead, image decoding, network and update.

The speed of a worker is either nominal, a stated fraction of the device's peak, or was measured on this machine by
`raylava.estimate.calibrate`. All functions are pure.
"""

from dataclasses import dataclass

from raylava.perf.hardware import Device
from raylava.perf.memory import ExecutionConfig, PackShape, TrainableModel
from raylava.perf.traffic import Traffic

STATED_MFU = 0.4
_COLLECTIVE_LATENCY = 20e-6  # seconds per ring neighbour and collective, the order of NCCL's on InfiniBand or EFA
_UPDATE_BYTES = 28  # per parameter, all fp32: reads gradient, weight and two moments, writes the last three
_UPDATE_RATE = 1e12  # bytes/s of device memory that an AdamW kernel sustains on a data-center GPU
_HOST_UPDATE_RATE = 2e10  # bytes/s that AdamW sustains on a worker's share of the host
_HOST_LINK_RATE = 2e10  # bytes/s between a device and its host, PCIe 4 in practice
_PACK_OVERHEAD = 5e-3  # seconds of kernel launches and hooks, which do not shrink with the pack


@dataclass(frozen=True)
class DeviceSpeed:
    """Speed of one worker.

    `flops_per_s` is sustained. Times are in seconds: per pack, per step, per parameter of the worker's shard in the
    update, per ring neighbour and collective (latency), and per image to decode, where the cores that decode also
    compute. `source` describes the origin of these numbers; `peak_flops` is the device's peak in FLOP/s, None if it is
    unknown.
    """

    flops_per_s: float
    s_per_pack: float
    s_per_step: float
    s_per_parameter_update: float
    collective_latency_s: float
    source: str
    peak_flops: float | None = None
    s_per_image_decode: float = 0.0


@dataclass(frozen=True)
class StepWorkload:
    """Work of one step on the slowest rank, with packs of one size.

    `pack_shape` is the largest pack of the run. `packs` is the mean number of packs over steps, `max_packs`
    the maximum.
    `flops` covers forward and backward pass, `body_forward` the forward pass of the language model's body, which
    activation checkpointing repeats. `images` is the number of images.
    """

    pack_shape: PackShape
    packs: float
    max_packs: int
    flops: float
    body_forward: float
    images: float


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step on the slowest worker, by cause."""

    compute: float
    packs: float
    decoding: float
    network: float
    update: float

    @property
    def total(self) -> float:
        """Seconds of the whole step. Nothing overlaps, as the engine disables DeepSpeed's overlap_comm."""
        return self.compute + self.packs + self.decoding + self.network + self.update


def nominal_speed(device: Device, mfu: float = STATED_MFU) -> DeviceSpeed:
    """Return the speed of a device that sustains the fraction `mfu` of its peak."""
    return DeviceSpeed(
        flops_per_s=device.flops * mfu,
        s_per_pack=_PACK_OVERHEAD,
        s_per_step=0.0,
        s_per_parameter_update=_UPDATE_BYTES / _UPDATE_RATE,
        collective_latency_s=_COLLECTIVE_LATENCY,
        source=f"{mfu:.0%} of {device.name}'s peak, stated",
        peak_flops=device.flops,
    )


def step_time(
    speed: DeviceSpeed,
    workload: StepWorkload,
    traffic: Traffic,
    model: TrainableModel,
    config: ExecutionConfig,
    world_size: int,
    bandwidth: float,
) -> StepTime:
    """Return the time of a step on the slowest rank; `bandwidth` is in bytes/s."""
    return StepTime(
        compute=_executed_flops(workload, config) / speed.flops_per_s,
        packs=workload.packs * (speed.s_per_pack + _fetch_time(model, config)) + speed.s_per_step,
        decoding=workload.images * speed.s_per_image_decode,
        network=_network_time(speed, traffic, world_size, bandwidth),
        update=_updated_parameters(model, config, world_size) * _parameter_update_time(speed, model, config),
    )


def _executed_flops(workload: StepWorkload, config: ExecutionConfig) -> float:
    """Return the FLOPs of a step, with the forward pass that activation checkpointing repeats."""
    recomputed = workload.body_forward if config.activation_checkpointing else 0.0
    return workload.flops + recomputed


def _fetch_time(model: TrainableModel, config: ExecutionConfig) -> float:
    """Return the seconds in which a pack copies offloaded weights from the host, in forward and backward pass."""
    if not config.offload_parameters:
        return 0.0
    return 2 * model.shape.parameters * model.bytes_per_value / _HOST_LINK_RATE


def _network_time(speed: DeviceSpeed, traffic: Traffic, world_size: int, bandwidth: float) -> float:
    latency = traffic.collectives * speed.collective_latency_s * (world_size - 1)
    return traffic.bytes_sent(world_size) / bandwidth + latency


def _updated_parameters(model: TrainableModel, config: ExecutionConfig, world_size: int) -> float:
    """Return how many parameters each rank updates: all of them at ZeRO 0, its partition otherwise."""
    ranks = 1 if config.zero_stage == 0 else world_size
    return model.parameters / ranks


def _parameter_update_time(speed: DeviceSpeed, model: TrainableModel, config: ExecutionConfig) -> float:
    """Return the seconds per parameter of the update; an offloaded one copies gradients to the host, weights back."""
    if not config.offload_optimizer:
        return speed.s_per_parameter_update
    return _UPDATE_BYTES / _HOST_UPDATE_RATE + (4 + model.bytes_per_value) / _HOST_LINK_RATE
