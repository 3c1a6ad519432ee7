"""A recipe → its stages → run what is missing.

    prepare(alignment)   ─▶ pretrain ─▶ connector ┐
    prepare(instruction) ─────────────────────────┴─▶ finetune ─▶ model ─▶ evaluate
                                        untrained model (a baseline) ─▶ evaluate

Resolving reads configuration files and annotations, and refuses what cannot work before any worker starts. What a stage
does is in its own room.
"""

import dataclasses
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raylava.artifacts import Artifact, ArtifactSpec, lock
from raylava.cluster.nodes import live_nodes, startable_node_types
from raylava.cluster.placement import placements, resource_requests
from raylava.cluster.roles import PREPARE, has_roles, labels_for
from raylava.cluster.session import ray_session
from raylava.config.recipe import Benchmark, Corpus, Recipe
from raylava.console import Console, ProgressBar
from raylava.corpus.prepare import PrepareSpec, check_quarantine, prepare
from raylava.corpus.sources import SourceFiles
from raylava.errors import UserError
from raylava.evaluate.benchmarks import BenchmarkCache
from raylava.evaluate.generation import ActorPool
from raylava.models.registry import (
    LanguageSpec,
    VisionSpec,
    check_known,
    load_tokenizer,
    located,
    resolve_language,
    resolve_vision,
    tokenizer_identity,
    weights_identity,
)
from raylava.pipeline.evaluation import Asked, evaluation
from raylava.pipeline.stage import Stage, commit, reuse, run_stage
from raylava.storage import StoragePath, join, storage_path

if TYPE_CHECKING:
    from raylava.train.spec import TrainSpec


@dataclass(frozen=True)
class ResolvedModel:
    """What the recipe's names turned out to mean on this machine."""

    vision: VisionSpec
    language: LanguageSpec
    tokenizer: str
    vision_weights: dict[str, str]
    language_weights: dict[str, str]


def resolve(recipe: Recipe) -> ResolvedModel:
    """Look the backbones up. Raises UserError, before any worker starts, for what is missing or doesn't fit."""
    check_known(recipe.model.language, recipe.model.vision)
    vision, language = resolve_vision(recipe.model.vision), resolve_language(recipe.model.language)
    if recipe.model.connector.weights:
        from raylava.models.llava import check_connector

        check_connector(recipe.model.connector.weights, vision, language)
    _check_lengths(recipe, vision)
    return ResolvedModel(
        vision,
        language,
        tokenizer_identity(load_tokenizer(recipe.model.language)),
        weights_identity(recipe.model.vision.name, recipe.model.vision.revision),
        weights_identity(recipe.model.language.name, recipe.model.language.revision),
    )


def _check_lengths(recipe: Recipe, vision: VisionSpec) -> None:
    for name, corpus in (("alignment", recipe.corpora.alignment), ("instruction", recipe.corpora.instruction)):
        if corpus is not None and corpus.max_length <= vision.image_tokens:
            raise UserError(
                f"corpora.{name}.max_length={corpus.max_length}: one image alone takes {vision.image_tokens} tokens "
                f"with {vision.name}; raise it"
            )


def stages_of(recipe: Recipe, storage: StoragePath, exams: BenchmarkCache | None = None) -> list[Stage]:
    """The recipe's stages, each after those it reads; `exams` spares reading what another recipe is asked as well.

    Raises UserError for input that cannot work.
    """
    return _Graph(recipe, storage, resolve(recipe), exams or BenchmarkCache()).stages()


def run(recipe: Recipe, storage: StoragePath, console: Console, only: str | None = None) -> dict[str, Artifact]:
    """Make every artifact of the recipe (or `only` those of a kind of stage: prepare) that is missing.

    Returns them by stage label.
    """
    stages = [stage for stage in stages_of(recipe, storage) if only in (None, stage.spec.stage)]
    artifacts: dict[str, Artifact] = {}
    missing = [stage for stage in stages if stage.spec.find() is None]
    if not missing:
        return {stage.label: reuse(stage, console) for stage in stages}
    with ray_session(recipe.resources):
        check_capacity(recipe, {stage.spec.stage for stage in missing}, console)
        for stage in stages:
            artifacts[stage.label] = run_stage(stage, console)
    return artifacts


def check_capacity(recipe: Recipe, kinds: set[str], console: Console) -> None:
    """Whether the cluster that is joined has room for such stages (prepare, finetune, …) of the recipe.

    Raises UserError where it never will; says what waits for nodes that are to be started.
    """
    types = startable_node_types() if os.environ.get("RAY_ADDRESS") else []
    wanted = [need for need in resource_requests(recipe, has_roles()) if kinds & set(need.stages)]
    for one in placements(wanted, live_nodes(), types):
        stages = " and ".join(one.request.stages)
        if one.is_impossible:
            raise UserError(f"{stages} can never start on this cluster: {one.request.description}: {one.reason}")
        if one.fits_now < one.request.min_workers:
            console.say(f"[dim]{stages} will wait for nodes: {one.request.description}, {one.fits_now} fit now[/]")


def train_standalone(recipe: Recipe, storage: StoragePath, label: str, console: Console) -> Artifact | None:
    """One training stage on this process and those that torchrun started with it; the artifact, on rank 0.

    Raises UserError when the recipe has no such stage or what it reads is not made yet.
    """
    from raylava.train.torchrun_backend import RankInfo, train

    stage = _training_stage(stages_of(recipe, storage), label)
    if stage.spec.find() is not None:
        return reuse(stage, console)
    assert stage.job is not None
    started = time.monotonic()
    with lock(stage.spec.path, label) if RankInfo.from_environment().rank == 0 else nullcontext():
        with console.stage(label, stage.unit) as bar:
            metrics = train(stage.job(), recipe.resources, bar)
        return None if metrics is None else commit(stage, metrics, started, console)


def _training_stage(stages: list[Stage], label: str) -> Stage:
    found = {stage.label: stage for stage in stages if stage.job is not None}
    if label not in found:
        raise UserError(f"{label}: the recipe trains {', '.join(found)}; name one of these")
    for spec in found[label].inputs.values():
        if spec.find() is None:
            raise UserError(f"{label} reads {spec.path}, which is not made yet; make it with `raylava run`")
    return found[label]


class _Graph:
    """Builds the stages of one recipe; each method makes one kind."""

    def __init__(self, recipe: Recipe, storage: StoragePath, facts: ResolvedModel, exams: BenchmarkCache) -> None:
        self._recipe, self._storage, self._facts, self._exams = absolute(recipe), storage, facts, exams

    def stages(self) -> list[Stage]:
        recipe = self._recipe
        found: list[Stage] = []
        connector: Stage | None = None
        if recipe.pretrain.enabled and recipe.model.connector.weights is None:
            assert recipe.corpora.alignment is not None
            alignment = self._prepare("alignment", recipe.corpora.alignment)
            connector = self._pretrain(alignment)
            found += [alignment, connector]
        instruction = self._prepare("instruction", recipe.corpora.instruction)
        model = self._finetune(instruction, connector)
        found += [instruction, model]
        return found + self._evaluations(model)

    def _evaluations(self, model: Stage) -> list[Stage]:
        found: list[Stage] = []
        untrained: Stage | None = None
        for benchmark in self._recipe.evaluate:
            found.append(self._evaluate(benchmark, model, f"evaluate {benchmark.name}", blank=False))
            if "blank_images" in benchmark.baselines:
                found.append(self._evaluate(benchmark, model, f"evaluate {benchmark.name} (blank)", blank=True))
            if "untrained" in benchmark.baselines:
                if untrained is None:
                    untrained = self._untrained()
                    found.append(untrained)
                found.append(
                    self._evaluate(benchmark, untrained, f"evaluate {benchmark.name} (untrained)", blank=False)
                )
        return found

    def _spec(self, stage: str, content: dict[str, Any]) -> ArtifactSpec:
        return ArtifactSpec(stage, content, self._storage)

    def _prepare(self, name: str, corpus: Corpus) -> Stage:
        facts, recipe = self._facts, self._recipe
        places = tuple(
            (join(recipe.data, source.annotations), join(recipe.data, source.images)) for source in corpus.sources
        )
        sources = [SourceFiles(source, *found) for source, found in zip(corpus.sources, places, strict=True)]
        template = facts.language.template
        content = {
            "corpus": corpus.fingerprint_fields(),
            "sources": [source.identity() for source in sources],
            "tokenizer": facts.tokenizer,
            "template": dataclasses.asdict(template),
            "vision": facts.vision.identity(),
        }
        spec = self._spec("prepare", content)
        job = PrepareSpec(name, corpus, places, recipe.model.language, template, facts.vision, spec.path.uri)

        def build(bar: ProgressBar) -> dict[str, Any]:
            return prepare(job, facts.tokenizer, bar, labels_for(PREPARE, recipe.resources)).figures()

        return Stage(
            f"prepare {name}",
            spec,
            {},
            "rows",
            build,
            lambda metrics: check_quarantine(metrics, name, corpus, spec.path),
        )

    def _backbones(self) -> dict[str, Any]:
        facts = self._facts
        return {
            "vision": facts.vision_weights,
            "image": facts.vision.identity(),
            "language": facts.language_weights,
            "template": dataclasses.asdict(facts.language.template),
        }

    def _pretrain(self, alignment: Stage) -> Stage:
        content = {
            "backbones": self._backbones(),
            "training": self._recipe.pretrain.fingerprint_fields(),
            "seed": self._recipe.seed,
            "blocks": alignment.spec.fingerprint,
        }
        return self._training("pretrain", content, {"blocks": alignment.spec})

    def _finetune(self, instruction: Stage, connector: Stage | None) -> Stage:
        given = self._recipe.model.connector.weights
        content = {
            "backbones": self._backbones(),
            "training": self._recipe.finetune.fingerprint_fields(),
            "seed": self._recipe.seed,
            "blocks": instruction.spec.fingerprint,
            "connector": connector.spec.fingerprint if connector else given and _connector_identity(given),
            "image_aspect": self._recipe.corpora.instruction.image_aspect,
        }
        inputs = {"blocks": instruction.spec} | ({"connector": connector.spec} if connector else {})
        return self._training("finetune", content, inputs)

    def _training(self, stage: Any, content: dict[str, Any], inputs: dict[str, ArtifactSpec]) -> Stage:
        spec = self._spec(stage, content)
        recipe, facts = self._recipe, self._facts
        connector = inputs.get("connector")

        def job() -> "TrainSpec":
            from raylava.train.spec import TrainSpec

            return TrainSpec(
                stage=stage,
                model=recipe.model,
                vision=facts.vision,
                language=facts.language,
                training=recipe.pretrain if stage == "pretrain" else recipe.finetune,
                seed=recipe.seed,
                blocks=inputs["blocks"].path.uri,
                connector=connector.path.uri if connector else None,
                image_aspect=recipe.corpora.instruction.image_aspect,
                output=spec.path.uri,
                tracking=recipe.tracking,
            )

        def build(bar: ProgressBar) -> dict[str, Any]:
            from raylava.train.ray_backend import train

            return train(job(), recipe.resources, bar)

        return Stage(stage, spec, inputs, "steps", build, job=job)

    def _untrained(self) -> Stage:
        """The model as it was before any training: both backbones and a random connector."""
        recipe, facts = self._recipe, self._facts
        image_aspect = recipe.corpora.instruction.image_aspect
        content = {"backbones": self._backbones(), "seed": recipe.seed, "image_aspect": image_aspect}
        spec = self._spec("untrained", content)

        def build(bar: ProgressBar) -> dict[str, Any]:
            from raylava.models.untrained import export_untrained

            export_untrained(recipe.model, facts.vision, facts.language, recipe.seed, image_aspect, spec.path)
            bar.update(1, 1)
            return {}

        return Stage("untrained", spec, {}, "models", build)

    def _evaluate(self, benchmark: Benchmark, model: Stage, label: str, blank: bool) -> Stage:
        exam = self._exams.of(benchmark, self._recipe.data)
        asked = Asked(model.spec.path.uri, model.spec.fingerprint, {"model": model.spec})
        return evaluation(label, benchmark, exam, asked, self._storage, ActorPool.of(self._recipe.resources), blank)


def absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute places: workers don't run in the directory that its relative ones start from."""
    model, data = recipe.model, storage_path(recipe.data or ".").uri
    weights = model.connector.weights
    parts = {
        "language": model.language.model_copy(update={"name": located(model.language.name)}),
        "vision": model.vision.model_copy(update={"name": located(model.vision.name)}),
        "connector": model.connector.model_copy(update={"weights": weights and storage_path(weights).uri}),
    }
    return recipe.model_copy(update={"data": data, "model": model.model_copy(update=parts)})


def _connector_identity(folder: str) -> str:
    from raylava.models.llava import CONNECTOR_FILE

    return (storage_path(folder) / CONNECTOR_FILE).sha256()
