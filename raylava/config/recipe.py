"""The recipe: everything that decides a result, as one typed object. recipe_file.py reads it from YAML.

Settings marked with `scale()` decide only how a result is reached (packs, ZeRO stage, workers, places); they never
enter a fingerprint. Nothing here touches weights, network or cluster.
"""

import importlib.util
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.fields import FieldInfo

_Fraction = Annotated[float, Field(ge=0, le=1)]


def scale(default: Any, **constraints: Any) -> Any:
    """A setting that never decides the result, only how it is reached: left out of fingerprints."""
    return Field(default, json_schema_extra={"decides": False}, **constraints)


def _decides(info: FieldInfo) -> bool:
    extra = info.json_schema_extra
    return not isinstance(extra, dict) or extra.get("decides") is not False


class ConfigModel(BaseModel):
    """A part of a recipe: immutable, and refusing keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def fingerprint_fields(self) -> dict[str, Any]:
        """The settings that decide the result, JSON-able, for a fingerprint."""
        return {key: _content(getattr(self, key)) for key, info in type(self).model_fields.items() if _decides(info)}


def _content(value: Any) -> Any:
    if isinstance(value, ConfigModel):
        return value.fingerprint_fields()
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    return value


class Language(ConfigModel):
    """A language model: a hub id or a local folder. `family` is found in the folder or by a known id."""

    name: str
    revision: str = "main"
    family: str | None = None


class Vision(ConfigModel):
    """A vision backbone: a hub id or a local folder. `image_size` (pixels a side) defaults to the backbone's own."""

    name: str
    revision: str = "main"
    family: str | None = None
    image_size: int | None = Field(None, ge=8, le=4096)


class Connector(ConfigModel):
    """Linear → GELU → Linear, from vision width to language width. `weights` starts it from a connector artifact."""

    weights: str | None = None


class Model(ConfigModel):
    language: Language
    vision: Vision
    connector: Connector = Connector()


class ImageEncoding(ConfigModel):
    """How prepared pixels are kept in blocks. png and webp are lossless; `quality` counts for jpeg only."""

    format: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: int = Field(95, ge=1, le=100)


class Source(ConfigModel):
    """One file of rows (or a folder of such files) and the folder its image paths start from.

    Patterns (`5/*`) choose rows by image path; `limit` takes the first so many; `weight` then takes that share of them,
    drawn by row number, or repeats them when it is above 1.
    """

    annotations: str = scale(...)  # a place; what lies there enters the fingerprint by its content
    images: str = scale("")
    format: Literal["auto", "llava_json", "jsonl", "parquet", "webdataset"] = "auto"
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_rows: int | None = Field(None, ge=1)
    sampling_weight: float = Field(1.0, gt=0, le=1000)


class Corpus(ConfigModel):
    """Sources, mixed, and how their rows become samples."""

    sources: tuple[Source, ...] = Field(..., min_length=1)
    image_aspect: Literal["pad", "crop"] = "pad"
    max_length: int = Field(2048, ge=16, le=1 << 20)
    on_overlong: Literal["quarantine", "truncate_exchanges"] = "quarantine"
    image_encoding: ImageEncoding = ImageEncoding()
    max_pixels: int = Field(64_000_000, ge=1)
    samples_per_block: int = Field(2048, ge=1, le=1 << 20)
    quarantine_limit: _Fraction = scale(0.01)


class Corpora(ConfigModel):
    alignment: Corpus | None = None
    instruction: Corpus


class ZeroConfig(ConfigModel):
    """DeepSpeed ZeRO: what is sharded across workers, and what is kept in host memory. `auto` chooses the stage."""

    stage: Literal[0, 1, 2, 3, "auto"] = 2
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.offload_parameters and self.stage not in (3, "auto"):
            raise ValueError("offload_parameters needs ZeRO stage 3; set zero.stage=3 or offload_parameters=false")
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("offload_optimizer needs ZeRO stage 1 to 3; set zero.stage=1 or offload_optimizer=false")
        return self


class CheckpointConfig(ConfigModel):
    """How often training keeps what it has, and how many checkpoints stay.

    One is due after `interval_minutes` or `interval_steps`, whichever comes first, and halfway through a run that would else
    have none. `keep` stay: the last ones or, with `keep_best`, those of the lowest loss and the very last. Storage that
    fails is tried again for `upload_timeout_minutes` while training goes on.
    """

    interval_minutes: float = Field(15.0, gt=0)
    interval_steps: int | None = Field(None, ge=1)
    keep_latest: int = Field(2, ge=1)
    keep_best: bool = False
    upload_timeout_minutes: float = Field(30.0, ge=0)


_OURS = (
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
)


def _no_clash(settings: dict[str, Any]) -> dict[str, Any]:
    clash = sorted(set(settings) & set(_OURS))
    zero = sorted(set(settings.get("zero_optimization", {})) & {"stage", "offload_optimizer", "offload_param"})
    if clash or zero:
        named = clash[0] if clash else f"zero_optimization.{zero[0]}"
        raise ValueError(
            f"{named} follows from the recipe's own settings (zero, precision, max_grad_norm, …); remove it"
        )
    return settings


class Training(ConfigModel):
    """One training stage. `global_batch_size` counts samples a step over all workers; `warmup` is a share of the steps.

    `lr` is the peak rate; `connector_lr` the connector's own, if it has one; `vision_lr` the vision tower's, which is
    frozen without one. Corpora of up to `shuffle_window_gb` are shuffled whole; of larger ones, blocks are shuffled, and
    samples within windows of blocks that hold so much. `activation_checkpointing`, `max_tokens_per_pack` and `zero.stage` may
    be `auto`: the fastest that memory admits, by the estimate, when training starts. `deepspeed` is handed to DeepSpeed
    as it is, for what has no name here. A step whose loss or gradient is not finite is skipped; `max_consecutive_skips` of
    them in a row end the run.
    """

    enabled: bool = True
    epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1)
    global_batch_size: int = Field(128, ge=1)
    lr: float = Field(2e-5, gt=0, le=1)
    connector_lr: float | None = Field(None, gt=0, le=1)
    vision_lr: float | None = Field(None, gt=0, le=1)
    warmup_ratio: _Fraction = 0.03
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_Fraction, _Fraction] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(None, gt=0)
    precision: Literal["bf16", "fp32"] = "bf16"
    shuffle_window_gb: float = Field(100.0, gt=0)
    max_tokens_per_pack: Annotated[int, Field(ge=16)] | Literal["auto"] = scale(2048)
    zero: ZeroConfig = scale(ZeroConfig())
    activation_checkpointing: bool | Literal["auto"] = scale(False)
    attn_implementation: Literal["varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = scale("varlen")
    compile: bool = scale(False)
    deepspeed: Annotated[dict[str, Any], AfterValidator(_no_clash)] = scale({})
    max_consecutive_skips: int = scale(5, ge=1)

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        if self.compile and (self.zero.stage == 3 or self.zero.offload_parameters):
            raise ValueError(
                "compile gives wrong losses beside ZeRO stage 3's hooks; set zero.stage to 2 or less, or compile=false"
            )
        return self

    checkpoint: CheckpointConfig = scale(CheckpointConfig())


class Benchmark(ConfigModel):
    """Held-out questions with reference answers: JSONL, or LLaVA JSON (each human turn is asked in turn).

    With a `kind` it is one of the paper's benchmarks: `questions` is the folder of its official files, which say how it
    is asked (mm-vet is answered, for a judge to grade); `protocol` chooses among toolkits' rules where they differ
    (pope: llava, lmms-eval). `categories` names a question type by a regular expression over the question; the first
    that matches counts. `baselines` answers the same questions with blank images, or with the model as it was before
    training.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    benchmark: Literal["custom", "pope", "gqa", "vqav2", "mme", "mmvp", "scienceqa", "mm-vet"] = "custom"
    protocol: str = ""
    questions: str = scale(...)
    images: str = scale("")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    max_rows: int | None = Field(None, ge=1)
    prompt_suffix: str = ""
    categories: dict[str, str] = {}
    metric: Literal["exact_match", "vqa_accuracy", "yes_no"] = "exact_match"
    max_new_tokens: int = Field(32, ge=1)
    batch_size: int = scale(32, ge=1)
    baselines: tuple[Literal["blank_images", "untrained"], ...] = ()


class Resources(ConfigModel):
    """What a stage may use. `gpus_per_worker: 0` trains on CPU with the same code.

    A corpus in a bucket is read through a cache of up to `cache_gb` on each node, which should hold three
    shuffle windows. With `min_workers`, training starts
    with as many workers as there is room for, from that number to `workers`, and goes on with another number when nodes
    come or go. `train_node_labels` and `prepare_node_labels` are Ray label selectors of the nodes for training and evaluating, and for
    preparing; on a cluster that gives its nodes roles (those of cluster/ do) they need not be given.
    """

    workers: int = Field(1, ge=1)
    min_workers: int | None = Field(None, ge=1)
    cpus_per_worker: int = Field(1, ge=1)
    gpus_per_worker: int = Field(0, ge=0)
    cache_gb: float = Field(300.0, gt=0)
    train_node_labels: dict[str, str] = {}
    prepare_node_labels: dict[str, str] = {}

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers} is more than workers={self.workers}; lower it")
        return self


class Tracking(ConfigModel):
    """Where figures are drawn besides metrics.jsonl and TensorBoard: a W&B project, an MLflow server, database or
    folder. Credentials come from the environment.
    """

    wandb: str | None = None
    mlflow: str | None = None

    @model_validator(mode="after")
    def _installed(self) -> Self:
        for name in ("wandb", "mlflow"):
            if getattr(self, name) and importlib.util.find_spec(name) is None:
                raise ValueError(f"{name} is not installed; pip install 'raylava[{name}]', or leave {name} out")
        return self


def _known_folder(value: str) -> str:
    return value.rstrip("/") if value not in ("", "/") else value


class Recipe(ConfigModel):
    """A whole experiment. `data` is where relative corpus and question paths start."""

    name: str = scale(..., pattern=r"^[A-Za-z0-9_.-]+$")
    data: Annotated[str, AfterValidator(_known_folder)] = scale("")
    seed: int = Field(0, ge=0)
    model: Model
    corpora: Corpora
    pretrain: Training = Training(global_batch_size=256, lr=1e-3)
    finetune: Training = Training()
    evaluate: tuple[Benchmark, ...] = ()
    resources: Resources = scale(Resources())
    tracking: Tracking = scale(Tracking())

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.pretrain.enabled and self.model.connector.weights is None and self.corpora.alignment is None:
            raise ValueError(
                "pretrain is enabled but corpora.alignment is missing; add it or set pretrain.enabled=false"
            )
        for stage, corpus in (("pretrain", self.corpora.alignment), ("finetune", self.corpora.instruction)):
            pack = getattr(self, stage).max_tokens_per_pack
            if corpus is not None and pack != "auto" and corpus.max_length > pack:
                raise ValueError(
                    f"{stage}.max_tokens_per_pack={pack} is less than its corpus's max_length={corpus.max_length}; "
                    f"raise {stage}.max_tokens_per_pack"
                )
        names = [benchmark.name for benchmark in self.evaluate]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate names {names} must differ; give each benchmark its own name")
        return self
