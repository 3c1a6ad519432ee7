"""Fixtures of tests that need processes or a process group."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def single_rank() -> Iterator[None]:
    """The process group of one rank that `raylava train` starts, in this process. DeepSpeed keeps the first one."""
    import torch

    from raylava.train.torchrun_backend import Rendezvous, process_group

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        with process_group(Rendezvous(), use_gpu=False):
            yield
    torch.set_num_threads(threads)
