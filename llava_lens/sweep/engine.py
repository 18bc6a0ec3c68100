"""Runs many interventions on one row and returns the metric of each, exactly, by running only what each can change.

Unusual: every sweep also runs edits that change nothing, through the same path as the others. What they miss is the
sweep's noise floor: an effect below it is none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from llava_lens.cache_file import passport
from llava_lens.errors import LensError
from llava_lens.sweep.base import Base
from llava_lens.sweep.climb import DecoderClimb, Member
from llava_lens.sweep.edits import Edit
from llava_lens.sweep.front import embedded
from llava_lens.sweep.journal import Journal, digest, source_of, weights_of
from llava_lens.sweep.metrics import Bound, Metric
from llava_lens.sweep.plan import Cell, Planned, Wave, located, waves
from llava_lens.sweep.setting import FullBase, Setting
from llava_lens.sweep.sites import entered, rank_of, site_of, why_watched

MAX_BYTES = 2**30
"""What the runs of one batch may hold together, unless told otherwise."""
N_FLOORS = 3
"""How many edits that change nothing are run."""


@dataclass(frozen=True)
class Outcome:
    """The metric of every cell `[cell]`, and how it came about.

    `baseline` is the metric of the run without edits, `floor` the most that an edit without effect moved it. Of the
    cells, `ran` were run; in the others the edit changes no bit, so theirs is the baseline. `path` says which way.
    """

    values: Float[Tensor, " cell"]
    baseline: float
    floor: float
    ran: int
    path: str

    def facts(self) -> dict[str, Any]:
        """For a result's `method`."""
        return {"noise_floor": self.floor, "cells": len(self.values), "ran": self.ran, "path": self.path}


def run_cells(
    setting: Setting,
    cells: Sequence[Cell],
    on: str = "corrupt",
    *,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
    file: str | os.PathLike[str] | None = None,
    what: str = "sweep",
) -> Outcome:
    """The metric of each cell, edits made together in one run of the setting's `"clean"` or `"corrupt"` base.

    With `file` an interrupted sweep goes on where it was, to the same numbers. `max_bytes` bounds what a batch holds.
    Raises `LensError` for no cells, for an edit at what is not there, and for a file of another sweep.
    """
    if on not in ("clean", "corrupt"):
        raise LensError(f"on={on!r}; expected 'clean' or 'corrupt'")
    if not len(cells):
        raise LensError("an empty sweep: there is no cell to run")
    base = setting.clean if on == "clean" else setting.corrupt
    baseline = setting.clean_value if on == "clean" else setting.corrupt_value
    baseline = _spanned(setting.bound, baseline)
    bare = next((i for i, edits in enumerate(cells) if isinstance(edits, Edit)), None)
    if bare is not None:
        raise LensError(f"cell {bare} is an Edit; expected a tuple of them: (edit,)")
    if not isinstance(base, FullBase):
        base.require(entered(base.model, (edit.hook for edits in cells for edit in edits)))
    planned = [located(base, i, tuple(edits)) for i, edits in enumerate(cells)]
    live = [cell for cell in planned if not all(base.is_noop(edit) for edit in cell.edits)]
    why = setting.why
    shortened = base.edits and not isinstance(base, FullBase)
    if shortened and any(in_front(base, edit) for cell in live for edit in cell.edits):
        base, why = FullBase(base.model, base.row, (), base.edits), "a cell changes what a lasting edit comes after"
    n, idle = len(cells), without_effect(live, len(cells))
    journal = Journal(file, n + len(idle), "" if file is None else sweep_key(setting, cells, on))
    journal.values[sorted(set(range(n)) - {cell.number for cell in live})] = baseline
    runner = _full if isinstance(base, FullBase) else _short
    bar = tqdm(total=len(live), desc=what, unit="run", disable=not progress, delay=1.0, leave=False)
    with torch.inference_mode(), bar:
        try:
            runner(base, setting.bound, [*live, *idle], journal, max_bytes, bar)
        finally:
            journal.save()
    floor = float((journal.values[n:] - baseline).abs().max()) if idle else 0.0
    path = "shortened runs" if why is None else f"full forward passes ({why})"
    return Outcome(journal.values[:n], baseline, floor, len(live), path)


def in_front(base: Base, edit: Edit) -> bool:
    """Whether an edit comes before a lasting one, which would have to be made again behind it."""
    model = base.model
    own = rank_of(model, edit.hook)
    lasting = [(rank_of(model, other.hook), other.hook) for other in base.edits]
    return any(own < rank or (own == rank and edit.hook != name) for rank, name in lasting)


def _spanned(bound: Bound, value: float) -> float:
    """A metric's value in the units of the result."""
    if bound.span is None:
        return value
    corrupt, clean = bound.span
    return (value - corrupt) / (clean - corrupt)


def _short(base: Base, bound: Bound, live: Sequence[Planned], journal: Journal, max_bytes: int, bar: Any) -> None:
    places = bound.places(len(base.row.columns))
    for wave in waves(base, live, len(places), max_bytes):
        numbers = [cell.number for cell in wave.cells]
        if not bool(journal.done[numbers].all()):
            journal.put(numbers, bound(wave_logits(base, wave, places)))
        bar.update(len(numbers))


def wave_logits(base: Base, wave: Wave, places: Sequence[int]) -> Float[Tensor, "cell read d_vocab"]:
    """Logits of the places that are read, in every cell of a wave."""
    cells = wave.cells
    climb = DecoderClimb(base, [Member(cell.stage, decoder_edits(base, cell)) for cell in cells], wave.first, places)
    front = [cell for cell in cells if cell.front]
    x = embedded(base, [cell.edits for cell in front], wave.first) if front else None
    changed = climb.logits(climb.go(x))
    before = [place for place in places if place < wave.first]
    if not before:
        return changed
    return torch.cat((base.logits(before).expand(len(cells), -1, -1), changed), 1)


def decoder_edits(base: Base, cell: Planned) -> tuple[Edit, ...]:
    """The edits that are made on the way through the decoder."""
    return tuple(edit for edit in cell.edits if site_of(base.model, edit.hook).room == "decoder")


def _full(base: Base, bound: Bound, live: Sequence[Planned], journal: Journal, max_bytes: int, bar: Any) -> None:
    assert isinstance(base, FullBase)
    places = bound.places(len(base.row.columns))
    for cell in live:
        if not bool(journal.done[cell.number]):
            journal.put([cell.number], bound(base.run(cell.edits, places)[None]))
        bar.update(1)


def without_effect(live: Sequence[Planned], number: int) -> list[Planned]:
    """Some of the cells with edits that change nothing, numbered from `number` on, to be run among the others."""
    ordered = sorted(live, key=lambda cell: (cell.first, cell.stage))
    step = max(1, (len(ordered) - 1) // max(1, N_FLOORS - 1))
    return [
        replace(cell, number=number + i, edits=tuple(replace(edit, value=0.0, how="add") for edit in cell.edits))
        for i, cell in enumerate(ordered[::step][:N_FLOORS])
    ]


def sweep_key(setting: Setting, cells: Sequence[Cell], on: str) -> str:
    """What names a sweep: the model, both inputs, every edit and the metric."""
    bound, metric = setting.bound, setting.bound.metric
    measured = repr(metric) if isinstance(metric, Metric) else source_of(metric)
    rows = (setting.clean.row, setting.corrupt.row)
    inputs = [[row.inputs.tokens, row.inputs.pixels, row.columns, *row.inputs.extras.values()] for row in rows]
    lasting = [_facts(edit) for base in (setting.clean, setting.corrupt) for edit in base.edits]
    made = [[_facts(edit) for edit in edits] for edits in cells]
    whose = [sorted(passport(setting.model).items()), weights_of(setting.model)]
    held = setting.clean.fwd_hooks if isinstance(setting.clean, FullBase) else []
    hooks = [[name if isinstance(name, str) else source_of(name), source_of(fn)] for name, fn in held]
    if setting.why is not None and not held and why_watched(setting.model) is not None:
        raise LensError(f"file= cannot tell what the model holds: {setting.why}; pass hooks as fwd_hooks= instead")
    return digest(
        whose, str(setting.model.cfg.dtype), inputs, lasting, made, measured, bound.ids, on, setting.why, hooks
    )


def _facts(edit: Edit) -> list[Any]:
    value = source_of(edit.value) if callable(edit.value) and not isinstance(edit.value, Tensor) else edit.value
    return [edit.hook, edit.how, edit.pos, edit.head, edit.neuron, edit.key, edit.image, value]
