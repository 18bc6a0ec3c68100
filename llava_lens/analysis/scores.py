"""`Scores`: numbers with named axes, the labels along them, and what produced them.

Unusual: how far a sum that must close misses (`closure`), how the numbers came about (`method`) and how sure they are
(`low`, `high`) travel with them, into every table, file and picture.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from llava_lens.analysis import combine
from llava_lens.analysis.tables import frame, shown, shown_as_html
from llava_lens.errors import LensError, nearest
from llava_lens.roles import Roles

Label = int | str
T = TypeVar("T")


class Entry(NamedTuple):
    """One score: where it stands, what that place is called, and its value."""

    place: tuple[int, ...]
    labels: tuple[Label, ...]
    value: float


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Labelled numbers `[*axes]` on the CPU.

    `labels` names the places along an axis (0, 1, … where it has none). `closure` is the error of the sum that must
    close, in `unit`; None where none must. `roles` belong to the axis `position`, one entry per row of the axis
    `batch` where there is one. `low` and `high` are the ends of each value's 95 % interval, None where there is none.
    Raises `LensError` where axes, values and intervals disagree.

    >>> scores = Scores(torch.tensor([[0.5, -1.0], [2.0, 0.0]]), ("layer", "head"), unit="nats")
    >>> scores.top(1)
    [Entry(place=(1, 0), labels=(1, 0), value=2.0)]
    >>> scores.sum("head").values
    tensor([-0.5000,  2.0000])
    >>> scores[{"layer": -1}].axes
    ('head',)
    """

    values: Shaped[Tensor, "..."]
    axes: tuple[str, ...]
    labels: Mapping[str, tuple[Label, ...]] = field(default_factory=dict)
    unit: str = ""
    method: Mapping[str, Any] = field(default_factory=dict)
    closure: float | None = None
    roles: tuple[Roles, ...] | None = None
    low: Shaped[Tensor, "..."] | None = None
    high: Shaped[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        if self.values.ndim != len(self.axes) or len(set(self.axes)) != len(self.axes):
            raise LensError(f"values {list(self.values.shape)} for the axes {self.axes}; expected one name per axis")
        for axis, names in self.labels.items():
            if len(names) != self.length(axis):
                raise LensError(f"{len(names)} labels for the {self.length(axis)} places of {axis!r}")
        if (self.low is None) != (self.high is None):
            raise LensError(
                f"{'high without low' if self.low is None else 'low without high'}; expected both or neither"
            )
        object.__setattr__(self, "values", self.values.detach().cpu())
        for name, end in (("low", self.low), ("high", self.high)):
            if end is not None and end.shape != self.values.shape:
                raise LensError(
                    f"{name} of {list(end.shape)} for values {list(self.values.shape)}; expected one per value"
                )
            object.__setattr__(self, name, None if end is None else end.detach().cpu())

    def axis(self, name: str) -> int:
        """The number of an axis; raises `LensError` with the names there are."""
        if name not in self.axes:
            raise LensError(f"no axis {name!r}{nearest(name, self.axes)}; the axes are {', '.join(self.axes)}")
        return self.axes.index(name)

    def length(self, axis: str) -> int:
        """How many places an axis has."""
        return self.values.shape[self.axis(axis)]

    def labels_of(self, axis: str) -> tuple[Label, ...]:
        """The labels along an axis."""
        return self.labels.get(axis) or tuple(range(self.length(axis)))

    def place_of(self, axis: str, label: Label) -> int:
        """Where a label stands along an axis; raises `LensError` for none and for several places of that name."""
        labels = self.labels_of(axis)
        found = [i for i, each in enumerate(labels) if each == label]
        if len(found) != 1:
            near = nearest(str(label), [str(each) for each in labels])
            many = f"is the name of {len(found)} places, {found}; take one by its number"
            raise LensError(f"{axis} {label!r} {many if found else f'is not there{near}'}")
        return found[0]

    def sel(self, **labels: Label) -> Scores:
        """The scores at the places with these labels, by axis; raises `LensError` as `place_of` does.

        >>> Scores(torch.tensor([1.0, 2.0]), ("layer",), {"layer": (3, 8)}).sel(layer=8).values
        tensor(2.)
        """
        return self[{axis: self.place_of(axis, label) for axis, label in labels.items()}]

    def __getitem__(self, places: Mapping[str, int | slice | str]) -> Scores:
        """The scores at the given places, by axis: `scores[{"layer": 3, "head": slice(0, 2)}]`.

        A number counts places, a string is a label: `scores[{"part": "mlp"}]`; `sel` takes numbers as labels too.
        """
        if not isinstance(places, Mapping):
            raise LensError(f"{places!r}; expected places by axis, {{{self.axes[0] if self.axes else 'axis'!r}: 0}}")
        at = {axis: self.place_of(axis, each) if isinstance(each, str) else each for axis, each in places.items()}
        return self._at(at)

    def _at(self, places: Mapping[str, int | slice]) -> Scores:
        index: list[int | slice] = [slice(None)] * len(self.axes)
        labels = {axis: self.labels_of(axis) for axis in self.labels}
        for axis, place in places.items():
            number = self.axis(axis)
            if isinstance(place, slice) and (place.step is None or place.step > 0):
                labels[axis] = self.labels_of(axis)[place]
                index[number] = place
            elif isinstance(place, bool | slice) or not hasattr(place, "__index__"):
                raise LensError(f"{axis} {place!r}; expected a number, a label as a string, or a slice forwards")
            else:
                index[number] = operator.index(place)
                if not -self.length(axis) <= place < self.length(axis):
                    raise LensError(f"{axis} {place}; expected {-self.length(axis)} … {self.length(axis) - 1}")
        kept = tuple(axis for axis, place in zip(self.axes, index, strict=True) if isinstance(place, slice))
        return replace(
            self,
            **self._moved(lambda values: values[tuple(index)]),
            axes=kept,
            labels={axis: names for axis, names in labels.items() if axis in kept},
            roles=self._roles_at(places),
        )

    def _moved(self, move: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Values and intervals, all moved in the same way."""
        held = {"values": self.values, "low": self.low, "high": self.high}
        return {name: move(tensor) for name, tensor in held.items() if tensor is not None}

    def _roles_at(self, places: Mapping[str, int | slice]) -> tuple[Roles, ...] | None:
        if self.roles is None or isinstance(places.get("position"), slice):
            return None  # some positions only: the roles no longer fit
        row = places.get("batch", slice(None))
        return self.roles[row] if isinstance(row, slice) else (self.roles[row],)

    def sum(self, *axes: str) -> Scores:
        """The scores summed over some axes (all for none), without intervals: those do not add up."""
        names = axes or self.axes
        summed = self.values.sum(tuple(self.axis(name) for name in names)) if names else self.values
        return replace(self, values=summed, **combine.without(self, names), low=None, high=None)

    def mean(self, axis: str | Sequence[str] = "batch", *, seed: int = 0) -> Scores:
        """The mean over an axis, with its 95 % bootstrap interval (`intervals.bootstrap`): the axis is the sample.

        Of several axes the first is the sample, and each of its places counts as the mean over the others. `method`
        gains `n`, the size of the sample; with one there is no interval. The same rows are drawn for every cell, and
        for other scores with this `n` and `seed`. A cell that is NaN everywhere (not swept) stays NaN. Roles stay, as
        one, where all rows have the same. Raises `LensError` for other numbers that are not finite.

        >>> Scores(torch.tensor([[1.0], [3.0]]), ("batch", "layer")).mean().values
        tensor([2.])
        """
        return combine.mean(self, (axis,) if isinstance(axis, str) else tuple(axis), seed)

    def __sub__(self, other: Scores) -> Scores:
        """The differences, place by place, without intervals; `(a - b).mean()` gives those of paired differences.

        `method` is the first one's; its `minus` holds what differs in the second's. The closure is at most the sum of
        both. Raises `LensError` where axes, labels or units differ.
        """
        return combine.difference(self, other) if isinstance(other, Scores) else NotImplemented

    def effect(self) -> Scores:
        """What each cell changes: the scores minus the `baseline` in `method`, the metric where nothing is done.

        Raises `LensError` without a baseline, and after a mean over rows that each had their own.
        """
        return combine.effect(self)

    def top(self, k: int = 10, absolute: bool = False) -> list[Entry]:
        """The `k` highest scores (the largest either way if `absolute`), highest first; NaN is left out."""
        if k < 0:
            raise LensError(f"the top {k}; expected 0 or more")
        flat = self.values.flatten()
        ranked = flat.abs() if absolute else flat
        order = ranked.nan_to_num(-math.inf).argsort(descending=True, stable=True)
        order = order[~flat[order].isnan()][:k]
        return [self._entry(int(i)) for i in order]

    def _entry(self, flat: int) -> Entry:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), self.values.shape))
        names = tuple(self.labels_of(axis)[i] for axis, i in zip(self.axes, index, strict=True))
        return Entry(index, names, float(self.values[index]))

    def over_image(self, image: int = 0) -> Scores:
        """Scores of positions as a grid `[…, row, col]` of one image's patches.

        Raises `LensError` without an axis `position`, without roles, and where rows of a batch differ in their grid.
        """
        self.axis("position")
        if not self.roles:
            raise LensError("these scores do not know which position is which patch; their inputs carried no roles")
        places = [roles.patch_positions(image) for roles in self.roles]
        if len({tuple(p.shape) for p in places}) > 1:
            raise LensError("the rows of this batch have different patch grids; take one row at a time")
        axes = (*(axis for axis in self.axes if axis != "position"), "row", "col")
        labels = {axis: names for axis, names in self.labels.items() if axis != "position"}
        return replace(self, **self._moved(lambda values: self._patches(values, places)), axes=axes, labels=labels)

    def _patches(self, values: Tensor, places: Sequence[Tensor]) -> Tensor:
        """Values of positions as those of patches, `[…, row, col]`; each row of a batch has its own places."""
        moved = values.movedim(self.axis("position"), -1)
        if "batch" not in self.axes:
            return moved[..., places[0]]
        batch = self.axis("batch") - (self.axis("position") < self.axis("batch"))
        rows = zip(moved.movedim(batch, 0), places, strict=True)
        return torch.stack([row[..., own] for row, own in rows]).movedim(0, batch)

    # Files and tables

    def to_json(self) -> dict[str, Any]:
        """Everything as plain lists, numbers and strings; a score that is not a number becomes None."""
        numbers = self._moved(lambda values: values)
        if any(bool(values.isinf().any()) for values in numbers.values()):
            raise LensError("infinite scores cannot be written as JSON")
        return {
            "axes": list(self.axes),
            "values": _plain(self.values.tolist()),
            "labels": {axis: list(names) for axis, names in self.labels.items()},
            "unit": self.unit,
            "method": dict(self.method),
            "closure": self.closure,
            "roles": None if self.roles is None else [json.loads(roles.to_json()) for roles in self.roles],
            "low": None if self.low is None else _plain(self.low.tolist()),
            "high": None if self.high is None else _plain(self.high.tolist()),
        }

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Scores:
        """The scores that `to_json` wrote, as float64."""
        roles = facts["roles"]
        held = {name: facts.get(name) for name in ("values", "low", "high")}  # older files have no intervals
        numbers = {
            name: torch.tensor(_numbers(each), dtype=torch.float64) for name, each in held.items() if each is not None
        }
        return cls(
            axes=tuple(facts["axes"]),
            labels={axis: tuple(names) for axis, names in facts["labels"].items()},
            unit=facts["unit"],
            method=facts["method"],
            closure=facts["closure"],
            roles=None if roles is None else tuple(Roles.from_json(json.dumps(each)) for each in roles),
            **numbers,
        )

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read a JSON file that `save` wrote; raises `LensError` for another file."""
        return read_json(path, cls.from_json)

    def to_frame(self) -> Any:
        """A pandas frame with one row per score: a column of labels per axis, `score`, and `low` and `high` if any.

        Raises `LensError` where pandas is not installed.
        """
        return frame(self)

    def __repr__(self) -> str:
        return shown(self)

    def _repr_html_(self) -> str:
        return shown_as_html(self)


def read_json(path: str | Path, of: Callable[[Any], T]) -> T:
    """What a JSON file holds, made into something; raises `LensError` where that cannot be."""
    text = Path(path).read_bytes()
    try:
        return of(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LensError(f"{path} was not written by save: {type(error).__name__}: {error}") from error


def _plain(values: Any) -> Any:
    if isinstance(values, list):
        return [_plain(value) for value in values]
    return None if isinstance(values, float) and math.isnan(values) else values


def _numbers(values: Any) -> Any:
    return [_numbers(value) for value in values] if isinstance(values, list) else math.nan if values is None else values


def stacked(each: Sequence[Scores]) -> Scores:
    """Scores of the rows of a batch as one, with an axis `batch` in front; what differs between them becomes a list."""
    first = each[0]
    common = {axis: names for axis, names in first.labels.items() if all(s.labels.get(axis) == names for s in each)}
    method = {}
    for key in dict.fromkeys(key for s in each for key in s.method):
        facts = [s.method.get(key) for s in each]
        method[key] = facts[0] if all(fact == facts[0] for fact in facts) else facts
    closures = [s.closure for s in each if s.closure is not None]
    roles = None if first.roles is None else tuple(r for s in each for r in s.roles or ())
    low, high = (
        torch.stack([end for end in ends if end is not None]) if all(end is not None for end in ends) else None
        for ends in ([s.low for s in each], [s.high for s in each])
    )
    return Scores(
        values=torch.stack([s.values for s in each]),
        axes=("batch", *first.axes),
        labels=common,
        unit=first.unit,
        method=method,
        closure=max(closures) if closures else None,
        roles=roles,
        low=low,
        high=high,
    )
