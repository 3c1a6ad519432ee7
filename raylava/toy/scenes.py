"""Scenes of colored shapes, and the images, captions and questions derived from them.

Pure functions of a random generator or a scene; no files, tokens or models.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 48  # pixels per side
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 39, 40),
    "green": (34, 150, 64),
    "blue": (40, 90, 220),
    "yellow": (240, 200, 30),
    "black": (30, 30, 34),
}
SHAPES = ("circle", "square", "triangle", "cross")
POSITIONS = ("left", "middle", "right")
NUMBERS = {1: "one", 2: "two", 3: "three"}
QUESTION_TYPES = ("count", "colour", "shape", "place", "presence")

_OVERSAMPLING = 4  # images are drawn larger by this factor and downsampled, for smooth edges


@dataclass(frozen=True)
class SceneObject:
    """One colored shape. `x` and `y` are its center in pixels from the top left corner, `radius` half its width."""

    colour: str
    shape: str
    position: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Color and shape, such as `red circle`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One to three objects of different colors at different positions, on a pale background."""

    objects: tuple[SceneObject, ...]
    background: tuple[int, int, int]

    def at(self, position: str) -> SceneObject | None:
        """Return the object at a position, or None."""
        return next((item for item in self.objects if item.position == position), None)


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene and its only correct answer. `kind` is one of QUESTION_TYPES."""

    kind: str
    text: str
    answer: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene. The number of objects is uniform over 1–3, so that a count cannot be guessed."""
    count = int(rng.integers(1, len(POSITIONS) + 1))
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    shapes = rng.choice(SHAPES, size=count)
    positions = sorted(rng.choice(len(POSITIONS), size=count, replace=False))
    objects = tuple(
        _draw_object(rng, str(colour), str(shape), POSITIONS[position])
        for colour, shape, position in zip(colours, shapes, positions, strict=True)
    )
    shade = int(rng.integers(215, 251))
    tint = rng.integers(-6, 7, size=3)
    return Scene(objects, tuple(int(shade + t) for t in np.clip(tint, -200, 4)))  # type: ignore[arg-type]


def _draw_object(rng: np.random.Generator, colour: str, shape: str, position: str) -> SceneObject:
    column = IMAGE_SIZE / len(POSITIONS)
    centre_x = column * (POSITIONS.index(position) + 0.5) + rng.uniform(-1.0, 1.0)
    centre_y = IMAGE_SIZE / 2 + rng.uniform(-12.0, 12.0)
    return SceneObject(colour, shape, position, centre_x, centre_y, rng.uniform(6.0, 7.5))


def render(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of IMAGE_SIZE × IMAGE_SIZE pixels."""
    side = IMAGE_SIZE * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(canvas)
    for item in scene.objects:
        x, y, radius = (value * _OVERSAMPLING for value in (item.x, item.y, item.radius))
        _SHAPE_PAINTERS[item.shape](pen, x, y, radius, COLOURS[item.colour])
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


_SHAPE_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, tuple[int, int, int]], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
}


def caption(scene: Scene) -> str:
    """Return the objects from left to right: `Here: left red circle, right blue square.`

    The prefix "Here:" puts a space before the first position too, so that each position is always the same token.
    """
    return "Here: " + ", ".join(f"{item.position} {item.name}" for item in scene.objects) + "."


def draw_question(scene: Scene, kind: str, rng: np.random.Generator) -> SceneQuestion:
    """Draw a question of a kind from QUESTION_TYPES. Answers are balanced, so that guessing without the image fails."""
    return _QUESTION_BUILDERS[kind](scene, rng)


def _random_object(scene: Scene, rng: np.random.Generator) -> SceneObject:
    return scene.objects[int(rng.integers(len(scene.objects)))]


def _count_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    return SceneQuestion("count", "How many shapes are there?", NUMBERS[len(scene.objects)])


def _colour_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("colour", f"What colour is the shape on the {item.position}?", item.colour)


def _shape_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("shape", f"Which shape is {item.colour}?", item.shape)


def _position_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("place", f"Where is the {item.colour} shape?", item.position)


def _presence_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    present = {item.name for item in scene.objects}
    if rng.random() < 0.5:
        name, answer = _random_object(scene, rng).name, "yes"
    else:
        absent = [f"{c} {s}" for c in COLOURS for s in SHAPES if f"{c} {s}" not in present]
        name, answer = absent[int(rng.integers(len(absent)))], "no"
    return SceneQuestion("presence", f"Is there a {name}?", answer)


_QUESTION_BUILDERS: dict[str, Callable[[Scene, np.random.Generator], SceneQuestion]] = {
    "count": _count_question,
    "colour": _colour_question,
    "shape": _shape_question,
    "place": _position_question,
    "presence": _presence_question,
}
