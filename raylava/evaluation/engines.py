"""The generation engine: a LLaVA model, loaded from a folder or a hub id, that answers questions about images."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from raylava.errors import UserError, first_line
from raylava.models.checkpoint import complete_processor, load_converted
from raylava.models.hub import model_path
from raylava.models.registry import LlavaCheckpoint

History = tuple[tuple[str, str], ...]
PRECISIONS = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # auto: dtype of the checkpoint


@dataclass(frozen=True)
class Exchange:
    """A question of a conversation with the RGB images that come with it, and its answer, None until there is one."""

    question: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None


def build_conversation(question: str, image: Image.Image | None, history: History) -> list[Exchange]:
    """Return a conversation that ends with `question`; the image belongs to its first turn."""
    turns = [*history, (question, None)]
    images = () if image is None else (image,)
    return [Exchange(text, () if index else images, answer) for index, (text, answer) in enumerate(turns)]


def validate_precision(name: str) -> None:
    """Raise UserError if the precision is unknown."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: unknown precision; choose one of: {', '.join(PRECISIONS)}")


class PromptBuilder:
    """Builds prompts with the processor and chat template of a model."""

    def __init__(self, model: LlavaCheckpoint) -> None:
        """Raises UserError when the model has no processor that can be loaded without code of its own."""
        from transformers import AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(
                model_path(model.name), revision=model.revision, backend="pil", trust_remote_code=False
            )
        except Exception as error:  # the library raises plain Exception for a damaged tokenizer.json
            raise UserError(
                f"{model.name}: its processor cannot be loaded ({first_line(error)}); give a complete folder"
            ) from error
        complete_processor(self.processor, model)

    def prompt(self, conversation: Iterable[Exchange]) -> str:
        """Return the conversation in the chat template, up to the start of the answer that the last exchange lacks."""
        messages: list[dict[str, Any]] = []
        for exchange in conversation:
            parts = [{"type": "image"} for _ in exchange.images] + [{"type": "text", "text": exchange.question}]
            messages.append({"role": "user", "content": parts})
            if exchange.answer is not None:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": exchange.answer}]})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def blank_image(self, image: Image.Image) -> Image.Image:
        """Return an image of the same size in the mean color of the vision backbone."""
        mean = tuple(int(channel * 255) for channel in self.processor.image_processor.image_mean)
        return Image.new("RGB", image.size, mean)


class TransformersEngine:
    """Generates with transformers: left-padded batches, greedy, up to a stop id of the model's generation config.

    In fp32 an answer does not depend on the other questions in its batch; in half precision rounding may change a word.
    """

    def __init__(self, model: LlavaCheckpoint, device: torch.device, precision: str = "auto") -> None:
        """Raises UserError for a checkpoint that is incomplete or does not state its transformers version."""
        self._prompt_builder = PromptBuilder(model)
        self._processor = self._prompt_builder.processor
        llava = load_converted(model, PRECISIONS[precision])
        self._model = llava.to(device).eval()

    def answer(
        self,
        questions: list[str],
        images: list[Image.Image | None],
        max_new_tokens: int,
        histories: list[History] | None = None,
    ) -> list[str]:
        """Return one greedily decoded answer per question. An image is RGB, or None for a question without an image.

        `histories` holds the (question, answer) pairs that precede each question; the image belongs to the first turn
        of the conversation.
        """
        if not questions:
            return []
        return self._generate(
            [
                build_conversation(text, image, history)
                for text, image, history in zip(questions, images, histories or [()] * len(questions), strict=True)
            ],
            max_new_tokens,
        )

    def continue_conversation(self, conversation: Sequence[Exchange], max_new_tokens: int) -> str:
        """Return the greedily decoded answer to the last question, whose exchange has no answer yet."""
        return self._generate([conversation], max_new_tokens)[0]

    @torch.inference_mode()
    def _generate(self, conversations: Sequence[Sequence[Exchange]], max_new_tokens: int) -> list[str]:
        """Return the next answer of each conversation."""
        images = [image for exchanges in conversations for exchange in exchanges for image in exchange.images]
        inputs = self._processor(
            text=[self._prompt_builder.prompt(conversation) for conversation in conversations],
            images=images or None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        output = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        generated = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._processor.batch_decode(generated, skip_special_tokens=True)]

    def blank_image(self, image: Image.Image) -> Image.Image:
        """See PromptBuilder.blank_image."""
        return self._prompt_builder.blank_image(image)
