"""Attention knockout: what happens when some positions may not look at others, in some layers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Unpack

from llava_lens.analysis.interventions.grid import Cell, Grid, Sweep
from llava_lens.analysis.interventions.study import Running, Turn, each_row, read, row_of
from llava_lens.analysis.interventions.where import Ground, layers_of, windows
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.sweep.edits import SCORES, Edit, Places, block_attention, places
from llava_lens.sweep.rows import Row


def knock_out(
    model: Any,
    inputs: Any,
    from_: Any = "last",
    to: Any = "image",
    layers: Any = None,
    *,
    sweep: Sweep = (),
    window: int | None = None,
    heads: Any = None,
    metric: Any = None,
    tower: bool = False,
    image: int = 0,
    **how: Unpack[Running],
) -> Scores:
    """The metric when queries `from_` may not attend to keys `to`: nothing can flow from `to` to `from_` directly.

    Blocked in all of `layers` at once, or with `window` in that many layers around each in turn (`Scores[layer]`), or
    by "layer" and "head" as `sweep` says. `from_` and `to` are roles, words, positions, `Patches`; a mapping from names
    to them adds an axis "from" or "to". "last" includes the positions of a given answer of several tokens. With
    `tower`, positions are those of picture `image` in the vision tower ("image", "class", numbers, `Patches`).

    Scores are -inf before the softmax, so the blocked weights are exactly zero, which every run checks. A query that
    may look at nothing mixes nothing: attention then adds only its output bias.

    `metric`, `how` and the errors are as in `patch`; a pair that causality blocks anyway raises too.
    """
    inputs = read(model, inputs)
    axes = (sweep,) if isinstance(sweep, str) else tuple(sweep)
    axes = ("layer", *axes) if window is not None and "layer" not in axes else axes
    unknown = next((axis for axis in axes if axis not in ("layer", "head")), None)
    if unknown is not None:
        raise LensError(f"sweep over {unknown!r}{nearest(unknown, ['layer', 'head'])}; expected layer and head")
    if tower and model.cfg.vision is None:
        raise LensError("tower=True for a model without a vision tower")
    cfg = model.cfg.vision if tower else model.cfg
    chosen, some = layers_of(layers, cfg.n_layers), _heads(heads, cfg.n_heads)
    facts: dict[str, Any] = {"score": "knockout"} | ({} if window is None else {"window": window})
    named = {"from": from_, "to": to}
    facts |= {name: _said(given) for name, given in named.items() if not isinstance(given, Mapping)}
    every = range(cfg.n_heads) if some is None else some
    ways: dict[str, list[Any]] = {
        "layer": windows(chosen, 1 if window is None else window, cfg.n_layers) if "layer" in axes else [chosen],
        "head": [(head,) for head in every] if "head" in axes else [some],
    }
    kept = (*axes, *(name for name, given in named.items() if isinstance(given, Mapping)))

    def study(turn: Turn) -> Scores:
        row = turn.row(inputs)
        setting = turn.settle(row, names=[_hook(tower)] if tower else [])
        ground = Ground(model, row, _hook(tower) if tower else "", image)
        sets = {name: _sets(ground, given) for name, given in named.items()}
        if not tower:
            answer = setting.clean.row.columns[len(row.columns) :]
            sets["from"] = {n: w + answer if row.last in w else w for n, w in sets["from"].items()}
            _refuse_what_is_ahead(model, setting.clean.row, sets["from"], sets["to"])
        choices = {**ways, **{name: list(where.values()) for name, where in sets.items()}}
        cells, made = [], []
        for combination in itertools.product(*map(enumerate, choices.values())):
            place = {axis: i for axis, (i, _) in zip(choices, combination, strict=True)}
            layers, head, queries, keys = (value for _, value in combination)
            cells.append(Cell(tuple(place[axis] for axis in kept), ()))
            made.append(tuple(block_attention(layer, queries, keys, head, tower, image) for layer in layers))
        called = {"layer": chosen, "head": every, **sets}
        labels = {axis: tuple(called[axis]) for axis in kept}
        grid = Grid(tuple(cells), kept, tuple(map(len, labels.values())), labels)
        return turn.measure(setting, grid, made, **facts)

    return each_row(model, inputs, metric, how, study)


def blocked(
    model: Any,
    inputs: Any,
    from_: Any = "last",
    to: Any = "image",
    layers: Any = None,
    *,
    heads: Any = None,
    row: int = 0,
    tower: bool = False,
    image: int = 0,
    onward: bool = True,
) -> list[Edit]:
    """The same knockout as edits: for other sweeps, caches and generation (`onward`: new tokens obey it too)."""
    inputs = read(model, inputs)
    cfg = model.cfg.vision if tower else model.cfg
    ground = Ground(model, Row.of(model, inputs, row_of(inputs, row)), _hook(tower) if tower else "", image)
    queries, keys = ground.select(from_), ground.select(to)
    if not tower:
        _refuse_what_is_ahead(model, ground.row, {_said(from_): queries}, {_said(to): keys})
    each, some = layers_of(layers, cfg.n_layers), _heads(heads, cfg.n_heads)
    return [block_attention(layer, queries, keys, some, tower, image, onward and not tower) for layer in each]


def _hook(tower: bool) -> str:
    """The scores of the first layer."""
    return f"{'vision.' if tower else ''}blocks.0.{SCORES}"


def _heads(given: Any, n: int) -> Places | None:
    chosen = places(given, "heads")
    bad = [] if chosen is None else [head for head in chosen if not 0 <= head < n]
    if bad:
        raise LensError(f"head {bad[0]}; expected 0 … {n - 1}")
    return chosen


def _sets(ground: Ground, given: Any) -> dict[str, Places]:
    return ground.groups(given) if isinstance(given, Mapping) else {_said(given): ground.select(given)}


def _said(given: Any) -> str:
    return given if isinstance(given, str) else "positions" if given is not None else "all"


def _refuse_what_is_ahead(model: Any, row: Row, queries: dict[str, Places], keys: dict[str, Places]) -> None:
    seen = row.seen(model)
    for q, k in itertools.product(queries, keys):
        last, first = max(queries[q]), min(keys[k])
        if seen is None:
            hidden = first > last
        else:
            here, there = ([row.rows.place[column] for column in where] for where in (queries[q], keys[k]))
            hidden = not bool(seen[here][:, there].any())
        if hidden:
            raise LensError(f"{q!r} (up to position {last}) never looks at {k!r} (from {first} on): it comes later")
