"""What is said of a scene is true of its image, and no answer can be guessed without looking."""

from collections import Counter

import numpy as np
import pytest

from raylava.toy.scenes import (
    COLOURS,
    IMAGE_SIZE,
    QUESTION_TYPES,
    caption,
    draw_scene,
    question,
    render,
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_every_thing_shows_its_colour_at_its_place(rng: np.random.Generator) -> None:
    for _ in range(50):
        scene = draw_scene(rng)
        image = render(scene)
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
        for thing in scene.things:
            assert image.getpixel((round(thing.x), round(thing.y))) == pytest.approx(COLOURS[thing.colour], abs=3)
            assert int(thing.x // (IMAGE_SIZE / 3)) == ["left", "middle", "right"].index(thing.place)


def test_answers_are_true_of_the_scene(rng: np.random.Generator) -> None:
    for _ in range(200):
        scene = draw_scene(rng)
        for kind in QUESTION_TYPES:
            one = question(scene, kind, rng)
            if kind == "count":
                assert one.answer == ["one", "two", "three"][len(scene.things) - 1]
            elif kind == "presence":
                assert (one.answer == "yes") == any(thing.name in one.text for thing in scene.things)
            elif kind == "place":
                thing = scene.at(one.answer)
                assert thing is not None
                assert f"the {thing.colour} shape" in one.text
            elif kind == "shape":
                (thing,) = [thing for thing in scene.things if f"is {thing.colour}?" in one.text]
                assert one.answer == thing.shape
            else:
                (thing,) = [thing for thing in scene.things if f"on the {thing.place}?" in one.text]
                assert one.answer == thing.colour


def test_captions_name_things_from_left_to_right(rng: np.random.Generator) -> None:
    scene = draw_scene(rng)
    ordered = sorted(scene.things, key=lambda thing: thing.x)
    assert (
        caption(scene) == "Here: " + ", ".join(f"{thing.place} {thing.colour} {thing.shape}" for thing in ordered) + "."
    )


@pytest.mark.parametrize(
    ("kind", "best_guess"), [("count", 0.40), ("colour", 0.25), ("shape", 0.31), ("place", 0.40), ("presence", 0.56)]
)
def test_no_single_answer_is_right_much_more_often_than_the_others(
    kind: str, best_guess: float, rng: np.random.Generator
) -> None:
    answers = Counter(question(draw_scene(rng), kind, rng).answer for _ in range(2000))
    assert answers.most_common(1)[0][1] / 2000 < best_guess
