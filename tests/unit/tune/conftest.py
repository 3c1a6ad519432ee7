"""Fixtures of the tests of studies and their searcher."""

from pathlib import Path

import pytest

from raylava.storage import StoragePath, storage_path
from raylava.tune.variants import Variant, variants
from tests.support.studies import make_sweep


@pytest.fixture
def variant() -> Variant:
    return variants(make_sweep(), [])[0]


@pytest.fixture
def folder(tmp_path: Path) -> StoragePath:
    return storage_path(tmp_path)
