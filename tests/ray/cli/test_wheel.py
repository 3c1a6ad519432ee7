"""The wheel brings the shipped recipes: they are listed, copied and run by name where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import raylava
from raylava.artifacts import Artifact

CHECKOUT = Path(raylava.__file__).parents[1]
Raylava = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel of this checkout, which sees the dependencies of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, sources / name)
    for name in ("raylava", "jobs/recipes"):
        shutil.copytree(CHECKOUT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = ("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, sources)
    subprocess.run([*pip, *build], check=True, capture_output=True)
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    packages = next(environment.glob("lib/python*/site-packages"))
    # A .pth file in a folder that a .pth file adds has no effect: neither has the one of an editable raylava.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("raylava-*.whl")
    install = ("--python", environment / "bin" / "python", "install", "--no-deps", "--no-index", wheel)
    subprocess.run([*pip, *install], check=True, capture_output=True)
    return environment


@pytest.fixture
def run(environment: Path, tmp_path: Path) -> Raylava:
    """Runs the wheel's `raylava` in an empty folder and returns the ended process."""
    folder = tmp_path / "empty"
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    variables["XDG_CACHE_HOME"] = str(tmp_path / "cache")  # its log files are of this test alone

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / program), *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)

    return run


def test_recipes_of_the_wheel_are_listed_copied_checked_and_run_by_name(
    run: Raylava, environment: Path, toy_assets: Artifact, tmp_path: Path
) -> None:
    imported = run("python", "-c", "import raylava; print(raylava.__file__)")
    assert Path(imported.stdout.strip()).is_relative_to(environment), imported

    listed = run("raylava", "recipes")
    shipped = sorted(file.stem for file in (CHECKOUT / "jobs" / "recipes").iterdir())
    assert [line.split()[0] for line in listed.stdout.splitlines()] == shipped

    assert run("raylava", "recipes", "copy", "toy", "mine.yaml").returncode == 0
    assert (tmp_path / "empty" / "mine.yaml").read_text().startswith("# A small LLaVA model")

    backbones = toy_assets.path / "backbones"
    settings = [
        f"data={toy_assets.path / 'corpus'}",
        f"model.language.name={backbones / 'gemma'}",
        f"model.vision.name={backbones / 'clip'}",
        *("pretrain.enabled=false", "finetune.max_steps=1", "finetune.global_batch_size=8", "evaluate=[]"),
        "resources.workers=1",
    ]
    checked = run("raylava", "check", "toy", *settings)
    assert (checked.returncode, checked.stdout) == (0, "toy: valid\n"), checked.stderr

    trained = run("raylava", "run", "toy", *settings, "--storage", tmp_path / "storage", "--json")
    assert trained.returncode == 0, trained.stderr
    assert "finetune" in json.loads(trained.stdout)
    (model,) = (tmp_path / "storage" / "finetune").iterdir()
    assert (model / "config.json").exists()

    # What runs is in the artifact and in the log; the terminal shows the progress, each line complete.
    mechanisms = json.loads((model / "mechanisms.json").read_text())
    (log,) = (tmp_path / "cache" / "raylava" / "logs").glob("run-*.log")
    assert f"finetune: attention: {mechanisms['attention']}\n" in log.read_text()
    assert "attention" not in trained.stderr
    lines = trained.stderr.splitlines()
    assert "finetune  starting" in lines
    assert [line for line in lines if line.startswith("finetune  1/1 steps")], trained.stderr
    assert not [line for line in lines if line != line.rstrip()]
