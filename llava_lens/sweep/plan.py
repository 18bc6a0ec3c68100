"""Which cells run together: those whose first change is at about the same position, as many as memory holds.

Unusual: the plan depends on the cells alone, so an interrupted sweep that goes on gives the same bits as one that was
not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import FRONT, SCORES, Edit, axes_of
from llava_lens.sweep.sites import site_of

Cell = tuple[Edit, ...]
FEW_ROWS = 24
"""A matrix product with fewer rows takes about as long; small models pay for calling the operations, too."""


@dataclass(frozen=True)
class Planned:
    """A cell with its number, the stage and the place of its first change; `front` cells change the embedding."""

    number: int
    edits: Cell
    stage: int
    first: int
    front: bool


def located(base: Base, number: int, edits: Cell) -> Planned:
    """Where a cell starts. Raises `LensError` for a hook, a position, a head … that is not there."""
    if not edits:
        raise LensError(f"cell {number} has no edit")
    wrong = next((type(edit).__name__ for edit in edits if not isinstance(edit, Edit)), None)
    if wrong is not None:
        raise LensError(f"cell {number} holds a {wrong}; expected edits: each cell is a tuple of Edits")
    stage, first, front = 2 * base.model.cfg.n_layers, len(base.row.columns) - 1, False
    slots = base.row.slots(base.model)
    for edit in edits:
        check(base, edit)
        site = site_of(base.model, edit.hook)
        if site.room in ("tower", "projector"):
            first, front = min([first, *(base.row.rows.place[slot] for slot in slots[edit.image][:1])]), True
        else:
            at = 0 if edit.pos is None else min(base.row.rows.place[column] for column in edit.pos)
            first, front = min(first, at), front or site.room == "embed"
        stage = min(stage, site.stage if site.room == "decoder" else 0)
    if not base.is_causal:
        first = 0  # what comes before a change sees it too
    return Planned(number, edits, 0 if front else stage, first, front)


def check(base: Base, edit: Edit) -> None:
    """Raise `LensError` where an edit selects what is not there."""
    model, row = base.model, base.row
    axes = axes_of(model.hook(edit.hook))
    _check_value(edit)
    for name, where in edit.selection.items():
        edit.axis_of(name, axes)
        if name in ("pos", "key") and not edit.hook.startswith(FRONT):
            for column in where:
                row.place_of(column)
            if min(where) < 0:
                raise LensError(f"{name} {min(where)} at {edit.hook!r}; count from 0 on")
            continue
        size = _size(base, edit, axes[edit.axis_of(name, axes)])
        if size is not None and not 0 <= min(where) <= max(where) < size:
            bad = next(w for w in where if not 0 <= w < size)
            raise LensError(f"{name} {bad} at {edit.hook!r}; expected 0 … {size - 1}")
    if edit.hook.startswith(FRONT):
        row.check_image(edit.image, edit.hook)


def _check_value(edit: Edit) -> None:
    value = edit.value
    if callable(value) or edit.blocks:
        return
    if not isinstance(value, Tensor | int | float):
        raise LensError(
            f"a value of type {type(value).__name__} at {edit.hook!r}; expected a tensor, number or function"
        )
    finite = torch.isfinite(value).all() if isinstance(value, Tensor) else math.isfinite(value)
    if not bool(finite) and not edit.hook.endswith(SCORES):
        raise LensError(f"a value at {edit.hook!r} that is not finite; expected numbers")


def _size(base: Base, edit: Edit, axis: str) -> int | None:
    cfg = base.model.cfg.seeing(base.row.inputs.pixels)
    if edit.hook.startswith(FRONT):
        patches = {"patch": cfg.vision.n_patches, "pos": cfg.vision.n_ctx, "query": cfg.vision.n_ctx}
        merged = edit.hook.startswith("projector.")
        patches |= {"key": cfg.vision.n_ctx, "feature": cfg.vision.n_merged if merged else cfg.vision.n_features}
        if axis in patches:
            return patches[axis]
        cfg = cfg.vision if edit.hook.startswith("vision.") else cfg
    sizes = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "d_head": cfg.d_head, "d_mlp": cfg.d_mlp}
    return (sizes | {"d_model": cfg.d_model, "1": 1, "d_vocab": base.model.cfg.d_vocab}).get(axis)


@dataclass(frozen=True)
class Wave:
    """Cells that run in one batch, in the order of their stages, from place `first` on."""

    first: int
    cells: tuple[Planned, ...]


def waves(base: Base, cells: Sequence[Planned], n_read: int, max_bytes: int) -> Iterator[Wave]:
    """All cells in batches, those that change most rows first."""
    n_layers, n = base.model.cfg.n_layers, len(base.row.columns)
    ordered = sorted(cells, key=lambda c: (c.first, c.stage, not c.front, c.number))
    for together in _merged(ordered, n_layers, base.model.cfg.d_model):
        first = together[0].first
        most = max(1, max_bytes // cell_bytes(base, n - first, n_read, together))
        by_stage = sorted(together, key=lambda c: (c.stage, not c.front, c.number))
        n_parts = -(-len(by_stage) // most)
        size = -(-len(by_stage) // n_parts)
        for start in range(0, len(by_stage), size):
            yield Wave(first, tuple(by_stage[start : start + size]))


def _merged(ordered: Sequence[Planned], n_layers: int, d_model: int) -> list[list[Planned]]:
    """Neighbouring first places in one wave where the extra rows cost less than another wave would."""
    worth = max(FEW_ROWS, 2**19 // d_model**2) * n_layers
    groups: list[list[Planned]] = []
    for first, same in groupby(ordered, key=lambda c: c.first):
        cells = list(same)
        layers = sum(n_layers - cell.stage / 2 for cell in cells)
        if groups and layers * (first - groups[-1][0].first) <= worth:
            groups[-1] += cells
        else:
            groups.append(cells)
    return groups


def cell_bytes(base: Base, rows: int, n_read: int, cells: Sequence[Planned]) -> int:
    """About what one cell holds at most while it runs."""
    cfg, item = base.model.cfg, base.model.cfg.dtype.itemsize
    n = len(base.row.columns)
    hidden = rows * (6 * cfg.d_model + 4 * cfg.d_mlp + 4 * cfg.n_heads * cfg.d_head)
    seen = 3 * n * cfg.n_key_value_heads * cfg.d_head + 4 * cfg.n_heads * rows * n
    logits = 4 * n_read * cfg.d_vocab
    total = hidden + seen + logits
    if any(cell.front for cell in cells) and cfg.vision is not None and base.row.n_images:
        v = cfg.vision
        total += v.n_ctx * (8 * v.d_model + 4 * v.d_mlp + 4 * v.n_heads * v.n_ctx) + n * cfg.d_model
    return total * item
