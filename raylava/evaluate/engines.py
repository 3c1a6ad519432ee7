"""Engines: a LLaVA folder or hub id, loaded, that answers questions about images. What asks them is answer.py's."""

import importlib.util
from typing import Any, Protocol

import torch
from PIL import Image

from raylava.errors import UserError
from raylava.models.registry import backbone_path

History = tuple[tuple[str, str], ...]
ENGINES = ("transformers", "vllm")
PRECISIONS = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # auto: as the weights are kept


class Engine(Protocol):
    """A loaded model."""

    def answer(
        self,
        questions: list[str],
        images: list[Image.Image | None],
        max_new_tokens: int,
        histories: list[History] | None = None,
    ) -> list[str]:
        """Greedy answers, one for each question; a image is an RGB image or None for text alone.

        `histories` are the (question, answer) pairs before each; a image is shown at the conversation's start.
        """

    def blank(self, image: Image.Image) -> Image.Image:
        """A image of the same size in the backbone's mean colour."""


def check_engine(name: str) -> None:
    """Raises UserError for an engine that raylava does not know, or that is not installed."""
    if name not in ENGINES:
        raise UserError(f"--engine {name}: known here: {', '.join(ENGINES)}")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: it is not installed; pip install vllm, or leave --engine out")


def check_precision(name: str) -> None:
    """Raises UserError for a precision that raylava does not know."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: known here: {', '.join(PRECISIONS)}")


def engine(name: str, model: str, device: torch.device, precision: str) -> Engine:
    """The model, loaded by the engine of that name."""
    return VllmEngine(model, precision) if name == "vllm" else TransformersEngine(model, device, precision)


class PromptBuilder:
    """A model's processor: how a conversation becomes its prompt."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(folder, backend="pil")

    def prompt(self, text: str, image: Image.Image | None, history: History) -> str:
        """The chat template's text, ready for the answer."""
        said = [text for exchange in history for text in exchange] + [text]
        roles = ("user", "assistant")
        messages: list[dict[str, Any]] = [
            {"role": roles[turn % 2], "content": [{"type": "text", "text": words}]} for turn, words in enumerate(said)
        ]
        if image is not None:
            messages[0]["content"].insert(0, {"type": "image"})
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def blank(self, image: Image.Image) -> Image.Image:
        """A image of the same size in the backbone's mean colour."""
        mean = tuple(int(channel * 255) for channel in self.processor.image_processor.image_mean)
        return Image.new("RGB", image.size, mean)


class TransformersEngine:
    """By plain transformers: left-padded batches, greedy, until a stop id of the model's generation config.

    In fp32 an answer depends on no other in its batch; in half precision rounding may decide between two words.
    """

    def __init__(self, model: str, device: torch.device, precision: str = "auto") -> None:
        from transformers import LlavaForConditionalGeneration

        folder = backbone_path(model)
        self._prompter = PromptBuilder(folder)
        self._processor = self._prompter.processor
        self._model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=PRECISIONS[precision])
        self._model = self._model.to(device).eval()

    @torch.inference_mode()
    def answer(
        self,
        questions: list[str],
        images: list[Image.Image | None],
        max_new_tokens: int,
        histories: list[History] | None = None,
    ) -> list[str]:
        """See Engine."""
        if not questions:
            return []
        asked = zip(questions, images, histories or [()] * len(questions), strict=True)
        prompts = [self._prompter.prompt(text, image, history) for text, image, history in asked]
        shown = [image for image in images if image is not None]
        inputs = self._processor(
            text=prompts,
            images=shown or None,
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self._model.device, self._model.dtype)
        output = self._model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self._processor.batch_decode(new, skip_special_tokens=True)]

    def blank(self, image: Image.Image) -> Image.Image:
        """See Engine."""
        return self._prompter.blank(image)


class VllmEngine:
    """By vLLM, where it is installed; it batches by itself. Not run by raylava's own tests: it wants a GPU."""

    def __init__(self, model: str, precision: str) -> None:
        from vllm import LLM

        folder = backbone_path(model)
        self._prompter = PromptBuilder(folder)
        self._model: Any = LLM(folder, dtype=PRECISIONS[precision], limit_mm_per_prompt={"image": 1})

    def answer(
        self,
        questions: list[str],
        images: list[Image.Image | None],
        max_new_tokens: int,
        histories: list[History] | None = None,
    ) -> list[str]:
        """See Engine."""
        from vllm import SamplingParams

        asked = zip(questions, images, histories or [()] * len(questions), strict=True)
        tokenizer = self._prompter.processor.tokenizer  # vLLM's own would put a second <bos> before the template's
        prompts: list[dict[str, Any]] = []
        for text, image, history in asked:
            prompt = self._prompter.prompt(text, image, history)
            prompts.append({"prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False)})
            if image is not None:
                prompts[-1]["multi_modal_data"] = {"image": image}
        said = self._model.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_new_tokens), use_tqdm=False)
        return [one.outputs[0].text.strip() for one in said]

    def blank(self, image: Image.Image) -> Image.Image:
        """See Engine."""
        return self._prompter.blank(image)
