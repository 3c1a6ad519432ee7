"""Small CLIP and DINOv2 backbones of transformers' own classes, with training objectives like those of the originals.

CLIP learns with supervision by words: it predicts the color, the kind and the position of the thing that covers each
patch. DINOv2 learns from images alone: it reconstructs masked patches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from raylava.corpus.images import normalize_pixels
from raylava.models.registry import PixelRule
from raylava.toy.scenes import COLORS, IMAGE_SIZE, POSITIONS, THINGS, Scene, draw_scene, render

PIXELS = PixelRule(IMAGE_SIZE, (0.78, 0.84, 0.78), (0.2, 0.18, 0.22))
PATCH = 16  # pixels per side
_GRID = IMAGE_SIZE // PATCH
_MASKED_FRACTION = 0.4  # of patches, for DINOv2
_WORDS = {"color": tuple(COLORS), "thing": THINGS, "position": POSITIONS}  # what CLIP learns, by attribute of a thing


@dataclass(frozen=True)
class VisionSize:
    """Dimensions of the backbones and length of their training."""

    width: int = 96
    layers: int = 4
    heads: int = 4
    steps: int = 200
    batch: int = 64
    lr: float = 2e-3


def build_clip(folder: Path, size: VisionSize, seed: int, advance: Callable[[], None]) -> None:
    """Train a CLIPVisionModel to describe the thing in each patch, and save it as a Hugging Face folder."""
    torch.manual_seed(seed)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=size.width,
            intermediate_size=4 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
            projection_dim=size.width,
        )
    )
    heads = nn.ModuleList([nn.Linear(size.width, 1 + len(words)) for words in _WORDS.values()])
    norm = nn.LayerNorm(size.width)

    def loss(pixels: Tensor, scenes: list[Scene]) -> Tensor:
        patches = norm(model(pixels).last_hidden_state[:, 1:]).flatten(0, 1)
        losses = [
            nn.functional.cross_entropy(head(patches), classes)
            for head, classes in zip(heads, _patch_classes(scenes), strict=True)
        ]
        return torch.stack(losses).sum()

    _train(nn.ModuleList([model, norm, heads]), loss, size, seed, advance)
    _save(model, folder, "CLIPImageProcessor")


def build_dinov2(folder: Path, size: VisionSize, seed: int, advance: Callable[[], None]) -> None:
    """Train a Dinov2Model to reconstruct masked patches, and save it as a Hugging Face folder."""
    torch.manual_seed(seed)
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=size.width,
            mlp_ratio=4,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        )
    )
    decoder = nn.Linear(size.width, 3 * PATCH * PATCH)

    def loss(pixels: Tensor, scenes: list[Scene]) -> Tensor:
        mask = torch.rand(len(pixels), _GRID * _GRID) < _MASKED_FRACTION
        reconstruction = decoder(model(pixels, bool_masked_pos=mask).last_hidden_state[:, 1:])
        return nn.functional.mse_loss(reconstruction, _patches(pixels))

    _train(nn.ModuleList([model, decoder]), loss, size, seed, advance)
    _save(model, folder, "BitImageProcessor")


def _train(
    modules: nn.Module,
    loss: Callable[[Tensor, list[Scene]], Tensor],
    size: VisionSize,
    seed: int,
    advance: Callable[[], None],
) -> None:
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(modules.parameters(), lr=size.lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.lr, total_steps=size.steps, pct_start=0.1)
    for _ in range(size.steps):
        scenes = [draw_scene(rng) for _ in range(size.batch)]
        pixels = torch.from_numpy(normalize_pixels(np.stack([np.asarray(render(scene)) for scene in scenes]), PIXELS))
        value = loss(pixels, scenes)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance()


def _patch_classes(scenes: list[Scene]) -> list[Tensor]:
    """Return the classes of all patches by _WORDS, each of shape (batch · patches,); 0 is background."""
    classes = [torch.zeros(len(scenes), _GRID, _GRID, dtype=torch.long) for _ in _WORDS]
    for number, scene in enumerate(scenes):
        for item in scene.objects:
            rows, columns = (_covered_patches(center, item.radius) for center in (item.y, item.x))
            for values, (attribute, words) in zip(classes, _WORDS.items(), strict=True):
                values[number, rows, columns] = 1 + words.index(getattr(item, attribute))
    return [values.flatten() for values in classes]


def _covered_patches(center: float, radius: float) -> slice:
    return slice(max(0, int((center - radius) // PATCH)), min(_GRID, int((center + radius) // PATCH) + 1))


def _patches(pixels: Tensor) -> Tensor:
    """Cut (batch, 3, side, side) pixels into (batch, patches, 3 · PATCH²) patches."""
    return nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def _save(model: CLIPVisionModel | Dinov2Model, folder: Path, processor: str) -> None:
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    preprocessor = {
        "image_processor_type": processor,
        "do_center_crop": True,
        "crop_size": size,
        "size": {"shortest_edge": IMAGE_SIZE},
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
