"""Scenes of coloured shapes at places: what is drawn, and what can truly be said and asked of it.

Pure functions of a seed: scene → image, caption, questions. No files, no tokens, no model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48  # pixels a side
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (34, 150, 64),
    "blue": (40, 90, 220),
    "yellow": (240, 200, 30),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("left", "middle", "right")
NUMBERS = {1: "one", 2: "two", 3: "three"}
QUESTION_TYPES = ("count", "colour", "shape", "place", "presence")

_OVERSAMPLING = 4  # images are drawn this much larger and shrunk, so that edges are smooth


@dataclass(frozen=True)
class Thing:
    """One coloured shape: its centre in pixels from the top left corner, and half its width in pixels."""

    colour: str
    shape: str
    place: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three things, no two of one colour and no two at one place, on a pale background."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    def at(self, place: str) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)


@dataclass(frozen=True)
class Question:
    """A question about a image with its one right answer."""

    kind: str
    text: str
    answer: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene; the number of things is uniform over 1–3, so that a count cannot be guessed."""
    count = int(rng.integers(1, len(PLACES) + 1))
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    shapes = rng.choice(SHAPES, size=count)
    places = sorted(rng.choice(len(PLACES), size=count, replace=False))
    named = zip(colours, shapes, places, strict=True)
    things = tuple(_thing(rng, (str(colour), str(shape)), PLACES[place]) for colour, shape, place in named)
    shade = int(rng.integers(215, 251))
    tint = rng.integers(-6, 7, size=3)
    return Scene(things, tuple(int(shade + t) for t in np.clip(tint, -200, 4)))  # type: ignore[arg-type]


def _thing(rng: np.random.Generator, name: tuple[str, str], place: str) -> Thing:
    column = IMAGE_SIZE / len(PLACES)
    centre_x = column * (PLACES.index(place) + 0.5) + rng.uniform(-1.0, 1.0)
    centre_y = IMAGE_SIZE / 2 + rng.uniform(-12.0, 12.0)
    return Thing(*name, place, centre_x, centre_y, rng.uniform(6.0, 7.5))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image of IMAGE_SIZE × IMAGE_SIZE pixels."""
    side = IMAGE_SIZE * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        _OUTLINES[thing.shape](
            pen, thing.x * _OVERSAMPLING, thing.y * _OVERSAMPLING, thing.radius * _OVERSAMPLING, COLOURS[thing.colour]
        )
    return canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)


def _circle(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fill)


def _square(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    side = 0.88 * r
    pen.rectangle((x - side, y - side, x + side, y + side), fill=fill)


def _triangle(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    corners = [(x + r * math.sin(a), y - r * math.cos(a)) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    pen.polygon(corners, fill=fill)


def _cross(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: tuple[int, int, int]) -> None:
    arm = 0.32 * r
    pen.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
    pen.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)


_OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, tuple[int, int, int]], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def caption(scene: Scene) -> str:
    """What is in the image, from left to right: `Here: left red circle, right blue square.`

    "Here:" comes first so that every place has a space before it, and so is the same token wherever it stands.
    """
    return "Here: " + ", ".join(f"{thing.place} {thing.name}" for thing in scene.things) + "."


def question(scene: Scene, kind: str, rng: np.random.Generator) -> Question:
    """A question of one of QUESTION_TYPES; answers are spread evenly, so that none can be guessed blind."""
    return _QUESTIONS[kind](scene, rng)


def _pick(scene: Scene, rng: np.random.Generator) -> Thing:
    return scene.things[int(rng.integers(len(scene.things)))]


def _count(scene: Scene, rng: np.random.Generator) -> Question:
    return Question("count", "How many shapes are there?", NUMBERS[len(scene.things)])


def _colour(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(scene, rng)
    return Question("colour", f"What colour is the shape on the {thing.place}?", thing.colour)


def _shape(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(scene, rng)
    return Question("shape", f"Which shape is {thing.colour}?", thing.shape)


def _place(scene: Scene, rng: np.random.Generator) -> Question:
    thing = _pick(scene, rng)
    return Question("place", f"Where is the {thing.colour} shape?", thing.place)


def _presence(scene: Scene, rng: np.random.Generator) -> Question:
    present = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        name, answer = _pick(scene, rng).name, "yes"
    else:
        absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
        name, answer = absent[int(rng.integers(len(absent)))], "no"
    return Question("presence", f"Is there a {name}?", answer)


_QUESTIONS: dict[str, Callable[[Scene, np.random.Generator], Question]] = {
    "count": _count,
    "colour": _colour,
    "shape": _shape,
    "place": _place,
    "presence": _presence,
}
