"""The recipe: every setting that determines a result, as one typed object. load.py reads it from YAML.

Settings declared with `not_fingerprinted()` affect only how a result is computed (pack size, ZeRO stage, workers,
storage locations) and never enter a fingerprint. Nothing here reads weights, the network or a cluster.
"""

import importlib.util
import re
import types
import typing
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

StageName = Literal["pretrain", "finetune"]  # the two training stages
NAME_PATTERN = r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$"  # of what becomes part of a path: neither `..` nor hidden
_MANY = 10**10  # more than any count that fits a machine; larger ones are mistakes
MAX_SEED = 2**32 - 1  # the largest that every library takes
_Fraction = Annotated[float, Field(ge=0, le=1)]


def not_fingerprinted(default: Any, **constraints: Any) -> Any:
    """Declare a setting that cannot change the result and is therefore left out of fingerprints."""
    return Field(default, json_schema_extra={"fingerprinted": False}, **constraints)


def is_fingerprinted(info: FieldInfo) -> bool:
    """Return whether a field takes part in fingerprints."""
    extra = info.json_schema_extra
    return not isinstance(extra, dict) or extra.get("fingerprinted") is not False


def _plain_types(annotation: Any) -> set[Any]:
    """Return the types that a field's annotation names at its top level."""
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        return {plain for argument in arguments for plain in _plain_types(argument)}
    if typing.get_origin(annotation) is Literal:
        return {type(argument) for argument in arguments}
    return {annotation}


class ConfigModel(BaseModel):
    """Base class of all config sections: immutable, and refusing unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_boolean_for_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `seed: yes`, which YAML reads as true and pydantic as 1."""
        if isinstance(value, bool) and info.field_name:
            plain_types = _plain_types(cls.model_fields[info.field_name].annotation)
            if plain_types & {int, float} and bool not in plain_types:
                raise ValueError("is true or false; give a number")
        return value

    def fingerprint_fields(self) -> dict[str, Any]:
        """Return the settings that determine the result, as JSON-serializable values."""
        fields = type(self).model_fields.items()
        return {key: _fingerprint_value(getattr(self, key)) for key, info in fields if is_fingerprinted(info)}


def _fingerprint_value(value: Any) -> Any:
    if isinstance(value, ConfigModel):
        return value.fingerprint_fields()
    if isinstance(value, list | tuple):
        return [_fingerprint_value(item) for item in value]
    return value


class Language(ConfigModel):
    """The language model: a hub id or a local folder. `family` is read from its config.json or from known hub ids."""

    name: str
    revision: str = "main"
    family: str | None = None


class Vision(ConfigModel):
    """The vision backbone: a hub id or a local folder. `image_size`, in pixels, defaults to the backbone's own.

    With `resize_size`, an image is resized to that many pixels (after padding, where the corpus pads), and its center
    of `image_size` pixels is cropped, as DINOv2's stock processor does with 256 and 224. Without it nothing is cropped
    from a padded image.
    """

    name: str
    revision: str = "main"
    family: str | None = None
    image_size: int | None = Field(None, ge=8, le=4096)
    resize_size: int | None = Field(None, ge=8, le=4096)

    @model_validator(mode="after")
    def _crop_within_resized_image(self) -> Self:
        if self.resize_size and self.image_size and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size={self.resize_size} is less than image_size={self.image_size}; raise it or leave it out"
            )
        return self


class Connector(ConfigModel):
    """The connector: Linear → GELU → Linear from vision width to language width.

    `weights` names a connector artifact to start from instead of pretraining one. With `feature_scale: embedding`,
    training multiplies the connector's output by the factor that the language model applies to its token embeddings
    (√width for Gemma, 1 for a model without one), as LLaVA-Gemma's code did; the exported model has the factor folded
    into the connector's last layer. With `none`, image features enter the language model as they are.
    """

    weights: str | None = None
    feature_scale: Literal["embedding", "none"] = "embedding"


def _refuse_unquoted_version(value: Any) -> Any:
    if isinstance(value, int | float):  # YAML's 5.10 is the number 5.1
        raise ValueError(f'{value} is a number; put the version in quotes: "{value}"')
    return value


class InitialWeights(ConfigModel):
    """A LLaVA checkpoint, as hub id or folder, whose weights replace those of both backbones and of the connector.

    transformers before 5.4 scaled image features together with token embeddings; a checkpoint that it saved is
    converted. `transformers_version` is the version that saved it, if its config.json does not state it correctly.
    """

    name: str
    revision: str = "main"
    transformers_version: Annotated[str | None, BeforeValidator(_refuse_unquoted_version)] = Field(
        None, pattern=r"^\d+(\.\d+)+[A-Za-z0-9.]*$"
    )


class Model(ConfigModel):
    """The parts of the LLaVA model. `initial_weights` names a LLaVA checkpoint of these backbones to start from."""

    language: Language
    vision: Vision
    connector: Connector = Connector()
    initial_weights: InitialWeights | None = None


class ImageEncoding(ConfigModel):
    """How blocks store prepared images. png and webp are lossless; `quality` applies to jpeg only."""

    format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = Field(95, ge=1, le=100)

    @model_validator(mode="after")
    def _quality_needs_jpeg(self) -> Self:
        if self.format != "jpeg" and self.quality != type(self).model_fields["quality"].default:
            raise ValueError(f"quality={self.quality} applies to format jpeg only; remove it")
        return self


class Source(ConfigModel):
    """One annotation file (or a folder of them) and the folder that its image paths are relative to.

    `include` and `exclude` select rows by patterns over image paths (`5/*`); `max_rows` keeps the first rows;
    `sampling_weight` then keeps that fraction of them, drawn by row number, or repeats rows when it is above 1.
    """

    annotations: str = not_fingerprinted(...)  # a location; the files' content enters the fingerprint instead
    images: str = not_fingerprinted("")
    format: Literal["auto", "llava_json", "jsonl", "parquet", "webdataset"] = "auto"
    include: tuple[str, ...] = Field(("*",), min_length=1)
    exclude: tuple[str, ...] = ()
    max_rows: int | None = Field(None, ge=1, le=_MANY)
    sampling_weight: float = Field(1.0, gt=0, le=1000)


class FetchConfig(ConfigModel):
    """How images that rows name by URL are fetched.

    A request may take `timeout_s` and is repeated up to `retries` times after a failure that may pass. A worker has at
    most `per_host` requests open to one host. An answer of more than `max_bytes` is not read further. Hosts whose
    addresses are not public are refused unless `allow_private_addresses` is set.
    """

    timeout_s: float = Field(20.0, gt=0)
    retries: int = Field(2, ge=0, le=10)
    per_host: int = Field(8, ge=1)
    max_bytes: int = Field(64_000_000, ge=1)
    allow_private_addresses: bool = False


class OperatorConfig(ConfigModel):
    """An operator of raylava, or `module:function` of the user's own, with its arguments.

    In a recipe an operator is its name, or a mapping of its name to its arguments.
    """

    name: str
    arguments: dict[str, Any] = {}


def _parse_operator(value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and len(value) == 1:
        name, arguments = next(iter(value.items()))
        return {"name": name, "arguments": {} if arguments is None else arguments}
    if isinstance(value, dict) and set(value) <= {"name", "arguments"}:
        return value  # the recipe as raylava itself wrote it
    if isinstance(value, OperatorConfig):
        return value
    raise ValueError("an operator is its name, or one name with its arguments, such as {answer_words: {minimum: 3}}")


class Corpus(ConfigModel):
    """A mixture of sources, and how their rows become training samples.

    `operators` filter, change and de-duplicate the rows, in their order, before anything else is done with them.

    `image_aspect` pads an image to a square or crops its center. A sample longer than `max_length` tokens (image tokens
    included) is quarantined, loses whole exchanges at its end with `on_overlong: truncate_exchanges`, or is cut at the
    token with `truncate_tokens`; it is quarantined if the loss covers nothing of what is left. A conversation of more
    than `max_chars` characters is quarantined before it is tokenized, an image file of more than `max_image_bytes`
    before it is read, and one of more than `max_pixels` before it is decoded. Preparing fails when more than the
    fraction `quarantine_limit` of all rows is quarantined. An Arrow block holds `samples_per_block` samples. `fetch`
    applies to images named by URL.
    """

    sources: tuple[Source, ...] = Field(..., min_length=1)
    image_aspect: Literal["pad", "crop"] = "pad"
    max_length: int = Field(2048, ge=16, le=1 << 20)
    on_overlong: Literal["quarantine", "truncate_exchanges", "truncate_tokens"] = "quarantine"
    image_encoding: ImageEncoding = ImageEncoding()
    max_pixels: int = Field(64_000_000, ge=1, le=_MANY)
    max_chars: int = Field(1_000_000, ge=1, le=_MANY)
    max_image_bytes: int = Field(64_000_000, ge=1, le=_MANY)
    samples_per_block: int = Field(2048, ge=1, le=1 << 20)
    operators: tuple[Annotated[OperatorConfig, BeforeValidator(_parse_operator)], ...] = ()
    quarantine_limit: _Fraction = not_fingerprinted(0.01)
    fetch: FetchConfig = not_fingerprinted(FetchConfig())

    def fingerprint_fields(self) -> dict[str, Any]:
        """See ConfigModel. Settings that were added after the first release are left out at their defaults."""
        added = ("operators", "max_chars", "max_image_bytes")
        unset = {key for key in added if getattr(self, key) == type(self).model_fields[key].default}
        return {key: value for key, value in super().fingerprint_fields().items() if key not in unset}


class Corpora(ConfigModel):
    """The corpora of the two training stages: image-caption pairs and conversations."""

    alignment: Corpus | None = None
    instruction: Corpus


class ZeroConfig(ConfigModel):
    """DeepSpeed ZeRO: which states are sharded across workers, and which are kept in host memory.

    `stage: auto` selects the fastest stage that is predicted to fit.
    """

    stage: Literal[0, 1, 2, 3, "auto"] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @model_validator(mode="after")
    def _offloading_needs_sharding(self) -> Self:
        if self.offload_parameters and self.stage not in (3, "auto"):
            raise ValueError("offload_parameters needs ZeRO stage 3; set zero.stage=3 or offload_parameters=false")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs ZeRO stage 1 to 3; set zero.stage=1 or offload_optimizer=false")
        return self


class CheckpointConfig(ConfigModel):
    """How often training saves a checkpoint, how many are kept, and which state becomes the model.

    A checkpoint is saved after `interval_minutes` or `interval_steps`, whichever comes first, and once halfway through
    a run that would otherwise have none. While the stage runs, storage holds `keep_latest` of them; all are removed
    once its artifact is complete. The artifact holds the weights after the last step. With `keep_best`, it holds those
    of the state with the lowest mean loss since the checkpoint before it, and storage keeps `keep_latest` checkpoints
    with the lowest loss besides the latest; this needs `interval_steps`, which then enters the fingerprint. A failing
    upload is retried for `upload_timeout_minutes` while training continues.
    """

    interval_minutes: float = Field(15.0, gt=0)
    interval_steps: int | None = Field(None, ge=1)
    keep_latest: int = Field(2, ge=1)
    keep_best: bool = False  # enters the fingerprint of a stage that sets it
    upload_timeout_minutes: float = Field(30.0, ge=0)

    @model_validator(mode="after")
    def _best_is_compared_at_known_steps(self) -> Self:
        if self.keep_best and self.interval_steps is None:
            raise ValueError("keep_best=true compares checkpoints at known steps; set interval_steps as well")
        return self


_RESERVED_DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "managed_gradient_accumulation",
    "gradient_clipping",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "checkpoint",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)
_RESERVED_ZERO_KEYS = ("stage", "offload_optimizer", "offload_param", "overlap_comm")
# DeepSpeed settings that cannot change a result beyond rounding; all others enter the fingerprint, and of
# zero_optimization those that quantize.
_HARMLESS_DEEPSPEED_KEYS = (
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "csv_monitor",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "tensorboard",
    "timers",
    "wall_clock_breakdown",
    "wandb",
    "zero_optimization",
)


def _refuse_reserved_keys(settings: dict[str, Any]) -> dict[str, Any]:
    reserved = [key for key in sorted(settings) if key in _RESERVED_DEEPSPEED_KEYS]
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f"zero_optimization={zero!r} is not a mapping of DeepSpeed's keys to values")
    zero_keys = sorted(zero)
    reserved += [f"zero_optimization.{key}" for key in zero_keys if key in _RESERVED_ZERO_KEYS]
    if reserved:
        raise ValueError(f"{reserved[0]} is set by raylava, from zero, precision and other keys; remove it")
    return settings


class Training(ConfigModel):
    """One training stage. `global_batch_size` counts samples per step over all workers.

    `batching: by_modality` forms each step of samples with images or of samples without, as LLaVA's sampler does;
    `mixed` draws from all samples. The loss of a step is the mean over its loss tokens, over the means of its samples,
    or over the means of groups of `loss_group_size` samples (`loss_weighting`). Groups have similar lengths, as in
    LLaVA's length-grouped sampler, or are consecutive samples (`loss_grouping: as_drawn`). docs/numerics.md gives the
    rules.

    `lr` is the peak learning rate, `connector_lr` the connector's if it differs, `vision_lr` the vision tower's, which
    stays frozen without one. `warmup_ratio` is a fraction of the steps; step k of w warm-up steps has k/w of the peak
    rate with `warmup_start: zero`, as in transformers, and (k+1)/w with `first_step`. `betas` and `eps` are those of
    AdamW. With `precision: bf16` the optimizer keeps fp32 master weights. A corpus of up to `shuffle_window_gb` is
    shuffled as a whole; of a larger one, blocks are shuffled, and samples within windows of that size.

    `attn_implementation: varlen` attends within each sample of a pack; the other values name implementations of
    transformers. `compile` compiles each layer of the language model by torch.compile. With `deterministic`, a run on
    the same number of GPUs of one type repeats bit by bit, at some cost of speed; on CPUs it always does.
    `activation_checkpointing`, `max_tokens_per_pack` and `zero.stage` may be `auto`: the fastest combination that is
    predicted to fit, chosen when training starts. `deepspeed` is passed to DeepSpeed unchanged; keys that raylava sets
    itself are refused.

    A step with a non-finite loss or gradient is skipped; `max_consecutive_skips` of them in a row end the run.
    """

    enabled: bool = True
    epochs: int = Field(1, ge=1, le=100_000)
    max_steps: int | None = Field(None, ge=1, le=_MANY)
    global_batch_size: int = Field(128, ge=1, le=_MANY)
    batching: Literal["mixed", "by_modality"] = "mixed"
    loss_weighting: Literal["tokens", "samples", "groups"] = "tokens"
    loss_group_size: int | None = Field(None, ge=1)
    loss_grouping: Literal["by_length", "as_drawn"] = "by_length"
    lr: float = Field(2e-5, gt=0, le=1)
    connector_lr: float | None = Field(None, gt=0, le=1)
    vision_lr: float | None = Field(None, gt=0, le=1)
    warmup_ratio: _Fraction = 0.03
    warmup_start: Literal["zero", "first_step"] = "first_step"
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(None, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    shuffle_window_gb: float = Field(100.0, gt=0)
    max_tokens_per_pack: Annotated[int, Field(ge=16, le=_MANY)] | Literal["auto"] = not_fingerprinted(2048)
    zero: ZeroConfig = not_fingerprinted(ZeroConfig())
    activation_checkpointing: bool | Literal["auto"] = not_fingerprinted(False)
    attn_implementation: Literal["varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = not_fingerprinted(
        "varlen"
    )
    compile: bool = not_fingerprinted(False)
    deterministic: bool = not_fingerprinted(False)
    deepspeed: Annotated[dict[str, Any], AfterValidator(_refuse_reserved_keys)] = not_fingerprinted({})
    max_consecutive_skips: int = not_fingerprinted(5, ge=1)
    checkpoint: CheckpointConfig = not_fingerprinted(CheckpointConfig())

    def fingerprint_fields(self) -> dict[str, Any]:
        """See ConfigModel. Includes DeepSpeed's settings that may change the result, and `keep_best` if it is set."""
        deepspeed = {key: value for key, value in self.deepspeed.items() if key not in _HARMLESS_DEEPSPEED_KEYS}
        zero = self.deepspeed.get("zero_optimization", {})
        quantized = {key: value for key, value in zero.items() if key.startswith("zero_quantized")}
        keep_best = self.checkpoint.interval_steps if self.checkpoint.keep_best else None
        optional = {"deepspeed": deepspeed | quantized, "keep_best": keep_best}
        return super().fingerprint_fields() | {key: value for key, value in optional.items() if value}

    @field_validator("attn_implementation")
    @classmethod
    def _attention_is_installed(cls, value: str) -> str:
        if value == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            raise ValueError(
                "flash-attn is not installed; pip install flash-attn, or use varlen, whose kernel torch has"
            )
        return value

    @model_validator(mode="after")
    def _groups_divide_the_batch(self) -> Self:
        size = self.loss_group_size
        if self.loss_weighting == "groups" and size is None:
            raise ValueError("loss_weighting=groups needs loss_group_size; set it to the samples of a group")
        if self.loss_weighting != "groups" and (size is not None or self.loss_grouping != "by_length"):
            key = "loss_grouping" if size is None else "loss_group_size"
            raise ValueError(f"{key} applies to loss_weighting: groups only; remove it or set loss_weighting=groups")
        if size is not None and self.global_batch_size % size:
            raise ValueError(
                f"loss_group_size={size} does not divide global_batch_size={self.global_batch_size}; "
                "choose a divisor of it"
            )
        return self

    @model_validator(mode="after")
    def _compile_excludes_zero_3(self) -> Self:
        if self.compile and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError(
                "compile gives wrong losses beside ZeRO stage 3's hooks; set zero.stage to 2 or less, or compile=false"
            )
        return self


def _check_patterns(patterns: dict[str, str]) -> dict[str, str]:
    for name, pattern in patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"the pattern of {name!r} is not a regular expression: {error}") from error
    return patterns


class Benchmark(ConfigModel):
    """Held-out questions with reference answers: JSONL, or LLaVA JSON in which each human turn is a question.

    `benchmark: custom` reads such a file; another name reads the official files of that benchmark (docs/evaluation.md
    lists them) from the folder `questions`. `images` is the folder of the images, by default that of the questions, or
    the one within the official files. Answers to a judged benchmark are not scored. `protocol` selects between
    toolkits' scoring rules where they differ. `categories` assigns a question to the first category whose regular
    expression matches it. `max_new_tokens` defaults to the benchmark's own limit, 32 for `custom`. `baselines` also
    scores blank images, or the model before training.
    """

    name: str = Field(pattern=NAME_PATTERN)
    benchmark: str = "custom"
    protocol: str = ""
    questions: str = not_fingerprinted(...)
    images: str = not_fingerprinted("")
    include: tuple[str, ...] = Field(("*",), min_length=1)
    exclude: tuple[str, ...] = ()
    max_rows: int | None = Field(None, ge=1, le=_MANY)
    prompt_suffix: str = ""
    categories: Annotated[dict[str, str], AfterValidator(_check_patterns)] = {}
    metric: Literal["exact_match", "vqa_accuracy", "yes_no"] = "exact_match"
    max_new_tokens: int | None = Field(None, ge=1, le=_MANY)
    batch_size: int = not_fingerprinted(32, ge=1, le=_MANY)
    baselines: tuple[Literal["blank_images", "untrained"], ...] = ()

    @model_validator(mode="after")
    def _official_files_define_questions_and_metric(self) -> Self:
        if self.benchmark != "custom":
            for key in ("include", "exclude", "categories", "metric"):
                if getattr(self, key) != type(self).model_fields[key].default:
                    value = getattr(self, key)
                    raise ValueError(
                        f"{key}={value} applies to benchmark: custom only; remove it beside {self.benchmark}"
                    )
        return self


DEFAULT_CACHE_GB = 300.0


class Resources(ConfigModel):
    """The resources of each stage. A worker trains on one GPU, or on CPUs with the same code (`gpus_per_worker: 0`).

    A corpus in a bucket is read through a cache of up to `cache_gb` per node, which should hold three shuffle windows.
    With `min_workers`, training starts with any number of workers from there to `workers` and continues with another
    number when nodes join or leave. `train_node_labels` and `prepare_node_labels` are Ray label selectors of the nodes
    for training and evaluation, and for preparing; clusters whose nodes carry roles do not need them.
    """

    workers: int = Field(1, ge=1, le=100_000)
    min_workers: int | None = Field(None, ge=1)
    cpus_per_worker: int = Field(1, ge=1, le=10_000)
    gpus_per_worker: int = Field(0, ge=0)
    cache_gb: float = Field(DEFAULT_CACHE_GB, gt=0)
    train_node_labels: dict[str, str] = {}
    prepare_node_labels: dict[str, str] = {}

    @field_validator("gpus_per_worker")
    @classmethod
    def _one_gpu_per_worker(cls, value: int) -> int:
        if value > 1:
            raise ValueError("a worker trains on one GPU; set it to 1, and workers to the number of GPUs")
        return value

    @model_validator(mode="after")
    def _min_workers_within_workers(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; lower it")
        return self


class Tracking(ConfigModel):
    """Experiment trackers besides metrics.jsonl and TensorBoard: a W&B project, an MLflow server, database or folder.

    Credentials come from the environment.
    """

    wandb: str | None = None
    mlflow: str | None = None

    @model_validator(mode="after")
    def _trackers_are_installed(self) -> Self:
        for name in ("wandb", "mlflow"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed; pip install 'raylava[{name}]', or leave {name} out")
        return self


def _without_trailing_slash(value: str) -> str:
    return value.rstrip("/") if value not in ("", "/") else value


class Recipe(ConfigModel):
    """A whole experiment. Relative paths of corpora and questions start at `data`."""

    name: str = not_fingerprinted(..., pattern=NAME_PATTERN)
    data: Annotated[str, AfterValidator(_without_trailing_slash)] = not_fingerprinted("")
    seed: int = Field(0, ge=0, le=MAX_SEED)
    model: Model
    corpora: Corpora
    pretrain: Training = Training(global_batch_size=256, lr=1e-3)
    finetune: Training = Training()
    evaluate: tuple[Benchmark, ...] = ()
    resources: Resources = not_fingerprinted(Resources())
    tracking: Tracking = not_fingerprinted(Tracking())

    @model_validator(mode="after")
    def _stages_have_their_inputs(self) -> Self:
        if self.pretrain.enabled and self.corpora.alignment is None:
            raise ValueError(
                "pretrain is enabled but corpora.alignment is missing; add it or set pretrain.enabled=false"
            )
        return self

    @model_validator(mode="after")
    def _enabled_stages_can_run(self) -> Self:
        if not self.finetune.enabled:
            raise ValueError(
                "finetune.enabled=false: a recipe always finetunes; to train the connector alone, use "
                "`raylava train RECIPE pretrain`, and remove the key"
            )
        if self.model.connector.weights is not None and self.pretrain.enabled:
            raise ValueError(
                f"model.connector.weights={self.model.connector.weights} replaces pretraining; "
                "set pretrain.enabled=false"
            )
        return self

    @model_validator(mode="after")
    def _packs_hold_the_longest_sample(self) -> Self:
        for stage, corpus in (("pretrain", self.corpora.alignment), ("finetune", self.corpora.instruction)):
            pack = getattr(self, stage).max_tokens_per_pack
            if corpus is not None and pack != "auto" and corpus.max_length > pack:
                raise ValueError(
                    f"{stage}.max_tokens_per_pack={pack} is less than its corpus's max_length={corpus.max_length}; "
                    f"raise {stage}.max_tokens_per_pack"
                )
        return self

    @model_validator(mode="after")
    def _benchmark_names_differ(self) -> Self:
        names = [benchmark.name for benchmark in self.evaluate]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate names {names} must differ; give each benchmark its own name")
        return self
