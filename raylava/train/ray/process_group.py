"""The process group of Ray Train's workers: what TorchConfig sets up, without importing torch in Ray's controller.

The controller starts the workers only once it has unpickled the backend's configuration: that of torch takes two
seconds of each stage's start.
"""

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.exceptions import GetTimeoutError
from ray.train.backend import Backend, BackendConfig

from raylava.train.process_environment import set_process_environment

_SHUTDOWN_TIMEOUT_S = 30.0


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Configures workers for `backend` (gloo or nccl), with variables for the environment of each, by name.

    A collective of more than `timeout_s` seconds fails.
    """

    backend: str
    timeout_s: float
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that Ray Train's controller calls when it starts and stops workers."""
        return ProcessGroupBackend


class ProcessGroupBackend(Backend):
    """Sets the environment of every worker, and joins them to one process group."""

    share_cuda_visible_devices = True  # each worker sees the GPUs of its node's other workers, as NCCL needs

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set up the workers; called by Ray Train's controller."""
        assert isinstance(backend_config, ProcessGroupConfig)
        worker_group.execute(set_process_environment, backend_config.environment)
        address = worker_group.execute_single(0, _free_address)
        arguments = (backend_config.backend, *address, backend_config.timeout_s)
        worker_group.execute(_join_process_group, *arguments)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Destroy the process group; a worker that does not answer in time is left to Ray Train, which ends it."""
        del backend_config
        try:
            ray.get(worker_group.execute_async(_leave_process_group), timeout=_SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            return


def _free_address() -> tuple[str, int]:
    """Return this node's address and a port that is free."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        return address, int(probe.getsockname()[1])


def _join_process_group(backend: str, address: str, port: int, timeout_s: float) -> None:
    """Set torchrun's variables for this worker, and start the process group on its device."""
    import torch
    from ray.train.torch import get_device

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    if backend == "nccl":
        torch.cuda.set_device(get_device())
    torch.distributed.init_process_group(backend, init_method="env://", timeout=timedelta(seconds=timeout_s))


def _leave_process_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
