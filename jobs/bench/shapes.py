"""The models and data of train.py: backbones of given shapes with random weights, and corpora like LLaVA's.

The backbones are written as folders of transformers' own format, so that models are built as `raylava run` builds them.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from raylava.config.recipe import ImageEncoding, Language, Model, StageName, Vision
from raylava.corpus.blocks import (
    LENGTHS,
    MANIFEST,
    SCHEMA_VERSION,
    BlockRecord,
    Manifest,
    Sample,
    encode_block,
    encode_lengths,
    sample_lengths,
)
from raylava.corpus.images import encode_image
from raylava.models.llava import DTYPES
from raylava.models.registry import PixelRule, ResolvedModel, resolve_model
from raylava.models.templates import IMAGE_TOKEN
from raylava.train.data_loader import PackCollator

PIXEL_MEAN, PIXEL_STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
BEGIN_TOKEN, IMAGE_TOKEN_ID = 2, 4  # among the special tokens of `write_backbones`
UNIQUE_IMAGES = 32  # samples cycle through them
HEADS = 8
GLOBAL_BATCH_SIZE: dict[StageName, int] = {"pretrain": 128, "finetune": 64}


@dataclass(frozen=True)
class Shape:
    """The dimensions of a LLaVA-Gemma model.

    Text is shortened by `text_divisor` relative to LLaVA's corpora, which preserves its share of a sample's tokens.
    `micro_batch_size` is that of the reference.
    """

    width: int
    layers: int
    head_size: int
    vocabulary: int
    vision_width: int
    vision_layers: int
    vision_heads: int
    pixels: int
    text_divisor: int
    precision: Literal["bf16", "fp32"]
    max_tokens_per_pack: int
    micro_batch_size: Mapping[StageName, int]

    @property
    def image_tokens(self) -> int:
        return (self.pixels // 14) ** 2


SHAPES = {
    # Gemma-2B and CLIP-L/336 with an eighth of all widths, half the layers and a ninth of the tokens.
    "small": Shape(
        width=256,
        layers=9,
        head_size=32,
        vocabulary=16_384,
        vision_width=128,
        vision_layers=12,
        vision_heads=4,
        pixels=112,
        text_divisor=9,
        precision="fp32",
        max_tokens_per_pack=1024,
        micro_batch_size={"pretrain": 32, "finetune": 16},  # as in LLaVA's scripts
    ),
    "gemma-2b": Shape(
        width=2048,
        layers=18,
        head_size=256,
        vocabulary=256_000,
        vision_width=1024,
        vision_layers=24,
        vision_heads=16,
        pixels=336,
        text_divisor=1,
        precision="bf16",
        max_tokens_per_pack=8192,
        # As in LLaVA-Gemma's: logits of a vocabulary eight times as large fill the memory of LLaVA's.
        micro_batch_size={"pretrain": 8, "finetune": 4},
    ),
}


def draw_samples(shape: Shape, stage: StageName, count: int) -> list[Sample]:
    """Draw samples of random content with lengths like those of LLaVA's corpora (lognormal, estimated parameters)."""
    rng = np.random.default_rng(0)
    rule = PixelRule(shape.pixels, PIXEL_MEAN, PIXEL_STD)
    noise = rng.integers(0, 256, (UNIQUE_IMAGES, rule.size, rule.size, 3), dtype=np.uint8)
    images = [encode_image(pixels, ImageEncoding()) for pixels in noise]
    return [_draw_sample(shape, stage, rng, images[number % UNIQUE_IMAGES], number) for number in range(count)]


def _draw_sample(shape: Shape, stage: StageName, rng: np.random.Generator, image: bytes, number: int) -> Sample:
    if stage == "pretrain":  # a short request and a caption
        has_image, prompt, response = True, 20.0, float(np.clip(rng.lognormal(2.5, 0.5), 5, 80))
    else:  # 94 % with an image; conversations in which responses are 15 to 75 % of the text
        has_image = bool(rng.random() < 0.94)
        text = np.clip(rng.lognormal(5.0, 0.7), 20, 1400) if has_image else np.clip(rng.lognormal(6.0, 0.8), 20, 2000)
        response = float(text * rng.uniform(0.15, 0.75))
        prompt = float(text) - response
    prompt_tokens, response_tokens = (max(1, round(tokens / shape.text_divisor)) for tokens in (prompt, response))
    text_ids = [int(token) for token in rng.integers(10, shape.vocabulary - 10, prompt_tokens + response_tokens)]
    ids = [BEGIN_TOKEN, *([IMAGE_TOKEN_ID] if has_image else []), *text_ids]
    length = len(ids) + (shape.image_tokens - 1 if has_image else 0)
    loss_span = (len(ids) - response_tokens, len(ids))
    return Sample(str(number), ids, [loss_span], [image] if has_image else [], length)


def write_blocks(samples: list[Sample], folder: Path) -> None:
    """Write a prepared corpus with all samples in one block."""
    folder.mkdir(parents=True)
    content = encode_block(samples)
    (folder / "block.arrow").write_bytes(content)
    record = BlockRecord("block.arrow", len(samples), 0, 0, len(content), hashlib.sha256(content).hexdigest())
    loss_tokens = sum(sample.loss_tokens for sample in samples)
    tokens, images = sum(sample.length for sample in samples), sum(len(sample.images) for sample in samples)
    manifest = Manifest(
        SCHEMA_VERSION, "bench", {}, (record,), len(samples), len(samples), tokens, loss_tokens, images, 0, 0, {}
    )
    (folder / LENGTHS).write_bytes(encode_lengths(sample_lengths(samples)))
    (folder / MANIFEST).write_bytes(manifest.to_json())


def write_backbones(shape: Shape, folder: Path) -> None:
    """Write both backbones with random weights from a fixed seed, a tokenizer of the special tokens, a processor."""
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModel,
        GemmaConfig,
        GemmaForCausalLM,
        PreTrainedTokenizerFast,
    )

    text = GemmaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=8 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=shape.head_size,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.vision_width,
        intermediate_size=4 * shape.vision_width,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.pixels,
        patch_size=14,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPES[shape.precision])
    GemmaForCausalLM(text).save_pretrained(folder / "language")
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    torch.set_default_dtype(torch.float32)
    tokens = {token: number for number, token in enumerate(("<pad>", "<eos>", "<bos>", "<unk>", IMAGE_TOKEN))}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(tokens, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=[IMAGE_TOKEN],
    ).save_pretrained(folder / "language")
    size = {"shortest_edge": shape.pixels}
    crop = {"height": shape.pixels, "width": shape.pixels}
    processor = CLIPImageProcessor(size=size, crop_size=crop, image_mean=PIXEL_MEAN, image_std=PIXEL_STD)
    processor.save_pretrained(folder / "vision")


def resolve_backbones(folder: Path) -> ResolvedModel:
    """Resolve the backbones of `write_backbones`."""
    return resolve_model(
        Model(language=Language(name=str(folder / "language")), vision=Vision(name=str(folder / "vision")))
    )


def pack_collator(model: ResolvedModel) -> PackCollator:
    """Return the collator for samples of the model."""
    return PackCollator(model.vision, IMAGE_TOKEN_ID, BEGIN_TOKEN)
