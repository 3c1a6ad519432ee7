"""Network traffic of one training step, as DeepSpeed 0.19 causes it with unmanaged gradient accumulation.

ZeRO 0 to 2 reduce whole gradients with an all-reduce: once per step at stages 0 and 1, once per pack at stage 2. ZeRO 1
and 2 then gather the updated weights. ZeRO 3 gathers all weights and scatters all gradients for every pack.
tests/ray/perf/test_memory.py compares this with the collectives of a two-rank run. All functions are pure.
"""

from dataclasses import dataclass

from raylava.perf.memory import GATHERED, REDUCE_BUCKET, ExecutionConfig, TrainableModel


@dataclass(frozen=True)
class Traffic:
    """Bytes that the collectives of a step operate on, by kind, and the number of large collectives."""

    all_reduce: float
    all_gather: float
    reduce_scatter: float
    collectives: float

    def bytes_sent(self, world_size: int) -> float:
        """Return the bytes that each device sends in ring collectives (Patarasu and Yuan 2009).

        An all-reduce counts twice: it is a reduce-scatter followed by an all-gather.
        """
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


def predict_traffic(model: TrainableModel, config: ExecutionConfig, packs: float, world_size: int) -> Traffic:
    """Return the traffic of a step in which every rank computes `packs` packs, which may be a mean over steps."""
    if world_size == 1:
        return Traffic(0, 0, 0, 0)
    if config.zero_stage == 3:
        return _partitioned_weights(model, packs)
    return _replicated_weights(model, config, packs)


def _replicated_weights(model: TrainableModel, config: ExecutionConfig, packs: float) -> Traffic:
    """Return the traffic of ZeRO 0, 1 and 2."""
    gradients = _gradient_bytes(model)
    reductions = packs if config.zero_stage == 2 else 1.0
    gathers = 0 if config.zero_stage == 0 else 1
    return Traffic(
        all_reduce=gradients * reductions,
        all_gather=gradients * gathers,  # the updated weights, as many bytes as their gradients
        reduce_scatter=0,
        collectives=_buckets(model) * reductions + gathers,
    )


def _partitioned_weights(model: TrainableModel, packs: float) -> Traffic:
    """Return the traffic of ZeRO 3. Weights within DeepSpeed's limit stay gathered from forward to backward pass."""
    parameters = model.shape.parameters
    gathers = packs * (1 if parameters <= GATHERED else 2)
    layers = model.shape.language.layers + model.shape.vision.layers
    return Traffic(
        all_reduce=0,
        all_gather=gathers * parameters * model.bytes_per_value,
        reduce_scatter=packs * _gradient_bytes(model),
        collectives=gathers * layers + packs * _buckets(model),
    )


def _gradient_bytes(model: TrainableModel) -> float:
    return float(model.parameters * model.bytes_per_value)


def _buckets(model: TrainableModel) -> int:
    """Return the number of reduce buckets that the gradients fill."""
    return -(-model.parameters // REDUCE_BUCKET)
