"""Draws small scenes whose every fact is known: shapes of plain colours on a muted ground, with exact masks.

A scene is its specification; the picture and the masks are drawn from it when first asked for. So a counterfactual
(`recolored`, `moved`, `removed` …) is a changed specification, and differs from the original in that one fact only.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw

from llava_lens.tiny.questions import sentence
from llava_lens.tiny.vocabulary import COLORS, PLACES, SHAPES

CANVAS = 256
RADIUS = (36.0, 52.0)  # of the circle around an object; 2 to 3 patches of 32 pixels across
GAP = 6.0  # between the circles around two objects, and to the picture's edge
CLEARANCE = 7.0  # of an object's centre from the lines between places, so that "where" has one answer
SUPERSAMPLING = 4


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, and where, in canvas pixels (`center` is the middle of its box, x then y)."""

    shape: str
    color: str
    center: tuple[float, float]
    radius: float
    angle: float = 0.0
    tint: tuple[int, int, int] = (0, 0, 0)

    @property
    def where(self) -> str:
        """The ninth of the picture that holds the centre: "top-left" … "bottom-right"."""
        column, row = (min(int(3 * v / CANVAS), 2) for v in self.center)
        return PLACES[row][column]

    @property
    def rgb(self) -> tuple[int, int, int]:
        """The drawn colour: the named one, shifted by this object's tint."""
        red, green, blue = (
            min(max(base + shift, 0), 255) for base, shift in zip(COLORS[self.color], self.tint, strict=True)
        )
        return red, green, blue

    @cached_property
    def coverage(self) -> Float[np.ndarray, "y x"]:
        """The share of each canvas pixel that the object covers, in 0..1."""
        drawn, left, top = self.drawn
        canvas = Image.new("L", (CANVAS, CANVAS))
        canvas.paste(drawn, (left, top))
        return np.asarray(canvas, np.float32) / 255

    @cached_property
    def drawn(self) -> tuple[Image.Image, int, int]:
        """The coverage in 0..255 around the object alone, and the left and top of that cut-out on the canvas."""
        return _draw(self)

    @property
    def mask(self) -> Bool[np.ndarray, "y x"]:
        """The pixels of which the object covers more than half."""
        return self.coverage > 0.5

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of the mask; right and bottom are past the last pixel, as in Pillow."""
        ys, xs = np.nonzero(self.mask)
        return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@dataclass(frozen=True)
class Ground:
    """What objects lie on: a muted colour, a gradient along `slope` and a faint texture drawn from `grain`."""

    rgb: tuple[int, int, int] = (128, 128, 128)
    slope: tuple[float, float] = (0.0, 0.0)
    grain: int = 0

    @property
    def pixels(self) -> UInt8[np.ndarray, "y x rgb"]:
        ramp = np.linspace(-1, 1, CANVAS, dtype=np.float32)
        shade = self.slope[0] * ramp[None, :] + self.slope[1] * ramp[:, None]
        noise = np.frombuffer(random.Random(self.grain).randbytes(32 * 32), np.uint8).reshape(32, 32)
        smooth = np.asarray(Image.fromarray(noise).resize((CANVAS, CANVAS), Image.Resampling.BILINEAR), np.float32)
        pixels = np.array(self.rgb, np.float32) + (shade + (smooth - 127.5) / 24)[:, :, None]
        return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """Objects on a ground; objects never touch."""

    objects: tuple[SceneObject, ...]
    ground: Ground = Ground()

    @cached_property
    def image(self) -> Image.Image:
        """The picture, `CANVAS` × `CANVAS`, RGB."""
        picture = Image.fromarray(self.ground.pixels)
        for thing in self.objects:
            cover, left, top = thing.drawn
            picture.paste(thing.rgb, (left, top), cover)
        return picture

    @property
    def sentences(self) -> tuple[str, ...]:
        """The facts of each object as a sentence, in the order of the objects."""
        return tuple(sentence(thing) for thing in self.objects)

    @property
    def text(self) -> str:
        """All sentences, as given to the model instead of the picture."""
        return " ".join(self.sentences)

    def find(self, *, shape: str | None = None, color: str | None = None) -> tuple[int, ...]:
        """Indices of the objects of that shape and colour."""
        return tuple(i for i, o in enumerate(self.objects) if shape in (None, o.shape) and color in (None, o.color))

    def recolored(self, i: int, color: str) -> Scene:
        """The scene with object `i` in another colour."""
        return self._with(i, color=_known(color, COLORS, "color"))

    def reshaped(self, i: int, shape: str) -> Scene:
        """The scene with object `i` of another shape, in the same circle."""
        return self._with(i, shape=_known(shape, SHAPES, "shape"))

    def moved(self, i: int, center: tuple[float | int, float | int]) -> Scene:
        """The scene with object `i` at another place (canvas pixels, x then y), clear of the others."""
        thing = replace(self.objects[i], center=(float(center[0]), float(center[1])))
        if not _free(thing, [o for k, o in enumerate(self.objects) if k != i]):
            raise ValueError(f"{center} is not free for object {i}: it would touch another object or the edge")
        return self._with(i, center=thing.center)

    def swapped(self, i: int, j: int) -> Scene:
        """The scene with the colours of objects `i` and `j` exchanged."""
        first, second = self.objects[i].color, self.objects[j].color
        return self.recolored(i, second).recolored(j, first)

    def removed(self, i: int) -> Scene:
        """The scene without object `i`."""
        self.objects[i]
        return replace(self, objects=tuple(o for k, o in enumerate(self.objects) if k != i))

    def _with(self, i: int, **changes: Any) -> Scene:
        things = list(self.objects)
        things[i] = replace(things[i], **changes)
        return replace(self, objects=tuple(things))


def render_scene(
    seed: int,
    n_objects: int | None = None,
    *,
    distinct: bool = False,
    shapes: Sequence[str] = SHAPES,
    colors: Sequence[str] = tuple(COLORS),
) -> Scene:
    """The scene of a seed: the same on every machine.

    2–4 objects (or `n_objects`) at free places, no two of them alike in both shape and colour; with `distinct` no two
    share a shape or a colour. At least one shape and one colour occur once, so that every scene has its questions.

    >>> render_scene(7).text == render_scene(7).text
    True
    """
    if n_objects is not None and not 1 <= n_objects <= 4:
        raise ValueError(f"n_objects is {n_objects}; a scene holds 1 to 4 objects, or 2 to 4 at random with None")
    rng = random.Random(f"scene-{seed}")
    n = n_objects or rng.choice((2, 3, 4))
    looks = _looks(rng, n, distinct, shapes, colors)
    while (things := _arrange(rng, looks)) is None:
        pass
    return Scene(things, _ground(rng))


def _looks(
    rng: random.Random, n: int, distinct: bool, shapes: Sequence[str], colors: Sequence[str]
) -> list[tuple[str, str]]:
    if distinct:
        return list(zip(rng.sample(tuple(shapes), n), rng.sample(tuple(colors), n), strict=True))
    every = [(shape, color) for shape in shapes for color in colors]
    while True:
        looks = rng.sample(every, n)
        if all(any(names.count(name) == 1 for name in names) for names in map(list, zip(*looks, strict=True))):
            return looks


def _arrange(rng: random.Random, looks: Sequence[tuple[str, str]]) -> tuple[SceneObject, ...] | None:
    """Objects at free places, or None if the first of them leave no room for the last."""
    things: list[SceneObject] = []
    for shape, color in looks:
        for _ in range(200):
            radius = rng.uniform(*RADIUS)
            center = (rng.uniform(radius, CANVAS - radius), rng.uniform(radius, CANVAS - radius))
            tint = (rng.randint(-10, 10), rng.randint(-10, 10), rng.randint(-10, 10))
            thing = SceneObject(shape, color, center, radius, rng.uniform(-0.25, 0.25), tint)
            if _free(thing, things) and _clear(center):
                things.append(thing)
                break
        else:
            return None
    return tuple(things)


def _free(thing: SceneObject, others: Sequence[SceneObject]) -> bool:
    inside = all(thing.radius + GAP <= v <= CANVAS - thing.radius - GAP for v in thing.center)
    return inside and all(math.dist(thing.center, o.center) >= thing.radius + o.radius + GAP for o in others)


def _clear(center: tuple[float, float]) -> bool:
    return all(abs(v - line) >= CLEARANCE for v in center for line in (CANVAS / 3, 2 * CANVAS / 3))


def _ground(rng: random.Random) -> Ground:
    """A grey, light or dark, with a slight cast: far from every object's colour."""
    grey = rng.choice((rng.randint(40, 95), rng.randint(150, 232)))
    red, green, blue = (min(max(grey + rng.randint(-12, 12), 0), 255) for _ in range(3))
    return Ground((red, green, blue), (rng.uniform(-14, 14), rng.uniform(-14, 14)), rng.getrandbits(32))


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The shape's corners, y downwards; each drawn object is scaled to fit the circle around it."""
    if shape == "circle":
        return tuple(_polar(1.0, 2 * math.pi * k / 96) for k in range(96))
    if shape == "square":
        return ((-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0))
    if shape == "triangle":
        return tuple(_polar(1.0, 2 * math.pi * k / 3 - math.pi / 2) for k in range(3))
    if shape == "star":
        return tuple(_polar(1.0 if k % 2 == 0 else 0.42, math.pi * k / 5 - math.pi / 2) for k in range(10))
    if shape == "cross":
        quarter = ((-0.36, -1.0), (0.36, -1.0), (0.36, -0.36))
        turns = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        return tuple((x * c - y * s, x * s + y * c) for c, s in turns for x, y in quarter)
    ts = [2 * math.pi * k / 96 for k in range(96)]  # the heart
    return tuple(
        (16 * math.sin(t) ** 3, -13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t) + math.cos(4 * t))
        for t in ts
    )


def _polar(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def _draw(thing: SceneObject) -> tuple[Image.Image, int, int]:
    """Draws the outline, turned and with its box on the centre, at four times the size, and averages."""
    cos, sin = math.cos(thing.angle), math.sin(thing.angle)
    turned = [(x * cos - y * sin, x * sin + y * cos) for x, y in _outline(thing.shape)]
    middle = [(min(v) + max(v)) / 2 for v in zip(*turned, strict=True)]
    turned = [(x - middle[0], y - middle[1]) for x, y in turned]
    scale = thing.radius / max(math.hypot(x, y) for x, y in turned)
    left, top = (int(v - thing.radius) - 1 for v in thing.center)
    side = int(2 * thing.radius) + 4
    corners = [
        ((thing.center[0] + x * scale - left) * SUPERSAMPLING, (thing.center[1] + y * scale - top) * SUPERSAMPLING)
        for x, y in turned
    ]
    drawn = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    ImageDraw.Draw(drawn).polygon(corners, fill=255)
    return drawn.resize((side, side), Image.Resampling.BOX), left, top


def _known(name: str, names: Sequence[str] | dict[str, Any], what: str) -> str:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known are {', '.join(names)}")
    return name
