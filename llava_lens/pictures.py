"""What the decoder sees of an image: its pictures, their grids of patches, and the exact way back to the pixels.

Unusual: a picture is what the tower sees at once. Most models see an image whole, so image and picture are the same;
one that cuts images into tiles has a picture for each, and the tokens of several may stand among one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped

from llava_lens.errors import LensError


@dataclass(frozen=True)
class Axis:
    """One axis of the way from a picture to its patches: pad, resize, crop, cut into `n` patches of `patch` pixels.

    `size`, `padded` and `resized` are lengths in pixels; `pad` is added in front, `crop` is cut off in front after
    the resize (negative: that many zeros were put in front).
    """

    size: int
    pad: int
    padded: int
    resized: int
    crop: int
    n: int
    patch: int

    def to_source(self, u: int | float) -> float:
        """The place in the original picture that ends up at `u` in the pixel values."""
        return (u + self.crop) * self.padded / self.resized - self.pad

    def patch_of(self, pixel: int) -> int | None:
        """The patch that the centre of an original pixel falls into."""
        unit = 2 * self.padded  # the centre, pixel + ½, in whole numbers of 1 / unit
        at = (2 * (pixel + self.pad) + 1) * self.resized - self.crop * unit
        index = at // (unit * self.patch)
        return index if 0 <= index < self.n else None

    def pixels_of(self, patch: int) -> slice:
        """The original pixels that a patch covers, wholly or in part; empty for one in the padding."""
        start = (patch * self.patch + self.crop) * self.padded - self.pad * self.resized
        stop = start + self.patch * self.padded
        first, last = start // self.resized, -(-stop // self.resized)
        return slice(min(max(first, 0), self.size), min(max(last, 0), self.size))


def side_of(given: Any) -> int | None:
    """A square's side from one number or a pair of equal ones, None for anything else.

    >>> side_of(448), side_of((14, 14)), side_of((14, 7))
    (448, 14, None)
    """
    sides = set(given) if isinstance(given, list | tuple) else {given}
    side = sides.pop() if len(sides) == 1 else None
    return side if isinstance(side, int) else None


def grown(patches: Bool[np.ndarray, "row col"], buffer: int) -> Bool[np.ndarray, "row col"]:
    """A choice of patches with `buffer` patches around each chosen one.

    >>> grown(np.eye(3, dtype=bool), 1).tolist()
    [[True, True, True], [True, True, True], [True, True, True]]
    """
    if buffer < 0:
        raise LensError(f"a buffer of {buffer} patches; expected 0 or more")
    near = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= buffer for n in patches.shape]
    return near[0] @ patches @ near[1]


@dataclass(frozen=True)
class PixelMap:
    """Where each patch of one prepared picture comes from, in pixels of the original; exact."""

    x: Axis
    y: Axis

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the original picture."""
        return self.x.size, self.y.size

    def box_of_patch(self, row: int, col: int) -> tuple[float, float, float, float]:
        """The patch's box `(x0, y0, x1, y1)` in original pixels; outside the picture where that was padded."""
        return self._box(slice(col, col + 1), slice(row, row + 1))

    def region(self) -> tuple[float, float, float, float]:
        """The box of all patches together: the part of the picture that the model sees."""
        return self._box(slice(0, self.x.n), slice(0, self.y.n))

    def _box(self, cols: slice, rows: slice) -> tuple[float, float, float, float]:
        x, y = self.x, self.y
        left, right = (x.to_source(c * x.patch) for c in (cols.start, cols.stop))
        top, bottom = (y.to_source(r * y.patch) for r in (rows.start, rows.stop))
        return left, top, right, bottom

    def patch_of_pixel(self, x: int | float, y: int | float) -> tuple[int, int] | None:
        """Row and column of the patch that shows the centre of pixel (`x`, `y`); None if that was cropped away."""
        width, height = self.size
        if not (0 <= x < width and 0 <= y < height):
            raise LensError(f"pixel ({x}, {y}) is outside the picture of {width}×{height}")
        row, col = self.y.patch_of(int(y)), self.x.patch_of(int(x))
        return None if row is None or col is None else (row, col)

    def patches_of_mask(self, mask: Shaped[np.ndarray, "height width"], buffer: int = 0) -> Bool[np.ndarray, "row col"]:
        """The patches that a mask of the original picture touches, and those within `buffer` patches around them."""
        if mask.shape != self.size[::-1] or mask.dtype != np.bool_:
            expected = f"bool of shape {self.size[::-1]} (height, width)"
            raise LensError(f"a mask of {mask.dtype} and shape {mask.shape}; expected {expected}, as the picture")
        rows = np.stack([mask[self.y.pixels_of(r)].any(0) for r in range(self.y.n)])
        touched = np.stack([rows[:, self.x.pixels_of(c)].any(1) for c in range(self.x.n)], 1)
        return grown(touched, buffer)

    def to_original(self, scores: Shaped[np.ndarray, "row col"]) -> Float[np.ndarray, "height width"]:
        """One score per patch as one per pixel of the original picture; NaN where the picture was cropped away."""
        if scores.shape != (self.y.n, self.x.n):
            raise LensError(f"scores of shape {scores.shape}; expected {(self.y.n, self.x.n)}, one per patch")
        out = np.full(self.size[::-1], np.nan)
        rows, cols = ([axis.patch_of(i) for i in range(axis.size)] for axis in (self.y, self.x))
        seen_y = np.array([r is not None for r in rows])
        seen_x = np.array([c is not None for c in cols])
        kept = np.ix_([r for r in rows if r is not None], [c for c in cols if c is not None])
        out[np.ix_(seen_y, seen_x)] = np.asarray(scores, np.float64)[kept]
        return out


@dataclass(frozen=True)
class Picture:
    """One picture of a prompt: its grid of patches, a class token in front or not, and the way back to its pixels.

    `grid` counts the patches that have a token, `offset` the rows and columns of the tower's grid before them (those
    that show only padding may have none). `ranks` says which of the row's image positions are its own, in reading
    order; None: those that follow the picture before it.
    """

    grid: tuple[int, int]
    class_token: bool = False
    map: PixelMap | None = None
    offset: tuple[int, int] = (0, 0)
    ranks: tuple[int, ...] | None = None
    mixed: bool = False

    @property
    def n_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + self.class_token

    def patches(self, columns: int) -> list[int]:
        """Which patches of the tower's grid, of so many columns, have a token; raises `LensError` for a `mixed` one.

        >>> Picture((1, 2), offset=(1, 0)).patches(3)
        [3, 4]
        """
        self._refuse_mixed()
        (rows, cols), (top, left) = self.grid, self.offset
        return [(top + row) * columns + left + col for row in range(rows) for col in range(cols)]

    def _refuse_mixed(self) -> None:
        if self.mixed:
            raise LensError(
                f"the {self.n_tokens} tokens of this tile are interpolated between its patches, so that no patch has a "
                "token of its own; expected a picture whose tokens show a patch each: the whole view, image=0"
            )

    def features(self, columns: int) -> list[int]:
        """Which of the tower's features its tokens show; everything else as in `patches`."""
        patches = self.patches(columns)
        return [0, *(1 + patch for patch in patches)] if self.class_token else patches

    def box(self, row: int, col: int, side: int) -> tuple[slice, slice]:
        """The rows and columns of the pixel values that a patch of `side` pixels covers; raises as `patches` does."""
        self._refuse_mixed()
        top, left = (self.offset[0] + row) * side, (self.offset[1] + col) * side
        return slice(top, top + side), slice(left, left + side)


@dataclass(frozen=True)
class Layout:
    """How one image stands in the prompt: its image tokens and the pictures that they show.

    Pictures' `ranks` count from the image's first token; tokens of no picture (ends of lines) belong to the image.
    """

    n_tokens: int
    pictures: tuple[Picture, ...]

    @property
    def is_plain(self) -> bool:
        """Whether its pictures' tokens follow one another and there are no others."""
        return all(p.ranks is None for p in self.pictures) and self.n_tokens == sum(p.n_tokens for p in self.pictures)

    def ranked(self) -> Iterator[Picture]:
        """Its pictures, each with its ranks."""
        start = 0
        for picture in self.pictures:
            ranks = tuple(range(start, start + picture.n_tokens)) if picture.ranks is None else picture.ranks
            start += picture.n_tokens
            yield replace(picture, ranks=ranks)


def in_a_row(layouts: Iterable[Layout]) -> tuple[Picture, ...]:
    """The pictures of a row's images, with their ranks among all image positions of the row."""
    layouts = list(layouts)
    if all(layout.is_plain for layout in layouts):
        return tuple(picture for layout in layouts for picture in layout.pictures)
    found, start = [], 0
    for layout in layouts:
        found += [replace(p, ranks=tuple(start + rank for rank in p.ranks or ())) for p in layout.ranked()]
        start += layout.n_tokens
    return tuple(found)
