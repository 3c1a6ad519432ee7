"""What a step sends over the network, as DeepSpeed 0.19 sends it with accumulation unmanaged. Pure functions.

Counted in a run of two ranks (tests/cost/test_memory.py). Gradients go whole through an all-reduce at stages 0 to 2:
once a step at 0 and 1, with every pack at 2; stage 3 scatters those of every pack and gathers all weights for it.
"""

from dataclasses import dataclass

from raylava.perf.memory import GATHERED, REDUCE_BUCKET, ExecutionConfig, TrainableModel

_KEPT = (
    1_000_000_000  # parameters that ZeRO-3 keeps gathered from forward to backward (DeepSpeed's max_live_parameters)
)


@dataclass(frozen=True)
class Traffic:
    """Bytes that a step's collectives work on, by kind, and how many there are of them (the large ones)."""

    all_reduce: float
    all_gather: float
    reduce_scatter: float
    collectives: float

    def sent(self, world_size: int) -> float:
        """Bytes that each device sends, in rings (Patarasu and Yuan 2009): an all-reduce is a scatter and a gather."""
        return (2 * self.all_reduce + self.all_gather + self.reduce_scatter) * (world_size - 1) / world_size


def traffic(model: TrainableModel, way: ExecutionConfig, packs: float, world_size: int) -> Traffic:
    """Of a step in which every rank computes so many packs."""
    trained = float(model.parameters * model.value)
    buckets = -(-model.parameters // REDUCE_BUCKET)
    if world_size == 1:
        return Traffic(0, 0, 0, 0)
    if way.zero_stage < 3:
        times = packs if way.zero_stage == 2 else 1.0
        gathered = trained * (way.zero_stage > 0)
        return Traffic(trained * times, gathered, 0, buckets * times + (way.zero_stage > 0))
    whole = model.shape.parameters
    gathers = packs * (1 if whole <= GATHERED else 2)
    layers = model.shape.language.layers + model.shape.vision.layers
    return Traffic(0, gathers * whole * model.value, packs * trained, gathers * layers + packs * buckets)
