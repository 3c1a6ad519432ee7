"""The toy assets as one artifact: corpus and backbones, made once and kept for the next run.

<storage>/toy_assets/<fingerprint>/corpus/{alignment.json, instruction.json, questions.jsonl, images/}
                                   backbones/{gemma, gemma-small, clip, dinov2}
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch

from raylava.artifacts import ArtifactSpec
from raylava.cluster.session import Progress
from raylava.console import ProgressBar
from raylava.pipeline.stage import Stage
from raylava.storage import StoragePath
from raylava.toy.corpus import write_corpus
from raylava.toy.language import LanguageSize
from raylava.toy.vision import VisionSize

BACKBONES = ("gemma", "gemma-small", "clip", "dinov2")  # the longest first: they share the CPUs
VERSION = 2  # raise it when scenes, their words or the backbones' training change: the toy assets is made anew


@dataclass(frozen=True)
class ToySize:
    """How much is drawn and how long the backbones are trained. The defaults suit `raylava demo`."""

    alignment: int = 3200
    instruction: int = 4800
    heldout: int = 500
    language: LanguageSize = field(default_factory=LanguageSize)
    small: LanguageSize = field(default_factory=lambda: LanguageSize(width=64, layers=2))
    vision: VisionSize = field(default_factory=VisionSize)

    @property
    def steps(self) -> int:
        """Training steps of all backbones."""
        return self.language.steps + self.small.steps + 2 * self.vision.steps


def toy_assets_stage(storage: StoragePath, size: ToySize, seed: int) -> Stage:
    """The stage that makes the toy assets."""
    spec = ArtifactSpec("toy-assets", {"version": VERSION, "size": asdict(size), "seed": seed}, storage)

    def build(bar: ProgressBar) -> dict[str, Any]:
        return _build(spec.path, size, seed, bar)

    return Stage("toy-assets", spec, {}, "steps", build)


def _build(output: StoragePath, size: ToySize, seed: int, bar: ProgressBar) -> dict[str, Any]:
    progress = Progress.remote()  # type: ignore[attr-defined]
    made = [_backbone.remote(name, output, size, seed, progress) for name in BACKBONES]
    made.append(_corpus.remote(output, size, seed))
    while made:
        bar.update(ray.get(progress.count.remote()), size.steps)
        ready, made = ray.wait(made, timeout=1.0)
        ray.get(ready)
    return {"images": size.alignment + size.instruction + size.heldout, "steps": size.steps}


@ray.remote(num_cpus=1)
def _corpus(output: StoragePath, size: ToySize, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), seed, size.alignment, size.instruction, size.heldout)
        (output / "corpus").upload_folder(Path(folder))


@ray.remote(num_cpus=1)
def _backbone(name: str, output: StoragePath, size: ToySize, seed: int, progress: Any) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _builder(name, size)(Path(folder), seed, lambda: progress.add.remote(1))
        (output / "backbones" / name).upload_folder(Path(folder))


def _builder(name: str, size: ToySize) -> Callable[[Path, int, Callable[[], None]], None]:
    from raylava.toy import language, vision

    if name.startswith("gemma"):
        proportions = size.small if name == "gemma-small" else size.language
        return lambda folder, seed, advance: language.build_language_model(folder, proportions, seed, advance)
    build = {"clip": vision.build_clip, "dinov2": vision.build_dinov2}[name]
    return lambda folder, seed, advance: build(folder, size.vision, seed, advance)
