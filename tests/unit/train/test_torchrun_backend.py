"""The torchrun backend deletes expired checkpoints as Ray Train would."""

import json
from pathlib import Path

import pytest

from raylava.config.recipe import CheckpointConfig
from raylava.storage import storage_path
from raylava.train.torchrun_backend import expired_checkpoints


@pytest.mark.parametrize(
    ("keep_latest", "keep_best", "expired_steps"),
    [(2, False, [1, 2]), (2, True, [2]), (1, True, [2, 3]), (5, False, []), (9, False, [])],
)
def test_newest_checkpoints_are_kept_or_as_many_of_the_best_besides_the_newest(
    keep_latest: int, keep_best: bool, expired_steps: list[int], tmp_path: Path
) -> None:
    for step, loss in ((1, 0.5), (2, 0.9), (3, 0.7), (4, 0.8)):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / "done-rank-0.json").write_text(json.dumps({"loss": loss}))
    config = CheckpointConfig(keep_latest=keep_latest, keep_best=keep_best, interval_steps=1)
    expired = expired_checkpoints(storage_path(tmp_path).children(), config)
    assert sorted(checkpoint.name for checkpoint in expired) == [f"step-{step}" for step in expired_steps]
