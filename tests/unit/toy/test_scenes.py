"""Captions and answers are true of the rendered scene, and answers cannot be guessed without the image."""

from collections import Counter

import numpy as np
import pytest

from raylava.toy.scenes import (
    COLORS,
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


def test_every_thing_is_rendered_in_its_color_at_its_position(rng: np.random.Generator) -> None:
    for _ in range(50):
        scene = draw_scene(rng)
        image = render(scene)
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        pixels = np.asarray(image).astype(int)
        for item in scene.objects:
            column = ["left", "middle", "right"].index(item.position)
            in_color = np.abs(pixels - np.array(COLORS[item.color])).max(axis=2) <= 3
            rows, columns = in_color.nonzero()
            assert len(rows) > 40
            assert set(columns * 3 // IMAGE_SIZE) == {column}


def test_things_and_colors_of_a_scene_differ_so_that_questions_have_one_answer(rng: np.random.Generator) -> None:
    for _ in range(200):
        objects = draw_scene(rng).objects
        for attribute in ("thing", "color", "position"):
            assert len({getattr(item, attribute) for item in objects}) == len(objects)


def test_answers_are_true_of_the_scene(rng: np.random.Generator) -> None:
    for _ in range(200):
        scene = draw_scene(rng)
        for kind in QUESTION_TYPES:
            question = draw_question(scene, kind, rng)
            if kind == "count":
                assert question.answer == ["one", "two", "three"][len(scene.objects) - 1]
            elif kind == "presence":
                assert (question.answer == "yes") == any(item.name in question.text for item in scene.objects)
            elif kind == "thing":
                (target,) = [item for item in scene.objects if f"the {item.position}?" in question.text]
                assert question.answer == target.thing
            else:
                (target,) = [item for item in scene.objects if f"the {item.thing}?" in question.text]
                assert question.answer == (target.position if kind == "place" else target.color)


def test_captions_list_things_from_left_to_right(rng: np.random.Generator) -> None:
    scene = draw_scene(rng)
    ordered = sorted(scene.objects, key=lambda item: item.x)
    expected = ", ".join(f"{item.position} {item.color} {item.thing}" for item in ordered)
    assert caption(scene) == f"Here: {expected}."


@pytest.mark.parametrize(
    ("kind", "best_guess"), [("count", 0.40), ("color", 0.25), ("thing", 0.31), ("place", 0.40), ("presence", 0.56)]
)
def test_no_constant_answer_is_much_better_than_chance(kind: str, best_guess: float, rng: np.random.Generator) -> None:
    answers = Counter(draw_question(draw_scene(rng), kind, rng).answer for _ in range(2000))
    assert answers.most_common(1)[0][1] / 2000 < best_guess
