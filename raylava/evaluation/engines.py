"""Generation engines: a LLaVA model, loaded from a folder or a hub id, that answers questions about images."""

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image

from raylava.errors import UserError, first_line
from raylava.models.checkpoint import complete_processor, legacy_scale, load_converted
from raylava.models.hub import is_folder, model_path
from raylava.models.registry import LlavaCheckpoint

History = tuple[tuple[str, str], ...]
ENGINES = ("transformers", "vllm")
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


class GenerationEngine(Protocol):
    """A loaded model."""

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

    def blank_image(self, image: Image.Image) -> Image.Image:
        """Return an image of the same size in the mean color of the vision backbone."""


def validate_engine(name: str) -> None:
    """Raise UserError if the engine is unknown or not installed."""
    if name not in ENGINES:
        raise UserError(f"--engine {name}: unknown engine; choose one of: {', '.join(ENGINES)}")
    if name == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm: vllm is not installed; run pip install vllm, or omit --engine")


def validate_precision(name: str) -> None:
    """Raise UserError if the precision is unknown."""
    if name not in PRECISIONS:
        raise UserError(f"--precision {name}: unknown precision; choose one of: {', '.join(PRECISIONS)}")


def load_engine(name: str, model: LlavaCheckpoint, device: torch.device, precision: str) -> GenerationEngine:
    """Load a model with the engine of that name; vLLM chooses its device itself."""
    return VllmEngine(model, precision) if name == "vllm" else TransformersEngine(model, device, precision)


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
        """See GenerationEngine."""
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
        """See GenerationEngine."""
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
        """See GenerationEngine."""
        return self._prompt_builder.blank_image(image)


class VllmEngine:
    """Generates with vLLM, which forms its own batches.

    vLLM needs a GPU, so the test suite does not cover this class.
    """

    def __init__(self, model: LlavaCheckpoint, precision: str) -> None:
        """Raises UserError for a checkpoint of transformers before 5.4, which vLLM would load without converting it."""
        from vllm import LLM

        if legacy_scale(model) != 1.0:
            raise UserError(f"--engine vllm: {model.name} was saved by an old transformers; omit --engine")
        self._prompt_builder = PromptBuilder(model)
        self._model: Any = LLM(
            model_path(model.name),
            revision=None if is_folder(model.name) else model.revision,
            dtype=PRECISIONS[precision],
            limit_mm_per_prompt={"image": 1},
        )

    def answer(
        self,
        questions: list[str],
        images: list[Image.Image | None],
        max_new_tokens: int,
        histories: list[History] | None = None,
    ) -> list[str]:
        """See GenerationEngine."""
        from vllm import SamplingParams

        conversations = zip(questions, images, histories or [()] * len(questions), strict=True)
        # Tokenize here: vLLM would put a second <bos> before that of the chat template.
        tokenizer = self._prompt_builder.processor.tokenizer
        prompts: list[dict[str, Any]] = []
        for text, image, history in conversations:
            prompt = self._prompt_builder.prompt(build_conversation(text, image, history))
            prompts.append({"prompt_token_ids": tokenizer.encode(prompt, add_special_tokens=False)})
            if image is not None:
                prompts[-1]["multi_modal_data"] = {"image": image}
        sampling = SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        outputs = self._model.generate(prompts, sampling, use_tqdm=False)
        return [output.outputs[0].text.strip() for output in outputs]

    def blank_image(self, image: Image.Image) -> Image.Image:
        """See GenerationEngine."""
        return self._prompt_builder.blank_image(image)
