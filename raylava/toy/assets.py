"""The toy corpus and backbones as artifacts, which are built once per storage: those of the demo, and the others.

<storage>/toy-assets/<fingerprint>/corpus/{alignment.json, instruction.json, questions.jsonl, images/}
                                   backbones/{gemma, clip}
<storage>/toy-assets/<fingerprint>/backbones/{gemma-small, dinov2}
"""

import tempfile
from collections.abc import Callable, Sequence
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

CORPUS = "corpus"
# The longest training first, so that none runs alone at the end.
DEMO_PARTS = ("gemma", "clip", CORPUS)
ABLATION_PARTS = ("gemma-small", "dinov2")
VERSION = 4  # increase it when scenes, their text or the training of the backbones change


@dataclass(frozen=True)
class ToySize:
    """Size of the corpus in images, and of the backbones. The defaults are those of `raylava demo`."""

    alignment: int = 3200
    instruction: int = 4800
    heldout: int = 500
    language: LanguageSize = field(default_factory=LanguageSize)
    small: LanguageSize = field(default_factory=lambda: LanguageSize(width=48, layers=2))
    vision: VisionSize = field(default_factory=VisionSize)

    def steps(self, part: str) -> int:
        """Return the training steps of a backbone; 0 for the corpus."""
        language = {"gemma": self.language.steps, "gemma-small": self.small.steps}
        return 0 if part == CORPUS else language.get(part, self.vision.steps)


class ToyAssetsStage(Stage):
    """Builds toy assets with Ray tasks: the corpus, backbones, or both, as `parts` names them."""

    unit = "steps"

    def __init__(
        self, storage: StoragePath, size: ToySize, seed: int, parts: Sequence[str] = (*DEMO_PARTS, *ABLATION_PARTS)
    ) -> None:
        super().__init__("toy-assets", "toy-assets", storage, {})
        self._size, self._seed, self._parts = size, seed, tuple(parts)

    def fingerprint_fields(self) -> dict[str, Any]:
        return {"version": VERSION, "parts": sorted(self._parts), "size": asdict(self._size), "seed": self._seed}

    def run(self, progress: ProgressBar) -> dict[str, Any]:
        return _build_with_ray(self._parts, self.spec().path, self._size, self._seed, progress)


def build_toy_assets(output: StoragePath, size: ToySize, seed: int) -> None:
    """Build all parts one after the other in this process, without Ray; the files equal those of the stage.

    Torch's thread count and random state are restored afterwards.
    """
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            for part in (*DEMO_PARTS, *ABLATION_PARTS):
                _build_part(part, output, size, seed, advance=lambda: None)
    finally:
        torch.set_num_threads(threads)


def _build_with_ray(
    parts: Sequence[str], output: StoragePath, size: ToySize, seed: int, bar: ProgressBar
) -> dict[str, Any]:
    progress, steps = ProgressCounter.remote(), sum(map(size.steps, parts))  # type: ignore[attr-defined]
    pending = [_part_task.remote(part, output, size, seed, progress) for part in parts]
    while pending:
        bar.update(ray.get(progress.count.remote()), steps)
        ready, pending = ray.wait(pending, timeout=1.0)
        ray.get(ready)
    return {"parts": list(parts), "steps": steps}


@ray.remote(num_cpus=1)
def _part_task(part: str, output: StoragePath, size: ToySize, seed: int, progress: Any) -> None:
    _build_part(part, output, size, seed, advance=lambda: progress.add.remote(1))


def _build_part(part: str, output: StoragePath, size: ToySize, seed: int, advance: Callable[[], None]) -> None:
    if part == CORPUS:
        _build_corpus(output, size, seed)
    else:
        _build_backbone(part, output, size, seed, advance)


def _build_corpus(output: StoragePath, size: ToySize, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), seed, size.alignment, size.instruction, size.heldout)
        (output / CORPUS).upload_folder(Path(folder))


def _build_backbone(name: str, output: StoragePath, size: ToySize, seed: int, advance: Callable[[], None]) -> None:
    """Train a backbone and upload it. Calls `advance` after each training step."""
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
