"""`raylava local-cluster`: start or stop an autoscaling cluster on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson
from raylava.console import Console


def command(
    action: Annotated[Literal["up", "down"], typer.Argument(metavar="up|down", help="start or stop the cluster")],
    cluster: Annotated[
        str, typer.Option("--cluster", metavar="FILE", help="the cluster's configuration")
    ] = "cluster/local-cluster.yaml",
    as_json: AsJson = False,
) -> int:
    """Start or stop an autoscaling cluster on this machine."""
    return execute("local-cluster", as_json, lambda console: _local_cluster(action, Path(cluster), console))


def _local_cluster(action: str, file: Path, console: Console) -> CommandResult:
    from raylava.cluster.local_cluster import VARIABLES, down, up

    if action == "down":
        console.say("stopped" if down() else "no local cluster is running")
        return CommandResult({}, f"unset {' '.join(VARIABLES)}")
    environment = up(file).environment()
    console.say('the cluster starts nodes on demand; `eval "$(raylava local-cluster up)"` configures this shell for it')
    return CommandResult(environment, "\n".join(f"export {name}={value}" for name, value in environment.items()))
