"""What all interventions have in common: inputs that are checked, a row at a time, and options with one meaning.

Unusual: a study is written for one row; `each_row` turns it into one for a batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from llava_lens.analysis.interventions.grid import Grid
from llava_lens.analysis.scores import Scores, stacked
from llava_lens.errors import LensError, nearest
from llava_lens.inputs import Inputs
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import AXES, FRONT, SCORES, Edit, axes_of
from llava_lens.sweep.engine import MAX_BYTES, Outcome, run_cells
from llava_lens.sweep.journal import digest
from llava_lens.sweep.metrics import Metric, metric_of
from llava_lens.sweep.rows import Row
from llava_lens.sweep.setting import FullBase, Hooks, Setting, settle

Direction = Literal["denoise", "noise"]
"""Clean activations into the corrupt run, or corrupt ones into the clean run."""


class Running(TypedDict, total=False):
    """Options of every study.

    `row` picks one row of a batch (all). `fwd_hooks` are yours, `(name, fn)` as in TransformerLens, held in every run,
    which then is a full forward pass; `full` asks for full passes without them. `max_bytes` bounds what one batch of
    runs holds (1 GiB), `progress=False` hides the bar, `file` is where an interrupted sweep goes on (a safetensors
    file; of a batch, one per row, numbered).
    """

    row: int | None
    fwd_hooks: Hooks
    full: bool
    max_bytes: int
    progress: bool
    file: str | os.PathLike[str] | None


@dataclass(frozen=True)
class Turn:
    """One row's turn in a study: row `i` of `n`, in a batch of `n_pos` positions."""

    model: Any
    i: int
    n: int
    n_pos: int
    metric: Any
    how: Running
    before: list[Base] = field(default_factory=list)

    def row(self, inputs: Inputs) -> Row:
        """This row of a batch."""
        return Row.of(self.model, inputs, self.i)

    def settle(
        self, clean: Row, corrupt: Row | None = None, names: Sequence[str] = (), corruption: Sequence[Edit] = ()
    ) -> Setting:
        """The runs that cells are made on, with `names` recorded, and the metric, as in `llava_lens.sweep.settle`.

        A row that begins like the one before it, with the same picture, starts from its run.
        """
        hooks, full = self.how.get("fwd_hooks", ()), self.how.get("full", False)
        like = self.before.pop() if self.before else None
        setting = settle(self.model, clean, corrupt, self.metric, names, corruption, hooks, full, like)
        if not isinstance(setting.clean, FullBase):
            self.before.append(setting.clean)
        if like is not None and like is not setting.clean:
            like.like = None  # a run keeps the one it began with, but not all before that
        return setting

    def run(
        self,
        setting: Setting,
        cells: Sequence[tuple[Edit, ...]],
        on: str = "clean",
        what: str = "sweep",
        part: str = "",
    ) -> Outcome:
        """The metric of each cell; `part` tells several sweeps of one study apart in its file."""
        file = self.how.get("file")
        if file is not None:
            path = Path(file)
            number = f".{self.i}" if self.n > 1 and self.how.get("row") is None else ""
            file = path.with_name(f"{path.stem}{number}{part and '.' + part}{path.suffix}")
        budget, progress = self.how.get("max_bytes", MAX_BYTES), self.how.get("progress", True)
        return run_cells(setting, cells, on, max_bytes=budget, progress=progress, file=file, what=what)

    def generator(self, seed: int, repeat: int) -> torch.Generator:
        """Random numbers of one repeat of this row: others for every row, repeat and seed."""
        return torch.Generator().manual_seed(int(digest(seed, self.i, repeat), 16))

    def measure(
        self,
        setting: Setting,
        grid: Grid,
        cells: Sequence[tuple[Edit, ...]],
        on: str = "clean",
        part: str = "",
        **facts: Any,
    ) -> Scores:
        """The cells of a grid run, as labelled scores that say how they came about."""
        outcome = self.run(setting, cells, on, str(facts.get("score", "sweep")), part)
        method = {**facts, **facts_of(setting), "baseline": outcome.baseline, **outcome.facts()}
        return grid.scores(outcome.values, setting.clean.row, self.n_pos, unit=setting.bound.unit, method=method)


def each_row(
    model: Any, inputs: Inputs, metric: Any, how: Mapping[str, Any], study: Callable[[Turn], Scores]
) -> Scores:
    """A study of every row of a batch as one result with an axis `batch`, or of one row.

    Raises `LensError` for an option that does not exist and a row that is not there.
    """
    known = list(Running.__annotations__)
    unknown = next((name for name in how if name not in known), None)
    if unknown is not None:
        raise LensError(f"unknown option {unknown!r}{nearest(unknown, known)}; known: {', '.join(known)}")
    n, row, kind = inputs.batch_size, how.get("row"), metric_of(metric)
    rows = range(n) if row is None else [row_of(inputs, row)]
    budget = how.get("max_bytes", MAX_BYTES)
    if not isinstance(budget, int) or budget < 1:
        raise LensError(f"max_bytes={budget!r}; expected a whole number of bytes, 1 or more")

    before: list[Base] = []

    def turn(i: int) -> Turn:
        mine = kind.of_row(i, n) if isinstance(kind, Metric) else kind
        return Turn(model, i, n, inputs.n_pos, mine, how, before)  # type: ignore[arg-type]

    each = [study(turn(i)) for i in rows]
    return each[0] if len(each) == 1 else stacked(each)


def row_of(inputs: Inputs, row: Any) -> int:
    """A row's number, negative ones counted from the end; raises `LensError` for one that is not there."""
    n = inputs.batch_size
    if not isinstance(row, int) or not -n <= row < n:
        raise LensError(f"row {row!r}; expected {-n} … {n - 1}")
    return row % n


def over_repeats(draws: Sequence[Scores]) -> Scores:
    """The mean of several draws of one study, with its interval, and what they have to say together."""
    first, said = draws[0], [draw.method for draw in draws]
    mean = replace(stacked(draws), axes=("repeat", *first.axes), roles=first.roles).mean("repeat")
    method = {**first.method, "repeats": len(draws)}
    if "corrupt" in first.method:
        each = [facts["corrupt"] for facts in said]
        method |= {"corrupt": sum(each) / len(each), "corrupt_each": each}
    method["baseline"] = sum(facts["baseline"] for facts in said) / len(said)
    method["noise_floor"] = max(facts["noise_floor"] for facts in said)
    method |= {name: sum(facts[name] for facts in said) for name in ("cells", "ran")}
    return replace(mean, method=method)


def facts_of(setting: Setting) -> dict[str, Any]:
    """What a result says of its metric, the answer in words where there are some."""
    facts: dict[str, Any] = {"metric": setting.bound.name}
    ids, model = setting.bound.ids, setting.model
    if ids and model.processor is None:
        facts["answer"] = ids[0] if len(ids) == 1 else list(ids)
    elif ids:
        facts["answer"] = model.tokenizer.decode(ids) if len(ids) > 1 else model.token_string(ids[0])
    facts["clean"] = setting.clean_value
    return facts | ({"corrupt": setting.corrupt_value} if setting.corrupt is not setting.clean else {})


def taken(source: Any, edit: Edit) -> Tensor:
    """What another run holds in the place of an edit; along an axis that it takes whole, padding in front too."""
    row, axes = source.row, axes_of(source.model.hook(edit.hook))
    rows = None if edit.hook.startswith(FRONT) else row.rows
    part = edit.part(source.of_sample(edit), axes, rows)
    if rows is None or len(rows) == row.n_columns:
        return part
    for i, axis in enumerate(axes):
        if any(axis in AXES[name] and name not in edit.selection for name in ("pos", "key")):
            shape = [*part.shape[:i], row.n_columns, *part.shape[i + 1 :]]
            whole = part.new_full(shape, -torch.inf if edit.hook.endswith(SCORES) else 0.0)
            part = whole.index_copy(i, torch.tensor(row.columns, device=part.device), part)
    return part


def read(model: Any, inputs: Any, what: str = "inputs") -> Inputs:
    """Inputs as a study takes them, checked and with roles; raises `LensError` naming which of them is wrong."""
    if isinstance(inputs, Mapping) and not isinstance(inputs, Inputs):
        inputs = model.read_inputs(inputs)
    if not isinstance(inputs, Inputs):
        raise LensError(f"{what} of type {type(inputs).__name__}; expected Inputs: model.prepare(question, image)")
    tokenizer = None if model.processor is None else model.processor.tokenizer
    return inputs.to(model.cfg.device).check(model.cfg).with_roles(model.cfg, tokenizer)


def read_pair(model: Any, clean: Any, corrupt: Any, direction: str) -> tuple[Inputs, Inputs]:
    """The two inputs that a patching study goes between, checked; raises `LensError` for a direction there is not."""
    if direction not in ("denoise", "noise"):
        raise LensError(f"direction={direction!r}; expected 'denoise' or 'noise'")
    clean, corrupt = read(model, clean, "clean"), read(model, corrupt, "corrupt")
    check_pair(model, clean, corrupt)
    return clean, corrupt


def check_pair(model: Any, clean: Inputs, corrupt: Inputs) -> None:
    """Raise `LensError` where positions of the two do not correspond."""
    for what, a, b in (
        ("rows", clean.batch_size, corrupt.batch_size),
        ("positions", clean.n_pos, corrupt.n_pos),
        ("pictures", *(0 if i.pixels is None else len(i.pixels) for i in (clean, corrupt))),
    ):
        if a != b:
            raise LensError(f"clean has {a} {what}, corrupt {b}; patching needs them to correspond one to one")
    masks = [torch.ones_like(i.tokens) if i.attention_mask is None else i.attention_mask for i in (clean, corrupt)]
    if not torch.equal(clean.slots(model.cfg), corrupt.slots(model.cfg)) or not torch.equal(*masks):
        raise LensError("the pictures or the padding of clean and corrupt stand at different positions")
