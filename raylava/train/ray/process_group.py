"""Ray Train's set-up of the workers' process group, preceded by the environment variables that it reads."""

from dataclasses import dataclass, field
from typing import Any

from ray.train.torch import TorchConfig

from raylava.train.process_environment import set_process_environment

_TorchBackend: Any = TorchConfig().backend_cls


@dataclass
class ProcessGroupConfig(TorchConfig):
    """TorchConfig with variables for the environment of every worker, by name."""

    environment: dict[str, str] = field(default_factory=dict)

    @property
    def backend_cls(self) -> Any:
        """The class that Ray Train's controller calls when it starts workers."""
        return _EnvironmentFirst


class _EnvironmentFirst(_TorchBackend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: ProcessGroupConfig) -> None:
        """Set the environment of every worker, then their process group."""
        worker_group.execute(set_process_environment, backend_config.environment)
        super().on_start(worker_group, backend_config)
