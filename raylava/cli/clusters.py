"""Commands about clusters: check, submit, stop, status, laptop, watch-spot."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from raylava.cli.command import Add, Outcome, job_server, takes_address, takes_overrides, takes_recipe
from raylava.console import Console
from raylava.errors import UserError

if TYPE_CHECKING:
    from raylava.config.recipe import Recipe


def register(add: Add) -> None:
    """Add these commands."""
    check = add("check", _check, "validate a recipe, alone or against a cluster")
    check.add_argument(
        "--cluster", metavar="FILE", help="against the node types of a `ray up` file or KubeRay manifest"
    )
    check.add_argument("--address", metavar="URL", help="against the cluster there, as it is and as it may grow")
    takes_recipe(check)
    submit = add("submit", _submit, "run a recipe or sweep as a job of a cluster, and follow it")
    submit.add_argument("--detach", action="store_true", help="do not follow it")
    takes_address(submit, "the cluster's job server")
    takes_recipe(submit)
    stop = add("stop", _stop, "stop the job of a recipe or sweep; it can go on later")
    takes_address(stop, "the cluster's job server")
    takes_recipe(stop)
    status = add("status", _status, "how far runs are, by what is in storage")
    status.add_argument("recipe", metavar="RECIPE.yaml", nargs="?", help="of its artifacts alone")
    takes_overrides(status)
    laptop = add("laptop", _laptop, "start or stop an autoscaling cluster on this machine")
    laptop.add_argument("what", choices=("up", "down"))
    laptop.add_argument("--cluster", metavar="FILE", default="cluster/laptop.yaml", help="(%(default)s)")
    spot = add("watch-spot", _watch_spot, "drain this node once the cloud says that it goes (AWS, Google Cloud)")
    spot.add_argument("--address", metavar="HOST:PORT", required=True, help="of the cluster's GCS")
    spot.add_argument("--node-id", metavar="HEX", help="(that of this machine's address)")


def _check(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.config.load import load_recipe
    from raylava.models.registry import check_known

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_known(recipe.model.language, recipe.model.vision)
    if arguments.address and arguments.cluster:
        raise UserError("check takes --cluster FILE or --address URL; leave one out")
    if arguments.address not in (None, "auto"):
        return _check_there(arguments, recipe, console)
    if arguments.address or arguments.cluster:
        return _check_cluster(arguments, recipe, console)
    return Outcome(recipe.model_dump(mode="json"), f"{arguments.recipe}: good")


def _check_cluster(arguments: argparse.Namespace, recipe: "Recipe", console: Console) -> Outcome:
    """Against a file, or as a driver of the cluster."""
    from dataclasses import asdict

    from raylava.cli.tables import needs_table
    from raylava.cluster.nodes import NodeType, live_nodes, read_node_types, startable_node_types
    from raylava.cluster.placement import placements, resource_requests
    from raylava.cluster.roles import has_roles
    from raylava.cluster.session import ray_session

    types: list[NodeType] | None
    if arguments.cluster:
        types, there, roles = read_node_types(Path(arguments.cluster)), [], True
    else:
        with ray_session(recipe.resources):
            types, there, roles = startable_node_types(), live_nodes(), has_roles()
    found = placements(resource_requests(recipe, roles), there, types)
    console.show(needs_table(recipe, found, arguments.storage))
    never = [one for one in found if one.is_impossible]
    if never:
        stages = " and ".join(never[0].request.stages)
        raise UserError(f"{stages} can never start there: {never[0].request.description}: {never[0].reason}")
    told = "the cluster can run it" if types is not None else "what the autoscaler may start is not known there"
    return Outcome({"provisions": [asdict(one) for one in found]}, f"{arguments.recipe}: {told}")


def _check_there(arguments: argparse.Namespace, recipe: "Recipe", console: Console) -> Outcome:
    """The same question, put by a job: only a driver sees the cluster's nodes and the autoscaler's file."""
    from raylava.cluster.jobs import JobClient, JobSpec
    from raylava.pipeline.stages import absolute

    command = ("check", "recipe.yaml", "--address", "auto", "--storage", arguments.storage)
    work = JobSpec(recipe.name, command, {"recipe.yaml": absolute(recipe).model_dump(mode="json")})
    told = JobClient(arguments.address).ask(work)
    console.stream.write(told)
    return Outcome({"told": told})


def _submit(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.jobs import JobClient, work_of

    work = work_of(arguments.recipe, arguments.overrides, arguments.storage)
    jobs = JobClient(job_server(arguments))
    submission, is_new = jobs.submit(work)
    console.say(f"job [bold]{submission}[/] " + ("submitted" if is_new else "runs already; following it"))
    if not arguments.detach:
        try:
            jobs.follow(submission, console.stream)
        except KeyboardInterrupt:
            console.say(f"{submission} goes on: submit again to follow it, `raylava stop` to stop it")
            raise
    told = f"next:  raylava status --storage {arguments.storage}"
    return Outcome({"submission_id": submission, "new": is_new}, told)


def _stop(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.jobs import JobClient, work_of

    work = work_of(arguments.recipe, arguments.overrides, arguments.storage)
    stopped = JobClient(job_server(arguments)).stop(work)
    told = f"{stopped}: stopped; submit again to go on from the last checkpoint" if stopped else "no such job runs"
    return Outcome({"submission_id": stopped}, told)


def _status(arguments: argparse.Namespace, console: Console) -> Outcome:
    from dataclasses import asdict

    from raylava.cli.tables import status_table
    from raylava.config.load import load_recipe
    from raylava.pipeline.stages import stages_of
    from raylava.pipeline.status import list_artifacts
    from raylava.storage import storage_path

    storage, wanted = storage_path(arguments.storage), None
    if arguments.recipe:
        stages = stages_of(load_recipe(arguments.recipe, arguments.overrides), storage)
        wanted = {stage.spec.fingerprint for stage in stages}
    found = list_artifacts(storage, wanted)
    if found:
        console.show(status_table(found))
    return Outcome({"artifacts": [asdict(one) for one in found]}, None if found else f"{storage}: nothing there yet")


def _laptop(arguments: argparse.Namespace, console: Console) -> Outcome:
    from raylava.cluster.local_cluster import VARIABLES, down, up

    if arguments.what == "down":
        console.say("stopped" if down() else "no laptop cluster runs")
        return Outcome({}, f"unset {' '.join(VARIABLES)}")
    environment = up(Path(arguments.cluster)).environment()
    console.say('a cluster that grows when there is work; `eval "$(raylava laptop up)"` tells this shell of it')
    return Outcome(environment, "\n".join(f"export {name}={value}" for name, value in environment.items()))


def _watch_spot(arguments: argparse.Namespace, console: Console) -> Outcome:
    from functools import partial

    from raylava.cluster.preemption import drain_node, find_provider, watch

    notice = watch(find_provider(), partial(drain_node, arguments.address, arguments.node_id))
    return Outcome(vars(notice), f"drained: {notice.reason}")
