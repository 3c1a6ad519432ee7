"""The stage types of a recipe: prepare a corpus, train, export the untrained model. evaluation.py has the fourth."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import ray

from raylava.artifacts import ArtifactSpec, fingerprint, lock
from raylava.cluster.roles import PREPARE, node_labels_for
from raylava.config.recipe import Resources
from raylava.corpus.operator_library import (
    DECONTAMINATE,
    check_compared_benchmarks,
    compared_benchmarks,
    load_operators,
)
from raylava.corpus.operators import Operator
from raylava.corpus.parallel import Function, map_with_ray_data
from raylava.corpus.prepare import ImageFolder, check_quarantine, prepare
from raylava.corpus.shards import PrepareSpec
from raylava.corpus.source_cache import SourceCache, build_indexes
from raylava.corpus.source_check import SourceCheck, check_sources
from raylava.errors import UserError
from raylava.evaluation.loading import LoadedBenchmark
from raylava.models.registry import ResolvedModel
from raylava.pipeline.stage import Stage
from raylava.progress import ProgressBar
from raylava.storage import StoragePath
from raylava.train.spec import TrainSpec
from raylava.train.step_log import FINAL_STATE

CONTINUED_FROM = "continued_from"  # metric of a training stage: fingerprint of the shorter one that it continued
INDEXED_SOURCES = "sources"  # folder of the storage; see corpus/row_index.py


class PrepareStage(Stage):
    """Prepares one corpus as Arrow blocks. `tokenizer` is the SHA-256 of the tokenizer's serialization."""

    unit = "rows"

    def __init__(
        self,
        spec: PrepareSpec,
        tokenizer: str,
        resources: Resources,
        storage: StoragePath,
        sources: SourceCache,
        benchmarks: Mapping[str, LoadedBenchmark],
    ) -> None:
        """`benchmarks` are those that operators may compare rows with."""
        super().__init__("prepare", f"prepare {spec.name}", storage, {})
        self._prepare_spec, self._tokenizer, self._resources, self._sources = spec, tokenizer, resources, sources
        self._benchmarks = benchmarks

    def fingerprint_fields(self) -> dict[str, Any]:
        spec = self._prepare_spec
        sources = [
            self._sources.fingerprint_fields(source, self.storage / INDEXED_SOURCES, self._resources)
            for source in spec.sources
        ]
        self._check_selection()
        return {
            "corpus": spec.corpus.fingerprint_fields(),
            "sources": sources,
            "tokenizer": self._tokenizer,
            "template": dataclasses.asdict(spec.language.template),
            "vision": spec.vision.fingerprint_fields(),
        } | self._operator_fields()

    def _check_selection(self) -> None:
        """Raise UserError when filters select no row of any source; of a source without filters, no row is read."""
        indexes, sources = self._sources.indexes(self.storage / INDEXED_SOURCES), self._prepare_spec.sources
        if all(source.has_filters and next(source.matching_rows(indexes), None) is None for source in sources):
            name = self._prepare_spec.name
            raise UserError(f"corpora.{name}: no row is selected; relax include and exclude of its sources")

    @cached_property
    def _operators(self) -> list[Operator]:
        return load_operators(self._prepare_spec.corpus.operators, f"corpora.{self._prepare_spec.name}.operators")

    def _operator_fields(self) -> dict[str, Any]:
        """Return what identifies operators beside their names and arguments: sources of functions, benchmark images."""
        key = f"corpora.{self._prepare_spec.name}.operators"
        sources = [operator.source_sha256 for operator in self._operators if operator.source_sha256]
        names = compared_benchmarks(self._operators)
        check_compared_benchmarks(self._operators, self._benchmarks, f"{key}: {DECONTAMINATE}")
        images = [_sha256(sorted(self._benchmarks[name].image_sizes.items())) for name in names]
        return ({"operator_sources": sources} if sources else {}) | ({"benchmark_images": images} if images else {})

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        spec = dataclasses.replace(self._prepare_spec, output=self.spec().path.uri)
        node_labels = node_labels_for(PREPARE, self._resources)
        loaded = {name: self._benchmarks[name] for name in compared_benchmarks(self._operators)}
        folders = {name: ImageFolder(value.image_root, sorted(value.image_sizes)) for name, value in loaded.items()}
        indexes = self._sources.indexes(self.storage / INDEXED_SOURCES)
        build_indexes(indexes, [file for source in spec.sources for file in source.annotation_files], self._resources)
        return prepare(spec, self._tokenizer, progress, node_labels, folders, indexes).counts()

    def validate_sources(self) -> None:
        """Raise UserError for a source without annotation files, without reading them."""
        for source in self._prepare_spec.sources:
            assert source.annotation_files

    def check_sources(self, progress: ProgressBar) -> SourceCheck:
        """Check the rows and images of the corpus on the connected cluster. Raises UserError like the stage."""
        spec, labels = self._prepare_spec, node_labels_for(PREPARE, self._resources)
        indexes = self._sources.indexes(self.storage / INDEXED_SOURCES)
        build_indexes(indexes, [file for source in spec.sources for file in source.annotation_files], self._resources)

        def map_on_cluster(function: Function, items: Sequence[int]) -> Iterator[dict[str, Any]]:
            return map_with_ray_data(f"inspecting corpora.{spec.name}", function, items, labels)

        return check_sources(spec, self.storage, indexes, progress, map_on_cluster)

    @property
    def image_roots(self) -> list[str]:
        """The image folder of each source."""
        return [source.images for source in self._prepare_spec.sources]

    def verify(self, metrics: Mapping[str, Any]) -> None:
        """Raise UserError when more rows are quarantined than the recipe, whose limit may have changed, allows."""
        spec = self._prepare_spec
        check_quarantine(dict(metrics), spec.name, spec.corpus, self.spec().path)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class TrainStage(Stage):
    """Trains the connector (pretrain) or the connector and the language model (finetune)."""

    unit = "steps"

    def __init__(
        self,
        spec: TrainSpec,
        backbones: Mapping[str, Any],
        resources: Resources,
        storage: StoragePath,
        inputs: Mapping[str, ArtifactSpec],
        connector_sha256: str | None = None,
    ) -> None:
        """`spec` lacks only the output, which follows from the fingerprint. `backbones` identify weights and pixels;
        `connector_sha256` is that of a connector given in the recipe. The stage starts from the final state of its
        `prefix`, if it has one, and keeps its own if `keep_state` is set.
        """
        super().__init__(spec.stage, spec.stage, storage, inputs)
        self._train_spec, self._backbones, self._resources = spec, dict(backbones), resources
        self._connector_sha256 = connector_sha256
        self.prefix: TrainStage | None = None
        self.keep_state = False

    @property
    def prefix_key(self) -> str | None:
        """What two stages must have in common for the shorter one to be the beginning of the longer one.

        None if the beginning depends on the length: by the schedule, or by the selection of the best state.
        """
        training = self._train_spec.training
        if training.lr_schedule != "constant" or training.warmup_ratio or training.checkpoint.keep_best:
            return None
        fields = self.fingerprint_fields()
        length = "epochs" if training.max_steps is None else "max_steps"
        settings = {key: value for key, value in fields["training"].items() if key != length}
        common = {**fields, "training": settings, "zero_stage": training.zero.stage}
        return fingerprint(self.kind, common)

    @property
    def length(self) -> int:
        """The length of the stage in epochs or, with `max_steps`, in steps."""
        training = self._train_spec.training
        return training.max_steps or training.epochs

    def as_prefix(self, prefix: "TrainStage | None") -> "TrainStage":
        """Return the stage as the beginning of a longer one: with another label, keeping its final state."""
        stage = self.continuing(prefix, keep_state=True)
        unit = "epochs" if self._train_spec.training.max_steps is None else "steps"
        stage.label = f"{self.label} (first {self.length} {unit})"
        return stage

    def continuing(self, prefix: "TrainStage | None", keep_state: bool) -> "TrainStage":
        """Return the stage starting from the final state of a shorter one; `keep_state` keeps its own for others."""
        stage = copy.copy(self)
        stage.prefix, stage.keep_state = prefix, keep_state
        return stage

    @property
    def can_be_continued(self) -> bool:
        """Whether a longer stage can start from this one's end: it is still to be built, or its state was kept."""
        return self.spec().find() is None or (self.spec().path / FINAL_STATE).exists()

    def delete_final_state(self) -> None:
        """Remove the state that was kept for longer stages, once no run uses it."""
        with lock(self.spec().path, self.label):
            (self.spec().path / FINAL_STATE).delete()

    def fingerprint_fields(self) -> dict[str, Any]:
        spec = self._train_spec
        fields = {
            "backbones": self._backbones,
            "training": spec.training.fingerprint_fields(),
            "seed": spec.seed,
            "blocks": self.inputs["blocks"].fingerprint,
        }
        if spec.stage == "pretrain":
            return fields
        connector = self.inputs["connector"].fingerprint if "connector" in self.inputs else self._connector_sha256
        return fields | {"connector": connector, "image_aspect": spec.image_aspect}

    def train_spec(self) -> TrainSpec:
        """Return the description of the stage that every worker gets."""
        state = self.prefix and self.prefix.spec().path / FINAL_STATE
        return dataclasses.replace(
            self._train_spec,
            output=self.spec().path.uri,
            initial_state=state.uri if state and state.exists() else None,
            keep_final_state=self.keep_state,
        )

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        from raylava.train.ray import driver  # imports Ray Train

        if self.prefix is None:
            return driver.run(self.train_spec(), self._resources, progress)
        with lock(self.prefix.spec().path, self.prefix.label):  # the state must not be removed meanwhile
            metrics = driver.run(self.train_spec(), self._resources, progress)
        return metrics | ({CONTINUED_FROM: self.prefix.spec().fingerprint} if metrics["first_step"] else {})


class UntrainedStage(Stage):
    """Exports the model before any training, as an evaluation baseline: its connector is random, or the given one."""

    unit = "models"

    def __init__(
        self,
        model: ResolvedModel,
        backbones: Mapping[str, Any],
        seed: int,
        image_aspect: str,
        precision: str,
        storage: StoragePath,
        connector_sha256: str | None = None,
    ) -> None:
        """`precision` is that of finetuning; `connector_sha256` identifies a connector given in the recipe."""
        super().__init__("untrained", "untrained", storage, {})
        self._model, self._backbones, self._seed, self._image_aspect = model, dict(backbones), seed, image_aspect
        self._precision, self._connector_sha256 = precision, connector_sha256

    def fingerprint_fields(self) -> dict[str, Any]:
        return {
            "backbones": self._backbones,
            "seed": self._seed,
            "image_aspect": self._image_aspect,
            "precision": self._precision,
            "connector": self._connector_sha256,
        }

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        """Export on a worker node, since the model may be larger than the driver's memory."""
        output = self.spec().path.uri
        ray.get(_export_untrained.remote(self._model, self._seed, self._image_aspect, self._precision, output))
        progress.update(1, 1)
        return {}


# In a trial, "DEFAULT" leaves the placement group of the trial, whose single bundle has no CPU.
@ray.remote(num_cpus=1, scheduling_strategy="DEFAULT")
def _export_untrained(model: ResolvedModel, seed: int, image_aspect: str, precision: str, output: str) -> None:
    from raylava.models.export import export_untrained

    export_untrained(model, seed, image_aspect, precision, output)
