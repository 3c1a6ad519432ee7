"""Errors of torch without a separate type are distinguished by their text."""

import pytest
import torch

from raylava.compat.torch import is_out_of_memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("NCCL Error 1: unhandled cuda error: Cuda failure 2 'out of memory'"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:30],
)
def test_failed_allocation_is_out_of_memory(error: BaseException) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: misaligned address"),
        RuntimeError("view size is not compatible: at least one dimension spans across memory strides"),
        ValueError("out of memory"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_illegal_access_to_memory_is_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)
