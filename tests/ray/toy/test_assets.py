"""The toy assets built with Ray tasks equal those built serially."""

from pathlib import Path

import pytest

from raylava.artifacts import Artifact
from raylava.console import Console
from raylava.pipeline.stage import run_stage
from raylava.storage import storage_path
from raylava.toy.assets import ToyAssetsStage
from tests.conftest import TINY
from tests.support.corpora import file_tree


@pytest.mark.usefixtures("ray_cluster")
def test_ray_tasks_and_serial_build_give_the_same_files(toy_assets: Artifact, console: Console, tmp_path: Path) -> None:
    artifact = run_stage(ToyAssetsStage(storage_path(tmp_path), TINY, seed=0), console)
    assert artifact.fingerprint == toy_assets.fingerprint
    for folder in ("corpus", "backbones"):
        assert file_tree(Path(artifact.path.path) / folder) == file_tree(Path(toy_assets.path.path) / folder)
