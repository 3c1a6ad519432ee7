"""Expand a recipe into its stages.

    prepare(alignment)   ─▶ pretrain ─▶ connector ┐
    prepare(instruction) ─────────────────────────┴─▶ finetune ─▶ model ─▶ evaluate
                                        untrained model (a baseline) ─▶ evaluate

Expansion reads configuration files and annotations, and refuses input that cannot work before any worker starts.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from raylava.config.recipe import Benchmark, Corpus, InitialWeights, Language, Recipe, StageName, Vision
from raylava.corpus.shards import PrepareSpec
from raylava.corpus.source_cache import SourceCache
from raylava.errors import UserError
from raylava.evaluation.generation import ActorPool
from raylava.evaluation.loading import BenchmarkCache
from raylava.models.hub import absolute_name, pin_revision, weights_identity
from raylava.models.registry import (
    LlavaCheckpoint,
    ResolvedModel,
    VisionSpec,
    load_tokenizer,
    resolve_model,
    tokenizer_sha256,
    validate_backbones,
)
from raylava.pipeline.evaluation import EvaluateStage, EvaluationRequest, ModelRef
from raylava.pipeline.stage import Stage
from raylava.pipeline.stages import PrepareStage, TrainStage, UntrainedStage
from raylava.storage import StoragePath, join, storage_path
from raylava.train.spec import TrainSpec


class InputCache:
    """Inputs that several recipes share, read once: benchmarks, and what identifies the sources of corpora.

    `resolved_sources` is that of another process, which then reads none of the sources again.
    """

    def __init__(self, resolved_sources: Mapping[str, Any] | None = None) -> None:
        self.benchmarks, self.sources = BenchmarkCache(), SourceCache(resolved_sources)

    @property
    def resolved_sources(self) -> dict[str, Any]:
        """What identifies each source that was read so far; serializable."""
        return self.sources.known


HubModel = TypeVar("HubModel", Language, Vision, InitialWeights)


def build_stages(
    recipe: Recipe,
    storage: StoragePath,
    inputs: "InputCache | None" = None,
) -> list[Stage]:
    """Return the recipe's stages in an order in which each follows its inputs.

    `inputs` avoids reading the same files again for another recipe. Raises UserError for input that cannot work.
    """
    recipe = make_absolute(recipe)
    stages = _StageBuilder(recipe, storage, resolve(recipe), inputs or InputCache()).build()
    for stage in stages:
        stage.spec()  # identifies the inputs now: a mistake must be reported before any stage runs
    return stages


def build_prepare_stages(recipe: Recipe, storage: StoragePath) -> list[PrepareStage]:
    """Return the stages that prepare the recipe's corpora, without identifying their inputs.

    Raises UserError for backbones that cannot be resolved.
    """
    recipe = make_absolute(recipe).model_copy(update={"evaluate": ()})
    return _StageBuilder(recipe, storage, resolve(recipe), InputCache()).prepare_stages()


def resolve(recipe: Recipe) -> ResolvedModel:
    """Resolve the recipe's model. Raises UserError for a missing or unsuitable backbone, connector or max_length."""
    validate_backbones(recipe.model.language, recipe.model.vision)
    model = resolve_model(recipe.model)
    if model.connector_weights:
        from raylava.models.connector import validate_connector

        validate_connector(model.connector_weights, model.vision, model.language)
    if model.initial_weights:
        from raylava.models.checkpoint import validate_checkpoint

        validate_checkpoint(model)
    _check_lengths(recipe, model.vision)
    return model


def _check_lengths(recipe: Recipe, vision: VisionSpec) -> None:
    for name, corpus in (("alignment", recipe.corpora.alignment), ("instruction", recipe.corpora.instruction)):
        if corpus is not None and corpus.max_length <= vision.image_tokens:
            raise UserError(
                f"corpora.{name}.max_length={corpus.max_length}: one image takes {vision.image_tokens} tokens with "
                f"{vision.name}; raise it"
            )


def make_absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute locations, since workers run in another directory."""
    model, data = recipe.model, storage_path(recipe.data or ".").uri
    weights, initial = model.connector.weights, model.initial_weights
    parts = {
        "language": model.language.model_copy(update={"name": absolute_name(model.language.name)}),
        "vision": model.vision.model_copy(update={"name": absolute_name(model.vision.name)}),
        "connector": model.connector.model_copy(update={"weights": weights and storage_path(weights).uri}),
        "initial_weights": initial and initial.model_copy(update={"name": absolute_name(initial.name)}),
    }
    return recipe.model_copy(update={"data": data, "model": model.model_copy(update=parts)})


def pin_commits(recipe: Recipe) -> Recipe:
    """Return the recipe with hub revisions replaced by commits, so that other processes resolve the same ones.

    Raises UserError when the hub cannot be reached and no snapshot is cached.
    """

    def pin(part: HubModel) -> HubModel:
        return part.model_copy(update={"revision": pin_revision(part.name, part.revision)})

    model = recipe.model
    parts = {
        "language": pin(model.language),
        "vision": pin(model.vision),
        "initial_weights": model.initial_weights and pin(model.initial_weights),
    }
    return recipe.model_copy(update={"model": model.model_copy(update=parts)})


class _StageBuilder:
    """Builds the stages of one recipe; each method builds one type."""

    def __init__(
        self,
        recipe: Recipe,
        storage: StoragePath,
        model: ResolvedModel,
        inputs: InputCache,
    ) -> None:
        self._recipe, self._storage, self._model, self._inputs = recipe, storage, model, inputs
        self._tokenizer = tokenizer_sha256(load_tokenizer(model.language))
        self._backbones = _identify_backbones(model)
        weights = model.connector_weights
        self._given_connector = weights and _connector_sha256(weights)

    def build(self) -> list[Stage]:
        recipe = self._recipe
        stages: list[Stage] = []
        connector: Stage | None = None
        if recipe.pretrain.enabled:
            assert recipe.corpora.alignment is not None
            alignment = self._prepare("alignment", recipe.corpora.alignment)
            connector = self._train("pretrain", alignment, None)
            stages += [alignment, connector]
        instruction = self._prepare("instruction", recipe.corpora.instruction)
        finetune = self._train("finetune", instruction, connector)
        return [*stages, instruction, finetune, *self._evaluations(finetune)]

    def prepare_stages(self) -> list[PrepareStage]:
        """Return the stages that prepare corpora."""
        corpora, stages = self._recipe.corpora, []
        if self._recipe.pretrain.enabled:
            assert corpora.alignment is not None
            stages.append(self._prepare("alignment", corpora.alignment))
        return [*stages, self._prepare("instruction", corpora.instruction)]

    def _prepare(self, name: str, corpus: Corpus) -> PrepareStage:
        recipe, model = self._recipe, self._model
        paths = tuple(
            (join(recipe.data, source.annotations), join(recipe.data, source.images)) for source in corpus.sources
        )
        spec = PrepareSpec(name, corpus, paths, model.language, model.vision, output="")
        benchmarks = {named.name: self._inputs.benchmarks.get(named, recipe.data) for named in recipe.evaluate}
        return PrepareStage(spec, self._tokenizer, recipe.resources, self._storage, self._inputs.sources, benchmarks)

    def _train(self, stage: StageName, blocks: Stage, connector: Stage | None) -> TrainStage:
        recipe = self._recipe
        spec = TrainSpec(
            stage=stage,
            model=self._model,
            training=recipe.pretrain if stage == "pretrain" else recipe.finetune,
            seed=recipe.seed,
            blocks=blocks.spec().path.uri,
            connector=connector.spec().path.uri if connector else None,
            image_aspect=recipe.corpora.instruction.image_aspect,
            output="",
            tracking=recipe.tracking,
        )
        inputs = {"blocks": blocks.spec()} | ({"connector": connector.spec()} if connector else {})
        return TrainStage(spec, self._backbones, recipe.resources, self._storage, inputs, self._given_connector)

    def _untrained(self) -> UntrainedStage:
        recipe = self._recipe
        image_aspect = recipe.corpora.instruction.image_aspect
        return UntrainedStage(
            self._model,
            self._backbones,
            recipe.seed,
            image_aspect,
            recipe.finetune.precision,
            self._storage,
            self._given_connector,
        )

    def _evaluations(self, model: Stage) -> list[Stage]:
        stages: list[Stage] = []
        untrained: Stage | None = None
        for benchmark in self._recipe.evaluate:
            stages.append(self._evaluate(benchmark, model, f"evaluate {benchmark.name}"))
            if "blank_images" in benchmark.baselines:
                label = f"evaluate {benchmark.name} (blank)"
                stages.append(self._evaluate(benchmark, model, label, blank_images=True))
            if "untrained" in benchmark.baselines:
                if untrained is None:
                    untrained = self._untrained()
                    stages.append(untrained)
                stages.append(self._evaluate(benchmark, untrained, f"evaluate {benchmark.name} (untrained)"))
        return stages

    def _evaluate(self, benchmark: Benchmark, model: Stage, label: str, blank_images: bool = False) -> EvaluateStage:
        request = EvaluationRequest(
            model=ModelRef(LlavaCheckpoint(model.spec().path.uri), model.spec().fingerprint, {"model": model.spec()}),
            benchmark=benchmark,
            loaded=self._inputs.benchmarks.get(benchmark, self._recipe.data),
            actors=ActorPool.from_resources(self._recipe.resources),
            blank_images=blank_images,
        )
        return EvaluateStage(label, request, self._storage)


def _identify_backbones(model: ResolvedModel) -> dict[str, Any]:
    """Return what identifies the backbones, and how they are connected, in the fingerprints of training stages."""
    initial = model.initial_weights
    return {
        "feature_scale": model.feature_scale,
        "initial_weights": initial
        and {
            "weights": weights_identity(initial.name, initial.revision),
            "transformers_version": initial.transformers_version,
        },
        "vision": weights_identity(model.vision.name, model.vision.revision),
        "image": model.vision.fingerprint_fields(),
        "language": weights_identity(model.language.name, model.language.revision),
        "template": dataclasses.asdict(model.language.template),
    }


def _connector_sha256(folder: str) -> str:
    from raylava.models.connector import CONNECTOR_FILE

    return (storage_path(folder) / CONNECTOR_FILE).sha256()
