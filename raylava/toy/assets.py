"""The toy corpus and backbones as one artifact, which is built once per storage.

<storage>/toy-assets/<fingerprint>/corpus/{alignment.json, instruction.json, questions.jsonl, images/}
                                   backbones/{gemma, gemma-small, clip, dinov2}
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from raylava.artifacts import publish_folder
from raylava.cluster.session import ProgressCounter
from raylava.pipeline.stage import Stage
from raylava.progress import ProgressBar
from raylava.storage import StoragePath
from raylava.toy.corpus import write_corpus
from raylava.toy.language import LanguageSize, build_language_model
from raylava.toy.vision import VisionSize, build_clip, build_dinov2

BACKBONES = ("gemma", "gemma-small", "clip", "dinov2")  # the longest training first, so that none runs alone at the end
VERSION = 2  # increase it when scenes, their text or the training of the backbones change


@dataclass(frozen=True)
class ToySize:
    """Size of the corpus in images, and of the backbones. The defaults are those of `raylava demo`."""

    alignment: int = 3200
    instruction: int = 4800
    heldout: int = 500
    language: LanguageSize = field(default_factory=LanguageSize)
    small: LanguageSize = field(default_factory=lambda: LanguageSize(width=64, layers=2))
    vision: VisionSize = field(default_factory=VisionSize)

    @property
    def steps(self) -> int:
        """Training steps of all backbones together."""
        return self.language.steps + self.small.steps + 2 * self.vision.steps


class ToyAssetsStage(Stage):
    """Builds the toy assets with Ray tasks."""

    unit = "steps"

    def __init__(self, storage: StoragePath, size: ToySize, seed: int) -> None:
        super().__init__("toy-assets", "toy-assets", storage, {})
        self._size, self._seed = size, seed

    def fingerprint_fields(self) -> dict[str, Any]:
        return {"version": VERSION, "size": asdict(self._size), "seed": self._seed}

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        return _build_with_ray(self.spec().path, self._size, self._seed, progress)


def build_toy_assets(output: StoragePath, size: ToySize, seed: int) -> None:
    """Build corpus and backbones one after the other in this process, without Ray; the files equal those of the stage.

    Torch's thread count and random state are restored afterwards.
    """
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            _build_corpus(output, size, seed)
            for name in BACKBONES:
                _build_backbone(name, output, size, seed, advance=lambda: None)
    finally:
        torch.set_num_threads(threads)


def _build_with_ray(output: StoragePath, size: ToySize, seed: int, bar: ProgressBar) -> dict[str, Any]:
    progress = ProgressCounter.remote()  # type: ignore[attr-defined]
    pending = [_backbone_task.remote(name, output, size, seed, progress) for name in BACKBONES]
    pending.append(_corpus_task.remote(output, size, seed))
    while pending:
        bar.update(ray.get(progress.count.remote()), size.steps)
        ready, pending = ray.wait(pending, timeout=1.0)
        ray.get(ready)
    return {"images": size.alignment + size.instruction + size.heldout, "steps": size.steps}


@ray.remote(num_cpus=1)
def _corpus_task(output: StoragePath, size: ToySize, seed: int) -> None:
    _build_corpus(output, size, seed)


@ray.remote(num_cpus=1)
def _backbone_task(name: str, output: StoragePath, size: ToySize, seed: int, progress: Any) -> None:
    _build_backbone(name, output, size, seed, advance=lambda: progress.add.remote(1))


def _build_corpus(output: StoragePath, size: ToySize, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), seed, size.alignment, size.instruction, size.heldout)
        (output / "corpus").upload_folder(Path(folder))


def _build_backbone(name: str, output: StoragePath, size: ToySize, seed: int, advance: Callable[[], None]) -> None:
    """Train a backbone of BACKBONES and upload it. Calls `advance` after each training step."""
    torch.set_num_threads(1)  # a task has one CPU; the thread count also changes the rounding of sums
    with tempfile.TemporaryDirectory() as folder:
        _train_backbone(name, Path(folder), size, seed, advance)
        publish_folder(Path(folder), output / "backbones" / name)


def _train_backbone(name: str, folder: Path, size: ToySize, seed: int, advance: Callable[[], None]) -> None:
    if name.startswith("gemma"):
        build_language_model(folder, size.small if name == "gemma-small" else size.language, seed, advance)
    else:
        build_vision = {"clip": build_clip, "dinov2": build_dinov2}[name]
        build_vision(folder, size.vision, seed, advance)
