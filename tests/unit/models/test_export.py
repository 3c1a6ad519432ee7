"""The published folder is an ordinary Hugging Face model: plain transformers computes what training computed."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raylava.config.recipe import Model
from raylava.corpus.conversation import ChatTokenizer, Turn
from raylava.corpus.images import normalize_pixels, resize_exact
from raylava.evaluate.engines import PromptBuilder, TransformersEngine
from raylava.models.export import publish
from raylava.models.llava import build_llava
from raylava.models.registry import LanguageSpec, VisionSpec, load_tokenizer

PLAIN = """
import json, sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, *questions = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
said = []
for question in questions:
    messages = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (60, 40), "red")},
                                             {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True,
                                           return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6)
    said.append(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip())
assert "raylava" not in sys.modules
problems = {key: sorted(value) for key, value in info.items() if value}
print(json.dumps({"said": said, "problems": problems}))
"""


@pytest.fixture(scope="module", params=["pad", "crop"])
def fit(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(
    fit: str, toy_model: Model, vision: VisionSpec, language: LanguageSpec, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    made = tmp_path_factory.mktemp("published")
    llava = build_llava(toy_model, vision, seed=0, dtype=torch.float32)
    publish(llava, None, load_tokenizer(toy_model.language), vision, language, fit, made)
    return made


QUESTIONS = ["How many shapes are there?", "Is there a red circle?", "Where?"]


def test_plain_transformers_gives_the_same_answers_with_no_warning_about_weights(folder: Path) -> None:
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(folder), *QUESTIONS], capture_output=True, text=True, check=False, cwd=folder
    )
    assert plain.returncode == 0, plain.stderr
    told = json.loads(plain.stdout.splitlines()[-1])
    assert told["problems"] == {}
    for word in ("not initialized", "not used", "newly", "unexpected", "missing", "mismatch"):
        assert word not in plain.stderr.lower()
    images: list[Image.Image | None] = [Image.new("RGB", (60, 40), "red")] * len(QUESTIONS)
    assert (
        TransformersEngine(str(folder), torch.device("cpu")).answer(QUESTIONS, images, max_new_tokens=6) == told["said"]
    )


@pytest.mark.parametrize("size", [(64, 64), (90, 41), (33, 127), (48, 48), (300, 20)])
def test_the_processor_computes_the_pixels_of_preparation(
    folder: Path, fit: str, size: tuple[int, int], vision: VisionSpec
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    prepared = normalize_pixels(resize_exact(noise, vision.pixels, fit), vision.pixels)
    published = _processor(folder)(text="<image>", images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(published, torch.from_numpy(prepared), rtol=0, atol=1e-5)


def test_a_prompt_has_the_ids_that_training_saw(
    folder: Path, toy_model: Model, vision: VisionSpec, language: LanguageSpec
) -> None:
    processor = _processor(folder)
    tokenizer = load_tokenizer(toy_model.language)
    encoder = ChatTokenizer(tokenizer, language.template)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    for images in (0, 1, 2):
        content = [{"type": "image"}] * images + [{"type": "text", "text": "Is there  a red circle?\nSay."}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        images = [Image.new("RGB", (8, 8))] * images or None
        published = processor(text=prompt, images=images)["input_ids"][0]  # the two-step way: no second <bos>
        prompt_ids = encoder.prompt("Is there  a red circle?\nSay.", images)
        expanded = [i for token in prompt_ids for i in [token] * (vision.image_tokens if token == image_id else 1)]
        assert published == expanded


def test_the_chat_template_refuses_turns_that_do_not_alternate(folder: Path) -> None:
    with pytest.raises(Exception, match="turns must alternate"):
        _processor(folder).apply_chat_template([{"role": "assistant", "content": "Hi"}], tokenize=False)


def test_generation_stops_on_both_ids_and_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    tokenizer = _processor(folder).tokenizer
    assert config["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")]
    chat = TransformersEngine(str(folder), torch.device("cpu"))
    rng = np.random.default_rng(0)
    images: list[Image.Image | None] = [
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)) for _ in range(5)
    ]
    images[3] = None  # text alone, in the same batch
    questions = ["Where?", "Is there a red circle on the left?", "What colour is it?", "Hello", "How many shapes?"]
    together = chat.answer(questions, images, max_new_tokens=6)
    alone = [chat.answer([text], [image], 6)[0] for text, image in zip(questions, images, strict=True)]
    assert together == alone


def test_a_later_turns_prompt_is_what_training_saw(folder: Path, toy_model: Model, language: LanguageSpec) -> None:
    prompt = PromptBuilder(str(folder)).prompt("And?", Image.new("RGB", (8, 8)), (("What is it?", "a cross"),))
    tokenizer = load_tokenizer(toy_model.language)
    turns = [Turn("human", "<image>\nWhat is it?"), Turn("gpt", "a cross"), Turn("human", "And?"), Turn("gpt", "x")]
    encoded = ChatTokenizer(tokenizer, language.template).encode(turns, image_count=1)
    assert prompt == tokenizer.decode(encoded.input_ids[: encoded.loss_spans[-1][0]])


def test_no_weight_is_stored_that_pickle_would_read(folder: Path) -> None:
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".jinja", ".safetensors"}


def _processor(folder: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoProcessor

    logging.getLogger("transformers").setLevel(logging.ERROR)
    return AutoProcessor.from_pretrained(folder)
