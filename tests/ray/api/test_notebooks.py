"""The notebooks of docs/notebooks run from their first cell to their last, on small assets."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray
from nbclient import NotebookClient

from raylava.artifacts import Artifact

NOTEBOOKS = Path(__file__).parents[3] / "docs" / "notebooks"
SHORT = ["finetune.max_steps=2", "finetune.epochs=1", "finetune.global_batch_size=8", "resources.workers=1"]


def execute(name: str, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """Execute a notebook in `folder` with other values in its parameters cell; every cell must succeed."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    assert sum(cell.cell_type == "code" for cell in notebook.cells) in range(10, 13), "they promise ten cells"
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert all(f"{parameter} = " in cell.source for parameter in parameters)
    cell.source = "\n".join(f"{parameter} = {value!r}" for parameter, value in parameters.items())
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    return client.execute()


def results(notebook: nbformat.NotebookNode) -> str:
    """Return the values of all cells as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.data["text/plain"] for output in outputs if output.output_type == "execute_result")


def test_own_corpus_notebook_runs_from_images_to_a_conversation(toy_assets: Artifact, tmp_path: Path) -> None:
    backbones = str(toy_assets.path / "backbones")
    values = results(execute("own-corpus.ipynb", tmp_path, storage="storage", backbones=backbones, settings=SHORT))
    assert "{'image missing': 1, 'turns do not alternate': 1}" in values
    assert "(238, 'flag-0" in values
    assert "What color is the bottom?" in values


def test_ablation_notebook_compares_two_levels(toy_assets: Artifact, tmp_path: Path) -> None:
    settings = [*SHORT, "pretrain.max_steps=1", "pretrain.global_batch_size=8"]
    values = results(
        execute("ablation.ipynb", tmp_path, storage="storage", toy=str(toy_assets.path), settings=settings, seeds=[0])
    )
    assert "connector=pretrained" in values
    assert "Effect(" in values


@pytest.fixture(autouse=True)
def _running_cluster(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the notebooks join the tests' Ray cluster, which saves the start of one for each of their runs."""
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)


@pytest.mark.parametrize("file", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda file: file.name)
def test_notebooks_hold_no_outputs_of_the_machine_they_were_written_on(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs")]
