"""The environment of a training process: what determinism needs, without what the user has set."""

import os

import pytest

from raylava.config.recipe import Training
from raylava.train.process_environment import process_environment, set_process_environment


def test_deterministic_training_fixes_the_order_of_sums_in_cublas_and_nccl() -> None:
    names = {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", "NCCL_NVLS_ENABLE"}
    assert names <= process_environment(Training(deterministic=True)).keys()
    assert not names & process_environment(Training()).keys()


def test_variable_that_the_user_has_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.delenv("NCCL_NVLS_ENABLE", raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    settings = {"NCCL_ALGO": "Ring", "NCCL_NVLS_ENABLE": "0", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    set_process_environment(settings)
    assert "PYTORCH_ALLOC_CONF" not in os.environ, "torch has an older name for it, which the user has set"
    assert (os.environ["NCCL_ALGO"], os.environ["NCCL_NVLS_ENABLE"]) == ("Tree", "0")
    monkeypatch.delenv("NCCL_NVLS_ENABLE")
