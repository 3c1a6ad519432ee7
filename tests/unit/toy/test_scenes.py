"""Captions and answers are true of the rendered scene, and answers cannot be guessed without the image."""

from collections import Counter

import numpy as np
import pytest

from raylava.toy.scenes import (
    COLOURS,
    IMAGE_SIZE,
    QUESTION_TYPES,
    caption,
    draw_question,
    draw_scene,
    render,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_object_is_rendered_in_its_color_at_its_position(rng: np.random.Generator) -> None:
    for _ in range(50):
        scene = draw_scene(rng)
        image = render(scene)
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        for item in scene.objects:
            assert image.getpixel((round(item.x), round(item.y))) == pytest.approx(COLOURS[item.colour], abs=3)
            assert int(item.x // (IMAGE_SIZE / 3)) == ["left", "middle", "right"].index(item.position)


def test_answers_are_true_of_the_scene(rng: np.random.Generator) -> None:
    for _ in range(200):
        scene = draw_scene(rng)
        for kind in QUESTION_TYPES:
            question = draw_question(scene, kind, rng)
            if kind == "count":
                assert question.answer == ["one", "two", "three"][len(scene.objects) - 1]
            elif kind == "presence":
                assert (question.answer == "yes") == any(item.name in question.text for item in scene.objects)
            elif kind == "place":
                target = scene.at(question.answer)
                assert target is not None
                assert f"the {target.colour} shape" in question.text
            elif kind == "shape":
                (target,) = [item for item in scene.objects if f"is {item.colour}?" in question.text]
                assert question.answer == target.shape
            else:
                (target,) = [item for item in scene.objects if f"on the {item.position}?" in question.text]
                assert question.answer == target.colour


def test_captions_list_objects_from_left_to_right(rng: np.random.Generator) -> None:
    scene = draw_scene(rng)
    ordered = sorted(scene.objects, key=lambda item: item.x)
    expected = ", ".join(f"{item.position} {item.colour} {item.shape}" for item in ordered)
    assert caption(scene) == f"Here: {expected}."


@pytest.mark.parametrize(
    ("kind", "best_guess"), [("count", 0.40), ("colour", 0.25), ("shape", 0.31), ("place", 0.40), ("presence", 0.56)]
)
def test_no_constant_answer_is_much_better_than_chance(kind: str, best_guess: float, rng: np.random.Generator) -> None:
    answers = Counter(draw_question(draw_scene(rng), kind, rng).answer for _ in range(2000))
    assert answers.most_common(1)[0][1] / 2000 < best_guess
