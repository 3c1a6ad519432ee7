"""What one device holds while training: states, gradients, buckets, activations by pack, logits. Pure functions.

The rules were read off DeepSpeed 0.19 and transformers 5.23 by listing what they allocate (tests/cost/test_memory.py
runs them and compares); sizes in bytes. `e` is 2 for bf16 and 4 for fp32.
"""

from dataclasses import dataclass

from raylava.config.recipe import Training
from raylava.perf.shapes import LanguageShape, LlavaShape

REDUCE_BUCKET = 500_000_000  # DeepSpeed's own limit, in parameters; the engine makes no bucket larger than it needs
GATHERED = 1_000_000_000  # DeepSpeed's max_live_parameters and max_reuse_distance
_ALWAYS_WHOLE = 100_000  # its param_persistence_threshold: ZeRO-3 leaves smaller weights whole on each device
_FP32 = 4


@dataclass(frozen=True)
class PackShape:
    """The fullest pack: its tokens, the supervised among them, its images."""

    tokens: int
    loss_tokens: int
    images: int


@dataclass(frozen=True)
class ExecutionConfig:
    """How a stage is trained: all that decides memory and speed and leaves the result as it is."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    activation_checkpointing: bool
    max_tokens_per_pack: int

    @property
    def name(self) -> str:
        """In words: `ZeRO 2, recomputed, packs of 4,096`."""
        return f"ZeRO {self.mode}, packs of {self.max_tokens_per_pack:,}"

    @property
    def mode(self) -> str:
        """In words, without the size of packs: `2, recomputed`."""
        kept = [("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)]
        offloaded = " and ".join(name for name, is_so in kept if is_so)
        words = [str(self.zero_stage)] + [f"host: {offloaded}"] * bool(offloaded)
        return ", ".join(words + ["recomputed"] * self.activation_checkpointing)


@dataclass(frozen=True)
class TrainableModel:
    """A stage's model: what trains beside the connector, and in what precision (bytes of a value)."""

    shape: LlavaShape
    language: bool
    vision: bool
    value: int

    @classmethod
    def of(cls, shape: LlavaShape, stage: str, training: Training) -> "TrainableModel":
        """As a recipe's stage (pretrain, finetune) trains it."""
        return cls(shape, stage == "finetune", training.vision_lr is not None, 2 if training.precision == "bf16" else 4)

    @property
    def parameters(self) -> int:
        """How many train."""
        return self.shape.trained(self.language, self.vision)


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and of its share of its host. `rest` is held between steps, `peak` at most, in the phase
    that `at` names.
    """

    weights: float
    optimizer: float
    gradients: float
    bucket: float
    gathered: float
    activations: float
    logits: float
    rest: float
    peak: float
    at: str
    host: float


def memory(model: TrainableModel, way: ExecutionConfig, load: PackShape, world_size: int) -> Memory:
    """What a step whose fullest pack is `load` holds, when packs before it have left their gradients."""
    states, host = _states(model, way, world_size)
    gradients = 0.0 if way.offload_optimizer and way.zero_stage > 1 else _gradients(model, way, world_size)
    bucket = float(min(REDUCE_BUCKET, model.parameters) * model.value * (way.zero_stage > 0))
    gathered = _gathered(model, way)
    saved, within = _activations(model, way, load)
    logits = 3.0 * _FP32 * load.loss_tokens * model.shape.language.vocabulary
    held = sum(states.values()) + gradients
    phases = {
        "vision tower": held + gathered + _vision_forward(model, load),
        "loss": held + gathered + bucket * (way.zero_stage != 2) + saved + logits,
        "backward": held + _gathered(model, way, times=2) + bucket + saved + within,
        "update": held + bucket * (way.zero_stage != 2) + _update(model, way, world_size),
    }
    at = max(phases, key=lambda name: phases[name])
    at_rest = (gradients + bucket) * (way.zero_stage == 3)
    return Memory(
        **states,
        gradients=gradients,
        bucket=bucket,
        gathered=gathered,
        activations=saved + within * (at == "backward"),
        logits=logits * (at == "loss"),
        rest=sum(states.values()) + at_rest,
        peak=phases[at],
        at=at,
        host=host,
    )


def _states(model: TrainableModel, way: ExecutionConfig, world_size: int) -> tuple[dict[str, float], float]:
    """Weights and optimizer states on the device, and what of them is on the host. An fp32 copy of what trains is kept
    even beside fp32 weights, but for stage 0.
    """
    shards = world_size if way.zero_stage else 1
    copy = model.value == 2 or way.zero_stage > 0
    optimizer = model.parameters * _FP32 * (2 + copy) / shards
    whole = model.shape.parameters * model.value
    if way.zero_stage < 3:
        return _placed(float(whole), optimizer, way)
    kept = _always_whole(model.shape) * model.value
    sharded = whole / world_size
    placed, host = _placed(sharded, optimizer, way)
    return placed | {"weights": placed["weights"] + kept}, host


def _placed(weights: float, optimizer: float, way: ExecutionConfig) -> tuple[dict[str, float], float]:
    host = weights * way.offload_parameters + optimizer * way.offload_optimizer
    device = {"weights": weights * (not way.offload_parameters), "optimizer": optimizer * (not way.offload_optimizer)}
    return device, host


def _always_whole(shape: LlavaShape) -> int:
    return sum(size * count for size, count in shape.tensors if size < _ALWAYS_WHOLE)


def _gradients(model: TrainableModel, way: ExecutionConfig, world_size: int) -> float:
    """What packs leave behind until the update: whole in the weights' precision, or a shard in fp32."""
    if way.zero_stage < 2:
        return float(model.parameters * model.value)
    return model.parameters * _FP32 / world_size


def _gathered(model: TrainableModel, way: ExecutionConfig, times: int = 1) -> float:
    """ZeRO-3's whole weights on the device; in the backward pass they are gathered anew beside those of the forward."""
    if way.zero_stage < 3:
        return 0.0
    return float(min(GATHERED, times * (model.shape.parameters - _always_whole(model.shape))) * model.value)


def _activations(model: TrainableModel, way: ExecutionConfig, load: PackShape) -> tuple[float, float]:
    """What the forward pass keeps for the backward pass, and the most that this needs besides."""
    language = model.shape.language
    layer = load.tokens * _layer_bytes(language, model.language, way.zero_stage == 3, model.value)
    norm = load.tokens * language.width * _FP32 * (1 + model.language)
    inner = load.tokens * language.intermediate * model.value
    embedding = language.embedding * model.value * model.language
    vision = _vision_saved(model, load)
    if not way.activation_checkpointing:
        return float(vision + language.layers * layer + norm), float(embedding + 2 * inner)
    inputs = load.tokens * language.layers * language.width * model.value
    # ZeRO-3's most is reached when a layer's weights are gathered anew, before its last product is there.
    temporary = 3 + model.language if way.zero_stage < 3 else -1
    return float(vision + inputs + norm), float(layer + embedding + temporary * inner)


def _layer_bytes(shape: LanguageShape, learns: bool, keeps_inputs: bool, value: int) -> int:
    """Of a token, kept by one decoder layer: two norms in fp32, queries, keys, values, their outcome, and the MLP's
    three products; the inputs of matrices too where these learn (ZeRO-3's linear layer keeps them in any case).
    """
    width, inner, attention = shape.width, shape.intermediate, shape.attention_width
    norms = 2 * _FP32 * (width * (1 + learns) + 1)
    products = 2 * attention + 2 * shape.kv_heads * shape.head_size + 3 * inner
    inputs = (2 * width + attention + inner) * (learns or keeps_inputs)
    return norms + value * (products + inputs) + _FP32 * shape.heads


def _vision_saved(model: TrainableModel, load: PackShape) -> float:
    """Kept by a tower that trains, which is never recomputed, and by the connector."""
    vision, width = model.shape.vision, model.shape.language.width
    connector = vision.patches * model.value * (vision.width + 2 * width)
    layer = vision.tokens * model.value * (9 * vision.width + 3 * vision.intermediate)
    return float(load.images * (connector + vision.layers * layer * model.vision))


def _vision_forward(model: TrainableModel, load: PackShape) -> float:
    """All hidden states, which transformers hands out, and one block at work."""
    vision = model.shape.vision
    states = (vision.layers + 1) * vision.width + 6 * vision.width + 2 * vision.intermediate
    return float(load.images * vision.tokens * model.value * states)


def _update(model: TrainableModel, way: ExecutionConfig, world_size: int) -> float:
    """AdamW's intermediate values, and gradients in fp32 where they are not yet."""
    half = model.value == 2
    if way.offload_optimizer:
        return 0.0
    if way.zero_stage == 0:
        largest = max(size for size, _ in model.shape.tensors)
        return _FP32 * max(model.parameters, 2.0 * largest + model.parameters * half)
    shards = {1: 1.5 * half, 2: 3.0 - half, 3: 3.0}[way.zero_stage]
    return shards * _FP32 * model.parameters / world_size


def checkpoint_bytes(model: TrainableModel, way: ExecutionConfig) -> float:
    """Of one checkpoint: what trains, its fp32 copy and Adam's moments; frozen weights are left out."""
    copy = model.value == 2 or way.zero_stage > 0
    return float(model.parameters * (model.value + _FP32 * (2 + copy)))


def result_bytes(model: TrainableModel) -> float:
    """Of the artifact: the whole model, or the connector where it alone trains."""
    return float((model.shape.parameters if model.language else model.parameters) * model.value)
