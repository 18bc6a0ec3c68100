"""Attribution patching: every cell of a patching sweep from one gradient, the strongest of them then run exactly.

Unusual: the first order only says where to look. What is claimed is the exact effect of the cells that it put first,
and the result shows how far the two are apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.gradients import (
    Graph,
    Slope,
    attention_names,
    base_of,
    beside,
    change,
    slope_of,
    through_softmax,
)
from llava_lens.analysis.interventions.grid import Grid, Reach, Sweep
from llava_lens.analysis.interventions.study import Direction, Running, Turn, each_row, facts_of, read_pair, taken
from llava_lens.analysis.scores import Label, Scores, stacked
from llava_lens.analysis.tables import SHOWN, _brief, _table
from llava_lens.errors import LensError
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import FRONT, axes_of
from llava_lens.sweep.engine import MAX_BYTES
from llava_lens.sweep.setting import Setting
from llava_lens.sweep.sites import names_at

Correction = Literal["qk", "graddrop", "star"] | None
BEFORE_SOFTMAX = ("attn.hook_q", "attn.hook_k", "attn.hook_rot_q", "attn.hook_rot_k")
"""Hooks for which `correction="qk"` exists."""
IN_A_BLOCK = ("attn.", "mlp.", "ln1.", "ln2.", "hook_attn_in", "hook_attn_out", "hook_mlp_in", "hook_mlp_out")
"""What a block adds to the stream passes these of its hooks; the rest of them is the stream itself."""


class Checked(NamedTuple):
    """One cell that was run: where, what that place is called, the metric by both ways, and its exact change."""

    place: tuple[int, ...]
    labels: tuple[Label, ...]
    exact: float
    estimate: float
    effect: float


@dataclass(frozen=True, eq=False, repr=False)
class Screened:
    """A sweep by first order, `estimate` (all cells), and the cells that were then run, `exact` (NaN elsewhere).

    Both are the metric with the cell patched, as `patch` gives it; `method["baseline"]` is that without any patch.
    """

    estimate: Scores
    exact: Scores

    @property
    def effects(self) -> tuple[Tensor, Tensor]:
        """What each cell changes, by first order and exactly."""
        baseline = torch.tensor(self.exact.method["baseline"], dtype=torch.float64)
        baseline = baseline.reshape(-1, *[1] * (self.exact.values.ndim - 1)) if baseline.ndim else baseline
        return self.estimate.values - baseline, self.exact.values - baseline

    @property
    def correlation(self) -> float:
        """Pearson's, of estimated and exact effects over the cells that were run; NaN where it does not exist."""
        ran = ~self.exact.values.isnan()
        both = torch.stack([effects[ran] for effects in self.effects])
        if both.shape[1] < 2 or not bool((both.std(-1) > 0).all()):
            return math.nan
        return float(torch.corrcoef(both)[0, 1])

    @property
    def largest_miss(self) -> float:
        """The most that an estimate and the exact value of one cell are apart; NaN where no cell was run."""
        misses = (self.estimate.values - self.exact.values).abs()
        return float(misses.nan_to_num(-1).max()) if bool((~misses.isnan()).any()) else math.nan

    def top(self, k: int = 10) -> list[Checked]:
        """The `k` cells with the largest exact effect in either direction; those that were not run are left out."""
        _, effects = self.effects
        found = []
        for place in _ranked(effects)[:k]:
            labels = tuple(self.exact.labels_of(axis)[i] for axis, i in zip(self.exact.axes, place, strict=True))
            exact, estimate = (float(scores.values[place]) for scores in (self.exact, self.estimate))
            found.append(Checked(place, labels, exact, estimate, float(effects[place])))
        return found

    def __repr__(self) -> str:
        exact, top = self.exact, self.top(SHOWN)
        shape = " × ".join(f"{axis} {size}" for axis, size in zip(exact.axes, exact.values.shape, strict=True))
        counts = ("cells", "ran", "exact", "of")
        facts = ", ".join(f"{key} {_brief(value)}" for key, value in exact.method.items() if key not in counts)
        n, of = (int((~scores.values.isnan()).sum()) for scores in (exact, self.estimate))
        said = f"{n} of {of} cells run exactly"
        if top:
            same = len({e.place for e in top} & set(_ranked(self.effects[0])[: len(top)]))
            said += f": correlation {self.correlation:.3f}, largest miss {self.largest_miss:.3g} {exact.unit}".rstrip()
            said += f"; {same} of the {len(top)} largest effects are among the {len(top)} largest estimates"
        rows = [(*map(str, e.labels), f"{e.exact:+.4g}", f"{e.estimate:+.4g}", f"{e.effect:+.4g}") for e in top]
        table = _table([(*exact.axes, "exact", "estimate", "effect"), *rows])
        return f"Screened[{shape}]{f' in {exact.unit}' if exact.unit else ''}: {facts}\n{table}\n{said}"


def _ranked(effects: Tensor) -> list[tuple[int, ...]]:
    """All places with a number, the largest in absolute value first."""
    flat = effects.flatten().abs()
    order = flat.nan_to_num(-1.0).argsort(descending=True, stable=True)
    order = order[~flat[order].isnan()]
    return [tuple(int(i) for i in place) for place in torch.stack(torch.unravel_index(order, effects.shape), -1)]


def attribution_patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    hook: str = "resid_pre",
    sweep: Sweep = ("layer", "position"),
    *,
    at: Any = None,
    metric: Any = None,
    direction: Direction = "denoise",
    layers: Any = None,
    heads: Any = None,
    neurons: Any = None,
    window: int = 1,
    image: int = 0,
    correction: Correction = None,
    top_k: int = 100,
    **how: Unpack[Running],
) -> Screened:
    """Estimate a whole patching sweep by first order, then run the `top_k` cells with the largest estimates exactly.

    A cell's estimate is `Σ (source − base) · ∂metric/∂activation` on the run that is patched (arXiv 2403.00745): one
    forward and one backward pass beside the two runs. A cell of several layers (`window`, or no axis "layer") gets the
    sum of its layers' estimates, which counts what one does through the other as well. All else is as in `patch`.

    `correction="qk"` (for q, k, rot_q, rot_k) computes the softmax under the patched queries or keys exactly, and is
    linear only from the pattern on. "graddrop" takes the gradient once per block with that block's contributions
    dropped on the way back, so that opposite effects through different blocks do not cancel: the mean of the absolute
    estimates, times n/(n − 1) at hooks inside a block, with the sign of the plain estimate. "star" is both, where the
    hook allows "qk".

    Only `exact`, and `top`, which reads it, are claims about the model; `estimate` says where it is worth looking.
    Raises `LensError` as `patch` does, and for a metric that no gradient passes through.
    """
    if correction not in (None, "qk", "graddrop", "star"):
        raise LensError(f"correction={correction!r}; expected None, 'qk', 'graddrop' or 'star'")
    if top_k < 0:
        raise LensError(f"top_k={top_k}; expected 0 or more")
    softmax = names_at(model, hook)[0].endswith(BEFORE_SOFTMAX)
    if correction == "qk" and not softmax:
        raise LensError(f"correction='qk' at {hook!r}; it is for q, k, rot_q and rot_k, which a softmax follows")
    clean, corrupt = read_pair(model, clean, corrupt, direction)
    reach = Reach(hook, sweep, at, layers, heads, neurons, window, image)
    facts = {"score": f"patch {hook}", "direction": direction}
    checked: list[Scores] = []

    def study(turn: Turn) -> Scores:
        rows = turn.row(clean), turn.row(corrupt)
        grid = reach.grid(model, rows[0], turn.n_pos)
        exactly = softmax and correction in ("qk", "star")
        setting = turn.settle(*rows, [*grid.hooks, *(attention_names(model, grid) if exactly else ())])
        screen = Screen(setting, grid, direction, exactly, turn.how.get("max_bytes", MAX_BYTES))
        slope = slope_of(setting, screen.base)
        effects = screen.dropping(slope) if correction in ("graddrop", "star") else screen.plain(slope)
        method = {**facts, **facts_of(setting), "baseline": slope.value, "correction": correction}
        made = {"unit": setting.bound.unit, "method": method | {"score": f"attribution patch {hook}"}}
        estimate = grid.scores(slope.value + effects, rows[0], turn.n_pos, **made)
        values, ran = screen.exact(turn, effects, top_k)
        made["method"] = {**facts, **facts_of(setting), "baseline": slope.value, **ran}
        checked.append(grid.scores(values, rows[0], turn.n_pos, **made))
        return estimate

    estimate = each_row(model, clean, metric, how, study)
    return Screened(estimate, checked[0] if len(checked) == 1 else stacked(checked))


@dataclass(frozen=True)
class Held:
    """Which entries of one hook belong to which cells: entry `entries[i]` of what is left after `dims` are summed."""

    dims: tuple[int, ...]
    cells: Tensor
    entries: Tensor


class CellSums:
    """Sums of a grid's cells over the entries that each selects."""

    def __init__(self, base: Base, grid: Grid):
        self.base, self.n, self.held = base, len(grid.cells), {}
        self.image = grid.cells[0].image
        edits = [(i, edit) for i, cell in enumerate(grid.cells) for edit in cell.edits(0.0)]
        for hook in grid.hooks:
            self.held[hook] = self._held(hook, [(i, edit) for i, edit in edits if edit.hook == hook])

    def _held(self, hook: str, edits: Sequence[tuple[int, Any]]) -> Held:
        axes, act = axes_of(self.base.model.hook(hook)), self.sample(hook, self.base.acts[hook])
        chosen = sorted(edits[0][1].axis_of(name, axes) for name in edits[0][1].selection)
        rows = None if hook.startswith(FRONT) else self.base.row.rows
        shape = [act.shape[i] for i in chosen] or [1]
        numbers = torch.arange(math.prod(shape)).reshape(shape)
        parts = [edit.part(numbers, [axes[i] for i in chosen], rows).flatten() for _, edit in edits]
        sizes = torch.tensor([len(part) for part in parts])
        cells = torch.tensor([i for i, _ in edits]).repeat_interleave(sizes)
        return Held(tuple(i for i in range(act.ndim) if i not in chosen), cells, torch.cat(parts))

    def sample(self, hook: str, act: Tensor) -> Tensor:
        """One sample of an activation: the row's, or the picture's."""
        return act[self.image] if hook.startswith(FRONT) else act[0]

    def add(self, total: Float[Tensor, " cell"], hook: str, values: Tensor) -> None:
        """Add to every cell's total its entries of one hook's values `[sample, …]`."""
        held, values = self.held[hook], self.sample(hook, values).double()
        values = values.sum(held.dims) if held.dims else values
        total.index_add_(0, held.cells, values.flatten().cpu()[held.entries])


@dataclass(frozen=True)
class Screen:
    """The cells of one row's sweep by first order; `exactly` goes through the softmax instead of linearising it."""

    setting: Setting
    grid: Grid
    direction: Direction
    exactly: bool
    max_bytes: int

    @property
    def base(self) -> Base:
        return base_of(self.setting, self.direction)[0]

    @property
    def source(self) -> Base:
        return base_of(self.setting, self.direction)[1]

    def graph(self, blocks: Sequence[str] = ()) -> Graph:
        """The run whose gradients are needed."""
        names = [beside(hook, "hook_z") for hook in self.grid.hooks] if self.exactly else self.grid.hooks
        return Graph(self.base, names, self.setting.bound.places(len(self.base.row.columns)), blocks)

    def effects(self) -> Callable[[dict[str, Tensor]], Float[Tensor, " cell"]]:
        """From gradients to every cell's effect."""
        if self.exactly:
            return lambda grads: through_softmax(self.base, self.source, self.grid, grads, self.max_bytes)
        sums = CellSums(self.base, self.grid)

        def linear(grads: dict[str, Tensor]) -> Tensor:
            total = torch.zeros(sums.n, dtype=torch.float64)
            for hook in self.grid.hooks:
                sums.add(total, hook, change(self.source, self.base, hook) * grads[hook])
            return total

        return linear

    def plain(self, slope: Slope) -> Float[Tensor, " cell"]:
        """Every cell's effect by first order."""
        return self.effects()(self.graph().backward(slope))

    def dropping(self, slope: Slope) -> Float[Tensor, " cell"]:
        """The mean size of the effects with one block's contributions dropped at a time, signed as without."""
        model, front = self.base.model, any(hook.startswith("vision.") for hook in self.grid.hooks)
        blocks = [f"vision.blocks.{i}." for i in range(model.vision.cfg.n_layers)] if front else []
        blocks += [f"blocks.{i}." for i in range(model.cfg.n_layers)]
        inside = self.grid.hooks[0].partition("blocks.")[2].partition(".")[2].startswith(IN_A_BLOCK)
        if inside and len(blocks) < 2:
            raise LensError("graddrop in a model of one block: with it dropped nothing is left")
        graph, effects = self.graph(blocks), self.effects()
        signed, size = effects(graph.backward(slope, again=True)), 0.0
        for block in blocks:
            size = size + effects(graph.backward(slope, block, again=True)).abs()
        size = size / (len(blocks) - inside)
        return torch.where(signed < 0, -size, size)

    def exact(self, turn: Turn, effects: Tensor, top_k: int) -> tuple[Float[Tensor, " cell"], dict[str, Any]]:
        """The metric of the cells with the largest effects, run exactly, and how that came about."""
        values = torch.full_like(effects, torch.nan)
        chosen = effects.abs().argsort(descending=True, stable=True)[:top_k].sort().values
        if not len(chosen):
            return values, {"exact": 0, "of": len(effects)}
        cells = [self.grid.cells[int(i)].edits(lambda edit: taken(self.source, edit)) for i in chosen]
        on = "corrupt" if self.direction == "denoise" else "clean"
        outcome = turn.run(self.setting, cells, on, "patch")
        values[chosen] = outcome.values.double()
        return values, outcome.facts() | {"baseline": outcome.baseline, "exact": len(chosen), "of": len(effects)}
