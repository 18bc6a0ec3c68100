"""The cells of a sweep: what each axis runs over, what its places are called, and one selection per cell.

Unusual: every intervention sweeps over the same axes with the same words, so what `patch` can sweep, `ablate` can too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_lens.analysis.interventions.where import Ground, layers_of, windows
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.sweep.edits import AXES, Edit, Places, axes_of, places
from llava_lens.sweep.rows import Row
from llava_lens.sweep.sites import names_at

SWEEPS = ("layer", "position", "patch", "group", "head", "neuron")
Sweep = str | Sequence[str]


@dataclass(frozen=True)
class Cell:
    """One cell: the hooks it is about (one per layer) and what it selects there; `index` is its place in the result."""

    index: tuple[int, ...]
    hooks: tuple[str, ...]
    pos: Places | None = None
    head: Places | None = None
    neuron: Places | None = None
    image: int = 0

    def edits(self, value: Any, how: Any = "replace") -> tuple[Edit, ...]:
        """The same edit at each of its hooks; `value` may be a function from an edit without value to its value."""
        made = []
        for hook in self.hooks:
            edit = Edit(hook, 0.0, how, self.pos, self.head, self.neuron, image=self.image)
            made.append(replace(edit, value=value(edit) if callable(value) else value))
        return tuple(made)


@dataclass(frozen=True)
class Grid:
    """All cells of a sweep, the result's axes and shape, and the names along them."""

    cells: tuple[Cell, ...]
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    labels: dict[str, tuple[int | str, ...]]

    @property
    def hooks(self) -> list[str]:
        """The hooks that the cells touch."""
        return list(dict.fromkeys(hook for cell in self.cells for hook in cell.hooks))

    def scores(self, values: Tensor, row: Row, n_pos: int, **facts: Any) -> Scores:
        """One value per cell as `Scores`; places that were not swept are NaN."""
        out = torch.full(self.shape, torch.nan, dtype=torch.float64)
        for cell, value in zip(self.cells, values, strict=True):
            out[cell.index] = value
        roles = None
        if "position" in self.axes and row.roles is not None and self.shape[self.axes.index("position")] == n_pos:
            roles = (row.roles.padded(after=n_pos - row.n_columns),)
        return Scores(out, self.axes, self.labels, roles=roles, **facts)


@dataclass(frozen=True)
class Reach:
    """What a sweep is given: hook, axes, and what restricts them."""

    hook: str
    sweep: Sweep = ("layer", "position")
    at: Any = None
    layers: Any = None
    heads: Any = None
    neurons: Any = None
    window: int = 1
    image: int = 0

    def grid(self, model: Any, row: Row, n_pos: int) -> Grid:
        """Every cell, checked. Raises `LensError` for an axis the hook lacks and for what is not there."""
        axes = (self.sweep,) if isinstance(self.sweep, str) else tuple(self.sweep)
        names = names_at(model, self.hook)
        hook_axes = axes_of(model.hook(names[0]))
        self._check(axes, names, hook_axes)
        ground = Ground(model, row, names[0], self.image)
        if ground.front:
            row.check_image(self.image, self.hook)
        layers = layers_of(self.layers, len(names))
        if self.hook in model.hook_dict and self.layers is not None:
            raise LensError(f"layers= with the one hook {self.hook!r}; leave it out")
        choices: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        sizes: dict[str, tuple[int, ...]] = {}
        labels: dict[str, tuple[int | str, ...]] = {}
        fixed: dict[str, Any] = {"hooks": tuple(names[layer] for layer in layers)}
        takes_pos = any(axis in AXES["pos"] for axis in hook_axes)
        if takes_pos and not {"position", "group", "patch"} & set(axes):
            fixed["pos"] = None if self.at is None else ground.select(self.at)
        for axis, given in (("head", self.heads), ("neuron", self.neurons)):
            if given is not None and axis not in axes:
                _, _, called = getattr(self, f"_{axis}")(model, ground, names, layers, n_pos)
                fixed[axis] = called[axis]
        for axis in axes:
            found, size, called = getattr(self, f"_{axis}")(model, ground, names, layers, n_pos)
            choices[axis], sizes[axis] = found, size
            labels |= called
        cells = []
        for combination in itertools.product(*choices.values()):
            chosen = dict(fixed)
            for _, part in combination:
                chosen |= part
            places_ = tuple(i for index, _ in combination for i in (index if isinstance(index, tuple) else (index,)))
            cells.append(Cell(places_, image=self.image, **chosen))
        kept = tuple(a for axis in axes for a in (("row", "col") if axis == "patch" else (axis,)))
        return Grid(tuple(cells), kept, tuple(n for axis in axes for n in sizes[axis]), labels)

    def _check(self, axes: tuple[str, ...], names: list[str], hook_axes: list[str]) -> None:
        for axis in axes:
            if axis not in SWEEPS:
                raise LensError(f"sweep over {axis!r}{nearest(axis, SWEEPS)}; expected {', '.join(SWEEPS)}")
        if len(set(axes)) != len(axes):
            raise LensError(f"sweep={axes}; expected each axis once")
        over = [axis for axis in axes if axis in ("position", "patch", "group")]
        if len(over) > 1:
            raise LensError(f"sweep over {' and '.join(over)}; expected one of position, patch and group")
        if "layer" in axes and self.hook in names:
            raise LensError(f"sweep over layers of the one hook {self.hook!r}; give its short name, as 'resid_pre'")
        has = {"head": any(a in AXES["head"] for a in hook_axes), "neuron": hook_axes[-1].startswith("d_")}
        has |= dict.fromkeys(("position", "patch", "group"), any(a in AXES["pos"] for a in hook_axes))
        for axis in axes:
            if not has.get(axis, True):
                raise LensError(f"sweep over {axis!r} at {self.hook!r}, whose axes are {' '.join(hook_axes)}")
        if self.window != 1 and "layer" not in axes:
            raise LensError(f"window={self.window} without a sweep over layers")

    def _layer(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        found = [
            (i, {"hooks": tuple(names[layer] for layer in window)})
            for i, window in enumerate(windows(layers, self.window, len(names)))
        ]
        return found, (len(layers),), {} if layers == list(range(len(names))) else {"layer": tuple(layers)}

    def _position(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        n = len(ground.every()) if ground.front else n_pos
        called = ground.names()
        called += tuple(range(len(called), n))
        return [(i, {"pos": (i,)}) for i in ground.select(self.at)], (n,), {"position": called}

    def _patch(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        rows, cols = ground.grid()
        patches = ground.patches()
        wanted = set(patches if self.at is None else ground.select(self.at))
        found = [(divmod(i, cols), {"pos": (at,)}) for i, at in enumerate(patches) if at in wanted]
        if not found:
            raise LensError(f"at={self.at!r} holds no patch of image {self.image}")
        return found, (rows, cols), {}

    def _group(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        groups = ground.groups(self.at)
        return [(i, {"pos": w}) for i, w in enumerate(groups.values())], (len(groups),), {"group": tuple(groups)}

    def _head(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        axis = next(a for a in axes_of(model.hook(names[0])) if a in AXES["head"])
        cfg = model.cfg.vision if ground.front else model.cfg
        n = cfg.n_key_value_heads if axis == "kv_head" else cfg.n_heads
        return self._numbered("head", self.heads, n)

    def _neuron(self, model: Any, ground: Ground, names: list[str], layers: list[int], n_pos: int) -> Any:
        axis = axes_of(model.hook(names[0]))[-1]
        n = model.axis_sizes(ground.row.inputs)[ground.prefix][axis]
        return self._numbered("neuron", self.neurons, n)

    def _numbered(self, axis: str, given: Any, n: int) -> Any:
        chosen = list(range(n)) if given is None else list(places(given, f"{axis}s") or ())
        bad = [i for i in chosen if not 0 <= i < n]
        if bad:
            raise LensError(f"{axis} {bad[0]}; expected 0 … {n - 1}")
        called = {} if given is None else {axis: tuple(chosen)}
        return [(i, {axis: (each,)}) for i, each in enumerate(chosen)], (len(chosen),), called
