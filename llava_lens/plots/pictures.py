"""Scores over the original picture, and the one page that explains an answer."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_lens.analysis.markup import signed
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.explanation import Explanation
from llava_lens.images import load_image
from llava_lens.plots.canvas import colour_limits, new_figure, plain, png
from llava_lens.plots.charts import heads_map
from llava_lens.plots.layers import layer_bars
from llava_lens.roles import Roles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OVER = 0.75
"""Opacity of a map over the grey picture."""
LARGEST = 1200
"""Pictures are drawn with at most this many pixels along a side."""


def overlay(
    scores: Scores, image: Any, roles: Roles | None = None, *, ax: Axes | None = None, title: str = "", index: int = 0
) -> Figure:
    """Draw the scores of patches over the original picture, each patch exactly where its pixels came from.

    `scores` are `[row, col]`, or `[position]` with their roles. Scores in nats or logits, or with a negative value, get
    a diverging colour map centred on zero, others a sequential one from zero; the strongest patch is outlined. `ax` is
    where to draw, by default a new figure. Raises `LensError` without roles that know the way to the picture's pixels,
    or for a picture of another size.
    """
    from matplotlib.ticker import MaxNLocator

    roles = roles or (scores.roles[0] if scores.roles else None)
    if roles is None:
        raise LensError("overlay needs roles: make the inputs with model.prepare, and pass inputs.roles[0]")
    grid = scores.over_image(index) if "position" in scores.axes else scores
    if grid.axes != ("row", "col"):
        raise LensError(f"scores with the axes {grid.axes}; expected ('row', 'col') or ('position',)")
    picture = picture_of(image, roles, index)
    if ax is None:
        width, height = panel_size(roles, index)
        ax = new_figure(width, height + 0.9).subplots()
    figure = ax.get_figure(root=True)
    assert figure is not None
    draw_picture(ax, picture, roles, index, faint=True)
    left, top, right, bottom = roles.region(index)
    values = grid.values.numpy()
    colours = colour_limits(values, signed=signed(grid))
    drawn = ax.imshow(values, extent=(left, right, bottom, top), alpha=OVER, interpolation="nearest", **colours)
    _outline(ax, roles, grid, index)
    bar = figure.colorbar(
        drawn, ax=ax, location="bottom", panchor=(0.5, 1.0), shrink=0.9, pad=0.02, aspect=30, label=grid.unit or " "
    )
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    ax.set_title(title, fontsize=10)
    return figure


def explanation_figure(explanation: Explanation, image: Any) -> Figure:
    """One page: the picture, mean attention, the map, and the heads and layers it comes from.

    `image` is the picture that the inputs were made from (path, PIL image or array). Raises `LensError` for another
    picture's size.
    """
    e, roles, index = explanation, explanation.roles, explanation.image
    width, height = panel_size(roles, index)
    columns = int(3 * width * 12.5)
    facts = _wrapped(e.findings(), int(1.9 * width * 12.5))
    below_height = max(5.4, 0.148 * (facts.count("\n") + 3))
    figure = new_figure(3 * width + 1.0, height + 1.9 + below_height)
    both: Any = figure.subfigures(2, 1, height_ratios=(height + 0.9, below_height))  # apart, so that the maps line up
    maps, below = both
    scene, attention, increase = maps.subplots(1, 3)
    charts, words = below.subfigures(1, 2, width_ratios=(1, 1.6))
    heads, layers = charts.subplots(2, 1, height_ratios=(1.15, 1))
    text = words.subplots()
    picture = picture_of(image, roles, index)
    draw_picture(scene, picture, roles, index)
    _outline(scene, roles, e.map, index)
    scene.set_title("the picture; outlined: strongest patch", fontsize=10)
    overlay(e.patch_attention(), picture, roles, ax=attention, title="mean attention (all heads)", index=index)
    overlay(e.map, picture, roles, ax=increase, title=plain(e.map_title), index=index)
    marked = [entry.place for entry in e.top_heads]
    heads_map(e.heads, ax=heads, marked=marked, title="increase by head (dots: the highest)")
    layer_bars(e.layers, ax=layers, title="increase by layer")
    text.set_axis_off()
    text.text(0, 1, facts, va="top", ha="left", fontsize=8.5, family="monospace", transform=text.transAxes)
    title = textwrap.fill(plain(e.question), int(columns * 0.72), max_lines=4, placeholder=" …")
    said = textwrap.shorten(plain(e.text or e.answer), int(columns * 0.72) - 24, placeholder=" …")
    figure.suptitle(f"{title}\n→ {said}    p(“{plain(e.answer)}”) = {e.probability:.3f}", fontsize=12)
    return figure


def explanation_png(explanation: Explanation, image: Any, dpi: int = 110) -> bytes:
    """`explanation_figure` as the bytes of a PNG file."""
    return png(explanation_figure(explanation, image), dpi)


def _wrapped(text: str, columns: int) -> str:
    """Lines no longer than `columns`, what is left of one indented below it."""
    return "\n".join(textwrap.fill(plain(line), columns, subsequent_indent=" " * 8) for line in text.splitlines())


def panel_size(roles: Roles, index: int) -> tuple[float, float]:
    """Inches for a panel that shows the picture and what patches stick out of it."""
    left, top, right, bottom = extent_of(roles, index)
    shape = (right - left) / (bottom - top)
    width = float(np.clip(4.0 * shape, 3.0, 5.0))
    return width, float(np.clip(width / shape, 1.2, 4.2))


def extent_of(roles: Roles, index: int) -> tuple[float, float, float, float]:
    """The box that shows the whole picture and every patch, padding included."""
    width, height = roles.image_size(index)
    left, top, right, bottom = roles.region(index)
    return min(left, 0.0), min(top, 0.0), max(right, float(width)), max(bottom, float(height))


def picture_of(image: Any, roles: Roles, index: int) -> Image.Image:
    picture = load_image(image)
    if picture.size != roles.image_size(index):
        raise LensError(f"a picture of {picture.size}; the inputs were made from one of {roles.image_size(index)}")
    return picture.convert("RGB")


def _faint(picture: Image.Image) -> np.ndarray:
    """The picture as a faint relief in near white, so that a map's colours mean the same all over it."""
    grey = np.asarray(fitting(picture), np.float32).max(-1) / 255  # the largest channel: colours stand out of greys
    return np.repeat((0.72 + 0.28 * grey)[..., None], 3, -1)


def fitting(picture: Image.Image, largest: int = LARGEST) -> Image.Image:
    factor = max(*picture.size, largest) / largest
    return picture if factor == 1 else picture.resize([max(1, round(s / factor)) for s in picture.size])


def draw_picture(ax: Axes, picture: Image.Image, roles: Roles, index: int, faint: bool = False) -> None:
    """A picture under the grid of its patches, with room for patches that stick out of it."""
    width, height = roles.image_size(index)
    pixels = _faint(picture) if faint else np.asarray(fitting(picture))
    ax.imshow(pixels, extent=(0, width, height, 0), interpolation="antialiased")
    _frame(ax, roles, index)


def _frame(ax: Axes, roles: Roles, index: int) -> None:
    """The patch grid, and limits that show all of it."""
    rows, cols = roles.grid(index)
    left, top, right, bottom = roles.region(index)
    thin = {"color": "white", "alpha": 0.55, "linewidth": float(np.clip(6 / rows, 0.25, 0.8))}
    ax.vlines(np.linspace(left, right, cols + 1), top, bottom, **thin)
    ax.hlines(np.linspace(top, bottom, rows + 1), left, right, **thin)
    x0, y0, x1, y1 = extent_of(roles, index)
    ax.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], facecolor="0.88", anchor="N")


def _outline(ax: Axes, roles: Roles, grid: Scores, index: int) -> None:
    """A box around the strongest patch, black on white so that it shows on any ground."""
    from matplotlib.patches import Rectangle

    row, col = grid.top(1)[0].place
    left, top, right, bottom = roles.box_of_patch(row, col, index)
    for color, width in (("white", 3.2), ("black", 1.4)):
        ax.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=color, linewidth=width))
