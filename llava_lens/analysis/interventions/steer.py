"""Steering: directions that tell two kinds of inputs apart, added to the stream; runs and generation under any edits.

Unusual: what `generate_with` takes are the edits that every study is made of, so an effect found in a sweep can be
watched in what the model goes on to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.grid import SWEEPS, Grid, Reach, Sweep
from llava_lens.analysis.interventions.study import Running, Turn, each_row, read, row_of
from llava_lens.analysis.interventions.where import Ground, layers_of
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.inputs import Inputs
from llava_lens.kernels import upcast
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import AXES, FRONT, Edit, axes_of, hooks_of
from llava_lens.sweep.plan import check
from llava_lens.sweep.rows import Row
from llava_lens.sweep.sites import names_at

SCALES = (-2.0, -1.0, 0.0, 1.0, 2.0)


def steering_vector(
    model: Any, positive: Any, negative: Any, layer: Any = None, *, hook: str = "resid_post", at: Any = "last"
) -> Float[Tensor, "*layer d_model"]:
    """The mean activation of some inputs minus that of others (arXiv 2312.06681): a direction to steer along.

    `positive` and `negative` are `Inputs` or lists of them; every row counts once. `layer` is one layer, for
    `[d_model]`, or several (None: all), for `[layer, d_model]`. `hook` is a place in the decoder with the stream's
    width. `at` selects positions in each row, as in `patch`; of several the mean is taken.

    Raises `LensError` for a hook of another width, no input, and what a row lacks.
    """
    names = streams(model, hook)
    several = not isinstance(layer, int)
    names = [names[i] for i in layers_of(layer, len(names))]
    means = [mean_of(model, given, names, at, what) for given, what in ((positive, "positive"), (negative, "negative"))]
    vectors = means[0] - means[1]
    return vectors if several else vectors[0]


def steer(
    model: Any,
    inputs: Any,
    vector: Float[Tensor, " d_model"],
    layer: int,
    *,
    scale: float | int = 1.0,
    at: Any = None,
    hook: str = "resid_post",
    row: int = 0,
    onward: bool = False,
) -> tuple[Edit, ...]:
    """The edits that add `scale` times a vector to the stream of one row, for `generate_with` and `run_with_edits`.

    `at` selects positions, as in `patch`; by default all, generated ones too. With `onward` those that are generated
    count in beside what `at` selects. Raises `LensError` for a vector of another width and what is not there.
    """
    inputs = read(model, inputs)
    fit(model, vector, 1)
    names = streams(model, hook)
    name = names[layers_of(layer, len(names))[0]]
    one = Row.of(model, inputs, row_of(inputs, row))
    pos = None if at is None else Ground(model, one).select(at)
    return (Edit(name, vector * scale, "add", pos=pos, onward=onward),)


def steering(
    model: Any,
    inputs: Any,
    vector: Float[Tensor, "*layer d_model"],
    sweep: Sweep = ("layer", "scale"),
    *,
    scales: Sequence[float | int] = SCALES,
    layers: Any = None,
    at: Any = None,
    hook: str = "resid_post",
    metric: Any = None,
    **how: Unpack[Running],
) -> Scores:
    """The metric with a vector added to the stream, for every layer and scale: `Scores[layer, scale]`.

    `vector` is `[d_model]`, added in whichever layer, or `[layer, d_model]`, one for each of `layers` (all).
    `sweep` may also name "position", "patch" or "group"; without "layer" every layer is steered at once, without
    "scale" by one scale. `at`, `metric` and `how` are as in `patch`, so are the errors.
    """
    inputs = read(model, inputs)
    fit(model, vector, 2)
    names = streams(model, hook)
    swept = layers_of(layers, len(names))
    if vector.ndim == 2 and len(vector) != len(swept):
        raise LensError(f"{len(vector)} vectors for {len(swept)} layers; expected one, or one per layer")
    each = {names[layer]: vector if vector.ndim == 1 else vector[i] for i, layer in enumerate(swept)}

    def study(turn: Turn) -> Scores:
        row = turn.row(inputs)
        grid, factors = scaled(model, row, turn.n_pos, Reach(hook, sweep, at, layers), scales)
        setting = turn.settle(row, names=grid.hooks)
        cells = [
            tuple(replace(edit, value=each[edit.hook] * factor) for edit in cell.edits(0.0, "add"))
            for cell, factor in zip(grid.cells, factors, strict=True)
        ]
        return turn.measure(setting, grid, cells, score=f"steering {hook}")

    return each_row(model, inputs, metric, how, study)


def generate_with(model: Any, inputs: Any, edits: Any, *, row: int | None = None, **options: Any) -> Any:
    """Generate under edits: `model.generate`, with interventions held in every step.

    `edits` are those of one row, or of a batch a list with those of each row (`()` for none); with `row`, those of that
    row alone. An edit with positions acts there and nowhere else, in cached steps too; one without acts at every
    position that comes; one with `onward` at what is generated beside its own. Edits of tower and projector act as the
    picture is read. `options` are those of `generate`; your `fwd_hooks` come before the edits.

    Raises `LensError`, before anything runs, for an edit at what is not there, and for a value that is made for some
    positions where more may come; while it runs, where a hook of yours restores blocked attention.
    """
    inputs = read(model, inputs)
    hooks = hooks_with(model, inputs, edits, row, generating=True)
    return model.generate(inputs, fwd_hooks=[*options.pop("fwd_hooks", ()), *hooks], **options)


def run_with_edits(model: Any, inputs: Any, edits: Any, row: int | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """One run under edits with its cache, as `run_with_cache` gives it: `(logits, cache)` of all rows.

    `edits` and `row` are as in `generate_with`, so are the errors. `kwargs` are those of `run_with_cache`.
    """
    inputs = read(model, inputs)
    with model.hooks(fwd_hooks=hooks_with(model, inputs, edits, row)):
        return model.run_with_cache(inputs, **kwargs)


# ---- edits on rows


def hooks_with(model: Any, inputs: Inputs, edits: Any, row: int | None, generating: bool = False) -> list[Any]:
    """The edits of every row as hook functions, all checked."""
    each = each_rows_edits(inputs, edits, row)
    hooks, images = [], 0
    for i, own in enumerate(each):
        one = Row.of(model, inputs, i)
        for edit in own:
            check(Base(model, one), edit)
            if generating:
                check_grows(model, edit)
        hooks += hooks_of(model, own, inputs.n_pos, i, images)
        images += one.n_images
    return hooks


def each_rows_edits(inputs: Inputs, edits: Any, row: int | None) -> list[tuple[Edit, ...]]:
    """A list of edits for every row; raises `LensError` where it is not clear whose they are."""
    n = inputs.batch_size
    given = [edits] if isinstance(edits, Edit) else list(edits)
    if all(isinstance(edit, Edit) for edit in given) and (given or n == 1 or row is not None):
        if row is None and n > 1:
            raise LensError(f"edits for a batch of {n}: say which row=0 … {n - 1}, or give a list of edits per row")
        return [tuple(given) if i == row_of(inputs, row or 0) else () for i in range(n)]
    lists = [[each] if isinstance(each, Edit) else list(each) for each in given]
    wrong = next((type(edit).__name__ for each in lists for edit in each if not isinstance(edit, Edit)), None)
    if wrong is not None:
        raise LensError(f"an edit of type {wrong}; expected Edit(hook, value, …) or block_attention(…)")
    if row is not None or len(lists) != n:
        where = f" with row={row}" if row is not None else ""
        raise LensError(f"{len(lists)} lists of edits{where} for {n} rows; expected one list per row")
    return [tuple(each) for each in lists]


def check_grows(model: Any, edit: Edit) -> None:
    """Raise `LensError` for an edit that cannot hold while a text grows."""
    if edit.hook.startswith(FRONT):
        if edit.onward:
            raise LensError(f"onward at {edit.hook!r}: pictures do not go on in what is generated")
        return
    value, axes = edit.value, axes_of(model.hook(edit.hook))
    for name in ("pos", "key"):
        axis = next((i for i, each in enumerate(axes) if each in AXES[name]), None)
        open_ended = getattr(edit, name) is None or (name == "pos" and edit.onward)
        if axis is None or not open_ended or not isinstance(value, Tensor) or value.ndim < len(axes) - axis:
            continue
        size = value.shape[axis - len(axes)]
        if size > 1:
            meant = "onward" if getattr(edit, name) is not None else f"{name}=None"
            raise LensError(
                f"a value for {size} places of {axes[axis]!r} at {edit.hook!r} with {meant}, which holds for what is "
                f"generated too; give one value for all, or {name}=range({size}) for those there are"
            )


# ---- vectors


def streams(model: Any, hook: str) -> list[str]:
    """A decoder hook of every layer; raises `LensError` unless it carries `d_model` numbers per position."""
    names = names_at(model, hook)
    axes = axes_of(model.hook(names[0]))
    if axes != ["pos", "d_model"] or names[0].startswith(FRONT):
        raise LensError(f"{hook!r} carries {' '.join(axes)}; expected a hook of the decoder with pos d_model")
    return names


def fit(model: Any, vector: Tensor, most: int) -> None:
    """Raise `LensError` for a vector that the stream cannot take."""
    expected = f"[{model.cfg.d_model}]" + (f" or [layer, {model.cfg.d_model}]" if most > 1 else "")
    if not 1 <= vector.ndim <= most or vector.shape[-1] != model.cfg.d_model:
        raise LensError(f"a vector {list(vector.shape)}; expected {expected}")
    if not bool(torch.isfinite(vector).all()):
        raise LensError("a vector that is not finite; expected numbers")


@torch.no_grad()
def mean_of(model: Any, given: Any, names: list[str], at: Any, what: str) -> Float[Tensor, "layer d_model"]:
    """The mean over rows of each row's mean over its positions, `[layer, d_model]`."""
    batches = [given] if isinstance(given, Mapping) else list(given)
    found = []
    for batch in (read(model, batch, what) for batch in batches):
        _, cache = model.run_with_cache(batch, names_filter=names)
        for i in range(batch.batch_size):
            where = list(Ground(model, Row.of(model, batch, i)).select(at))
            found.append(torch.stack([upcast(cache.cache_dict[name][i, where]).mean(0) for name in names]))
    if not found:
        raise LensError(f"no {what} inputs; expected one or more")
    return torch.stack(found).mean(0)


def scaled(
    model: Any, row: Row, n_pos: int, reach: Reach, scales: Sequence[float | int]
) -> tuple[Grid, tuple[float, ...]]:
    """A sweep with an axis of scales, and each cell's scale."""
    axes = (reach.sweep,) if isinstance(reach.sweep, str) else tuple(reach.sweep)
    unknown = next((axis for axis in axes if axis not in (*SWEEPS, "scale")), None)
    if unknown is not None:
        known = (*SWEEPS, "scale")
        raise LensError(f"sweep over {unknown!r}{nearest(unknown, known)}; expected {', '.join(known)}")
    given = tuple(float(scale) for scale in scales)
    if not given or axes.count("scale") > 1 or ("scale" not in axes and len(given) > 1):
        raise LensError(f"scales {given} with sweep={axes}; expected one or more, and 'scale' once for several")
    plain = replace(reach, sweep=tuple(axis for axis in axes if axis != "scale")).grid(model, row, n_pos)
    if "scale" not in axes:
        return plain, given * len(plain.cells)
    before = axes[: axes.index("scale")]
    at = len(before) + before.count("patch")  # patches are two axes
    cells, factors = [], []
    for cell in plain.cells:
        for i, factor in enumerate(given):
            cells.append(replace(cell, index=(*cell.index[:at], i, *cell.index[at:])))
            factors.append(factor)
    labels = {**plain.labels, "scale": tuple(f"{factor:g}" for factor in given)}
    shape = (*plain.shape[:at], len(given), *plain.shape[at:])
    return Grid(tuple(cells), (*plain.axes[:at], "scale", *plain.axes[at:]), shape, labels), tuple(factors)
