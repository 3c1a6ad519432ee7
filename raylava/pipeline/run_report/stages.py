"""The stages that a report is about: those of a recipe, or the ones that belong to a single artifact."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylava.artifacts import Artifact, read_artifact
from raylava.errors import UserError
from raylava.pipeline.results import EVALUATE_PREFIX
from raylava.pipeline.stage import Stage
from raylava.storage import StoragePath

BLANK, UNTRAINED = "blank", "untrained"  # baselines, in the labels of stages


@dataclass(frozen=True)
class ReportStage:
    """A stage with its artifact, None while it is not built. `inputs` are the fingerprints of its inputs' artifacts."""

    label: str
    kind: str
    fingerprint: str
    path: StoragePath
    inputs: tuple[str, ...]
    artifact: Artifact | None

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of the artifact; empty while it is not built."""
        return self.artifact.metrics if self.artifact else {}


def stages_of_recipe(stages: Sequence[Stage]) -> list[ReportStage]:
    """Return the stages of a recipe, whether their artifacts exist or not."""
    return [
        ReportStage(
            stage.label,
            stage.kind,
            stage.spec().fingerprint,
            stage.spec().path,
            tuple(spec.fingerprint for spec in stage.inputs.values()),
            stage.spec().find(),
        )
        for stage in stages
    ]


def stages_of_run(artifacts: Mapping[str, Artifact]) -> list[ReportStage]:
    """Return the stages of a run from its artifacts by label."""
    return [_report_stage(label, artifact) for label, artifact in artifacts.items()]


def _report_stage(label: str, artifact: Artifact) -> ReportStage:
    inputs = tuple(artifact.record["inputs"].values())
    return ReportStage(label, artifact.stage, artifact.fingerprint, artifact.path, inputs, artifact)


def stages_of_artifact(artifact: Artifact) -> list[ReportStage]:
    """Return the stages that led to an artifact and, of a model, its evaluations beside their baselines.

    Only artifacts in the same storage are found; a damaged or unfinished one is left out.
    """
    neighbours = _Neighbours(artifact)
    model = neighbours.input_of(artifact, "model") if artifact.stage == "evaluate" else artifact
    path = [*neighbours.ancestors(model)] if model else []
    stages = [_report_stage(_label(each, path), each) for each in path]
    evaluations = [artifact] if artifact.stage == "evaluate" else neighbours.evaluations(artifact)
    for evaluation in evaluations:
        for label, each in neighbours.with_baselines(evaluation, model):
            if label not in {stage.label for stage in stages}:
                stages.append(_report_stage(label, each))
    return stages


def _label(artifact: Artifact, path: Sequence[Artifact]) -> str:
    """Return the label that an artifact's stage has in a recipe."""
    if artifact.stage != "prepare":
        return artifact.stage
    consumers = {each.stage for each in path if artifact.fingerprint in each.record["inputs"].values()}
    if not consumers:
        return "prepare"
    return "prepare alignment" if "pretrain" in consumers else "prepare instruction"


class _Neighbours:
    """The artifacts in the storage of one artifact."""

    def __init__(self, artifact: Artifact) -> None:
        root, path = artifact.path, artifact.path.path.rsplit("/", 2)[0]
        self._root = StoragePath(root.filesystem, path, root.uri.rsplit("/", 2)[0])

    def _find(self, stage: str, fingerprint: str) -> Artifact | None:
        try:
            return read_artifact(self._root / stage / fingerprint)
        except (FileNotFoundError, UserError):
            return None

    def input_of(self, artifact: Artifact, role: str) -> Artifact | None:
        """Return the artifact that an artifact has as an input."""
        fingerprint = artifact.record["inputs"].get(role)
        kinds = {"blocks": ("prepare",), "connector": ("pretrain",)}.get(role, ("finetune", "untrained"))
        found = (self._find(kind, fingerprint) for kind in kinds if fingerprint)
        return next((each for each in found if each), None)

    def ancestors(self, artifact: Artifact) -> Iterator[Artifact]:
        """Yield the artifacts that an artifact was built from, each before those built from it, then itself."""
        for role in ("connector", "blocks", "model"):
            if source := self.input_of(artifact, role):
                yield from self.ancestors(source)
        yield artifact

    def evaluations(self, model: Artifact) -> list[Artifact]:
        """Return the evaluations of a model with its images, the newest first."""
        found = [
            each
            for each in self._all_evaluations()
            if each.record["fingerprint_fields"].get("model") == model.fingerprint
            and not each.record["fingerprint_fields"].get("blank_images")
        ]
        return sorted(found, key=lambda each: each.record["finished"], reverse=True)

    def _all_evaluations(self) -> list[Artifact]:
        found = (self._find("evaluate", folder.name) for folder in (self._root / "evaluate").children())
        return [each for each in found if each]

    def with_baselines(self, evaluation: Artifact, model: Artifact | None) -> Iterator[tuple[str, Artifact]]:
        """Yield (label, artifact) of an evaluation and of those of the same questions that are its baselines."""
        label = EVALUATE_PREFIX + evaluation.metrics["benchmark"]
        yield label, evaluation
        fields = evaluation.record["fingerprint_fields"]
        for other in self._all_evaluations():
            others = other.record["fingerprint_fields"]
            if any(others.get(key) != fields.get(key) for key in ("questions", "benchmark", "engine", "precision")):
                continue
            if others["model"] == fields["model"] and others["blank_images"] and not fields["blank_images"]:
                yield f"{label} ({BLANK})", other
            elif model and self._is_untrained(other, model):
                yield f"{label} ({UNTRAINED})", other

    def _is_untrained(self, evaluation: Artifact, model: Artifact) -> bool:
        """Return whether an evaluation is of the model before training."""
        source = self.input_of(evaluation, "model")
        if source is None or source.stage != UNTRAINED or source.fingerprint == model.fingerprint:
            return False
        fields, others = model.record["fingerprint_fields"], source.record["fingerprint_fields"]
        return all(fields.get(key) == others.get(key) for key in ("backbones", "seed", "image_aspect"))
