"""The processor, prompts and generation of an exported model match preparation and training."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from raylava.artifacts import Artifact
from raylava.config.recipe import Language, Model, Vision
from raylava.corpus.conversation import ChatTokenizer, Turn
from raylava.corpus.images import normalize_pixels, resize_exact
from raylava.evaluation.engines import PromptBuilder, TransformersEngine, build_conversation
from raylava.models.export import build_processor, export_model
from raylava.models.llava import build_llava
from raylava.models.registry import (
    LanguageSpec,
    LlavaCheckpoint,
    ResolvedModel,
    VisionSpec,
    load_tokenizer,
    resolve_model,
    resolve_vision,
)


def load_processor(folder: Path) -> Any:
    from transformers import AutoProcessor

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize(
    ("family", "tokens", "strategy"), [("clip", 36, "default"), ("dinov2", 36, "default"), ("siglip", 16, "full")]
)
def test_each_vision_family_answers_through_an_exported_model(
    family: str, tokens: int, strategy: str, toy_assets: Artifact, siglip: Path, tmp_path: Path, language: LanguageSpec
) -> None:
    """The model accepts the processor's placeholders only if the token count and the CLS rule are right."""
    folder = str(siglip) if family == "siglip" else str(toy_assets.path / "backbones" / family)
    model = resolve_model(Model(language=Language(name=language.name), vision=Vision(name=folder)))
    vision = model.vision
    assert (vision.family, vision.image_tokens, vision.select_strategy) == (family, tokens, strategy)
    export_model(build_llava(model, 0, torch.float32), None, model, "pad", tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    engine = TransformersEngine(LlavaCheckpoint(str(tmp_path)), torch.device("cpu"))
    assert isinstance(engine.answer(["What?"], [image], 3)[0], str)


@pytest.mark.parametrize("size", [(64, 64), (90, 41), (33, 127), (48, 48), (300, 20)])
def test_exported_processor_computes_the_pixels_of_preparation(
    exported: Path, image_aspect: str, size: tuple[int, int], vision: VisionSpec
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    prepared = normalize_pixels(resize_exact(noise, vision.pixels, image_aspect), vision.pixels)
    processed = load_processor(exported)(text="<image>", images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(processed, torch.from_numpy(prepared), rtol=0, atol=1e-5)


@pytest.mark.parametrize("aspect", ["pad", "crop"])
def test_exported_processor_crops_as_preparation_does(
    aspect: str, toy_assets: Artifact, language: LanguageSpec, tmp_path: Path
) -> None:
    vision = resolve_vision(Vision(name=str(toy_assets.path / "backbones" / "dinov2"), resize_size=120))
    build_processor(load_tokenizer(language), vision, language, aspect).save_pretrained(tmp_path)
    noise = np.random.default_rng(0).integers(0, 256, (41, 90, 3), dtype=np.uint8)
    prepared = normalize_pixels(resize_exact(noise, vision.pixels, aspect), vision.pixels)
    processed = load_processor(tmp_path)(text="<image>", images=Image.fromarray(noise), return_tensors="pt")
    torch.testing.assert_close(processed["pixel_values"][0], torch.from_numpy(prepared), rtol=0, atol=1e-5)


def test_prompt_of_the_exported_processor_has_the_token_ids_of_training(
    exported: Path, vision: VisionSpec, language: LanguageSpec
) -> None:
    question = "Is there  a red circle?\nSay."
    processor = load_processor(exported)
    tokenizer = load_tokenizer(language)
    chat_tokenizer = ChatTokenizer(tokenizer, language.template)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    for image_count in (0, 1, 2):
        content = [{"type": "image"}] * image_count + [{"type": "text", "text": question}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        images = [Image.new("RGB", (8, 8))] * image_count or None
        processed = processor(text=prompt, images=images)["input_ids"][0]  # in two steps: must not add a second <bos>
        prompt_ids = chat_tokenizer.prompt(question, image_count)
        expanded = [i for token in prompt_ids for i in [token] * (vision.image_tokens if token == image_id else 1)]
        assert processed == expanded


def test_chat_template_rejects_turns_that_do_not_alternate(exported: Path) -> None:
    with pytest.raises(Exception, match="turns must alternate"):
        load_processor(exported).apply_chat_template([{"role": "assistant", "content": "Hi"}], tokenize=False)


def test_generation_stops_at_both_end_tokens_and_answers_do_not_depend_on_the_batch(exported: Path) -> None:
    config = json.loads((exported / "generation_config.json").read_text())
    tokenizer = load_processor(exported).tokenizer
    assert config["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    engine = TransformersEngine(LlavaCheckpoint(str(exported)), torch.device("cpu"))
    rng = np.random.default_rng(0)
    images: list[Image.Image | None] = [
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(5)
    ]
    images[3] = None  # text only, in the same batch
    questions = ["Where?", "Is there a red circle on the left?", "What colour is it?", "Hello", "How many shapes?"]
    batched = engine.answer(questions, images, max_new_tokens=6)
    single = [engine.answer([text], [image], 6)[0] for text, image in zip(questions, images, strict=True)]
    assert batched == single


def test_prompt_of_a_later_turn_equals_the_text_of_training(exported: Path, language: LanguageSpec) -> None:
    builder = PromptBuilder(LlavaCheckpoint(str(exported)))
    prompt = builder.prompt(build_conversation("And?", Image.new("RGB", (8, 8)), (("What is it?", "a cross"),)))
    tokenizer = load_tokenizer(language)
    turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "a cross"), Turn("human", "And?"), Turn("gpt", "x")]
    tokenized = ChatTokenizer(tokenizer, language.template).encode(turns, image_count=1)
    assert prompt == tokenizer.decode(tokenized.input_ids[: tokenized.loss_spans[-1][0]])


def test_exported_folder_contains_no_pickled_weights(exported: Path) -> None:
    assert {path.suffix for path in exported.iterdir()} <= {".json", ".jinja", ".md", ".safetensors"}


def test_no_exported_file_holds_a_path_of_this_machine(exported: Path, resolved_model: ResolvedModel) -> None:
    folders = {Path(resolved_model.language.name).parent, exported, Path.cwd(), Path.home()}
    for file in exported.iterdir():
        content = file.read_bytes()
        assert not [folder for folder in folders if str(folder).encode() in content], file.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_folder_states_the_dtype_of_its_weights(
    dtype: torch.dtype, resolved_model: ResolvedModel, tmp_path: Path
) -> None:
    """vLLM takes it from config.json."""
    export_model(build_llava(resolved_model, 0, dtype), None, resolved_model, "pad", tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_exported_folder_names_the_least_version_of_transformers(exported: Path) -> None:
    assert json.loads((exported / "config.json").read_text())["min_transformers_version"] == "5.4"
    assert "transformers 5.4 or newer" in (exported / "README.md").read_text()
