"""Two small vision backbones of transformers' own classes, trained as their namesakes are: one by words, one without.

CLIP learns what the captions say: which colour and shape covers each patch. DINOv2 sees no word: it learns to fill in
patches that were hidden from it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from raylava.corpus.images import normalise
from raylava.models.registry import PixelRule
from raylava.toy.scenes import COLOURS, IMAGE_SIZE, SHAPES, Scene, draw_scene, render

PIXELS = PixelRule(IMAGE_SIZE, (0.86, 0.86, 0.86), (0.25, 0.25, 0.25))
PATCH = 8  # pixels a side
_GRID = IMAGE_SIZE // PATCH
_HIDDEN_SHARE = 0.4  # of patches, for DINOv2


@dataclass(frozen=True)
class VisionSize:
    """The backbones' proportions and how long each is trained."""

    width: int = 96
    layers: int = 4
    heads: int = 4
    steps: int = 300
    batch: int = 64
    lr: float = 2e-3


def build_clip(folder: Path, size: VisionSize, seed: int, advance: Callable[[], None]) -> None:
    """Train a CLIPVisionModel by the words of captions, patch by patch, and write its folder."""
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
    colour, shape = (nn.Linear(size.width, 1 + len(words)) for words in (COLOURS, SHAPES))
    heads = nn.ModuleDict({"norm": nn.LayerNorm(size.width), "colour": colour, "shape": shape})

    def loss(pixels: Tensor, scenes: list[Scene]) -> Tensor:
        patches = heads["norm"](model(pixels).last_hidden_state[:, 1:]).flatten(0, 1)
        colours, shapes = _words_of_patches(scenes)
        return nn.functional.cross_entropy(colour(patches), colours) + nn.functional.cross_entropy(
            shape(patches), shapes
        )

    _train(nn.ModuleList([model, heads]), loss, size, seed, advance)
    _write(model, folder, "CLIPImageProcessor")


def build_dinov2(folder: Path, size: VisionSize, seed: int, advance: Callable[[], None]) -> None:
    """Train a Dinov2Model to fill in hidden patches, and write its folder."""
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
    painter = nn.Linear(size.width, 3 * PATCH * PATCH)

    def loss(pixels: Tensor, scenes: list[Scene]) -> Tensor:
        hidden = torch.rand(len(pixels), _GRID * _GRID) < _HIDDEN_SHARE
        painted = painter(model(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:])
        return nn.functional.mse_loss(painted, _patches(pixels))

    _train(nn.ModuleList([model, painter]), loss, size, seed, advance)
    _write(model, folder, "BitImageProcessor")


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
        pixels = torch.from_numpy(normalise(np.stack([np.asarray(render(scene)) for scene in scenes]), PIXELS))
        value = loss(pixels, scenes)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        advance()


def _words_of_patches(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """(batch · patches,) class numbers of colour and of shape; 0 where nothing is."""
    colours = torch.zeros(len(scenes), _GRID, _GRID, dtype=torch.long)
    shapes = torch.zeros_like(colours)
    for number, scene in enumerate(scenes):
        for thing in scene.things:
            rows, columns = (_covered(centre, thing.radius) for centre in (thing.y, thing.x))
            colours[number, rows, columns] = 1 + list(COLOURS).index(thing.colour)
            shapes[number, rows, columns] = 1 + SHAPES.index(thing.shape)
    return colours.flatten(), shapes.flatten()


def _covered(centre: float, radius: float) -> slice:
    return slice(max(0, int((centre - radius) // PATCH)), min(_GRID, int((centre + radius) // PATCH) + 1))


def _patches(pixels: Tensor) -> Tensor:
    """(batch, 3, side, side) → (batch, patches, 3 · PATCH²)."""
    return nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)


def _write(model: CLIPVisionModel | Dinov2Model, folder: Path, processor: str) -> None:
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    about = {
        "image_processor_type": processor,
        "do_center_crop": True,
        "crop_size": size,
        "size": {"shortest_edge": IMAGE_SIZE},
        "image_mean": PIXELS.mean,
        "image_std": PIXELS.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(about, indent=2))
