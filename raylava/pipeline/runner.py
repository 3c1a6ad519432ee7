"""Run the stages of a recipe whose artifacts are missing, on a Ray cluster or, for one training stage, without Ray."""

import json
import os
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from raylava.artifacts import Artifact, lock
from raylava.cluster.nodes import live_nodes, startable_node_types
from raylava.cluster.placement import placements, resource_requests
from raylava.cluster.roles import cluster_has_roles
from raylava.cluster.session import ray_session
from raylava.config.recipe import Recipe, Resources
from raylava.console import escape
from raylava.errors import UserError
from raylava.pipeline.graph import InputCache, build_stages, make_absolute, pin_commits
from raylava.pipeline.stage import Stage, commit, reuse, run_stage
from raylava.pipeline.stages import TrainStage
from raylava.progress import ProgressReporter
from raylava.storage import StoragePath

if TYPE_CHECKING:
    from raylava.train.torchrun_backend import Rendezvous


def run(
    recipe: Recipe, storage: StoragePath, reporter: ProgressReporter, only: str | None = None
) -> dict[str, Artifact]:
    """Build every missing artifact of the recipe, or those of one kind of stage (`only`: prepare).

    Returns all artifacts by stage label.
    """
    stages = [stage for stage in build_stages(recipe, storage) if only in (None, stage.kind)]
    existing = {stage.label: artifact for stage in stages if (artifact := stage.spec().find())}
    missing = [stage for stage in stages if stage.label not in existing]
    if not missing:
        return {stage.label: reuse(stage, existing[stage.label], reporter) for stage in stages}
    with ray_session(recipe.resources):
        check_capacity(recipe, {stage.kind for stage in missing}, reporter)
        return {stage.label: run_stage(stage, reporter) for stage in stages}


def check_capacity(recipe: Recipe, kinds: set[str], reporter: ProgressReporter) -> None:
    """Check that the connected cluster can run the recipe's stages of these kinds (prepare, finetune, …).

    Reports stages that will wait for new nodes. Raises UserError for a stage that can never start.
    """
    node_types = startable_node_types() if os.environ.get("RAY_ADDRESS") else []
    requests = [request for request in resource_requests(recipe, cluster_has_roles()) if kinds & set(request.stages)]
    for placement in placements(requests, live_nodes(), node_types):
        request = placement.request
        stages = " and ".join(request.stages)
        if placement.is_impossible:
            raise UserError(f"{stages} can never start on this cluster: {request.description}: {placement.reason}")
        if placement.fits_now < request.min_workers:
            reporter.say(
                f"[dim]{stages} will wait for nodes: {escape(request.description)}, {placement.fits_now} fit now[/]"
            )


def train_standalone(recipe: Recipe, storage: StoragePath, label: str, reporter: ProgressReporter) -> Artifact | None:
    """Train one stage in this process and those that torchrun started with it; return the artifact on rank 0.

    Raises UserError when the recipe has no such stage or an input artifact is missing.
    """
    from raylava.train import torchrun_backend

    _refuse_cluster_settings(recipe.resources)
    rendezvous = torchrun_backend.Rendezvous()
    stage = _select_training_stage(_build_same_stages(recipe, storage, rendezvous), label)
    with ExitStack() as stack:

        def must_build() -> bool:
            """Lock the artifact unless it exists; another run may complete it while rank 0 waits for the lock."""
            if stage.spec().find():
                return False
            stack.enter_context(lock(stage.spec().path, label))
            return stage.spec().find() is None

        if not rendezvous.agree(must_build):
            return _reuse_on_rank_0(stage, rendezvous.ranks.rank, reporter)
        started = time.monotonic()
        with reporter.stage(label, stage.unit) as progress:
            metrics = torchrun_backend.run(stage.train_spec(), recipe.resources, progress, rendezvous)
        return None if metrics is None else commit(stage, metrics, started, reporter)


def _build_same_stages(recipe: Recipe, storage: StoragePath, rendezvous: "Rendezvous") -> list[Stage]:
    """Build the stages on rank 0, and the same ones on the other ranks.

    Rank 0 alone asks the hub for commits and scans the sources: another rank might find newer ones.
    """
    built: list[Stage] = []

    def resolve() -> str:
        inputs = InputCache()
        built.extend(build_stages(recipe, storage, inputs))
        pinned = pin_commits(make_absolute(recipe)).model_dump(mode="json")
        return json.dumps({"recipe": pinned, "sources": inputs.resolved_sources})

    resolved = json.loads(rendezvous.share("inputs", resolve))
    return built or build_stages(Recipe.model_validate(resolved["recipe"]), storage, InputCache(resolved["sources"]))


def _refuse_cluster_settings(resources: Resources) -> None:
    """Refuse the resources that need a cluster. The number of workers is torchrun's, and cannot change."""
    for key, value in (("min_workers", resources.min_workers), ("train_node_labels", resources.train_node_labels)):
        if value:
            raise UserError(f"resources.{key}={value} needs Ray; remove it, or train with `raylava run`")
    if resources.gpus_per_worker > 0:
        from torch.cuda import is_available

        if not is_available():
            value = resources.gpus_per_worker
            raise UserError(f"resources.gpus_per_worker={value}: torch finds no GPU on this machine; set it to 0")


def _reuse_on_rank_0(stage: Stage, rank: int, reporter: ProgressReporter) -> Artifact | None:
    artifact = stage.spec().find()
    return reuse(stage, artifact, reporter) if artifact and rank == 0 else None


def _select_training_stage(stages: list[Stage], label: str) -> TrainStage:
    training_stages = {stage.label: stage for stage in stages if isinstance(stage, TrainStage)}
    if label not in training_stages:
        raise UserError(f"{label}: not a training stage of this recipe; choose one of: {', '.join(training_stages)}")
    for spec in training_stages[label].inputs.values():
        if spec.find() is None:
            raise UserError(f"{label} needs {spec.path}, which does not exist yet; build it with `raylava run`")
    return training_stages[label]
