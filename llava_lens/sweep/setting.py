"""What a study is made on: the clean and the corrupt run of one row, and its metric, all checked before any long work.

Unusual: a model that holds hooks of the user, or whose forward pass is its own, is run in full, hooks included, here as
in every cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import AXES, FRONT, Edit, axes_of, hooks_of
from llava_lens.sweep.metrics import Bound, Metric, ids_of, metric_of, one_id, probe
from llava_lens.sweep.rows import Row
from llava_lens.sweep.sites import entered, why_not

Hooks = Sequence[tuple[Any, Callable[..., Any]]]


class FullBase(Base):
    """A base whose runs are full forward passes, with the user's hooks in all of them."""

    def __init__(
        self, model: Any, row: Row, names: Iterable[str] = (), edits: Sequence[Edit] = (), fwd_hooks: Hooks = ()
    ):
        self.model, self.row, self.edits, self.fwd_hooks = model, row, tuple(edits), list(fwd_hooks)
        self.names, self.shared = tuple(dict.fromkeys(names)), 0
        self.acts: dict[str, Tensor] = {}
        self._run()

    def _run(self) -> None:
        hooks = [*self.fwd_hooks, *hooks_of(self.model, self.edits, self.row.n_columns)]
        with torch.inference_mode(), self.model.hooks(fwd_hooks=hooks):
            if self.names:
                logits, cache = self.model.run_with_cache(self.row.inputs, names_filter=list(self.names))
                self.acts = {name: self._compact(name, act) for name, act in cache.cache_dict.items()}
            else:
                logits = self.model(self.row.inputs)
        self._logits = logits[0, list(self.row.columns)]

    def _compact(self, name: str, act: Tensor) -> Tensor:
        if name.startswith(FRONT) or len(self.row.columns) == self.row.n_columns:
            return act
        for i, axis in enumerate(self.model.hook(name).axes.split()):
            if axis in ("pos", "query", "key"):
                act = act.index_select(i, torch.tensor(self.row.columns, device=act.device))
        return act

    def logits(self, places: Sequence[int]) -> Tensor:
        return self._logits[list(places)]

    def run(self, edits: Sequence[Edit], places: Sequence[int]) -> Tensor:
        """Logits `[place, d_vocab]` of one full run with some edits."""
        made = [off_padding(self.model, edit, self.row) for edit in (*self.edits, *edits)]
        hooks = [*self.fwd_hooks, *hooks_of(self.model, made, self.row.n_columns)]
        with torch.inference_mode():
            logits = self.model.run_with_hooks(self.row.inputs, fwd_hooks=hooks)
        return logits[0, [self.row.columns[place] for place in places]]


def off_padding(model: Any, edit: Edit, row: Row) -> Edit:
    """The same edit on the positions that are no padding, where it selects all of them."""
    if edit.hook.startswith(FRONT) or len(row.columns) == row.n_columns:
        return edit
    axes = axes_of(model.hook(edit.hook))
    columns = torch.tensor(row.columns)
    for name in ("pos", "key"):
        axis = next((i for i, each in enumerate(axes) if each in AXES[name]), None)
        if axis is None or name in edit.selection:
            continue
        value = edit.value
        if isinstance(value, Tensor) and value.ndim >= len(axes) - axis and value.shape[axis - len(axes)] > 1:
            value = value.index_select(axis - len(axes), columns.to(value.device))
        edit = replace(edit, value=value, **{name: row.columns})
    return edit


@dataclass
class Setting:
    """One row's clean and corrupt run (the same where there is one), and the metric on them, also of either run.

    `why` says why runs are full forward passes, None where they are shortened.
    """

    clean: Base
    corrupt: Base
    bound: Bound
    clean_value: float
    corrupt_value: float
    why: str | None

    @property
    def model(self) -> Any:
        return self.clean.model


def settle(
    model: Any,
    clean: Row,
    corrupt: Row | None = None,
    metric: Any = None,
    names: Sequence[str] = (),
    corruption: Sequence[Edit] = (),
    fwd_hooks: Hooks = (),
    full: bool = False,
    like: Base | None = None,
) -> Setting:
    """Run both rows, recording `names`, and tie the metric to them; what begins like the run `like` starts from it.

    `corruption` are lasting edits of the corrupt run; without it and without `corrupt` there is one run. `fwd_hooks`
    are the user's, held in every run. Raises `LensError` for an answer of several tokens where one is needed, a metric
    that is not one number, and activations or metrics that are not finite.
    """
    kind = metric_of(metric)
    ids = _ids(model, kind)
    clean = clean.extended(ids[:-1])
    corrupt = None if corrupt is None else corrupt.extended(ids[:-1])
    front = [name for name in names if name.startswith(FRONT)] or list(corruption)
    why = "a full forward pass was asked for" if full else "hooks of the user are held" if fwd_hooks else None
    why = why or why_not(model, bool(front))
    if front and any(picture.mixed for row in (clean, corrupt) if row for _, picture in row.standing(model)):
        why = why or "tokens of a tile are interpolated between its patches"

    def run(row: Row, edits: Sequence[Edit] = (), like: Base | None = None) -> Base:
        if why is not None:
            return FullBase(model, row, names, edits, fwd_hooks)
        return Base.of(model, row, (*names, *entered(model, names)), edits, like)

    one = run(clean, (), like)
    paired = corrupt is not None or bool(corruption)
    other = run(corrupt or clean, corruption, one) if paired else one
    for which, base in (("clean", one), ("corrupt", other)):
        _refuse_what_is_not_finite(base, names, which)
    return tie(kind, ids, one, other, why)


def tie(kind: Any, ids: list[int], clean: Base, corrupt: Base, why: str | None) -> Setting:
    """Bind a metric to two runs; the user's function is tried on the corrupt one."""
    n, model = len(clean.row.columns), clean.model
    bound = Bound(kind, ids)
    if not isinstance(kind, Metric):
        bound.everywhere, bound.whole = probe(kind, corrupt.logits(range(len(corrupt.row.columns))), bound.name)
    elif kind.kind in ("log_prob", "prob", "logit", "logit_diff") and not ids:
        bound.ids = [int(clean.logits([n - 1])[0].argmax())]
    if isinstance(kind, Metric) and kind.kind == "kl":
        bound.clean = clean.logits(bound.places(n)).log_softmax(-1)
    if isinstance(kind, Metric) and kind.kind == "logit_diff":
        if kind.versus is None:
            raise LensError("logit_diff needs two tokens: logit_diff(answer, versus)")
        bound.versus = one_id(model, kind.versus, "versus")  # type: ignore[arg-type]
    values = [_value(bound, base) for base in (clean, corrupt)]
    for which, value in zip(("clean", "corrupt"), values, strict=True):
        if not math.isfinite(value):
            raise LensError(f"the metric {bound.name!r} is {value} on the {which} run; expected a finite number")
    if isinstance(kind, Metric) and kind.recover:
        if abs(values[0] - values[1]) <= 1e-9 * max(1.0, abs(values[0])):
            raise LensError(f"nothing to recover: {kind.kind} is {values[0]:.6g} on the clean and on the corrupt run")
        bound.span = (values[1], values[0])
    return Setting(clean, corrupt, bound, values[0], values[1], why)


def _value(bound: Bound, base: Base) -> float:
    return float(bound(base.logits(bound.places(len(base.row.columns)))[None])[0])


def _ids(model: Any, kind: Any) -> list[int]:
    """The answer's tokens, none where the clean run chooses."""
    if not isinstance(kind, Metric) or kind.answer is None or kind.kind == "kl":
        return []
    if kind.kind in ("logit", "logit_diff"):
        return [one_id(model, kind.answer, "answer")]  # type: ignore[arg-type]
    return ids_of(model, kind.answer)  # type: ignore[arg-type]


def _refuse_what_is_not_finite(base: Base, names: Sequence[str], which: str) -> None:
    for name in names:
        act = base.acts.get(name)
        if act is not None and not bool(torch.isfinite(act).all()) and not name.endswith("attn_scores"):
            raise LensError(f"{name!r} of the {which} run holds values that are not finite")
