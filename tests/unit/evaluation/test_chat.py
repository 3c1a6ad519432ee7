"""A chat session keeps its conversation: each question is answered with the exchanges and images before it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raylava.errors import UserError
from raylava.evaluation.chat import ChatSession, open_image
from raylava.evaluation.engines import Exchange, TransformersEngine
from raylava.models.registry import LlavaCheckpoint


@pytest.fixture(scope="module")
def engine(untrained_llava: Path) -> TransformersEngine:
    return TransformersEngine(LlavaCheckpoint(str(untrained_llava)), torch.device("cpu"), "fp32")


@pytest.fixture
def session(engine: TransformersEngine) -> ChatSession:
    return ChatSession(engine, max_new_tokens=4)


@pytest.fixture
def inputs_of(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, tuple[int, ...]]]:
    """What the model is run on, per answer: the prompt, its image tokens and the shape of the pixels."""
    recorded: list[tuple[str, int, tuple[int, ...]]] = []
    generate = engine._model.generate

    def record(**inputs: torch.Tensor) -> torch.Tensor:
        ids = inputs["input_ids"]
        prompt = engine._processor.batch_decode(ids)[0]
        pixels = inputs.get("pixel_values")
        image_tokens = int((ids == engine._model.config.image_token_id).sum())
        recorded.append((prompt, image_tokens, () if pixels is None else tuple(pixels.shape)))
        return generate(**inputs)

    monkeypatch.setattr(engine._model, "generate", record)
    return recorded


def gray_image(brightness: int) -> Image.Image:
    return Image.fromarray(np.full((48, 48, 3), brightness, np.uint8))


def test_follow_up_question_sees_the_question_and_answer_before_it(session: ChatSession, inputs_of: list) -> None:
    first = session.ask("What is it?", [gray_image(90)])
    session.ask("Are you sure?")
    prompt, _, pixels = inputs_of[-1]
    assert "What is it?<end_of_turn>" in prompt
    assert prompt.index("What is it?") < prompt.index("<start_of_turn>model") < prompt.index("Are you sure?")
    assert first in prompt
    assert prompt.count("<start_of_turn>user") == 2
    assert pixels[0] == 1, "the image stays in the conversation"


def test_answer_to_a_follow_up_equals_that_of_the_batch_path_with_a_history(
    session: ChatSession, engine: TransformersEngine
) -> None:
    first = session.ask("What is it?", [gray_image(90)])
    follow_up = session.ask("Are you sure?")
    assert [follow_up] == engine.answer(["Are you sure?"], [gray_image(90)], 4, [(("What is it?", first),)])


def test_images_of_one_turn_reach_the_model_in_their_order(
    session: ChatSession, engine: TransformersEngine, inputs_of: list
) -> None:
    session.ask("Which is brighter?", [gray_image(10), gray_image(200)])
    prompt, image_tokens, pixels = inputs_of[-1]
    assert pixels[0] == 2
    assert image_tokens == 2 * engine._model.config.image_seq_length
    assert prompt.count("<start_of_turn>user") == 1


def test_image_of_a_later_turn_belongs_to_that_turn(session: ChatSession, engine: TransformersEngine) -> None:
    session.ask("What is it?", [gray_image(10)])
    session.ask("And this?", [gray_image(200)])
    assert [len(exchange.images) for exchange in session.exchanges] == [1, 1]
    prompt = engine._prompt_builder.prompt([*session.exchanges, Exchange("Same?")])
    turns = prompt.split("<start_of_turn>user\n")[1:]
    assert [turn.startswith("<image>\n") for turn in turns] == [True, True, False]
    assert prompt.count("<image>") == 2


def test_session_that_restarts_has_no_history(session: ChatSession, inputs_of: list) -> None:
    session.ask("What is it?", [gray_image(90)])
    session.restart()
    session.ask("Hello")
    prompt, image_tokens, _ = inputs_of[-1]
    assert "What is it?" not in prompt
    assert image_tokens == 0


def test_interrupted_question_leaves_no_trace(session: ChatSession, engine: TransformersEngine) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    session.ask("What is it?")
    hook = engine._model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("And this?", [gray_image(1)])
    hook.remove()
    assert [exchange.question for exchange in session.exchanges] == ["What is it?"]


def test_image_token_in_a_question_is_no_image(session: ChatSession, inputs_of: list) -> None:
    session.ask("What is <image> in this?", [gray_image(90)])
    assert inputs_of[-1][2][0] == 1
    with pytest.raises(UserError, match="the question is empty"):
        session.ask(" <image> ")


def test_image_file_is_read_as_rgb_and_a_bad_one_is_a_user_error(tmp_path: Path) -> None:
    Image.new("L", (8, 6), 7).save(tmp_path / "grey.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "grey.png")
    image = open_image("--image", str(tmp_path / "link.png"))
    assert (image.mode, image.size) == ("RGB", (8, 6))
    (tmp_path / "broken.png").write_bytes(b"no image")
    for name in ("broken.png", "none.png"):
        with pytest.raises(UserError, match=rf"--image .*{name}: .*; give an image file"):
            open_image("--image", str(tmp_path / name))
