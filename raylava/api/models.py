"""A trained model that answers questions about images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from raylava.evaluate.engines import TransformersEngine
from raylava.evaluate.generation import load_image
from raylava.models.checkpoint import find_checkpoint

ImageLike = Image.Image | str | Path


class Model:
    """A LLaVA model in memory, on the GPU if there is one; made by `load_model`."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine

    def answer(
        self,
        question: str,
        image: ImageLike | None = None,
        *,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 128,
    ) -> str:
        """Return the greedy answer to one question about an image: a PIL image, or the path or URI of a file.

        `history` holds the earlier (question, answer) pairs of the conversation, whose first turn has the image.
        Raises UserError for an image that cannot be read.
        """
        pixels = load_image(str(image)) if isinstance(image, str | Path) else image
        rgb = pixels.convert("RGB") if pixels is not None else None
        return self._engine.answer([question], [rgb], max_new_tokens, [tuple(history)])[0]


def load_model(model: str, *, precision: str = "auto", transformers_version: str | None = None) -> Model:
    """Load a model to ask it questions: a finetune artifact, a Hugging Face LLaVA folder or a hub id.

    `precision` is fp32, bf16, fp16, or auto: that of the weights. Raises UserError when the model is incomplete.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Model(TransformersEngine(find_checkpoint(model, transformers_version), device, precision))
