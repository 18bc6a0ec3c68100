"""Scores made of others: means with intervals, and differences.

Unusual: a mean takes an axis as a sample of independent rows, and says how large it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llava_lens.analysis.intervals import bootstrap
from llava_lens.errors import LensError
from llava_lens.roles import Roles

if TYPE_CHECKING:
    from llava_lens.analysis.scores import Scores


def mean(scores: Scores, names: tuple[str, ...], seed: int = 0) -> Scores:
    """The mean over axes; `Scores.mean` says more."""
    numbers = [scores.axis(name) for name in names]
    if not names or len(set(names)) != len(names):
        raise LensError(f"mean over the axes {names}; expected one or more of {', '.join(scores.axes)}, each once")
    rest = without(scores, names)
    rows = scores.values.double().movedim(numbers, tuple(range(len(names))))
    _complete(rows.flatten(0, len(names) - 1), names, rest["axes"], scores)
    rows = rows.flatten(1, len(names) - 1).mean(1) if len(names) > 1 else rows
    kind = torch.promote_types(scores.values.dtype, torch.float32)
    low, high = (end.to(kind) for end in bootstrap(rows, seed=seed)) if len(rows) > 1 else (None, None)
    return replace(
        scores,
        values=rows.mean(0).to(kind),
        **rest,
        method={**scores.method, "n": len(rows)},
        closure=scores.closure if names == ("batch",) else None,
        roles=_after_mean(scores, names),
        low=low,
        high=high,
    )


def effect(scores: Scores) -> Scores:
    """`scores` minus their baseline; `Scores.effect` says more."""
    baseline = scores.method.get("baseline")
    if baseline is None:
        raise LensError("these scores have no baseline; interventions (patch, ablate, knock_out …) give one")
    if isinstance(baseline, list):
        if "batch" not in scores.axes or len(baseline) != scores.length("batch"):
            raise LensError(f"{len(baseline)} baselines, one per row, and no such rows: take effect() before mean()")
        shape = [-1 if axis == "batch" else 1 for axis in scores.axes]
        baseline = torch.tensor(baseline, dtype=scores.values.dtype).reshape(shape)
    ends = {name: end - baseline for name in ("low", "high") if (end := getattr(scores, name)) is not None}
    return replace(scores, values=scores.values - baseline, method={**scores.method, "baseline": 0.0}, **ends)


def difference(a: Scores, b: Scores) -> Scores:
    """`a - b`; `Scores.__sub__` says more."""
    if (a.axes, a.unit) != (b.axes, b.unit):
        raise LensError(f"{_kind(a)} minus {_kind(b)}; expected the same axes and unit")
    for axis in a.axes:
        if a.labels_of(axis) != b.labels_of(axis):
            raise LensError(f"{_differ(axis, a, b)}; expected the same labels: pick the same places of both")
    differs = {key: fact for key, fact in b.method.items() if key not in a.method or a.method[key] != fact}
    same = a.roles is not None and b.roles is not None and len(a.roles) == len(b.roles)
    pairs = zip(a.roles or (), b.roles or (), strict=True) if same else ()
    shared = [role for pair in pairs for role in common(pair) or ()]
    return replace(
        a,
        values=a.values - b.values,
        method={**a.method, "minus": [*a.method.get("minus", ()), differs]},
        closure=None if a.closure is None or b.closure is None else a.closure + b.closure,
        roles=tuple(shared) if shared and len(shared) == len(a.roles or ()) else None,
        low=None,
        high=None,
    )


def without(scores: Scores, names: Sequence[str]) -> dict[str, Any]:
    """The axes that are left without some, and their labels."""
    kept = tuple(axis for axis in scores.axes if axis not in names)
    return {"axes": kept, "labels": {axis: names for axis, names in scores.labels.items() if axis in kept}}


def common(roles: Sequence[Roles]) -> tuple[Roles, ...] | None:
    """The roles that all rows share, as one entry; its text is left out where it differs."""
    if not roles or len({(each.labels, *(picture.grid for picture in each.pictures)) for each in roles}) > 1:
        return None
    same_text = len({(each.tokens, each.text, each.spans) for each in roles}) == 1
    return (roles[0] if same_text else replace(roles[0], tokens=(), text="", spans=()),)


def _after_mean(scores: Scores, names: Sequence[str]) -> tuple[Roles, ...] | None:
    if scores.roles is None or "position" not in scores.axes or "position" in names:
        return None
    return common(scores.roles) if "batch" in names else scores.roles


def _complete(rows: Tensor, over: Sequence[str], axes: Sequence[str], scores: Scores) -> None:
    """Raises `LensError` for a cell of `[row, *axes]` that has no rows, or some that are not finite numbers."""
    if not len(rows):
        raise LensError(f"no places along {', '.join(over)}; a mean takes at least one")
    bad = ~rows.isfinite()
    torn = bad.any(0) & ~rows.isnan().all(0)
    if bool(torn.any()):
        place = tuple(torn.nonzero()[0].tolist())
        cell = ", ".join(f"{axis} {scores.labels_of(axis)[i]!r}" for axis, i in zip(axes, place, strict=True))
        raise LensError(
            f"{int(bad[(slice(None), *place)].sum())} of the {len(rows)} scores over {', '.join(over)} are not finite"
            f"{' at ' if cell else ''}{cell}; expected numbers, or NaN in all of them: pick the rows that have numbers"
        )


def _kind(scores: Scores) -> str:
    return f"scores over {scores.axes} in {scores.unit or 'no unit'}"


def _differ(axis: str, a: Scores, b: Scores) -> str:
    """What differs along an axis of two scores."""
    ours, theirs = a.labels_of(axis), b.labels_of(axis)
    if len(ours) != len(theirs):
        return f"{len(ours)} places of {axis!r} minus {len(theirs)}"
    at = next(i for i in range(len(ours)) if ours[i] != theirs[i])
    return f"place {at} of {axis!r} is {ours[at]!r} minus {theirs[at]!r}"
