"""Servers of vLLM that run for the duration of an evaluation, each in an actor with its own Python environment.

vLLM needs another version of transformers than raylava. Ray installs it into an environment for these actors, once on
each node (`runtime_env`). A server listens on its node's loopback interface only, so its actor forwards the requests.

The tests start another server of the same API. With vLLM itself, on a GPU, this has not been run yet.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raylava.cluster.session import error_summary, free_ports
from raylava.errors import RunError, first_line
from raylava.evaluation.endpoints import (
    DEFAULT_CONCURRENCY,
    Endpoint,
    EndpointSource,
    EndpointUnavailable,
    HttpEndpoint,
    Reply,
)
from raylava.models.hub import is_folder, model_path

if TYPE_CHECKING:
    from raylava.evaluation.generation import ActorPool, GenerationConfig
    from raylava.models.registry import LlavaCheckpoint

_SERVED_MODEL = "raylava"
_DTYPES = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_START_TIMEOUT_S = 1800.0
_POLL_INTERVAL_S = 0.5
_STOP_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class VllmServers(EndpointSource):
    """As many servers as the evaluation has workers, at least one, started by `command` where `requirements` are.

    `command` is continued by the arguments of `vllm serve`. Without `requirements`, it runs in raylava's environment.
    """

    served_model: str = _SERVED_MODEL
    concurrency: int = DEFAULT_CONCURRENCY
    command: tuple[str, ...] = ("vllm", "serve")
    requirements: tuple[str, ...] = ("vllm==0.32.*",)
    needs_ray = True

    def fingerprint_fields(self) -> dict[str, Any]:
        """See EndpointSource."""
        return {"served_model": self.served_model, "server": list(self.requirements)}

    @contextlib.contextmanager
    def open(self, config: "GenerationConfig", actors: "ActorPool") -> Iterator[Sequence[Endpoint]]:
        """See EndpointSource. Raises RunError when a server cannot be started."""
        arguments = _arguments(config.model, self.served_model, config.precision, actors.gpus_per_actor)
        server_class = ray.remote(**self._actor_options(actors))(_VllmServer)
        servers = [
            server_class.remote(config.model.name, [*self.command], arguments, self.concurrency)
            for _ in range(actors.max_actors or 1)
        ]
        try:
            _wait_until_ready(servers)
            yield [_ActorEndpoint(server, f"vLLM server {number}") for number, server in enumerate(servers, 1)]
        finally:
            ray.wait([server.stop.remote() for server in servers], num_returns=len(servers), timeout=_STOP_TIMEOUT_S)
            for server in servers:
                ray.kill(server)

    def _actor_options(self, actors: "ActorPool") -> dict[str, Any]:
        """Return resources, node labels and Python environment of the actors."""
        options: dict[str, Any] = {"num_cpus": actors.cpus_per_actor, "num_gpus": actors.gpus_per_actor}
        options["max_concurrency"] = self.concurrency + 1  # stop() must not wait for requests
        if actors.node_labels:
            options["label_selector"] = dict(actors.node_labels)
        if self.requirements:
            options["runtime_env"] = {"uv": list(self.requirements)}
        return options


def _arguments(model: "LlavaCheckpoint", served_model: str, precision: str, gpus: int) -> list[str]:
    """Return the arguments of `vllm serve` that follow the model, except for its address."""
    arguments = ["--served-model-name", served_model, "--dtype", _DTYPES[precision]]
    arguments += ["--limit-mm-per-prompt", '{"image": 1}']
    if not is_folder(model.name):
        arguments += ["--revision", model.revision]
    return [*arguments, "--tensor-parallel-size", str(gpus)] if gpus > 1 else arguments


def _wait_until_ready(servers: Sequence[Any]) -> None:
    try:
        problems = ray.get([server.start.remote() for server in servers], timeout=2 * _START_TIMEOUT_S)
    except GetTimeoutError as error:
        raise RunError(
            f"not all of {len(servers)} vLLM servers could be started within {2 * _START_TIMEOUT_S:g} s; free GPUs for "
            "them, or lower --workers"
        ) from error
    except RayError as error:  # among others, of the environment's installation
        raise RunError(f"vLLM cannot be started ({first_line(error)})") from error
    for problem in filter(None, problems):
        raise RunError(problem)


class _ActorEndpoint:
    """A server behind its actor, which forwards the requests."""

    def __init__(self, server: Any, name: str) -> None:
        self._server, self.name = server, name

    def request(self, method: str, path: str, body: bytes | None = None) -> Reply:
        """See Endpoint."""
        try:
            reply: Reply | str = ray.get(self._server.request.remote(method, path, body))
        except RayError as error:
            raise EndpointUnavailable(first_line(error)) from error
        if isinstance(reply, str):
            raise EndpointUnavailable(reply)
        return reply


class _VllmServer:
    """The actor: runs the server as a child process and forwards requests to it.

    Only processes of this machine can connect to the server, and only those that know the key, which is drawn here.
    """

    def __init__(self, model: str, command: list[str], arguments: list[str], max_connections: int) -> None:
        (port,) = free_ports(1)
        key = secrets.token_hex(16)
        address = f"http://127.0.0.1:{port}"
        self._model, self._command = model, command
        self._arguments = [*arguments, "--host", "127.0.0.1", "--port", str(port)]
        self._environment = _with_own_programs(os.environ) | {"VLLM_API_KEY": key}
        self._health, self._api = HttpEndpoint(address), HttpEndpoint(f"{address}/v1", key, max_connections)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str:
        """Start the server and wait until it responds. Return why it cannot be started, empty if it was."""
        try:
            command = [*self._command, model_path(self._model), *self._arguments]
            # Its output goes to the actor's log.
            self._process = subprocess.Popen(command, env=self._environment, start_new_session=True)
            return self._wait_for_health(self._process)
        except Exception as error:
            return f"vLLM cannot be started ({error_summary(error)})"

    def _wait_for_health(self, process: "subprocess.Popen[bytes]") -> str:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(EndpointUnavailable):
                if self._health.request("GET", "/health").status == 200:
                    return ""
            if process.poll() is not None:
                actor = ray.get_runtime_context().get_actor_id()
                problem = f"the server ended with status {process.returncode} before it was ready"
                return f"vLLM: {problem}; see `ray logs actor --id {actor}` or the dashboard"
            time.sleep(_POLL_INTERVAL_S)
        return f"vLLM: the server is not ready after {_START_TIMEOUT_S:g} s"

    def request(self, method: str, path: str, body: bytes | None) -> Reply | str:
        """Forward a request. Return the response, or why there is none."""
        try:
            return self._api.request(method, path, body)
        except EndpointUnavailable as problem:
            return str(problem)

    def stop(self) -> None:
        """End the server and its processes."""
        if self._process:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S / 2)
            with contextlib.suppress(ProcessLookupError):  # its children may outlive it, with the GPU's memory
                os.killpg(self._process.pid, signal.SIGKILL)


def _with_own_programs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which the programs of this Python's environment, such as vllm, come first."""
    path = os.pathsep.join([os.path.dirname(sys.executable), environment.get("PATH", os.defpath)])
    return {**environment, "PATH": path}
