"""`MapReport`: how good each map is by each measure, with intervals that are paired over the items.

Unusual: a mean is taken over the items that have the measure at all (a mask, a second question), the same ones for
every method; a method that lacks one of them has no mean there, rather than a mean over easier items.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens.analysis.intervals import bootstrap
from llava_lens.analysis.scores import Scores, read_json
from llava_lens.errors import LensError, nearest
from llava_lens.maps.scoring import better

COSTS = ("forward", "backward", "seconds", "peak_bytes")
"""What one map costs: runs, wall time, and memory."""


@dataclass(frozen=True, eq=False, repr=False)
class MapReport:
    """Every measure of every method on every item.

    `items` `[item, method, measure]` has NaN where an item has no such measure. `chance` `[item, measure]` is what
    pointing blindly gives, NaN where that is not defined. `costs` `[item, method, cost]` are forward and backward
    passes, seconds, and bytes (of the first item alone, NaN where they cannot be measured). `method` says how.

    `means`, `differences` and `difference` have 95 % intervals from one resampling of the items for all methods.
    """

    items: Scores
    chance: Scores
    costs: Scores

    def __post_init__(self) -> None:
        if self.items.axes != ("item", "method", "measure") or self.chance.axes != ("item", "measure"):
            raise LensError(f"scores over {self.items.axes}, chance over {self.chance.axes}; expected items first")

    @property
    def method(self) -> dict[str, Any]:
        """How the numbers came about: operators, counts, seed, the randomised copy, what memory means."""
        return dict(self.items.method)

    @property
    def methods(self) -> tuple[str, ...]:
        """The labels of the methods."""
        return tuple(map(str, self.items.labels_of("method")))

    @property
    def measures(self) -> tuple[str, ...]:
        """The names of the measures, `/operator` behind those that take patches out."""
        return tuple(map(str, self.items.labels_of("measure")))

    @property
    def n(self) -> dict[str, int]:
        """How many items each measure has."""
        there = ~self.items.values.isnan().all(1)
        return dict(zip(self.measures, there.sum(0).tolist(), strict=True))

    @cached_property
    def means(self) -> Scores:
        """Means over the items `[method, measure]` with their intervals."""
        return self._over_items(self.items.values, ("method", "measure"))

    @property
    def chances(self) -> Scores:
        """Mean chance levels `[measure]`, NaN where there is none."""
        there = ~self.items.values.isnan().all(1)
        kept = self.chance.values.double().masked_fill(~there, 0).sum(0) / there.sum(0)
        return Scores(kept, ("measure",), {"measure": self.measures}, method=self.method)

    @property
    def cost(self) -> Scores:
        """The median cost of one map `[method, cost]`; of the bytes the largest."""
        values = self.costs.values.double()
        middle = values.nanmedian(0).values
        middle[:, COSTS.index("peak_bytes")] = values[..., COSTS.index("peak_bytes")].nan_to_num(-1).amax(0)
        labels = {"method": self.methods, "cost": COSTS}
        return Scores(middle.masked_fill(middle < 0, torch.nan), ("method", "cost"), labels, method=self.method)

    def best(self, measure: str) -> str:
        """The method with the best mean by a measure; raises `LensError` for a measure that no method has."""
        values = self.means.values[:, self._place(measure, "measure")]
        good = {"higher": values, "lower": -values, "zero": -values.abs()}[better(measure)].nan_to_num(-torch.inf)
        if not bool(good.isfinite().any()):
            raise LensError(f"no method has numbers for {measure!r}: the items have no such measure")
        return self.methods[int(good.argmax())]

    def difference(self, a: str, b: str) -> Scores:
        """Method `a` minus method `b` `[measure]`, paired item by item, with intervals."""
        first, second = (self.items.values[:, self._place(name, "method")] for name in (a, b))
        return self._over_items(first - second, ("measure",), minus=b)

    def differences(self, to: str | None = None) -> Scores:
        """Every method minus one, or minus the best by each measure, `[method, measure]`, paired, with intervals."""
        values, n = self.items.values, self.n
        if to is not None:
            against = values[:, self._place(to, "method")]
        else:
            best = [self._place(self.best(name), "method") if n[name] else 0 for name in self.measures]
            against = torch.stack([values[:, place, i] for i, place in enumerate(best)], 1)
        return self._over_items(values - against[:, None], ("method", "measure"), minus=to or "the best")

    def _place(self, name: str, axis: str) -> int:
        names = tuple(map(str, self.items.labels_of(axis)))
        if name not in names:
            raise LensError(f"no {axis} {name!r}{nearest(name, names)}; there are {', '.join(names)}")
        return names.index(name)

    def _over_items(self, values: Tensor, axes: tuple[str, ...], **facts: Any) -> Scores:
        there = ~self.items.values.isnan().all(1)
        mean, low, high = paired_means(values.double(), there, self.method.get("seed", 0))
        labels = {axis: self.items.labels_of(axis) for axis in axes}
        return Scores(mean, axes, labels, method={**self.method, **facts}, low=low, high=high)

    # ---- files and tables

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"items": self.items.to_json(), "chance": self.chance.to_json(), "costs": self.costs.to_json()}

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> MapReport:
        """The report that `to_json` wrote."""
        return cls(*(Scores.from_json(facts[name]) for name in ("items", "chance", "costs")))

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_json(), ensure_ascii=False, allow_nan=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MapReport:
        """Read a JSON file that `save` wrote; raises `LensError` for another file."""
        return read_json(path, cls.from_json)

    def to_frame(self) -> Any:
        """A pandas frame of the means, a row per method and measure, with `low`, `high` and `n`."""
        frame = self.means.to_frame()
        return frame.assign(n=frame["measure"].map(self.n))

    def table(self, measures: Sequence[str] | None = None) -> str:
        """A markdown table of means with intervals, a row per method, then the chance level.

        All measures in turn, an operator at a time, unless some are named. Bold: the best, and those that the paired
        difference cannot tell from it. Raises `LensError` for a measure that does not exist.
        """
        if measures is None:
            groups: dict[str, list[str]] = {}
            for name in self.measures:
                groups.setdefault(name.partition("/")[2], []).append(name)
            tables = [self.table(names) for names in groups.values()]
            return "\n\n".join([*tables, self.cost_table()])
        places = [self._place(name, "measure") for name in measures]
        means, to_best, chances, n = self.means, self.differences(), self.chances.values, self.n
        assert to_best.low is not None and to_best.high is not None
        head = ["method", *(f"{name} {ARROWS[better(name)]}" for name in measures)]
        body = [["n", *(str(n[name]) for name in measures)]]
        for m, method in enumerate(self.methods):
            level = (to_best.low[m] <= 0) & (to_best.high[m] >= 0)
            body.append([method, *(_cell(means, m, i, bool(level[i])) for i in places)])
        if not chances[places].isnan().all():
            body.append(["chance", *("" if chances[i].isnan() else f"{float(chances[i]):.3f}" for i in places)])
        return markdown([head, *body])

    def cost_table(self) -> str:
        """A markdown table of what one map costs."""
        rows = [["method", "forward", "backward", "milliseconds", "peak MiB"]]
        for method, costs in zip(self.methods, self.cost.values.tolist(), strict=True):
            scaled = zip(costs, (1, 1, 1e3, 2**-20), strict=True)
            rows.append([method, *("?" if cost != cost else f"{cost * by:.4g}" for cost, by in scaled)])
        return markdown(rows)

    def __repr__(self) -> str:
        n = self.items.length("item")
        return f"MapReport: {n} items, {len(self.methods)} methods, 95 % intervals paired over items\n\n{self.table()}"


ARROWS = {"higher": "↑", "lower": "↓", "zero": "→0"}


def paired_means(
    values: Float[Tensor, "item *cell measure"], there: Bool[Tensor, "item measure"], seed: int
) -> tuple[Float[Tensor, "*cell measure"], Float[Tensor, "*cell measure"], Float[Tensor, "*cell measure"]]:
    """Means with the ends of their bootstrap intervals, each measure over the items that have it.

    Measures of the same items share one resampling. NaN for a cell that lacks one of the items, and for the interval
    of a single one.
    """
    mean = values.new_full(values.shape[1:], torch.nan)
    low, high = mean.clone(), mean.clone()
    patterns, group = there.unique(dim=1, return_inverse=True)
    for g, rows in enumerate(patterns.T):
        if not rows.any():
            continue
        columns = (group == g).nonzero()[:, 0]
        part = values[rows][..., columns]
        mean[..., columns] = part.mean(0)
        if len(part) > 1:
            low[..., columns], high[..., columns] = bootstrap(part, seed=seed)
    return mean, low, high


def markdown(rows: Iterable[Sequence[str]]) -> str:
    """A markdown table, the first row its head; its columns line up as plain text too."""
    body = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in body]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cell(scores: Scores, method: int, measure: int, bold: bool) -> str:
    assert scores.low is not None and scores.high is not None
    mean, low, high = (float(each[method, measure]) for each in (scores.values, scores.low, scores.high))
    if mean != mean:
        return ""
    text = f"**{mean:.3f}**" if bold else f"{mean:.3f}"
    return text if low != low else f"{text} [{low:.3f}, {high:.3f}]"
