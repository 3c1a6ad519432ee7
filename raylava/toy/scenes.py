"""Scenes of colored things in a meadow, and the images, captions and questions derived from them.

Pure functions of a random generator or a scene; no files, tokens or models.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]

IMAGE_SIZE = 96  # pixels per side
COLORS: dict[str, RGB] = {
    "red": (208, 42, 40),
    "green": (30, 132, 62),
    "blue": (38, 84, 214),
    "yellow": (240, 190, 20),
    "black": (34, 34, 40),
}
THINGS = ("house", "car", "tree", "kite")
POSITIONS = ("left", "middle", "right")
_PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
NUMBERS = {1: "one", 2: "two", 3: "three"}
QUESTION_TYPES = ("count", "color", "thing", "place", "presence")

_OVERSAMPLING = 2  # images are drawn larger by this factor and downsampled, for smooth edges
_WHITE: RGB = (250, 250, 246)
_WOOD: RGB = (122, 84, 52)
_TIRE: RGB = (66, 66, 72)
_RIM: RGB = (206, 206, 210)


@dataclass(frozen=True)
class SceneObject:
    """One colored thing. `x` and `y` are its center in pixels from the top left corner, `radius` half its width."""

    color: str
    thing: str
    position: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Color and thing, such as `red house`."""
        return f"{self.color} {self.thing}"


@dataclass(frozen=True)
class Scene:
    """One to three different things of different colors at different positions.

    `sky` and `grass` are the colors of the background, `horizon` the height of their border in pixels from the top.
    """

    objects: tuple[SceneObject, ...]
    sky: RGB
    grass: RGB
    horizon: float


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene and its only correct answer. `kind` is one of QUESTION_TYPES."""

    kind: str
    text: str
    answer: str


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene. The number of things is uniform over 1–3, so that a count cannot be guessed."""
    count = int(rng.integers(1, len(POSITIONS) + 1))
    colors = rng.choice(list(COLORS), size=count, replace=False)
    things = rng.choice(THINGS, size=count, replace=False)
    positions = sorted(rng.choice(len(POSITIONS), size=count, replace=False))
    objects = tuple(
        _draw_object(rng, str(color), str(thing), POSITIONS[position])
        for color, thing, position in zip(colors, things, positions, strict=True)
    )
    shade = rng.integers(-9, 10, size=2)
    sky, grass = _shaded((208, 229, 246), int(shade[0])), _shaded((206, 226, 186), int(shade[1]))
    return Scene(objects, sky, grass, rng.uniform(0.45, 0.7) * IMAGE_SIZE)


def _draw_object(rng: np.random.Generator, color: str, thing: str, position: str) -> SceneObject:
    column = IMAGE_SIZE / len(POSITIONS)
    center_x = column * (POSITIONS.index(position) + 0.5) + rng.uniform(-2.0, 2.0)
    center_y = IMAGE_SIZE / 2 + rng.uniform(-24.0, 24.0)
    return SceneObject(color, thing, position, center_x, center_y, rng.uniform(12.0, 14.5))


def _shaded(color: RGB, change: int) -> RGB:
    red, green, blue = (min(255, max(0, channel + change)) for channel in color)
    return red, green, blue


def render(scene: Scene) -> Image.Image:
    """Render a scene as an RGB image of IMAGE_SIZE × IMAGE_SIZE pixels."""
    side = IMAGE_SIZE * _OVERSAMPLING
    canvas = Image.new("RGB", (side, side), scene.sky)
    pen = ImageDraw.Draw(canvas)
    pen.rectangle((0, scene.horizon * _OVERSAMPLING, side, side), fill=scene.grass)
    for item in scene.objects:
        x, y, radius = (value * _OVERSAMPLING for value in (item.x, item.y, item.radius))
        _PAINTERS[item.thing](pen, x, y, radius, COLORS[item.color])
    return canvas.reduce(_OVERSAMPLING)


def _house(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, color: RGB) -> None:
    pen.rectangle((x - 0.8 * r, y - 0.15 * r, x + 0.8 * r, y + r), fill=color)
    pen.polygon([(x - r, y - 0.15 * r), (x, y - r), (x + r, y - 0.15 * r)], fill=_shaded(color, -40))
    pen.rectangle((x - 0.55 * r, y + 0.1 * r, x - 0.05 * r, y + 0.5 * r), fill=_WHITE)
    pen.rectangle((x + 0.15 * r, y + 0.25 * r, x + 0.55 * r, y + r), fill=_WOOD)


def _car(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, color: RGB) -> None:
    roof = [(x - 0.7 * r, y), (x - 0.4 * r, y - 0.6 * r), (x + 0.35 * r, y - 0.6 * r), (x + 0.75 * r, y)]
    pen.polygon(roof, fill=color)
    pen.polygon(
        [(x - 0.5 * r, y), (x - 0.3 * r, y - 0.45 * r), (x - 0.05 * r, y - 0.45 * r), (x - 0.05 * r, y)], _WHITE
    )
    pen.polygon([(x + 0.1 * r, y), (x + 0.1 * r, y - 0.45 * r), (x + 0.3 * r, y - 0.45 * r), (x + 0.55 * r, y)], _WHITE)
    pen.rounded_rectangle((x - r, y - 0.05 * r, x + r, y + 0.5 * r), 0.2 * r, fill=color)
    for center in (x - 0.5 * r, x + 0.5 * r):
        _disc(pen, center, y + 0.5 * r, 0.28 * r, _TIRE)
        _disc(pen, center, y + 0.5 * r, 0.12 * r, _RIM)


def _tree(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, color: RGB) -> None:
    pen.rectangle((x - 0.15 * r, y, x + 0.15 * r, y + r), fill=_WOOD)
    for dx, dy, size in ((-0.42, -0.12, 0.5), (0.42, -0.12, 0.5), (0.0, -0.45, 0.58)):
        _disc(pen, x + dx * r, y + dy * r, size * r, color)
    for dx, dy in ((-0.4, -0.2), (0.15, -0.6), (0.45, 0.0), (0.0, -0.1)):
        _disc(pen, x + dx * r, y + dy * r, 0.1 * r, _shaded(color, 45))


def _kite(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, color: RGB) -> None:
    top, bottom, left, right = (x, y - r), (x, y + 0.45 * r), (x - 0.75 * r, y - 0.3 * r), (x + 0.75 * r, y - 0.3 * r)
    pen.polygon([top, right, bottom, left], fill=color)
    width = max(1, round(0.08 * r))
    pen.line([top, bottom], fill=_WHITE, width=width)
    pen.line([left, right], fill=_WHITE, width=width)
    tail = [bottom, (x + 0.2 * r, y + 0.65 * r), (x - 0.1 * r, y + 0.8 * r), (x + 0.15 * r, y + r)]
    pen.line(tail, fill=_shaded(color, -30), width=2 * width)


def _disc(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, color: RGB) -> None:
    pen.ellipse((x - r, y - r, x + r, y + r), fill=color)


_PAINTERS: dict[str, Callable[[ImageDraw.ImageDraw, float, float, float, RGB], None]] = {
    "house": _house,
    "car": _car,
    "tree": _tree,
    "kite": _kite,
}


def caption(scene: Scene) -> str:
    """Return the things from left to right: `Here: left red house, right blue car.`

    The prefix "Here:" puts a space before the first position too, so that each position is always the same token.
    """
    return "Here: " + ", ".join(f"{item.position} {item.name}" for item in scene.objects) + "."


def draw_question(scene: Scene, kind: str, rng: np.random.Generator) -> SceneQuestion:
    """Draw a question of a kind from QUESTION_TYPES. Answers are balanced, so that guessing without the image fails."""
    return _QUESTION_BUILDERS[kind](scene, rng)


def _random_object(scene: Scene, rng: np.random.Generator) -> SceneObject:
    return scene.objects[int(rng.integers(len(scene.objects)))]


def _count_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    return SceneQuestion("count", "How many things are there?", NUMBERS[len(scene.objects)])


def _color_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("color", f"What color is the {item.thing}?", item.color)


def _thing_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("thing", f"What is {_PLACES[item.position]}?", item.thing)


def _position_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    item = _random_object(scene, rng)
    return SceneQuestion("place", f"Where is the {item.thing}?", item.position)


def _presence_question(scene: Scene, rng: np.random.Generator) -> SceneQuestion:
    present = {item.name for item in scene.objects}
    if rng.random() < 0.5:
        name, answer = _random_object(scene, rng).name, "yes"
    else:
        absent = [f"{color} {thing}" for color in COLORS for thing in THINGS if f"{color} {thing}" not in present]
        name, answer = absent[int(rng.integers(len(absent)))], "no"
    return SceneQuestion("presence", f"Is there a {name}?", answer)


_QUESTION_BUILDERS: dict[str, Callable[[Scene, np.random.Generator], SceneQuestion]] = {
    "count": _count_question,
    "color": _color_question,
    "thing": _thing_question,
    "place": _position_question,
    "presence": _presence_question,
}
