"""Opening blocks that need no cache."""

import pytest

from raylava.corpus import block_cache
from raylava.corpus.block_cache import open_blocks
from raylava.corpus.blocks import Blocks
from raylava.storage import storage_path


def test_local_blocks_are_opened_in_place(prepared_blocks: Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_cache, "BlockCache", None)
    assert open_blocks(storage_path(prepared_blocks.folder), 1.0).folder == prepared_blocks.folder
