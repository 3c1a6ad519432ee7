"""The private parts of DeepSpeed that raylava uses exist and do what the feature that uses them needs."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPT = """
import sys
import raylava.compat.deepspeed as compat
assert "mlflow" not in sys.modules, "DeepSpeed's autotuner imported MLflow"
assert "torch._inductor.compile_fx" not in sys.modules, "the Muon optimizer imported torch's compiler"
assert "deepspeed_shm_comm" in compat.deepspeed.ops.__compatible_ops__
"""


def test_training_starts_without_a_compiler_mlflow_or_inductor() -> None:
    """Symbols: deepspeed.ops.__compatible_ops__ and deepspeed.runtime.zero.muon.muon_optimizer."""
    process = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]


COLLECTIVES = """
import torch
import torch.distributed as dist
import raylava.compat.deepspeed
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
for _ in range(3):
    dist.all_gather_into_tensor(torch.empty(2), torch.ones(2))
    dist.reduce_scatter_tensor(torch.empty(2), torch.ones(2))
dist.destroy_process_group()
"""


def test_collectives_of_deepspeed_do_not_fill_the_logs_with_deprecation_warnings() -> None:
    process = subprocess.run([sys.executable, "-c", COLLECTIVES], capture_output=True, text=True, check=True)
    assert "deprecated" not in process.stderr


def test_checkpoints_are_written_in_the_background_without_frozen_weights(tmp_path: Path) -> None:
    """Symbol: deepspeed.runtime.checkpoint_engine.checkpoint_engine.CheckpointEngine."""
    from raylava.compat.deepspeed import BackgroundWriter

    writer = BackgroundWriter(trained={"connector"})
    weights = {"connector": torch.ones(2), "tower": torch.ones(2)}
    writer.save({"module": weights, "step": 3}, str(tmp_path / "shard.pt"))
    weights["connector"].zero_()
    writer.wait()
    loaded = writer.load(str(tmp_path / "shard.pt"))
    assert loaded["module"].keys() == {"connector"}
    assert loaded["module"]["connector"].tolist() == [1.0, 1.0], "the values at the time of the call"
    writer.save({}, str(tmp_path / "no-such-folder" / "shard.pt"))
    with pytest.raises(RuntimeError, match="no-such-folder"):
        writer.wait()


def test_engine_is_on_the_device_of_the_model_whatever_the_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed reads LOCAL_RANK. Ray numbers the GPUs of a node as strings: the eleventh comes before the third."""
    from raylava.compat import deepspeed as compat

    device = torch.device("cuda", 3)

    def initialize(**_: object) -> tuple[SimpleNamespace]:
        taken = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        return (SimpleNamespace(device=taken, optimizer=SimpleNamespace(state={})),)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(compat.deepspeed, "initialize", initialize)
    arguments = (torch.nn.Identity(), None, {}, compat.BackgroundWriter(set()))
    assert compat.initialize(*arguments, device).device == device
    assert os.environ["LOCAL_RANK"] == "1"
