"""What every layer adds, as bars on both sides of zero.

Unusual: attention and MLP stand side by side in the order in which they write to the stream, so the bars read as one
sum from left to right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.plots.canvas import new_figure, plain
from llava_lens.plots.charts import COLOURS, TEXT, figure_of, room_of, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def layer_bars(scores: Scores, *, ax: Axes | None = None, title: str = "") -> Figure:
    """Draw scores `[layer, part]` as bars by layer, one colour per part, up where they raise and down where they lower.

    One axis `[layer]` gives one bar per layer. `ax` is where to draw, by default a new figure. Raises `LensError` for
    other axes and for more than 8 parts.
    """
    if scores.axes == ("layer",):
        parts, values = [""], scores.values.double().numpy()[:, None]
    elif len(scores.axes) == 2 and scores.axes[0] == "layer":
        parts, values = [str(label) for label in scores.labels_of(scores.axes[1])], scores.values.double().numpy()
    else:
        raise LensError(f"scores with the axes {scores.axes}; expected ('layer', 'part') or ('layer',)")
    if len(parts) > len(COLOURS):
        raise LensError(f"{len(parts)} bars for each layer; expected at most {len(COLOURS)}: draw them with grid")
    ax = ax or new_figure(float(np.clip(0.28 * len(values) + 2.5, 4.5, 11.0)), 3.2).subplots()
    layers, width = np.arange(len(values)), 0.84 / len(parts)
    for i, (part, colour) in enumerate(zip(parts, COLOURS, strict=False)):
        left = layers + (i - (len(parts) - 1) / 2) * width
        ax.bar(left, values[:, i], width, color=colour, label=plain(part) or None)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ticks(ax.xaxis, layers, scores.labels_of("layer"), room_of(ax)[0])
    ax.set(xlabel="layer", ylabel=plain(scores.unit or "score"), xlim=(-0.6, len(values) - 0.4))
    ax.tick_params(axis="y", labelsize=TEXT)
    ax.spines[["top", "right"]].set_visible(False)
    if len(parts) > 1:
        ax.legend(fontsize=TEXT, frameon=False, ncols=len(parts), loc="lower right", bbox_to_anchor=(1.0, 1.0))
    ax.set_title(title, fontsize=10, loc="left")
    return figure_of(ax)
