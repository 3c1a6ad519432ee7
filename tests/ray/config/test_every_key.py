"""Every key of a recipe reaches what it names: changing it changes what DeepSpeed, torch, Ray, blocks or scores get.

A probe returns what a part of the product does with a recipe, through the functions that `raylava run` calls. Training
keys are observed in a short run of the product's Trainer in this process.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from PIL import Image

from raylava.artifacts import Artifact
from raylava.config.load import _sections
from raylava.config.recipe import Recipe
from raylava.corpus.fetch import FetchedImage, UrlFetcher
from raylava.corpus.prepare import check_quarantine
from raylava.errors import UserError
from raylava.pipeline import stages as stages_module
from raylava.pipeline.evaluation import EvaluateStage
from raylava.pipeline.graph import build_stages, make_absolute, resolve
from raylava.pipeline.stages import PrepareStage, TrainStage
from raylava.progress import NullProgressBar
from raylava.storage import storage_path
from raylava.toy.demo import toy_recipe
from raylava.train.checkpoints import CheckpointManager
from raylava.train.ray.driver import build_trainer as build_ray_trainer
from raylava.train.torchrun_backend import expired_checkpoints
from tests.support.corpora import prepare_serially
from tests.support.recorded_training import RecordingBackend, build_trainer, record_training

pytestmark = pytest.mark.usefixtures("single_rank")

SHORT = ["pretrain.enabled=false", "finetune.max_steps=4", "finetune.global_batch_size=8", "evaluate.0.baselines=[]"]


@dataclasses.dataclass(frozen=True)
class Bench:
    """The folders that the probes work in: the toy corpus with some wide images, blocks of it, an empty folder."""

    toy: Artifact
    corpus: Path
    blocks: Path
    folder: Path

    def recipe(self, *overrides: str) -> Recipe:
        return toy_recipe(self.toy.path, [f"data={self.corpus}", *SHORT, *overrides])

    def train_spec(self, recipe: Recipe, name: str = "finetune") -> Any:
        (stage,) = (stage for stage in self.stages(recipe) if stage.label == name)
        assert isinstance(stage, TrainStage)
        shutil.rmtree(self.folder / "output", ignore_errors=True)
        (self.folder / "output").mkdir()
        output, blocks = str(self.folder / "output"), str(self.blocks)
        return dataclasses.replace(stage.train_spec(), blocks=blocks, output=output)

    def stages(self, recipe: Recipe) -> list[Any]:
        return build_stages(recipe, storage_path(self.folder))


Probe = Callable[[Bench, Recipe], Any]


def training(bench: Bench, recipe: Recipe) -> Any:
    """A whole run: samples, losses, rates, gradient norms, saved steps, and the mechanisms in force."""
    return record_training(bench.train_spec(recipe))


def engine(bench: Bench, recipe: Recipe) -> Any:
    """What the engine is built with, without a step: compiling a step takes a minute."""
    trainer, _ = build_trainer(bench.train_spec(recipe))
    trainer._build_engine(None)
    deepspeed = trainer._engine._engine
    return trainer._engine.mechanisms() | {"bucket": deepspeed.zero_reduce_bucket_size()}


def skipped_steps(bench: Bench, recipe: Recipe) -> Any:
    """A run in which every loss is NaN."""
    spec = bench.train_spec(recipe)
    spec = dataclasses.replace(spec, training=spec.training.model_copy(update={"max_steps": 7}))
    trainer, _ = build_trainer(spec)
    with torch.no_grad():
        trainer._llava.model.multi_modal_projector.linear_1.bias.fill_(torch.nan)
    with pytest.raises(Exception, match="consecutive steps") as error:
        trainer.run()
    return str(error.value).partition(" had")[0]


def ray_train(bench: Bench, recipe: Recipe) -> Any:
    """What Ray Train is asked for."""
    trainer = build_ray_trainer(bench.train_spec(recipe), recipe.resources, None)
    scaling, checkpoints = trainer.scaling_config, trainer.run_config.checkpoint_config
    assert trainer.train_loop_config is not None
    return [
        scaling.num_workers,
        scaling.use_gpu,
        scaling.resources_per_worker,
        scaling.label_selector,
        trainer.train_loop_config["threads"],
        trainer.train_loop_config["cache_bytes"],
        checkpoints.num_to_keep,
        checkpoints.checkpoint_score_attribute,
    ]


def kept_checkpoints(bench: Bench, recipe: Recipe) -> Any:
    """Which of five checkpoints the torchrun backend removes; their losses fall, and rise again."""
    folder = storage_path(bench.folder) / "kept"
    complete = [folder / f"step-{step}" for step in range(5)]
    for checkpoint, loss in zip(complete, (5.0, 1.0, 2.0, 3.0, 4.0), strict=True):
        (checkpoint / "done-rank-0.json").write_bytes(json.dumps({"loss": loss}).encode())
    return [checkpoint.name for checkpoint in expired_checkpoints(complete, recipe.finetune.checkpoint)]


def upload_timeout(bench: Bench, recipe: Recipe) -> Any:
    """How long a checkpoint's upload is retried."""
    manager = CheckpointManager(bench.train_spec(recipe), 4, RecordingBackend())
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raylava.train.checkpoints.upload_checkpoint", lambda *arguments: seen.append(arguments[2]))
        manager._uploader(_SavedEngine())(bench.folder, storage_path(bench.folder))  # type: ignore[arg-type]
    return seen


class _SavedEngine:
    def wait_for_save(self) -> None:
        """Do nothing: every file is written."""


def blocks(bench: Bench, recipe: Recipe) -> Any:
    """The prepared corpus, by the functions that Ray Data's workers call: counts, and the blocks' checksums."""
    stage = next(stage for stage in bench.stages(recipe) if stage.label == "prepare instruction")
    assert isinstance(stage, PrepareStage)
    shutil.rmtree(bench.folder / "blocks", ignore_errors=True)
    manifest = prepare_serially(dataclasses.replace(stage._prepare_spec, output=str(bench.folder / "blocks")))
    counts = manifest.counts()
    try:
        check_quarantine(counts, "instruction", recipe.corpora.instruction, storage_path(bench.folder))
        verdict = "accepted"
    except UserError as error:
        verdict = str(error)
    return [counts, [block.sha256 for block in manifest.blocks], verdict]


def fetching(bench: Bench, recipe: Recipe) -> Any:
    """The limits by which a shard's images are fetched."""
    seen: list[Any] = []

    class Fetcher(UrlFetcher):
        def fetch_all(self, urls: Iterable[str]) -> dict[str, FetchedImage]:
            seen.append(self.config)
            return super().fetch_all(urls)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raylava.corpus.block_writer.UrlFetcher", Fetcher)
        blocks(bench, recipe)
    return seen


def prepare_nodes(bench: Bench, recipe: Recipe) -> Any:
    """The nodes on which Ray Data's actors may run."""
    seen: list[Any] = []

    class Counts:
        def counts(self) -> dict[str, Any]:
            return {}

    def prepare(*arguments: Any) -> Counts:
        seen.append(arguments[3])
        return Counts()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages_module, "prepare", prepare)
        next(stage for stage in bench.stages(recipe) if stage.kind == "prepare").run(NullProgressBar())
    return seen


def evaluation(bench: Bench, recipe: Recipe) -> Any:
    """The evaluate stages: what is asked, how answers are generated, and how they are scored."""
    seen = []
    for stage in bench.stages(recipe):
        if isinstance(stage, EvaluateStage):
            request = stage._request
            config = dataclasses.replace(request.generation_config(), model="")
            loaded = request.loaded
            seen.append([stage.label, loaded.questions, loaded.scoring, loaded.protocol, config, request.actors])
    return seen


def model(bench: Bench, recipe: Recipe) -> Any:
    """The resolved model: shapes, classes, pixels."""
    return resolve(make_absolute(recipe))


def stage_labels(bench: Bench, recipe: Recipe) -> Any:
    return [stage.label for stage in bench.stages(recipe)]


def trackers(bench: Bench, recipe: Recipe) -> Any:
    """The trackers that a run's metrics go to."""
    trainer, _ = build_trainer(bench.train_spec(recipe))
    trainer._build_engine(None)
    logger = trainer._build_metrics_logger(0)
    names = [type(tracker).__name__ for tracker in logger._trackers]
    logger.close()
    return names


def locations(bench: Bench, recipe: Recipe) -> Any:
    """The files from which corpora are read."""
    return [stage._prepare_spec.source_paths for stage in bench.stages(recipe) if isinstance(stage, PrepareStage)]


# By section: each key with another value than the probes' recipe has, and the probes that must notice, one per backend
# where backends differ. Settings before an arrow are those under which the key matters.
TRAINING: dict[str, tuple[str, *tuple[Probe, ...]]] = {
    "epochs": ("finetune.max_steps=null; finetune.global_batch_size=48 -> finetune.epochs=1", training),
    "max_steps": ("finetune.max_steps=3", training),
    "global_batch_size": ("finetune.global_batch_size=4", training),
    "batching": ("finetune.batching=by_modality", training),
    "loss_weighting": ("finetune.loss_weighting=samples", training),
    "loss_group_size": (
        "finetune.loss_weighting=groups; finetune.loss_group_size=2 -> finetune.loss_group_size=4",
        training,
    ),
    "loss_grouping": (
        "finetune.loss_weighting=groups; finetune.loss_group_size=2 -> finetune.loss_grouping=as_drawn",
        training,
    ),
    "lr": ("finetune.lr=0.002", training),
    "connector_lr": ("finetune.connector_lr=0.01", training),
    "vision_lr": ("finetune.vision_lr=0.001", training),
    "warmup_ratio": ("finetune.warmup_ratio=0.9", training),
    "warmup_start": ("finetune.warmup_ratio=0.5 -> finetune.warmup_start=zero", training),
    "lr_schedule": ("finetune.lr_schedule=constant", training),
    "weight_decay": ("finetune.weight_decay=0.5", training),
    "betas": ("finetune.betas=[0.5,0.9]", training),
    "eps": ("finetune.eps=0.01", training),
    "max_grad_norm": ("finetune.max_grad_norm=0.01", training),
    "precision": ("finetune.precision=bf16", training),
    "shuffle_window_gb": ("finetune.shuffle_window_gb=1e-9", training),
    "max_tokens_per_pack": ("finetune.max_tokens_per_pack=300", training),
    "activation_checkpointing": ("finetune.activation_checkpointing=true", training),
    "attn_implementation": ("finetune.attn_implementation=eager", training),
    "compile": ("finetune.compile=true", engine),
    "deterministic": ("finetune.deterministic=true", engine),
    "deepspeed": ("finetune.deepspeed={zero_optimization: {reduce_bucket_size: 1000}}", engine),
    "max_consecutive_skips": ("finetune.max_consecutive_skips=2", skipped_steps),
    "zero.stage": ("finetune.zero.stage=1", engine),
    "zero.offload_optimizer": ("finetune.zero.stage=2 -> finetune.zero.offload_optimizer=true", engine),
    "zero.offload_parameters": ("finetune.zero.stage=3 -> finetune.zero.offload_parameters=true", engine),
    "checkpoint.interval_minutes": ("finetune.checkpoint.interval_minutes=1e-9", training),
    "checkpoint.interval_steps": ("finetune.checkpoint.interval_steps=1", training),
    "checkpoint.keep_latest": ("finetune.checkpoint.keep_latest=3", kept_checkpoints, ray_train),
    "checkpoint.keep_best": (
        "finetune.checkpoint.interval_steps=1 -> finetune.checkpoint.keep_best=true",
        kept_checkpoints,
        ray_train,
    ),
    "checkpoint.upload_timeout_minutes": ("finetune.checkpoint.upload_timeout_minutes=7", upload_timeout),
}
CORPUS: dict[str, tuple[str, *tuple[Probe, ...]]] = {
    "image_aspect": ("corpora.instruction.image_aspect=crop", blocks),
    "max_length": ("corpora.instruction.max_length=80", blocks),
    "on_overlong": ("corpora.instruction.max_length=80 -> corpora.instruction.on_overlong=truncate_exchanges", blocks),
    "max_pixels": ("corpora.instruction.max_pixels=2000", blocks),
    "samples_per_block": ("corpora.instruction.samples_per_block=7", blocks),
    "max_chars": ("corpora.instruction.max_chars=60", blocks),
    "max_image_bytes": ("corpora.instruction.max_image_bytes=400", blocks),
    "operators.name": ("corpora.instruction.operators=['tests.support.user_operators:twice']", blocks),
    "operators.arguments": (
        "corpora.instruction.operators=[{first_exchanges: {count: 9}}] -> "
        "corpora.instruction.operators=[{first_exchanges: {count: 1}}]",
        blocks,
    ),
    "quarantine_limit": ("corpora.instruction.max_pixels=4000 -> corpora.instruction.quarantine_limit=1.0", blocks),
    **{
        f"fetch.{key}": (f"corpora.instruction.fetch.{key}={value}", fetching)
        for key, value in (
            ("timeout_s", 3),
            ("retries", 5),
            ("per_host", 2),
            ("max_bytes", 1000),
            ("allow_private_addresses", "true"),
        )
    },
    "image_encoding.format": ("corpora.instruction.image_encoding.format=webp", blocks),
    "image_encoding.quality": (
        "corpora.instruction.image_encoding.format=jpeg -> corpora.instruction.image_encoding.quality=20",
        blocks,
    ),
    "sources.annotations": ("corpora.instruction.sources.0.annotations=alignment.json", blocks),
    "sources.images": ("corpora.instruction.sources.0.images=other", blocks),
    "sources.format": ("corpora.instruction.sources.0.format=jsonl", blocks),
    "sources.include": ("corpora.instruction.sources.0.include=['*1.png']", blocks),
    "sources.exclude": ("corpora.instruction.sources.0.exclude=['*1.png']", blocks),
    "sources.max_rows": ("corpora.instruction.sources.0.max_rows=5", blocks),
    "sources.sampling_weight": ("corpora.instruction.sources.0.sampling_weight=0.5", blocks),
}
BENCHMARK: dict[str, tuple[str, *tuple[Probe, ...]]] = {
    "name": ("evaluate.0.name=other", evaluation),
    "benchmark": ("evaluate.0.questions=pope; evaluate.0.images='' -> evaluate.0.benchmark=pope", evaluation),
    "protocol": (
        "evaluate.0.metric=yes_no; evaluate.0.questions=yes.jsonl -> evaluate.0.protocol=lmms-eval",
        evaluation,
    ),
    "questions": ("evaluate.0.questions=fewer.jsonl", evaluation),
    "images": ("evaluate.0.images=other", evaluation),
    "include": ("evaluate.0.include=['*1.png']", evaluation),
    "exclude": ("evaluate.0.exclude=['*1.png']", evaluation),
    "max_rows": ("evaluate.0.max_rows=3", evaluation),
    "prompt_suffix": ("evaluate.0.prompt_suffix=' Answer briefly.'", evaluation),
    "categories": ("evaluate.0.categories={all: '.*'}", evaluation),
    "metric": ("evaluate.0.metric=vqa_accuracy", evaluation),
    "max_new_tokens": ("evaluate.0.max_new_tokens=3", evaluation),
    "batch_size": ("evaluate.0.batch_size=3", evaluation),
    "baselines": ("evaluate.0.baselines=[blank_images]", evaluation),
}
KEYS: dict[str, tuple[str, *tuple[Probe, ...]]] = {
    "data": ("data=ELSEWHERE", locations),
    "seed": ("seed=1", training),
    "model.language.name": ("model.language.name=SMALL", model),
    "model.language.revision": ("model.language.revision=other", model),
    "model.language.family": ("model.language.family=none", model),
    "model.vision.name": ("model.vision.name=DINOV2", model),
    "model.vision.revision": ("model.vision.revision=other", model),
    "model.vision.family": ("model.vision.family=dinov2", model),
    "model.vision.image_size": ("model.vision.image_size=56", model),
    "model.vision.resize_size": ("model.vision.resize_size=120", blocks, model),
    "model.connector.feature_scale": ("model.connector.feature_scale=none", training),
    "model.initial_weights.name": ("model.initial_weights={name: INITIAL}", training),
    "model.initial_weights.revision": (
        "model.initial_weights={name: INITIAL} -> model.initial_weights.revision=other",
        model,
    ),
    "model.initial_weights.transformers_version": (
        "model.initial_weights={name: INITIAL} -> model.initial_weights.transformers_version='4.39'",
        training,
    ),
    "model.connector.weights": ("model.connector.weights=CONNECTOR", training),
    "pretrain.enabled": ("pretrain.enabled=true", stage_labels),
    "resources.workers": ("resources.workers=3", ray_train),
    "resources.min_workers": ("resources.min_workers=1", ray_train),
    "resources.cpus_per_worker": ("resources.cpus_per_worker=2", ray_train),
    "resources.gpus_per_worker": ("resources.gpus_per_worker=1", ray_train),
    "resources.cache_gb": ("resources.cache_gb=1", ray_train),
    "resources.train_node_labels": ("resources.train_node_labels={disk: ssd}", ray_train),
    "resources.prepare_node_labels": ("resources.prepare_node_labels={disk: ssd}", prepare_nodes),
    "tracking.wandb": ("tracking.wandb=project", trackers),
    "tracking.mlflow": ("tracking.mlflow=MLFLOW", trackers),
    **{f"finetune.{key}": entry for key, entry in TRAINING.items()},
    **{f"corpora.instruction.{key}": entry for key, entry in CORPUS.items()},
    **{f"evaluate.{key}": entry for key, entry in BENCHMARK.items()},
}
# Keys that only one value is accepted for, or that name things for people.
NO_EFFECT = {"name": "names the job and the tracker's run", "finetune.enabled": "false is refused"}


@pytest.fixture(scope="module")
def bench(toy_assets: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("keys")
    corpus = Path(shutil.copytree((toy_assets.path / "corpus").path, folder / "corpus"))
    shutil.copytree(corpus / "images", corpus / "other")
    _remove_images(corpus / "instruction.json")
    for image in sorted((corpus / "images").rglob("*.png"))[::3]:
        Image.open(image).resize((96, 48)).save(image)
    questions = (corpus / "questions.jsonl").read_text().splitlines(keepends=True)
    (corpus / "fewer.jsonl").write_text("".join(questions[:4]))
    (corpus / "yes.jsonl").write_text("".join(_with_answer(line, "yes") for line in questions))
    bench = Bench(toy_assets, corpus, folder / "blocks", folder / "work")
    recipe = bench.recipe("corpora.instruction.samples_per_block=8")
    (stage,) = (stage for stage in bench.stages(recipe) if isinstance(stage, PrepareStage))
    prepare_serially(dataclasses.replace(stage._prepare_spec, output=str(bench.blocks)))
    return bench


def _remove_images(annotations: Path) -> None:
    """Make every fourth conversation text-only."""
    rows = json.loads(annotations.read_text())
    for row in rows[3::4]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>\n", "")
    annotations.write_text(json.dumps(rows))


def _with_answer(question: str, answer: str) -> str:
    return json.dumps(json.loads(question) | {"answer": answer}) + "\n"


@pytest.fixture(scope="module", autouse=True)
def offline_wandb() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        yield


@pytest.fixture(scope="module")
def places(bench: Bench) -> dict[str, str]:
    """The values of keys that name files, made on demand."""
    from safetensors.torch import save_file

    from raylava.models.connector import CONNECTOR, CONNECTOR_FILE
    from raylava.models.export import export_untrained
    from raylava.models.llava import build_llava
    from tests.support.official_files import write_pope

    connector = bench.folder / "connector"
    connector.mkdir(parents=True)
    trained = build_llava(resolve(bench.recipe()), seed=9, dtype=torch.float32).model.multi_modal_projector
    save_file({CONNECTOR + name: value for name, value in trained.state_dict().items()}, connector / CONNECTOR_FILE)
    export_untrained(resolve(bench.recipe()), 5, "pad", "fp32", str(bench.folder / "initial"))
    elsewhere = Path(shutil.copytree(bench.corpus, bench.folder / "elsewhere"))
    (bench.corpus / "pope" / "val2014").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(bench.corpus / "pope" / "val2014" / "a.jpg")
    write_pope(bench.corpus / "pope")
    backbones = bench.toy.path / "backbones"
    return {
        "CONNECTOR": str(connector),
        "ELSEWHERE": str(elsewhere),
        "INITIAL": str(bench.folder / "initial"),
        "SMALL": str(backbones / "gemma-small"),
        "DINOV2": str(backbones / "dinov2"),
        "MLFLOW": f"sqlite:///{bench.folder}/mlflow.db",
    }


@pytest.fixture(scope="module")
def unchanged(bench: Bench) -> dict[tuple[Probe, str], Any]:
    """What each probe returned for the unchanged recipe."""
    return {}


def observe(probe: Probe, bench: Bench, recipe: Recipe) -> Any:
    """Return what the probe observes; a refusal is an observation too."""
    try:
        return probe(bench, recipe)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("key", KEYS)
def test_changing_a_key_changes_what_it_names(
    key: str, bench: Bench, places: dict[str, str], unchanged: dict[tuple[Probe, str], Any]
) -> None:
    entry, *probes = KEYS[key]
    for name, place in places.items():
        entry = entry.replace(name, place)
    context, _, overrides = entry.rpartition(" -> ")
    base = context.split("; ") if context else []
    changed = bench.recipe(*base, *overrides.split("; "))
    for probe in probes:
        if (probe, context) not in unchanged:
            unchanged[probe, context] = observe(probe, bench, bench.recipe(*base))
            assert unchanged[probe, context] == observe(probe, bench, bench.recipe(*base)), "it is deterministic"
        assert observe(probe, bench, changed) != unchanged[probe, context]


def test_the_table_has_every_key_of_a_recipe() -> None:
    """Both corpora have the same keys, and so have both training stages."""
    leaves = set()
    for path, section in _sections(Recipe, ()):
        for name in section.model_fields:
            leaves.add(".".join((*path, name)))
    sections = {leaf for leaf in leaves if any(other.startswith(f"{leaf}.") for other in leaves)}
    twins = {
        leaf for leaf in leaves if leaf.startswith(("corpora.alignment.", "pretrain.")) and leaf != "pretrain.enabled"
    }
    assert leaves - sections - twins - set(NO_EFFECT) == set(KEYS)


def test_each_stage_gets_its_own_section(bench: Bench) -> None:
    recipe = bench.recipe("pretrain.enabled=true", "pretrain.lr=0.5", "corpora.alignment.max_length=99")
    specs = {name: bench.train_spec(recipe, name).training for name in ("pretrain", "finetune")}
    assert specs == {"pretrain": recipe.pretrain, "finetune": recipe.finetune}
    prepares = {stage.label: stage._prepare_spec.corpus for stage in bench.stages(recipe) if stage.kind == "prepare"}
    assert prepares["prepare alignment"].max_length == 99
    assert prepares["prepare instruction"] == recipe.corpora.instruction
