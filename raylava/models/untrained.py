"""The model before any training, published like a trained one: the baseline that shows what training bought."""

import shutil
import tempfile
from pathlib import Path

import ray
import torch

from raylava.config.recipe import Model
from raylava.models.export import publish
from raylava.models.llava import build_llava
from raylava.models.registry import LanguageSpec, VisionSpec, load_tokenizer
from raylava.storage import StoragePath


def export_untrained(
    model: Model, vision: VisionSpec, language: LanguageSpec, seed: int, fit: str, output: StoragePath
) -> None:
    """Assemble and write the model on a worker node: it may be larger than the driver's memory."""
    ray.get(_publish.remote(model, vision, language, seed, fit, output.uri))


@ray.remote(num_cpus=1)
def _publish(model: Model, vision: VisionSpec, language: LanguageSpec, seed: int, fit: str, output: str) -> None:
    from raylava.storage import storage_path

    llava = build_llava(model, vision, seed, torch.bfloat16)
    folder = Path(tempfile.mkdtemp(prefix="raylava-untrained-"))
    try:
        publish(llava, None, load_tokenizer(model.language), vision, language, fit, folder)
        storage_path(output).upload_folder(folder)
    finally:
        shutil.rmtree(folder)
