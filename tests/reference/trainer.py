"""A trainer of LLaVA-Gemma by the published recipe: transformers' modules, padded batches, AdamW. Imports no raylava.

Sources: IntelLabs/multimodal_cognitive_ai, LLaVA-Gemma (scripts/v1_5/*_gaudi.sh, llava/train, llava/model);
haotian-liu/LLaVA; transformers of March 2024, whose GemmaModel multiplied whatever embeddings it was given by √width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPVisionModel,
    Dinov2Model,
    GemmaForCausalLM,
    get_cosine_schedule_with_warmup,
)

IGNORED = -100
TURN_OPEN, TURN_CLOSE = "<start_of_turn>", "<end_of_turn>\n"


@dataclass(frozen=True)
class Backbones:
    """Folders of the two backbones, and how the vision backbone's processor resizes: short side, then center crop."""

    language: Path
    vision: Path
    resize: int
    crop: int
    mean: Sequence[float]
    std: Sequence[float]


@dataclass(frozen=True)
class Stage:
    """One training stage. `pad_images` pads images to squares; `train_language` is True in finetuning."""

    steps: list[list[list[str]]]  # sample ids by step and micro-batch
    planned_steps: int  # of the whole run, which the learning rate depends on
    lr: float
    warmup_ratio: float
    pad_images: bool
    train_language: bool
    max_length: int


class ReferenceTrainer:
    """The model in fp32, and its training on samples of LLaVA's JSON format."""

    def __init__(self, backbones: Backbones, seed: int) -> None:
        self.backbones = backbones
        self.tokenizer = AutoTokenizer.from_pretrained(backbones.language)
        vision_class = Dinov2Model if "dinov2" in AutoConfig.from_pretrained(backbones.vision).model_type else None
        self.tower: Any = (vision_class or CLIPVisionModel).from_pretrained(backbones.vision, dtype=torch.float32)
        self.gemma: Any = GemmaForCausalLM.from_pretrained(backbones.language, dtype=torch.float32)
        width = self.gemma.config.hidden_size
        torch.manual_seed(seed)
        self.connector = nn.Sequential(
            nn.Linear(self.tower.config.hidden_size, width), nn.GELU(), nn.Linear(width, width)
        )
        self.tower.requires_grad_(False).eval()

    def train(self, stage: Stage, rows: dict[str, dict[str, Any]], images: Path) -> Iterator[float]:
        """Train; yield the loss of each step. `rows` maps sample ids to rows, `images` is the images' folder."""
        self.gemma.requires_grad_(stage.train_language)
        trained = [
            weight for weight in [*self.connector.parameters(), *self.gemma.parameters()] if weight.requires_grad
        ]
        optimizer = torch.optim.AdamW(trained, lr=stage.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
        warmup = math.ceil(stage.warmup_ratio * stage.planned_steps)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, stage.planned_steps)
        for micro_batches in stage.steps:
            total = 0.0
            for ids in micro_batches:
                samples = [self._sample(rows[sample_id], images, stage) for sample_id in ids]
                loss = self._mean_loss(samples) / len(micro_batches)
                loss.backward()
                total += float(loss.detach())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield total

    def _mean_loss(self, samples: "list[tuple[Tensor, Tensor]]") -> Tensor:
        """Return the mean over the supervised tokens of a micro-batch, padded on the right to its longest sample."""
        longest = max(len(labels) for _, labels in samples)
        width = self.gemma.config.hidden_size
        embeddings = torch.stack([pad_rows(rows, longest, torch.zeros(width)) for rows, _ in samples])
        labels = torch.stack([pad_rows(labels, longest, torch.tensor(IGNORED)) for _, labels in samples])
        mask = torch.stack([torch.arange(longest) < len(labels) for _, labels in samples]).long()
        # March 2024: GemmaModel scaled inputs_embeds. Today it scales only what it looks up itself.
        logits = self.gemma(inputs_embeds=embeddings * width**0.5, attention_mask=mask, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    def _sample(self, row: dict[str, Any], images: Path, stage: Stage) -> "tuple[Tensor, Tensor]":
        """Return a sample's embeddings (T, width), unscaled, and its labels (T,), cut to the maximum length."""
        image_features = self._image_features(row, images, stage)
        # A row without an image has zero rows of a blank one's, so that the connector's gradient is 0 and not missing:
        # the optimizer then moves it by its momentum (llava_arch.py, `cur_image_features[0:0]`).
        embeddings, labels = [image_features[0][:0]], [torch.empty(0, dtype=torch.long)]
        features = iter(image_features)
        for text, supervised in chat_pieces(row["conversations"]):
            for index, part in enumerate(text.split("<image>")):
                if index:
                    image = next(features)
                    embeddings.append(image)
                    labels.append(torch.full((len(image),), IGNORED))
                ids = torch.tensor(self.tokenizer(part, add_special_tokens=False)["input_ids"], dtype=torch.long)
                embeddings.append(nn.functional.embedding(ids, self.gemma.model.embed_tokens.weight))
                labels.append(ids if supervised else torch.full_like(ids, IGNORED))
        return torch.cat(embeddings)[: stage.max_length], torch.cat(labels)[: stage.max_length]

    def _image_features(self, row: dict[str, Any], images: Path, stage: Stage) -> list[Tensor]:
        blank = Image.new("RGB", (self.backbones.crop, self.backbones.crop))
        image = Image.open(images / row["image"]).convert("RGB") if "image" in row else blank
        pixels = self._pixels(image, stage.pad_images)
        with torch.no_grad():
            hidden = self.tower(pixels[None], output_hidden_states=True).hidden_states[-2]
        return [self.connector(hidden[0, 1:])]  # without the class token

    def _pixels(self, image: Image.Image, pad: bool) -> Tensor:
        """Process an image as the stock processor does, after padding to a square with the mean color if `pad`."""
        backbones = self.backbones
        if pad:
            side = max(image.size)
            canvas = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in backbones.mean))
            canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = canvas
        short = min(image.size)
        size = (int(backbones.resize * image.width / short), int(backbones.resize * image.height / short))
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (image.width - backbones.crop) // 2, (image.height - backbones.crop) // 2
        image = image.crop((left, top, left + backbones.crop, top + backbones.crop))
        values = (np.asarray(image, dtype=np.float32) / 255 - np.float32(backbones.mean)) / np.float32(backbones.std)
        return torch.from_numpy(values.astype(np.float32)).permute(2, 0, 1)


def chat_pieces(conversation: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation in Gemma's template, and whether the loss covers them."""
    opening = "<bos>"
    for question, answer in zip(conversation[::2], conversation[1::2], strict=True):
        text = question["value"]
        if "<image>" in text:  # moved to the front, followed by a newline
            text = "<image>\n" + text.replace("<image>", "").strip()
        yield f"{opening}{TURN_OPEN}user\n{text}{TURN_CLOSE}{TURN_OPEN}model\n", False
        yield answer["value"] + TURN_CLOSE, True
        opening = ""


def pad_rows(values: Tensor, length: int, value: Tensor) -> Tensor:
    """Append `value` to the rows of a tensor until there are `length`."""
    return torch.cat([values, value.to(values.dtype).expand(length - len(values), *values.shape[1:])])


def modality_batches(
    with_image: list[int], without: list[int], lengths: Sequence[int], batch: int, micro_batch: int, shuffle: Any
) -> list[list[list[int]]]:
    """Return an epoch's micro-batches by step, as LLaVA's sampler forms them (llava_trainer.py).

    `with_image` and `without` are the samples of both kinds, shuffled; `shuffle(n)` returns a permutation of n numbers.
    """
    count = batch // micro_batch
    kinds = [
        [even_chunks(kind[start : start + batch], lengths, count) for start in range(0, len(kind), batch)]
        for kind in (with_image, without)
    ]
    full = kinds[0][:-1] + kinds[1][:-1]
    order = [sample for number in shuffle(len(full)) for chunk in full[number] for sample in chunk]
    order += sorted(sample for kind in kinds for chunk in kind[-1] for sample in chunk)
    steps = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [[step[start : start + micro_batch] for start in range(0, len(step), micro_batch)] for step in steps]


def even_chunks(samples: list[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide samples, longest first, among chunks of equal size such that the totals of their lengths are similar."""
    longest_first = sorted(samples, key=lambda sample: lengths[sample], reverse=True)
    if len(samples) % count:
        return [longest_first[start::count] for start in range(count)]
    chunks: list[list[int]] = [[] for _ in range(count)]
    for sample in longest_first:
        open_chunks = [chunk for chunk in chunks if len(chunk) < len(samples) // count]
        min(open_chunks, key=lambda chunk: sum(lengths[member] for member in chunk)).append(sample)
    return chunks
