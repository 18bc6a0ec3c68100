"""Ablation: take a part's activation away, and see what the answer does without it.

Unusual: means and resamples come from inputs that the user gives, and are matched by role: a patch with the same patch,
a word of the question with the words of questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from llava_lens.analysis.interventions.grid import Reach, Sweep
from llava_lens.analysis.interventions.study import Running, Turn, each_row, over_repeats, read, taken
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.inputs import Inputs
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import FRONT, Edit
from llava_lens.sweep.rows import Row
from llava_lens.sweep.setting import FullBase

By = Literal["zero", "mean", "resample", "noise"]
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "head": ("z", ("layer", "head")),
    "attn": ("attn_out", ("layer",)),
    "mlp": ("mlp_out", ("layer",)),
    "neuron": ("post", ("layer", "neuron")),
    "image": ("hook_embed", ("patch",)),
}
"""What can be ablated by name: its hook, and the axes that are swept unless told otherwise."""


def ablate(
    model: Any,
    inputs: Any,
    part: str = "head",
    by: By = "zero",
    sweep: Sweep | None = None,
    *,
    reference: Any = None,
    at: Any = None,
    metric: Any = None,
    layers: Any = None,
    heads: Any = None,
    neurons: Any = None,
    window: int = 1,
    image: int = 0,
    sigma: float = 1.0,
    repeats: int = 1,
    seed: int = 0,
    **how: Unpack[Running],
) -> Scores:
    """The metric without a part: `Scores` over the same axes as `patch`.

    `part` is "head", "attn", "mlp", "neuron" or "image" (image tokens: `at=Patches(object.mask, buffer=1)` with
    `sweep=()` takes an object away), or any hook as in `patch`. `by` says what takes its place: "zero"; "mean", over
    the `reference`'s positions with the same role (for a patch: the same patch); "resample", what one prompt of the
    `reference` holds there, drawn with `seed`; "noise", Gaussian noise added, `sigma` times the activation's standard
    deviation. `reference` is `Inputs` or a list of them.

    Resampling and noise are drawn once per repeat, the same for every cell; with `repeats` > 1 the result is the mean
    with a 95 % interval. Other arguments, `method` and errors are as in `patch`; a missing reference raises too, and
    one without a role that is ablated.
    """
    if by not in ("zero", "mean", "resample", "noise"):
        known = ("zero", "mean", "resample", "noise")
        raise LensError(f"by={by!r}{nearest(str(by), known)}; expected {', '.join(known)}")
    if repeats < 1 or (repeats > 1 and by in ("zero", "mean")):
        why = "expected 1 or more" if repeats < 1 else "nothing is drawn, so 1 says it all"
        raise LensError(f"repeats={repeats} with by={by!r}: {why}")
    if by == "noise" and not sigma > 0:
        raise LensError(f"sigma={sigma}; expected more than 0")
    hook, axes = PARTS.get(part, (part, ("layer", "position")))
    inputs = read(model, inputs)
    others = references(model, reference) if by in ("mean", "resample") else []
    reach = Reach(hook, axes if sweep is None else sweep, at, layers, heads, neurons, window, image)

    def study(turn: Turn) -> Scores:
        row = turn.row(inputs)
        grid = reach.grid(model, row, turn.n_pos)
        setting = turn.settle(row, names=grid.hooks)
        facts: dict[str, Any] = {"score": f"ablate {part}", "by": by}
        facts |= {"reference": len(others)} if others else {"sigma": sigma} if by == "noise" else {}
        said = setting.bound.ids[:-1]  # an answer of several tokens follows the references' prompts, too
        hooks = turn.how.get("fwd_hooks", ())
        held = [FullBase(model, other.extended(said), grid.hooks, (), hooks) for other in others]
        draws = []
        for repeat in range(repeats):
            source = _source(by, held, setting.clean, grid.hooks, sigma, turn.generator(seed, repeat))
            cells = [cell.edits(0.0 if source is None else partial(taken, source)) for cell in grid.cells]
            draws.append(turn.measure(setting, grid, cells, part=str(repeat) if repeats > 1 else "", **facts))
        return over_repeats(draws) if repeats > 1 else draws[0]

    return each_row(model, inputs, metric, how, study)


def references(model: Any, given: Any) -> list[Row]:
    """Every prompt of a reference; raises `LensError` for none."""
    each = [given] if isinstance(given, Inputs) else list(given) if isinstance(given, list | tuple) else []
    if not each:
        raise LensError(f"reference of type {type(given).__name__}; expected Inputs, or a list of them")
    batches = [read(model, inputs, "reference") for inputs in each]
    return [Row.of(model, inputs, i) for inputs in batches for i in range(inputs.batch_size)]


@dataclass(frozen=True)
class Stand:
    """Activations that stand in for a run's, in the layout of its row."""

    model: Any
    row: Row
    acts: dict[str, Tensor]

    def of_sample(self, edit: Edit) -> Tensor:
        """As `Base.of_sample`."""
        act = self.acts[edit.hook]
        return act[edit.image] if edit.hook.startswith(FRONT) else act[0]


def _source(
    by: By, held: Sequence[FullBase], base: Base, hooks: Iterable[str], sigma: float, generator: torch.Generator
) -> Stand | None:
    """What takes the place of the run's own activations; None for zeros."""
    if by == "zero":
        return None
    if by == "noise":
        acts = {name: _noisy(base.acts[name], sigma, generator) for name in hooks}
    elif by == "mean":
        acts = {name: _mean(name, held, base) for name in hooks}
    else:
        chosen = held[int(torch.randint(len(held), (1,), generator=generator))]
        _refuse_another_layout(chosen.row, base.row)
        acts = {name: chosen.acts[name] for name in hooks}
    return Stand(base.model, base.row, acts)


def _noisy(act: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(act.shape, generator=generator, dtype=torch.float32)
    return act + (sigma * act.float().std()).to(act) * noise.to(act)


def _mean(name: str, held: Sequence[FullBase], base: Base) -> Tensor:
    """The mean over all references of what stands in the same role, in the layout of the base's row."""
    if name.startswith(FRONT):
        each = torch.cat([other.acts[name] for other in held]).mean(0, keepdim=True)
        return each.expand_as(base.acts[name])
    axis = _places_axis(base.model, name)
    wanted = [kinds_of(base.row)[column] for column in base.row.columns]
    sums: dict[Any, Tensor] = {}
    counts: dict[Any, int] = {}
    for other in held:
        act = other.acts[name].movedim(axis, 0)
        for place, column in enumerate(other.row.columns):
            kind = kinds_of(other.row)[column]
            sums[kind] = sums[kind] + act[place] if kind in sums else act[place]
            counts[kind] = counts.get(kind, 0) + 1
    missing = next((kind for kind in wanted if kind not in sums), None)
    if missing is not None:
        raise LensError(
            f"the reference has no {missing[0]!r} position" + (f", patch {missing[1:]}" if missing[1:] else "")
        )
    return torch.stack([sums[kind] / counts[kind] for kind in wanted]).movedim(0, axis)


def _places_axis(model: Any, name: str) -> int:
    axes = model.hook(name).axes.split()
    if "key" in axes:
        raise LensError(f"{name!r} has no mean by role: its keys are positions, too")
    return axes.index("pos")


def kinds_of(row: Row) -> list[tuple[Any, ...]]:
    """What each position is: its role, and for a patch its picture's number and its own."""
    roles = row.roles
    if roles is None:
        raise LensError("these inputs carry no roles; make them with model.prepare or Inputs.from_tokens")
    kinds: list[tuple[Any, ...]] = [(label,) for label in roles.labels]
    for image in range(roles.n_images):
        for i, column in enumerate(roles.positions("image", image).tolist()):
            kinds[column] = ("image", image, i)
    return kinds


def _refuse_another_layout(other: Row, own: Row) -> None:
    theirs, ours = ([kinds_of(row)[c] for c in row.columns] for row in (other, own))
    if theirs != ours or other.columns != own.columns:
        raise LensError(
            f"a reference of {len(theirs)} positions with other roles than the {len(ours)} here; resampling takes "
            "prompts of the same layout (the same template, as many words): by='mean' takes any"
        )
