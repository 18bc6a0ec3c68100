"""Many rendered scenes at once: pixels as the shipped processor gives them, and what each patch shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from llava_lens.tiny.layout import IMAGE_SIZE, PATCH
from llava_lens.tiny.questions import Said
from llava_lens.tiny.scenes import CANVAS, Scene, render_scene
from llava_lens.tiny.vocabulary import COLORS, PLACES, SHAPES

GRID = IMAGE_SIZE // PATCH
MEAN, STD = 0.5, 0.25
SHOWN = 0.12  # of a patch must be covered for it to show an object
_PLACES = [place for row in PLACES for place in row]


class Pictures(NamedTuple):
    """Scenes ready for training; `shown[scene, patch]` is (shape, colour, place, centre is here), -1 for the ground."""

    pixels: UInt8[np.ndarray, "scene y x rgb"]
    shown: Int[np.ndarray, "scene patch 4"]
    offset: Float[np.ndarray, "scene patch 2"]
    facts: tuple[tuple[Said, ...], ...]


def normalised(pictures: Pictures, rows: Sequence[int]) -> Float[torch.Tensor, "batch rgb y x"]:
    """The pixels of those scenes, scaled as the processor scales them."""
    chosen = torch.from_numpy(pictures.pixels[list(rows)]).float()
    return rearrange((chosen / 255 - MEAN) / STD, "batch y x rgb -> batch rgb y x")


def small(picture: Image.Image) -> UInt8[np.ndarray, "y x rgb"]:
    """The picture at the tower's size, resized as the processor resizes it."""
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def patches_of(scene: Scene, i: int) -> Float[np.ndarray, "patch"]:
    """The share of each patch that object `i` covers, patches row by row."""
    side = CANVAS // GRID
    return scene.objects[i].coverage.reshape(GRID, side, GRID, side).mean((1, 3)).reshape(-1)


def shown_by_patches(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """For each patch the object that covers most of it: its attributes, and its centre seen from there, in patches."""
    covers = np.stack([patches_of(scene, i) for i in range(len(scene.objects))])
    owner = np.where(covers.max(0) >= SHOWN, covers.argmax(0), -1)
    shown = np.full((GRID * GRID, 4), -1, np.int8)
    offset = np.zeros((GRID * GRID, 2), np.float32)
    rows, columns = np.divmod(np.arange(GRID * GRID), GRID)
    for i, thing in enumerate(scene.objects):
        own = owner == i
        x, y = (v / CANVAS * GRID for v in thing.center)
        shown[own, :3] = SHAPES.index(thing.shape), list(COLORS).index(thing.color), _PLACES.index(thing.where)
        shown[own, 3] = 0
        shown[int(y) * GRID + int(x), 3] = 1
        offset[own] = np.stack([x - 0.5 - columns[own], y - 0.5 - rows[own]], -1)
    return shown, offset


def training_pictures(n: int, kept: Path) -> Pictures:
    """The scenes of the seeds from 0 to `n`; drawn once, then read from the file `kept`."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        drawn = render_pictures(range(n))
        save_file({name: getattr(drawn, name) for name in ("pixels", "shown", "offset")}, kept)
        return drawn
    arrays = load_file(kept)
    if len(arrays["pixels"]) != n:
        raise ValueError(f"{kept} holds {len(arrays['pixels'])} pictures, wanted are {n}; remove it to draw them anew")
    return Pictures(**arrays, facts=tuple(said(render_scene(seed)) for seed in range(n)))


def said(scene: Scene) -> tuple[Said, ...]:
    """The facts of a scene without its drawing."""
    return tuple(Said(thing.shape, thing.color, thing.where) for thing in scene.objects)


def render_pictures(seeds: Sequence[int]) -> Pictures:
    """Renders the scenes of those seeds."""
    pixels = np.empty((len(seeds), IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    shown = np.empty((len(seeds), GRID * GRID, 4), np.int8)
    offset = np.empty((len(seeds), GRID * GRID, 2), np.float32)
    facts = []
    for k, seed in enumerate(tqdm(seeds, desc="rendering", unit="scene", leave=False)):
        scene = render_scene(seed)
        pixels[k] = small(scene.image)
        shown[k], offset[k] = shown_by_patches(scene)
        facts.append(said(scene))
    return Pictures(pixels, shown, offset, tuple(facts))
