"""A watcher beside Ray on each spot node: the cloud's notice that the node goes becomes a drain of the node.

Draining is Ray's affair: nothing new starts there, and Ray Train tells the workers to save. On Kubernetes the pod's
SIGTERM does the same without this.

The notices: AWS, instance metadata v2, `spot/instance-action` (404 until two minutes before); Google Cloud, metadata
`instance/preempted` (FALSE until thirty seconds before).
"""

import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from raylava.errors import RunError, UserError, first_line

logger = logging.getLogger(__name__)

_POLL_SECONDS = 2.0
_ANSWER_SECONDS = 2.0
_PATIENCE_SECONDS = 60.0
_TOKEN_SECONDS = 300
_GCP_NOTICE_SECONDS = 30.0
_AWS = "http://169.254.169.254"
_GCP = "http://metadata.google.internal"
_ENDPOINT = "RAYLAVA_METADATA"  # another address of the metadata, for tests and proxies


@dataclass(frozen=True)
class Notice:
    """This node goes; `deadline` is in seconds since the epoch."""

    reason: str
    deadline: float


class Provider(Protocol):
    """A cloud's metadata."""

    def is_here(self) -> bool:
        """Whether this machine is one of the cloud's."""

    def notice(self) -> Notice | None:
        """The notice, once there is one. Raises OSError while the metadata does not answer."""


class Aws:
    """Instance metadata, version 2: a session token first."""

    def __init__(self, endpoint: str = _AWS) -> None:
        self._endpoint = endpoint
        self._token, self._until = "", 0.0

    def is_here(self) -> bool:
        """See Provider."""
        return _answers(self._session)

    def notice(self) -> Notice | None:
        """See Provider."""
        headers = {"X-aws-ec2-metadata-token": self._session()}
        try:
            told = json.loads(_get(f"{self._endpoint}/latest/meta-data/spot/instance-action", headers))
        except HTTPError as error:
            if error.code == 404:
                return None
            raise
        deadline = datetime.strptime(told["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        return Notice(f"AWS will {told['action']} this spot instance", deadline)

    def _session(self) -> str:
        if time.monotonic() > self._until:
            seconds = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_SECONDS)}
            self._token = _get(f"{self._endpoint}/latest/api/token", seconds, method="PUT")
            self._until = time.monotonic() + _TOKEN_SECONDS / 2
        return self._token


class Gcp:
    """Google Cloud's metadata server."""

    def __init__(self, endpoint: str = _GCP) -> None:
        self._endpoint = endpoint

    def is_here(self) -> bool:
        """See Provider."""
        return _answers(lambda: self._ask("instance/id"))

    def notice(self) -> Notice | None:
        """See Provider."""
        if self._ask("instance/preempted").strip().upper() != "TRUE":
            return None
        return Notice("Google Cloud preempts this instance", time.time() + _GCP_NOTICE_SECONDS)

    def _ask(self, path: str) -> str:
        return _get(f"{self._endpoint}/computeMetadata/v1/{path}", {"Metadata-Flavor": "Google"})


def _get(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urlopen(Request(url, headers=headers, method=method), timeout=_ANSWER_SECONDS) as answer:
        return str(answer.read().decode())


def _answers(ask: Callable[[], object]) -> bool:
    try:
        ask()
    except (OSError, HTTPException):
        return False
    return True


def find_provider(patience_seconds: float = _PATIENCE_SECONDS) -> Provider:
    """The cloud that this machine is of; a machine that starts may not have its metadata yet.

    Raises UserError on a machine of neither, after a while.
    """
    endpoint = os.environ.get(_ENDPOINT)
    found: list[Provider] = [Aws(endpoint), Gcp(endpoint)] if endpoint else [Aws(), Gcp()]
    deadline = time.monotonic() + patience_seconds
    while True:
        for provider in found:
            if provider.is_here():
                return provider
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    raise UserError("watch-spot: neither AWS's nor Google Cloud's instance metadata answers here; run it on a node")


def watch(provider: Provider, drain: Callable[[Notice], None], poll_seconds: float = _POLL_SECONDS) -> Notice:
    """Wait for the notice, drain the node, return the notice.

    Metadata that does not answer is asked again; a drain that fails is tried again until the node is gone.
    """
    while True:
        try:
            notice = provider.notice()
        except (OSError, HTTPException, ValueError, KeyError) as error:
            logger.warning("the instance metadata does not answer: %s", error)
            notice = None
        if notice is not None:
            logger.warning("%s in %.0f s; draining it", notice.reason, notice.deadline - time.time())
            if _drained(drain, notice):
                return notice
        time.sleep(poll_seconds)


def _drained(drain: Callable[[Notice], None], notice: Notice) -> bool:
    try:
        drain(notice)
    except Exception as error:  # of Ray's many kinds; once the deadline is past there is nothing more to try
        if time.time() > notice.deadline:
            raise
        logger.warning("the node could not be drained, will be tried again: %s", first_line(error))
        return False
    return True


def drain_node(address: str, node_id: str | None, notice: Notice) -> None:
    """Have Ray drain a node (this machine's, by its address, where no id is given) before the deadline.

    Raises RunError when Ray knows no such node or refuses.
    """
    from ray._raylet import GcsClient  # type: ignore[attr-defined]
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    client = GcsClient(address=address)  # what `ray drain-node` does: Ray has no public call for it
    wanted = node_id or _node_here(client)
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, refusal = client.drain_node(wanted, reason, notice.reason, int(1000 * notice.deadline))
    if not accepted:
        raise RunError(f"Ray does not drain node {wanted}: {refusal}")


def _node_here(client: object) -> str:
    from ray.core.generated.gcs_pb2 import GcsNodeInfo
    from ray.util import get_node_ip_address

    here = get_node_ip_address()
    for node_id, node in client.get_all_node_info().items():  # type: ignore[attr-defined]
        if node.state == GcsNodeInfo.ALIVE and node.node_manager_address == here:
            return str(node_id.hex())
    raise RunError(f"Ray has no live node at {here}")
