"""Memory of one device during training, as a table of named terms.

Each term is a function that returns bytes and documents its rule. PHASES lists the terms that are allocated in each
phase of a step; the predicted peak is the largest phase total. The rules describe DeepSpeed 0.19 and transformers 5.23;
tests/ray/perf/test_memory.py compares them with the allocations of a two-rank run.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce

from raylava.config.recipe import Training
from raylava.perf.shapes import LanguageShape, LlavaShape

REDUCE_BUCKET = 500_000_000  # parameters, DeepSpeed's default; the engine allocates no more than what trains
GATHERED = 1_000_000_000  # parameters, DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
_LOSS_CHUNK_BYTES = 512 << 20  # fp32 logits that the loss computes at once
_PERSISTENCE_THRESHOLD = 100_000  # parameters, DeepSpeed's stage3_param_persistence_threshold
_FP32 = 4  # bytes
_DENSE_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class PackShape:
    """The largest pack of a run: its tokens, how many of them contribute to the loss, and its images."""

    tokens: int
    loss_tokens: int
    images: int


@dataclass(frozen=True)
class ExecutionConfig:
    """Settings of a training stage that determine memory and speed but not the result."""

    zero_stage: int
    offload_optimizer: bool
    offload_parameters: bool
    activation_checkpointing: bool
    max_tokens_per_pack: int

    @property
    def description(self) -> str:
        """The settings in words, such as `ZeRO 2, recomputed, packs of 4,096`."""
        return f"ZeRO {self.short_description}, packs of {self.max_tokens_per_pack:,}"

    @property
    def short_description(self) -> str:
        """The settings in words without the pack size, such as `2, recomputed`."""
        offloads = [("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)]
        on_host = " and ".join(name for name, is_offloaded in offloads if is_offloaded)
        words = [str(self.zero_stage)]
        if on_host:
            words.append(f"host: {on_host}")
        if self.activation_checkpointing:
            words.append("recomputed")
        return ", ".join(words)


@dataclass(frozen=True)
class TrainableModel:
    """The model of a training stage: its shape, which parts train besides the connector, the weights' precision, and
    how the language model computes attention.
    """

    shape: LlavaShape
    trains_language: bool
    trains_vision: bool
    bytes_per_value: int  # of weights and activations: 2 for bf16, 4 for fp32
    attn_implementation: str = "varlen"

    @classmethod
    def of(cls, shape: LlavaShape, stage: str, training: Training) -> "TrainableModel":
        """Return the model as a recipe's `stage` (pretrain or finetune) trains it."""
        return cls(
            shape,
            trains_language=stage == "finetune",
            trains_vision=training.vision_lr is not None,
            bytes_per_value=2 if training.precision == "bf16" else 4,
            attn_implementation=training.attn_implementation,
        )

    @property
    def dense_attention(self) -> bool:
        """Whether attention computes all pairs of a pack's tokens and masks those of different samples.

        The other implementations compute each sample alone, from the restarting positions or the samples' lengths.
        """
        return self.attn_implementation in _DENSE_ATTENTION

    @property
    def parameters(self) -> int:
        """Number of trainable parameters."""
        return self.shape.trained(self.trains_language, self.trains_vision)


@dataclass(frozen=True)
class MemoryBreakdown:
    """Predicted bytes of one device; `host` is the bytes of the device's share of its host.

    `at_rest` is allocated between steps. `peak` is the maximum over a step and `peak_phase` the phase that reaches it.
    `activations` are the saved activations, with backward temporaries if the peak phase allocates these. `logits` is
    zero unless the peak phase allocates them.
    """

    weights: float
    optimizer: float
    gradients: float
    bucket: float
    gathered: float
    activations: float
    logits: float
    at_rest: float
    peak: float
    peak_phase: str
    host: float


@dataclass(frozen=True)
class StepContext:
    """The inputs of every term. `pack` is the largest pack; earlier packs of the step have left their gradients."""

    model: TrainableModel
    config: ExecutionConfig
    pack: PackShape
    world_size: int


Term = Callable[[StepContext], float]


# Terms: model states


def weights(step: StepContext) -> float:
    """ZeRO 0 to 2 hold all weights. ZeRO 3 holds a partition, which can be offloaded, and all small tensors."""
    partition = 0.0 if step.config.offload_parameters else _weight_partition(step)
    return partition + _persistent_weights(step)


def optimizer_states(step: StepContext) -> float:
    """Adam keeps two moments and fp32 master weights, partitioned by ZeRO 1 to 3, unless they are offloaded."""
    return 0.0 if step.config.offload_optimizer else _optimizer_partition(step)


def gradients(step: StepContext) -> float:
    """Packs accumulate gradients until the update: whole and in the weights' precision with ZeRO 0 and 1, as an fp32
    partition with ZeRO 2 and 3, which is on the host if the optimizer is offloaded.
    """
    if step.config.zero_stage < 2:
        return float(step.model.parameters * step.model.bytes_per_value)
    if step.config.offload_optimizer:
        return 0.0
    return step.model.parameters * _FP32 / step.world_size


# Terms: communication buffers


def reduce_bucket(step: StepContext) -> float:
    """ZeRO 1 to 3 reduce gradients through a buffer that is no larger than the trainable parameters."""
    if step.config.zero_stage == 0:
        return 0.0
    return float(min(REDUCE_BUCKET, step.model.parameters) * step.model.bytes_per_value)


def retained_bucket(step: StepContext) -> float:
    """ZeRO 1 and 3 keep the reduce bucket outside the backward pass; ZeRO 2 frees it after each backward pass."""
    return 0.0 if step.config.zero_stage == 2 else reduce_bucket(step)


def gathered_weights(step: StepContext) -> float:
    """ZeRO 3 gathers full weights in the forward pass, up to DeepSpeed's limit on live parameters."""
    return _gathered_copies(step, 1)


def regathered_weights(step: StepContext) -> float:
    """ZeRO 3 gathers full weights again in the backward pass while those of the forward pass are still allocated."""
    return _gathered_copies(step, 2)


def zero3_gradient_buffers(step: StepContext) -> float:
    """ZeRO 3 alone keeps its gradient partition and its reduce bucket allocated between steps."""
    if step.config.zero_stage < 3:
        return 0.0
    return gradients(step) + reduce_bucket(step)


# Terms: activations and logits


def vision_forward(step: StepContext) -> float:
    """The vision tower of transformers returns the hidden states of all layers; one block is being computed."""
    vision = step.model.shape.vision
    hidden_states = (vision.layers + 1) * vision.width
    block = 6 * vision.width + 2 * vision.intermediate
    return float(step.pack.images * vision.tokens * step.model.bytes_per_value * (hidden_states + block))


def attention_mask(step: StepContext) -> float:
    """transformers builds one mask of (tokens, tokens) for all layers: booleans for sdpa, values for eager."""
    if not step.model.dense_attention:
        return 0.0
    return float(step.pack.tokens**2 * (1 if step.model.attn_implementation == "sdpa" else step.model.bytes_per_value))


def saved_activations(step: StepContext) -> float:
    """The forward pass saves activations of vision tower, connector, decoder layers and final norm for the backward
    pass. Activation checkpointing reduces those of a decoder layer to its input and leaves the vision tower's.
    """
    language = step.model.shape.language
    layer = _layer_input(step) if step.config.activation_checkpointing else _layer_activations(step)
    final_norm = step.pack.tokens * _norm_values(step.model) * _FP32
    return float(_vision_activations(step) + language.layers * layer + final_norm)


def backward_temporaries(step: StepContext) -> float:
    """The backward pass allocates the embedding's gradient and, for the layer at work, buffers of the MLP's size.

    Activation checkpointing adds the recomputed layer. With ZeRO 3 it peaks before the layer's last MLP product is
    computed, when the layer's weights are gathered again.
    """
    embedding = _embedding_gradient(step.model)
    mlp_buffer = step.pack.tokens * step.model.shape.language.intermediate * step.model.bytes_per_value
    if not step.config.activation_checkpointing:
        return float(embedding + 2 * mlp_buffer)
    recomputed_layer = _layer_activations(step)
    if step.config.zero_stage == 3:
        return float(recomputed_layer + embedding - mlp_buffer)
    buffers = 4 if step.model.trains_language else 3
    return float(recomputed_layer + embedding + buffers * mlp_buffer)


def loss_logits(step: StepContext) -> float:
    """The loss holds a chunk's logits in fp32 and, in half precision, their gradient; it already has the gradient of
    the output layer's weight, which is that of the embedding.
    """
    model = step.model
    vocabulary = model.shape.language.vocabulary
    rows = min(step.pack.loss_tokens, loss_chunk_rows(vocabulary))
    rounded = model.bytes_per_value if model.bytes_per_value != _FP32 else 0
    return float(rows * vocabulary * (_FP32 + rounded) + _embedding_gradient(model))


# Terms: optimizer update

# fp32 copies of a rank's partition that the update allocates, by (ZeRO stage, bytes per value).
_UPDATE_COPIES = {(1, 2): 1.5, (1, 4): 0.0, (2, 2): 2.0, (2, 4): 3.0, (3, 2): 3.0, (3, 4): 3.0}


def update_temporaries(step: StepContext) -> float:
    """AdamW allocates intermediate values, and fp32 gradients where they do not exist yet: a multiple of the partition
    with ZeRO 1 to 3, at least one value per trainable parameter with ZeRO 0, nothing if the optimizer is offloaded.
    """
    model = step.model
    if step.config.offload_optimizer:
        return 0.0
    if step.config.zero_stage == 0:
        largest_tensor = max(size for size, _ in model.shape.tensors)
        fp32_gradients = model.parameters if model.bytes_per_value == 2 else 0
        return _FP32 * max(model.parameters, 2.0 * largest_tensor + fp32_gradients)
    copies = _UPDATE_COPIES[step.config.zero_stage, model.bytes_per_value]
    return copies * _FP32 * model.parameters / step.world_size


# Terms: host memory


def host_weights(step: StepContext) -> float:
    """Parameter offload moves a rank's partition of the weights to the host."""
    return _weight_partition(step) if step.config.offload_parameters else 0.0


def host_optimizer_states(step: StepContext) -> float:
    """Optimizer offload moves a rank's partition of the optimizer states to the host."""
    return _optimizer_partition(step) if step.config.offload_optimizer else 0.0


# The terms that are allocated in each phase of a step, between steps, and on the host.

_MODEL_STATES: tuple[Term, ...] = (weights, optimizer_states, gradients)
PHASES: Mapping[str, tuple[Term, ...]] = {
    "vision tower": (*_MODEL_STATES, gathered_weights, vision_forward),
    "loss": (*_MODEL_STATES, gathered_weights, retained_bucket, attention_mask, saved_activations, loss_logits),
    "backward": (
        *_MODEL_STATES,
        regathered_weights,
        reduce_bucket,
        attention_mask,
        saved_activations,
        backward_temporaries,
    ),
    "update": (*_MODEL_STATES, retained_bucket, update_temporaries),
}
AT_REST: tuple[Term, ...] = (weights, optimizer_states, zero3_gradient_buffers)
ON_HOST: tuple[Term, ...] = (host_weights, host_optimizer_states)


def predict_memory(model: TrainableModel, config: ExecutionConfig, pack: PackShape, world_size: int) -> MemoryBreakdown:
    """Return the memory of a step whose largest pack is `pack`: the largest phase of PHASES and its breakdown."""
    step = StepContext(model, config, pack, world_size)
    totals = {phase: _total(terms, step) for phase, terms in PHASES.items()}
    peak_phase = max(totals, key=lambda phase: totals[phase])

    def in_peak(term: Term) -> float:
        return term(step) if term in PHASES[peak_phase] else 0.0

    return MemoryBreakdown(
        weights=weights(step),
        optimizer=optimizer_states(step),
        gradients=gradients(step),
        bucket=reduce_bucket(step),
        gathered=gathered_weights(step),
        activations=saved_activations(step) + in_peak(attention_mask) + in_peak(backward_temporaries),
        logits=in_peak(loss_logits),
        at_rest=_total(AT_REST, step),
        peak=totals[peak_phase],
        peak_phase=peak_phase,
        host=_total(ON_HOST, step),
    )


def loss_chunk_rows(vocabulary: int) -> int:
    """Return the number of positions whose logits the loss computes at once."""
    return max(1, _LOSS_CHUNK_BYTES // (_FP32 * vocabulary))


def checkpoint_bytes(model: TrainableModel, config: ExecutionConfig) -> float:
    """Return the bytes of a checkpoint: trainable weights and their optimizer states; frozen weights are left out."""
    return float(model.parameters * (model.bytes_per_value + _FP32 * _optimizer_values(model, config)))


def result_bytes(model: TrainableModel) -> float:
    """Return the bytes of the stage's artifact: the whole model, or the connector if the language model is frozen."""
    parameters = model.shape.parameters if model.trains_language else model.parameters
    return float(parameters * model.bytes_per_value)


def _total(terms: tuple[Term, ...], step: StepContext) -> float:
    """Add the terms from left to right. `sum` compensates rounding errors from Python 3.12 on, so that its result would
    depend on the Python version.
    """
    return reduce(operator.add, (term(step) for term in terms))


def _weight_partition(step: StepContext) -> float:
    """Return a rank's bytes of all weights, trainable and frozen: 1 / world_size of them with ZeRO 3."""
    whole = step.model.shape.parameters * step.model.bytes_per_value
    return whole / step.world_size if step.config.zero_stage == 3 else float(whole)


def _persistent_weights(step: StepContext) -> int:
    """Return the bytes of the tensors that ZeRO 3 holds whole on every rank besides the partition."""
    if step.config.zero_stage < 3:
        return 0
    return _persistent_parameters(step.model.shape) * step.model.bytes_per_value


def _persistent_parameters(shape: LlavaShape) -> int:
    return sum(size * count for size, count in shape.tensors if size < _PERSISTENCE_THRESHOLD)


def _optimizer_partition(step: StepContext) -> float:
    ranks = 1 if step.config.zero_stage == 0 else step.world_size
    return step.model.parameters * _FP32 * _optimizer_values(step.model, step.config) / ranks


def _optimizer_values(model: TrainableModel, config: ExecutionConfig) -> int:
    """Return the fp32 values per trainable parameter: two moments and a master weight.

    ZeRO 1 to 3 keep master weights besides fp32 weights too; ZeRO 0 keeps none in fp32.
    """
    has_master_weights = model.bytes_per_value == 2 or config.zero_stage > 0
    return 3 if has_master_weights else 2


def _gathered_copies(step: StepContext, copies: int) -> float:
    """Return the bytes of `copies` full copies of the weights that ZeRO 3 partitions, within DeepSpeed's limit."""
    if step.config.zero_stage < 3:
        return 0.0
    partitioned = step.model.shape.parameters - _persistent_parameters(step.model.shape)
    return float(min(GATHERED, copies * partitioned) * step.model.bytes_per_value)


def _vision_activations(step: StepContext) -> int:
    """Return the bytes that the connector saves and, if it trains, the vision tower."""
    model, vision = step.model, step.model.shape.vision
    values = vision.patches * (vision.width + 2 * model.shape.language.width)
    if model.trains_vision:
        values += vision.layers * vision.tokens * (9 * vision.width + 3 * vision.intermediate)
    return step.pack.images * values * model.bytes_per_value


def _layer_input(step: StepContext) -> int:
    """Return the bytes of a decoder layer's input, which activation checkpointing saves."""
    return step.pack.tokens * step.model.shape.language.width * step.model.bytes_per_value


def _layer_activations(step: StepContext) -> int:
    """Return the bytes that one decoder layer saves without activation checkpointing."""
    language, value = step.model.shape.language, step.model.bytes_per_value
    norms = 2 * _FP32 * (_norm_values(step.model) + 1)  # and the reciprocal root mean square
    log_sum_exp = _FP32 * language.heads
    values = _layer_products(language)
    # ZeRO 3 replaces torch's linear layer by one that saves its input even if the weight is frozen.
    if step.model.trains_language or step.config.zero_stage == 3:
        values += _layer_matmul_inputs(language)
    return step.pack.tokens * (norms + log_sum_exp + value * values) + _dense_attention_activations(step)


def _dense_attention_activations(step: StepContext) -> int:
    """Return the bytes that one layer's dense attention saves besides queries, keys, values and output.

    Keys and values are repeated for all query heads. sdpa converts the mask to values in every layer; eager saves the
    probabilities of every head, in fp32 and, if that differs, in the precision of the values.
    """
    if not step.model.dense_attention:
        return 0
    language, value, pairs = step.model.shape.language, step.model.bytes_per_value, step.pack.tokens**2
    repeated = 2 * (language.heads - language.kv_heads) * language.head_size * step.pack.tokens * value
    if step.model.attn_implementation == "sdpa":
        return repeated + pairs * value
    return repeated + language.heads * pairs * (_FP32 + (value if value != _FP32 else 0))


def _norm_values(model: TrainableModel) -> int:
    """Return the fp32 values per token that Gemma's RMSNorm saves: its input and, if its weight trains, the normalized
    input.
    """
    width = model.shape.language.width
    return 2 * width if model.trains_language else width


def _layer_products(shape: LanguageShape) -> int:
    """Return the values per token of queries, attention output, keys, values and the MLP's three products."""
    return 2 * shape.attention_width + 2 * shape.kv_heads * shape.head_size + 3 * shape.intermediate


def _layer_matmul_inputs(shape: LanguageShape) -> int:
    """Return the values per token that enter the projections of attention (input, output) and MLP (input, output)."""
    return shape.width + shape.attention_width + shape.width + shape.intermediate


def _embedding_gradient(model: TrainableModel) -> int:
    return model.shape.language.embedding * model.bytes_per_value if model.trains_language else 0
