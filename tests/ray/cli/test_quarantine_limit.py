"""A corpus with too many quarantined rows ends a run."""

from pathlib import Path

import pytest
import ray
import yaml

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.toy.demo import recipes_folder


@pytest.mark.usefixtures("ray_cluster")
def test_corpus_above_its_quarantine_limit_ends_the_run_with_the_count(
    toy_assets: Artifact, corpus_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    backbones = toy_assets.path / "backbones"
    model = {"language": {"name": str(backbones / "gemma")}, "vision": {"name": str(backbones / "clip")}}
    recipe = {"extends": str(recipes_folder() / "toy.yaml"), "data": str(corpus_copy), "model": model}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for image in sorted((corpus_copy / "images" / "caption").iterdir())[:5]:
        image.unlink()
    assert main(["run", str(tmp_path / "recipe.yaml"), "--storage", str(tmp_path / "storage")]) == 2
    assert "5 of 40 rows" in capfd.readouterr().err
    assert ray.is_initialized(), "the session's Ray cluster keeps running"
