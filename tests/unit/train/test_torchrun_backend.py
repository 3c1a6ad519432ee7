"""What a run without Ray does by itself; that it trains to the same bits is tested in test_road.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raylava.config.recipe import CheckpointConfig
from raylava.storage import storage_path
from raylava.train.torchrun_backend import expired_checkpoints


@pytest.mark.parametrize(
    ("keep", "best", "gone"),
    [(2, False, [1, 2]), (2, True, [2, 3]), (1, True, [1, 2, 3]), (5, False, []), (9, False, [])],
)
def test_the_newest_checkpoints_are_kept_or_the_newest_and_the_best(
    keep: int, best: bool, gone: list[int], tmp_path: Path
) -> None:
    for step, loss in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8)):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "done-rank-0.json").write_text(json.dumps({"loss": loss}))
    found = expired_checkpoints(
        storage_path(tmp_path).children(), CheckpointConfig(target_positions=keep, keep_best=best)
    )
    assert sorted(one.name for one in found) == [f"step-{step}" for step in gone]


def test_training_alone_needs_no_ray() -> None:
    script = "import sys, raylava.train.torchrun_backend; assert not [name for name in sys.modules if name.split('.')[0] == 'ray']"
    subprocess.run([sys.executable, "-c", script], check=True)
