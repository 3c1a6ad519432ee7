"""Preemption watcher for spot nodes: turns the cloud's preemption notice into a drain of the Ray node.

Ray schedules nothing new on a draining node, and Ray Train asks the workers to save a checkpoint. On Kubernetes the
SIGTERM of the pod has the same effect, without this watcher.

Sources of the notice: on AWS, `spot/instance-action` of the instance metadata service v2 (status 404 until two minutes
before the interruption); on Google Cloud, `instance/preempted` of the metadata server (FALSE until thirty seconds
before).
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Protocol
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from raylava.errors import RunError, UserError, first_line, last_line

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 2.0
_REQUEST_TIMEOUT_S = 2.0
_DISCOVERY_TIMEOUT_S = 60.0
_AWS_TOKEN_TTL_S = 300
_GCP_NOTICE_S = 30.0
_AWS_ENDPOINT = "http://169.254.169.254"
_GCP_ENDPOINT = "http://metadata.google.internal"
_ENDPOINT_VARIABLE = "RAYLAVA_METADATA"  # overrides the address of the metadata service, for tests and proxies


@dataclass(frozen=True)
class Notice:
    """A notice that this node will be preempted at `deadline`, in seconds since the epoch."""

    reason: str
    deadline: float


class MetadataService(Protocol):
    """The instance metadata service of a cloud."""

    def is_available(self) -> bool:
        """Return whether the service answers, that is, whether this machine belongs to the cloud."""

    def poll_notice(self) -> Notice | None:
        """Return the preemption notice, or None if there is none yet. Raises OSError if the service does not answer."""


class AwsMetadata:
    """The instance metadata service of AWS, version 2, which requires a session token."""

    def __init__(self, endpoint: str = _AWS_ENDPOINT) -> None:
        self._endpoint = endpoint
        self._token, self._renew_at = "", 0.0

    def is_available(self) -> bool:
        """See MetadataService."""
        return _answers(self._session_token)

    def poll_notice(self) -> Notice | None:
        """See MetadataService."""
        headers = {"X-aws-ec2-metadata-token": self._session_token()}
        try:
            instance_action = json.loads(_request(f"{self._endpoint}/latest/meta-data/spot/instance-action", headers))
        except HTTPError as error:
            if error.code == 404:
                return None
            raise
        deadline = datetime.strptime(instance_action["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
        return Notice(f"AWS will {instance_action['action']} this spot instance", deadline)

    def _session_token(self) -> str:
        if time.monotonic() > self._renew_at:
            headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(_AWS_TOKEN_TTL_S)}
            self._token = _request(f"{self._endpoint}/latest/api/token", headers, method="PUT")
            self._renew_at = time.monotonic() + _AWS_TOKEN_TTL_S / 2
        return self._token


class GcpMetadata:
    """The metadata server of Google Cloud."""

    def __init__(self, endpoint: str = _GCP_ENDPOINT) -> None:
        self._endpoint = endpoint

    def is_available(self) -> bool:
        """See MetadataService."""
        return _answers(lambda: self._get("instance/id"))

    def poll_notice(self) -> Notice | None:
        """See MetadataService."""
        if self._get("instance/preempted").strip().upper() != "TRUE":
            return None
        return Notice("Google Cloud preempts this instance", time.time() + _GCP_NOTICE_S)

    def _get(self, path: str) -> str:
        return _request(f"{self._endpoint}/computeMetadata/v1/{path}", {"Metadata-Flavor": "Google"})


def _request(url: str, headers: dict[str, str], method: str = "GET") -> str:
    with urlopen(Request(url, headers=headers, method=method), timeout=_REQUEST_TIMEOUT_S) as response:
        return str(response.read().decode())


def _answers(request: Callable[[], object]) -> bool:
    try:
        request()
    except (OSError, HTTPException):
        return False
    return True


def find_metadata_service(timeout_s: float = _DISCOVERY_TIMEOUT_S) -> MetadataService:
    """Return the metadata service of the cloud that this machine belongs to.

    Retries, since the service of a booting machine may not answer yet. Raises UserError if none answers in
    `timeout_s` seconds.
    """
    endpoint = os.environ.get(_ENDPOINT_VARIABLE)
    services: list[MetadataService] = (
        [AwsMetadata(endpoint), GcpMetadata(endpoint)] if endpoint else [AwsMetadata(), GcpMetadata()]
    )
    deadline = time.monotonic() + timeout_s
    while True:
        for service in services:
            if service.is_available():
                return service
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_INTERVAL_S)
    raise UserError(
        "preemption-watcher: neither the AWS nor the Google Cloud instance metadata service answers; "
        "run this command on a cluster node"
    )


def watch_for_preemption(
    service: MetadataService, drain: Callable[[Notice], None], poll_interval_s: float = _POLL_INTERVAL_S
) -> Notice:
    """Wait for the preemption notice, drain the node and return the notice.

    Polls again if the metadata service does not answer, and retries a failed drain until the notice's deadline.
    """
    while True:
        try:
            notice = service.poll_notice()
        except (OSError, HTTPException, ValueError, KeyError) as error:
            logger.warning("the instance metadata service does not answer, polling again: %s", error)
            notice = None
        if notice is not None:
            seconds_left = notice.deadline - time.time()
            logger.warning("preemption notice received: %s in %.0f s; draining the node", notice.reason, seconds_left)
            if _try_drain(drain, notice):
                return notice
        time.sleep(poll_interval_s)


def _try_drain(drain: Callable[[Notice], None], notice: Notice) -> bool:
    """Return whether the drain succeeded. Raises the drain's error once the deadline has passed."""
    try:
        drain(notice)
    except Exception as error:  # Ray raises many types here
        if time.time() > notice.deadline:
            raise
        logger.warning("draining the node failed, trying again: %s", first_line(error))
        return False
    return True


def drain_nodes(address: str, node_id: str | None, notice: Notice) -> None:
    """Request that Ray drain this machine's nodes before the notice's deadline.

    `address` is HOST:PORT of the GCS. Without `node_id`, all live nodes at this machine's address are drained: the
    cloud takes the machine, and several raylets may run on it. Raises RunError if Ray rejects a request.
    """
    for target in [node_id] if node_id else _nodes_of_this_machine(address):
        seconds = max(0, round(notice.deadline - time.time()))
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={address}", f"--node-id={target}"),
            *("--reason=DRAIN_NODE_REASON_PREEMPTION", f"--reason-message={notice.reason}"),
            f"--deadline-remaining-seconds={seconds}",
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RunError(f"Ray did not drain node {target}: {last_line(result)}")


def _nodes_of_this_machine(address: str) -> list[str]:
    """Return the ids of the live nodes that share an address with the node that this process connects to."""
    import ray

    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        connected = ray.get_runtime_context().get_node_id()
        (machine,) = (node["NodeManagerAddress"] for node in nodes if node["NodeID"] == connected)
        return [node["NodeID"] for node in nodes if node["NodeManagerAddress"] == machine]
    finally:
        ray.shutdown()
