"""Which positions are meant: a role, a word, an object's patches, numbers; and groups of them with names.

Unusual: the same words select in the decoder, in the projector and in the tower, where only pictures have positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from llava_lens.errors import LensError, nearest
from llava_lens.pictures import grown
from llava_lens.roles import SELECTORS, Roles
from llava_lens.sweep.edits import FRONT, Places, places
from llava_lens.sweep.rows import Row

GROUPS = ("system", "image", "question", "answer", "template", "text", "last")
"""The groups of a sweep over groups that names none: those that the prompt has, `last` taken out of the others."""


@dataclass(frozen=True)
class Patches:
    """The patches of one picture that a boolean mask touches, grown by `buffer` patches.

    `mask` is `[height, width]` of the original picture, or `[row, col]` of its patches. With `outside`, the others.
    """

    mask: Any
    buffer: int = 0
    image: int = 0
    outside: bool = False

    def numbers(self, roles: Roles) -> list[int]:
        """Their numbers in reading order; raises `LensError` for a mask of another shape, or that touches none."""
        mask = self.mask.numpy() if isinstance(self.mask, Tensor) else np.asarray(self.mask)
        grid = roles.grid(self.image)
        if mask.dtype != np.bool_:
            raise LensError(f"a mask of {mask.dtype}; expected booleans")
        if mask.shape == grid:
            chosen = grown(mask, self.buffer)
        else:
            chosen = roles.patches_of_mask(mask, self.image, self.buffer).numpy()
        chosen = ~chosen if self.outside else chosen
        if not chosen.any():
            raise LensError(f"a mask that touches none of the {grid[0]} × {grid[1]} patches")
        return np.flatnonzero(chosen).tolist()


@dataclass(frozen=True)
class Ground:
    """What positions mean at one hook: the decoder's of a row, or one picture's in tower or projector."""

    model: Any
    row: Row
    hook: str = ""
    image: int = 0

    @property
    def front(self) -> bool:
        """Whether positions are a picture's own."""
        return self.hook.startswith(FRONT)

    @property
    def prefix(self) -> str:
        """The room's prefix in hook names, empty for the decoder."""
        return next((prefix for prefix in FRONT if self.hook.startswith(prefix)), "")

    @property
    def roles(self) -> Roles:
        if self.row.roles is None:
            raise LensError("these inputs carry no roles; make them with model.prepare or Inputs.from_tokens")
        return self.row.roles

    @property
    def vision(self) -> Any:
        """The tower as it sees the row's pictures."""
        return self.model.cfg.seeing(self.row.inputs.pixels).vision

    @property
    def class_token(self) -> int:
        """Positions in front of the patches: the tower's class token, the projector's where it is kept."""
        if not self.hook:
            return 0
        axes = self.model.hook(self.hook).axes.split()
        vision = self.vision
        if vision is None or "patch" in axes:
            return 0
        return int(vision.keep_class_token if "feature" in axes else vision.class_token)

    def every(self) -> Places:
        """All positions, padding left out."""
        if not self.front:
            return self.row.columns
        rows, cols = self.grid()
        return tuple(range(rows * cols + self.class_token))

    def patches(self, image: int | None = None) -> list[int]:
        """The position of every patch of a picture, in reading order."""
        if self.front:
            return list(self.every()[self.class_token :])
        return self.roles.patch_positions(self.image if image is None else image).flatten().tolist()

    def select(self, given: Any) -> Places:
        """The positions that are meant, ascending. Raises `LensError` for a role or a word that the prompt lacks."""
        if given is None:
            return self.every()
        if isinstance(given, Patches):
            if self.front and given.image != self.image:
                raise LensError(f"patches of image {given.image} at {self.hook!r}, swept in image {self.image}")
            patches, numbers, vision = self.patches(given.image), given.numbers(self.roles), self.vision
            if self.front:
                shown = self.roles.picture(given.image).patches(vision.token_grid[1])
                numbers = [shown[i] for i in numbers]
            if self.prefix == "vision.":
                numbers = sorted(patch for number in numbers for patch in vision.patches_of(number))
            return tuple(patches[i] for i in numbers)
        if isinstance(given, str):
            return self._named(given)
        if isinstance(given, Tensor | np.ndarray) and str(given.dtype) in ("bool", "torch.bool"):
            return self.select(Patches(given, image=self.image))
        if isinstance(given, list | tuple) and any(not isinstance(each, int) for each in given):
            return tuple(sorted({column for each in given for column in self.select(each)}))
        found = places(given.tolist() if isinstance(given, np.ndarray) else given)
        assert found is not None
        return tuple(self._here(column) for column in found)

    def _here(self, column: int) -> int:
        if not self.front:
            return self.row.columns[self.row.place_of(column)]
        n = len(self.every())
        if not -n <= column < n:
            raise LensError(f"position {column} at {self.hook!r}; expected 0 … {n - 1}")
        return column % n

    def _named(self, name: str) -> Places:
        if self.front:
            known = {"image": self.patches(), "class": list(range(self.class_token)), "all": list(self.every())}
            if not known.get(name):
                raise LensError(f"{name!r} at {self.hook!r}; expected 'image', 'class' or 'all': text is not there")
            return tuple(known[name])
        if name == "last":
            return (self.row.last,)
        if name in SELECTORS:
            found = self.roles.positions(name).tolist()
            if not found:
                there = [role for role in GROUPS if role == "last" or len(self.roles.positions(role))]
                raise LensError(f"the prompt has no {name!r}; it has {', '.join(there)}")
            return tuple(found)
        if not self.roles.spans:
            raise LensError(f"unknown role {name!r}{nearest(name, SELECTORS)}; known: {', '.join(SELECTORS)}, last")
        try:
            return tuple(self.roles.positions_of(name).tolist())
        except LensError as error:
            raise LensError(f"{name!r} is no role ({', '.join(SELECTORS)}, last), and {error}") from None

    def groups(self, given: Any = None) -> dict[str, Places]:
        """Named groups of positions: from a mapping, a sequence of roles and words, or the prompt's own roles."""
        if given is None and self.front:
            return {name: where for name in ("class", "image") if (where := self._or_none(name))}
        if given is None:
            last = {self.row.last}
            found = {name: tuple(p for p in self._or_none(name) if p not in last) for name in GROUPS[:-2]}
            return {name: where for name, where in found.items() if where} | {"last": (self.row.last,)}
        if isinstance(given, Mapping):
            return {str(name): self.select(each) for name, each in given.items()}
        if isinstance(given, str):
            return {given: self.select(given)}
        if isinstance(given, Sequence) and all(isinstance(each, str) for each in given):
            return {name: self.select(name) for name in given}
        raise LensError("groups need names: a mapping from names to positions, or a list of roles and words")

    def _or_none(self, name: str) -> Places:
        try:
            return self._named(name)
        except LensError:
            return ()

    def names(self) -> tuple[int | str, ...]:
        """What each position is called."""
        if self.front:
            rows, cols = self.grid()
            class_token = ("class token",) * self.class_token
            return (*class_token, *(f"patch {divmod(i, cols)}" for i in range(rows * cols)))
        from llava_lens.analysis.attribution.query import names_of

        return names_of(self.row.roles) if self.row.roles is not None else tuple(range(self.row.n_columns))

    def grid(self) -> tuple[int, int]:
        """Rows and columns of the picture's patches; in the projector of what a token may show, in the decoder does."""
        vision = self.vision
        if vision is None or not self.row.n_images:
            raise LensError("a sweep over patches needs a picture; the prompt has none")
        if not self.front:
            return self.roles.grid(self.image)
        return vision.grid if self.prefix == "vision." else vision.token_grid


def layers_of(given: Any, n: int) -> list[int]:
    """Layers from a number, a range or a list, negative ones from the end; all for None. Raises `LensError`."""
    if given is None:
        return list(range(n))
    found = places(given, "layers")
    assert found is not None
    bad = [layer for layer in found if not -n <= layer < n]
    if bad:
        raise LensError(f"layer {bad[0]}; expected 0 … {n - 1}")
    chosen = [layer % n for layer in found]
    if len(set(chosen)) < len(chosen):
        raise LensError(f"layers {list(found)} name one twice; expected each once")
    return chosen


def windows(layers: Sequence[int], width: int, n: int) -> list[list[int]]:
    """`width` neighbouring layers of `n` around each of some layers, cut off at both ends.

    >>> windows(range(4), 3, 4), windows([1], 2, 4)
    ([[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]], [[1, 2]])
    """
    if not isinstance(width, int) or width < 1:
        raise LensError(f"a window of {width} layers; expected a whole number, 1 or more")
    before = (width - 1) // 2
    return [[other for other in range(n) if -before <= other - layer <= width - 1 - before] for layer in layers]
