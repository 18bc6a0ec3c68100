"""Scores as heat maps and as curves.

Unusual: how many names or numbers stand along an axis follows from the room it has; names that do not all fit give way
to the numbers of their places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from llava_lens.analysis.markup import signed
from llava_lens.analysis.scores import Label, Scores
from llava_lens.errors import LensError
from llava_lens.plots.canvas import colour_limits, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "0.72"
"""The grey of cells without a score."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00", "#8C6D31")
MARKERS = "os^DvPX*"
"""One of each per curve: Okabe and Ito's colours for every kind of sight (brown for their yellow), and shapes."""
CROWDED = 40
"""From this many places on, a curve's markers are small."""
NAME, LETTER, TEXT = 0.17, 0.075, 8
"""Inches that a line and a letter of a tick label take, and its size in points."""
LONGEST = 24
"""Letters of a name that are drawn."""


def plot(scores: Scores, *, ax: Axes | None = None, title: str = "") -> Figure:
    """Draw scores by the number of their axes: one as `curves`, two as `grid`.

    Raises `LensError` for other numbers of axes, and for patches `[row, col]`, which `overlay` draws over the picture.
    """
    axes = scores.axes
    if axes == ("row", "col"):
        raise LensError("scores of patches [row, col]; draw them over the picture: overlay(scores, image, roles)")
    if len(axes) not in (1, 2):
        raise LensError(f"scores with {len(axes)} axes{_which(axes)}; expected one or two{_hint(axes)}")
    return curves(scores, ax=ax, title=title) if len(axes) == 1 else grid(scores, ax=ax, title=title)


def grid(scores: Scores, *, ax: Axes | None = None, title: str = "") -> Figure:
    """Draw scores with two axes as a heat map, the first axis upright; `layer` counts from the bottom.

    Scores in nats or logits, or with a negative value, get a diverging colour map centred on zero, others a sequential
    one from zero. Cells without a score are grey. Intervals are not drawn. `ax` is where to draw, by default a new
    figure. Raises `LensError` for another number of axes.
    """
    import matplotlib

    if len(scores.axes) != 2:
        raise LensError(f"scores with {len(scores.axes)} axes{_which(scores.axes)}; expected two{_hint(scores.axes)}")
    ax = ax or new_figure(*_size(scores)).subplots()
    figure = figure_of(ax)
    values = _numbers(scores.values)
    colours = colour_limits(values, signed=signed(scores))
    colours["cmap"] = matplotlib.colormaps[colours["cmap"]].with_extremes(bad=MISSING)
    origin = "lower" if scores.axes[0] == "layer" else "upper"
    width, height = room_of(ax)
    fits = width * figure.dpi >= values.shape[1] and height * figure.dpi >= values.shape[0]  # else cells would be lost
    how = "nearest" if fits else "antialiased"
    drawn = ax.imshow(values, aspect="auto", origin=origin, interpolation=how, **colours)
    for axis, name, room in ((ax.yaxis, scores.axes[0], height), (ax.xaxis, scores.axes[1], width)):
        axis.set_label_text(plain(name))
        ticks(axis, range(scores.length(name)), scores.labels_of(name), room, upright=axis is ax.yaxis)
    bar = figure.colorbar(drawn, ax=ax, pad=0.02, label=plain(scores.unit) or None)
    bar.ax.tick_params(labelsize=TEXT)
    ax.set_title(title, fontsize=10)
    return figure


def heads_map(heads: Scores, *, ax: Axes | None = None, marked: Any = (), title: str = "") -> Figure:
    """Draw scores `[layer, head]` as a heat map; `marked` heads (layer, head) get a dot."""
    if heads.axes != ("layer", "head"):
        raise LensError(f"scores with the axes {heads.axes}; expected ('layer', 'head')")
    ax = ax or new_figure(5.0, 4.0).subplots()
    figure = grid(heads, ax=ax, title=title)
    places = np.array(list(marked)).reshape(-1, 2)
    ax.scatter(places[:, 1], places[:, 0], s=14, color="black", marker="o", linewidths=0.8, edgecolors="white")
    return figure


def curves(
    scores: Scores | Mapping[str, Scores],
    *,
    ax: Axes | None = None,
    title: str = "",
    baseline: float | int | tuple[str, float | int] | None = None,
) -> Figure:
    """Draw scores along their axis as lines with markers, their 95 % intervals as bands.

    `scores` have one axis, or two of which the second tells the curves apart, or are several by name. `baseline` is a
    value to compare with, or its name and the value, drawn as a dashed line. `ax` is where to draw, by default a new
    figure. Raises `LensError` for other axes, for more than 8 curves, and where axes, labels or units differ.
    """
    series = _series(scores)
    first = next(iter(series.values()))
    (axis,) = first.axes
    labels = first.labels_of(axis)
    ax = ax or new_figure(7.0, 4.0).subplots()
    figure = figure_of(ax)
    x = _along(labels)
    styles = list(zip(COLOURS, MARKERS, strict=True))
    for (name, each), style in zip(series.items(), styles, strict=False):
        _curve(ax, x, each, name, *style)
    if ax.get_ylim()[0] < 0 < ax.get_ylim()[1]:
        ax.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    if baseline is not None:
        called, level = baseline if isinstance(baseline, tuple) else ("baseline", baseline)
        ax.axhline(level, color="0.35", linestyle="--", linewidth=1.2, label=plain(called))
    ticks(ax.xaxis, x, labels, room_of(ax)[0])
    ax.set_xlabel(plain(axis))
    ax.set_ylabel(plain(first.unit or "score"))
    ax.tick_params(axis="y", labelsize=TEXT)
    ax.spines[["top", "right"]].set_visible(False)
    _legend(ax, series)
    ax.set_title(title, fontsize=10)
    return figure


# ---- curves


def _series(scores: Scores | Mapping[str, Scores]) -> dict[str, Scores]:
    """The curves by name; one alone has an empty name. Raises `LensError` where they do not go into one picture."""
    if isinstance(scores, Mapping):
        series = dict(scores)
    elif len(scores.axes) == 2:
        axis = scores.axes[1]
        names = [label if isinstance(label, str) else f"{axis} {label}" for label in scores.labels_of(axis)]
        twice = len(set(names)) < len(names)
        series = {f"{name} ({i})" if twice else name: scores[{axis: i}] for i, name in enumerate(names)}
    else:
        series = {"": scores}
    if not 0 < len(series) <= len(COLOURS):
        raise LensError(f"{len(series)} curves; expected 1 … {len(COLOURS)}: pick some, or draw two axes with grid")
    first_name, first = next(iter(series.items()))
    for name, each in series.items():
        if len(each.axes) != 1:
            of = f"{name!r} has" if name else "scores with"
            more = "one" if isinstance(scores, Mapping) else "one or two"
            raise LensError(f"{of} {len(each.axes)} axes{_which(each.axes)}; expected {more}{_hint(each.axes, 1)}")
        axis = first.axes[0]
        if (each.axes, each.unit) != (first.axes, first.unit) or each.labels_of(axis) != first.labels_of(axis):
            raise LensError(
                f"{name!r} is {_said(each)}, {first_name!r} {_said(first)}; "
                "expected the same axis, labels and unit for all curves"
            )
    return series


def _said(scores: Scores) -> str:
    labels = scores.labels_of(scores.axes[0])
    ends = f"{labels[0]} … {labels[-1]}" if labels else "nothing"
    return f"{scores.axes[0]} {ends} ({len(labels)} places) in {scores.unit or 'no unit'}"


def _curve(ax: Axes, x: np.ndarray, scores: Scores, name: str, colour: str, marker: str) -> None:
    """One line; its band, as bars where a score stands alone and has no line."""
    values = _numbers(scores.values)
    size = 4.5 if len(x) < CROWDED else 1.5
    ax.plot(x, values, color=colour, marker=marker, markersize=size, linewidth=1.4, label=plain(name) or None)
    if scores.low is None or scores.high is None:
        return
    low, high = _numbers(scores.low), _numbers(scores.high)
    ax.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    there = np.pad(np.isfinite(values), 1)
    alone = there[1:-1] & ~there[:-2] & ~there[2:]
    ax.vlines(x[alone], low[alone], high[alone], color=colour, alpha=0.5, linewidth=2)


def _legend(ax: Axes, series: Mapping[str, Scores]) -> None:
    """What the lines and bands are, beside the axes, so that no curve is covered; none where one line says it all."""
    from matplotlib.patches import Patch

    handles, names = ax.get_legend_handles_labels()
    sure = [each for each in series.values() if each.low is not None]
    if sure:
        sizes = {each.method.get("n") for each in sure}
        n = next(iter(sizes)) if len(sizes) == 1 else None
        handles = [*handles, Patch(facecolor="0.5", alpha=0.3)]
        names = [*names, "95 % interval" + (f"\nof the mean, n = {n}" if n else "")]
    if handles:
        ax.legend(handles, names, loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=TEXT, frameon=False)


def _along(labels: Sequence[Label]) -> np.ndarray:
    """Where the places stand: at their numbers where these ascend, else one after the other."""
    numbers = [label for label in labels if isinstance(label, int)]
    ascending = len(numbers) == len(labels) and all(a < b for a, b in pairwise(numbers))
    return np.array(numbers if ascending else range(len(labels)), dtype=float)


# ---- axes and errors


def _size(scores: Scores) -> tuple[float, float]:
    """Inches for a heat map: room for the cells, and beside them for names."""
    rows, cols = scores.values.shape
    beside, below = (
        max((min(len(label), LONGEST) for label in scores.labels_of(axis) if isinstance(label, str)), default=0)
        for axis in scores.axes
    )
    width, height = np.clip(0.42 * cols, 2.5, 9.5), np.clip(0.3 * rows, 1.2, 6.5)
    return float(width + 1.7 + beside * LETTER), float(height + 1.0 + 0.7 * below * LETTER)


def ticks(axis: Any, at: Any, labels: Sequence[Label], room: float, upright: bool = False) -> None:
    """Names where all of them fit, turned if they are long; else numbers at even steps. `room` is in inches."""
    places, names = list(at), [_name(label) for label in labels]
    longest = max(map(len, names), default=0)
    if any(isinstance(label, str) for label in labels):
        if len(names) * NAME <= room:
            turned = not upright and longest * LETTER * len(names) > room
            style: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
            axis.set_ticks(places, names, fontsize=TEXT, **style)
            return
        names, labels = [str(i) for i in range(len(names))], range(len(names))
        longest = len(names[-1])
    step = _step(len(names), room / (NAME * 1.5 if upright else longest * LETTER + NAME))
    even = [i for i, label in enumerate(labels) if isinstance(label, int) and label % step == 0]
    shown = even if len(even) * step > len(names) - step else range(0, len(names), step)
    axis.set_ticks([places[i] for i in shown], [names[i] for i in shown], fontsize=TEXT)


def _step(n: int, most: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, … that leaves at most `most` of `n` places."""
    steps = (digit * 10**power for power in range(12) for digit in (1, 2, 5))
    return next(step for step in steps if n / step <= max(most, 1.0))


def _name(label: Label) -> str:
    """A label as matplotlib takes it literally: short, on one line."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(label))
    return plain(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")


def _numbers(values: Tensor) -> np.ndarray:
    return values.double().numpy()


def room_of(ax: Axes) -> tuple[float, float]:
    """Inches that the axes are wide and high, before the layout makes room for labels."""
    box = ax.get_window_extent()
    dpi = figure_of(ax).dpi
    return box.width / dpi, box.height / dpi


def figure_of(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _which(axes: Sequence[str]) -> str:
    return f" ({', '.join(axes)})" if axes else ""


def _hint(axes: Sequence[str], wanted: int = 2) -> str:
    """Which axes to sum, average or pick so that `wanted` are left; patches of a picture are never taken apart."""
    if not axes:
        return ": this is a single number"
    patches = {"row", "col"} <= set(axes)
    spare = [axis for axis in axes if not (patches and axis in ("row", "col"))]
    extra = sorted(spare, key=lambda axis: axis != "batch")[: max(len(axes) - wanted, 0)]  # a batch goes first
    ways = [f"scores.{'mean' if axis == 'batch' else 'sum'}({axis!r}) or scores[{{{axis!r}: 0}}]" for axis in extra]
    told = f": sum or pick {' and '.join(extra)}, {', '.join(ways)}" if extra else ""
    return told + ("; overlay draws patches (row, col)" if patches else "")
