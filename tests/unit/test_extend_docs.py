"""docs/extend.md shows the modules that the tests register, and a package registers its own by entry points."""

import sys
from pathlib import Path

import pytest

from raylava.evaluation import benchmarks
from raylava.models import families

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    file for file in (ROOT / "tests" / "support" / "extensions").glob("*.py") if file.name != "__init__.py"
)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: file.stem)
def test_docs_show_a_module_of_at_most_forty_lines(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 40
    assert f"```python\n{text}```" in (ROOT / "docs" / "extend.md").read_text()


def test_installed_package_adds_families_and_benchmarks_by_entry_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "tests.support.extensions"
    entry_points = {
        families.ENTRY_POINTS: [f"ijepa = {package}.ijepa:FAMILY", f"llama = {package}.llama:FAMILY"],
        benchmarks.ENTRY_POINTS: [f"counting = {package}.counting:BENCHMARK"],
    }
    metadata = tmp_path / "plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    lines = [line for group, names in entry_points.items() for line in (f"[{group}]", *names)]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.setattr(families, "_FAMILIES", list(families._FAMILIES))
    monkeypatch.setattr(benchmarks, "_BENCHMARKS", dict(benchmarks._BENCHMARKS))
    families._load_plugins.cache_clear()
    benchmarks._load_plugins.cache_clear()
    assert "ijepa" in families.vision_families()
    assert "llama" in families.language_families()
    assert "counting" in benchmarks.official_benchmarks()
