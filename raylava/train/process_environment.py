"""Environment variables that CUDA, NCCL and torch read once, before a training process has its process group."""

import os
from collections.abc import Mapping

from raylava.config.recipe import Training

# Bit-equal sums: cuBLAS's workspaces, and NCCL's ring, whose order of additions does not depend on the message size or
# on switches that add in the network (NVLink SHARP).
_DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0"}
# Packs have different lengths: without segments that grow, the allocator's memory is fragmented.
_ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_OLD_NAMES = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}  # which torch prefers where it is set
# The last collectives of each rank, which a report of a hang shows.
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000"}


def process_environment(training: Training) -> dict[str, str]:
    """Return the variables for a process that trains with these settings."""
    return _ALLOCATOR | _FLIGHT_RECORDER | (_DETERMINISTIC if training.deterministic else {})


def set_process_environment(environment: Mapping[str, str]) -> None:
    """Set the variables in this process, except those that the user has set."""
    for name, value in environment.items():
        if _OLD_NAMES.get(name, name) not in os.environ:
            os.environ.setdefault(name, value)
