"""Replaying needs the dump of a failed run."""

from pathlib import Path

import pytest

from raylava.errors import UserError
from raylava.storage import storage_path
from raylava.train.replay import replay


def test_folder_without_a_dumped_step_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dumped step there"):
        list(replay(storage_path(tmp_path)))
