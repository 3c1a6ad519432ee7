"""`raylava check`: validate a recipe, alone or against a cluster."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import DEFAULT_STORAGE, AsJson, Overrides, RecipeFile, Storage
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe


def command(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="FILE", help="the node types of a `ray up` file or KubeRay manifest"),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="URL", help="also check the resources of the cluster with this job server"),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    as_json: AsJson = False,
) -> int:
    """Validate a recipe, alone or against a cluster."""
    return execute(
        "check", as_json, lambda console: _check(recipe, overrides or [], cluster, address, storage, console)
    )


def _check(
    file: str, overrides: list[str], cluster: str | None, address: str | None, storage: str, console: Console
) -> CommandResult:
    from raylava.config.load import load_recipe
    from raylava.evaluation.loading import validate_benchmark
    from raylava.models.registry import validate_backbones

    recipe = load_recipe(file, overrides)
    validate_backbones(recipe.model.language, recipe.model.vision)
    for benchmark in recipe.evaluate:
        validate_benchmark(benchmark)
    _check_operators(recipe)
    _check_folders(recipe)
    if address and cluster:
        raise UserError("check takes --cluster FILE or --address URL; leave one out")
    if address not in (None, "auto"):
        return _check_as_job(recipe, str(address), storage, console)
    if address or cluster:
        return _check_placements(file, recipe, cluster, storage, console)
    return CommandResult(recipe.model_dump(mode="json"), f"{file}: valid")


def _check_operators(recipe: "Recipe") -> None:
    if not any(corpus and corpus.operators for corpus in (recipe.corpora.alignment, recipe.corpora.instruction)):
        return  # the library imports torch

    from raylava.corpus.operator_library import check_compared_benchmarks, load_operators

    benchmarks = [benchmark.name for benchmark in recipe.evaluate]
    for name, corpus in (("alignment", recipe.corpora.alignment), ("instruction", recipe.corpora.instruction)):
        key = f"corpora.{name}.operators"
        operators = load_operators(corpus.operators, key) if corpus else []
        check_compared_benchmarks(operators, benchmarks, key)


def _check_folders(recipe: "Recipe") -> None:
    """Check the configuration files of backbones in local folders, which need no network."""
    from raylava.models.hub import is_folder
    from raylava.models.registry import resolve_language, resolve_vision

    if is_folder(recipe.model.language.name):
        resolve_language(recipe.model.language)
    if is_folder(recipe.model.vision.name):
        resolve_vision(recipe.model.vision)


def _check_placements(
    file: str, recipe: "Recipe", cluster: str | None, storage: str, console: Console
) -> CommandResult:
    """Check against a cluster file, or as a driver of the cluster."""
    from raylava.cli.tables import placement_table
    from raylava.cluster.nodes import NodeType, live_nodes, read_node_types, startable_node_types
    from raylava.cluster.placement import placements, resource_requests
    from raylava.cluster.roles import cluster_has_roles
    from raylava.cluster.session import ray_session

    node_types: list[NodeType] | None
    if cluster:
        node_types, live, roles = read_node_types(Path(cluster)), [], True
    else:
        with ray_session(recipe.resources):
            node_types, live, roles = startable_node_types(), live_nodes(), cluster_has_roles()
    stage_placements = placements(resource_requests(recipe, roles), live, node_types)
    console.show(placement_table(recipe, stage_placements, storage))
    for placement in stage_placements:
        if placement.is_impossible:
            stages = " and ".join(placement.request.stages)
            raise UserError(f"{stages} can never start there: {placement.request.description}: {placement.reason}")
    verdict = "the cluster can run it" if node_types is not None else "the autoscaler's node types are unknown"
    return CommandResult({"placements": [asdict(placement) for placement in stage_placements]}, f"{file}: {verdict}")


def _check_as_job(recipe: "Recipe", address: str, storage: str, console: Console) -> CommandResult:
    """Run the check as a cluster job: only a driver sees the cluster's nodes and the autoscaler's configuration."""
    from raylava.cluster.jobs import JobClient, JobSpec
    from raylava.pipeline.graph import make_absolute

    arguments = ("check", "recipe.yaml", "--address", "auto", "--storage", storage)
    job = JobSpec(recipe.name, arguments, {"recipe.yaml": make_absolute(recipe).model_dump(mode="json")})
    output = JobClient(address).run_and_capture(job)
    console.stream.write(output)
    return CommandResult({"output": output})
