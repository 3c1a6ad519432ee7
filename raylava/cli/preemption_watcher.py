"""`raylava preemption-watcher`: drain this node once the cloud sends a preemption notice."""

from functools import partial
from typing import Annotated

import typer

from raylava.cli.command import CommandResult, execute
from raylava.cli.options import AsJson


def command(
    address: Annotated[str, typer.Option("--address", metavar="HOST:PORT", help="the address of the cluster's GCS")],
    node_id: Annotated[
        str | None,
        typer.Option("--node-id", metavar="HEX", help="the node to drain (default: all on this machine)"),
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Drain this node once the cloud sends a preemption notice (AWS, Google Cloud)."""
    return execute("preemption-watcher", as_json, lambda console: _watch(address, node_id))


def _watch(address: str, node_id: str | None) -> CommandResult:
    from raylava.cluster.preemption import drain_nodes, find_metadata_service, watch_for_preemption

    notice = watch_for_preemption(find_metadata_service(), partial(drain_nodes, address, node_id))
    return CommandResult(vars(notice), f"drained: {notice.reason}")
