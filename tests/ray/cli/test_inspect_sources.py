"""`raylava inspect --source RECIPE` on a real cluster of Ray: counts, list and repair."""

import json
from pathlib import Path

import pytest
from PIL import Image

from raylava.artifacts import Artifact
from raylava.cli import main
from raylava.toy.demo import recipes_folder

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_sources_of_a_recipe_are_checked_and_repaired_before_a_run(
    toy_assets: Artifact, corpus_copy: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads((corpus_copy / "instruction.json").read_text())
    rows[0]["image"], rows[1]["image"] = "gone.jpg", "there.jpg"
    Image.new("P", (8, 8)).save(corpus_copy / "images" / "there.gif")
    (corpus_copy / "instruction.json").write_text(json.dumps(rows))
    backbones = toy_assets.path / "backbones"
    arguments = [
        *("inspect", str(recipes_folder() / "toy.yaml"), "--source", "--storage", str(tmp_path / "storage"), "--json"),
        *("--csv", str(tmp_path / "findings.csv"), f"data={corpus_copy}"),
        *(f"model.language.name={backbones / 'gemma'}", f"model.vision.name={backbones / 'clip'}"),
    ]
    counts = []
    for repair in ((), ("--repair",), ()):
        assert main([*arguments, *repair]) == 0
        counts.append(json.loads(capfd.readouterr().out))
    assert counts[0]["alignment"] == {"rows": 40, "images": 40, "by_url": 0, "findings": {}}
    assert counts[0]["instruction"]["findings"] == {"instruction.json": {"image missing": 2}}
    assert [count["repaired"] for count in counts] == [0, 1, 0]
    assert counts[2]["instruction"]["findings"] == {"instruction.json": {"image missing": 1, "image suffix differs": 1}}
    assert "gone.jpg" in (tmp_path / "findings.csv").read_text()
