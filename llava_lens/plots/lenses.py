"""Pictures of lenses: the grid of layers and positions with the words in it, and the words of patches on the picture.

Unusual: letters are as large as the cells allow and never wider than their cell; what does not fit ends in an ellipsis.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from llava_lens.analysis.lenses.words import UNITS, Lens
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.images import load_image
from llava_lens.plots.canvas import colour_limits, new_figure, plain
from llava_lens.roles import Roles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 16
"""How many positions are drawn unless they are named."""
PATCHES = 2
"""How many patches are among them: those that the word scores highest at, in any layer."""
LETTER = 0.62
"""How wide a letter is, in units of its size."""
SIZES = (4.0, 9.0)
"""The smallest and the largest letters, in points."""
CELL = (0.72, 0.34)
"""Inches that a cell of the grid is wide and high at least."""
LONGEST = 14
"""Letters of a word that widen its cell."""
SHARE = 0.85
"""What of given axes is left for cells."""
LARGEST = 1200
"""Pictures are drawn with at most this many pixels along a side."""


def lens_grid(
    lens: Lens,
    *,
    positions: Sequence[int] | None = None,
    color: str = "top",
    ax: Axes | None = None,
    title: str = "",
) -> Figure:
    """Draw a lens `[stream, position]` (or `[layer, position]`): each cell says its highest word.

    Cells are coloured by the probability of that word (`color="top"`) or of the lens's own word ("answer"), or by their
    scores where these are no log-probabilities; cells whose highest word is the lens's own are outlined. `positions`
    are places along the lens's axis; by default all, or, of more than 16, the last ones of the text and the two patches
    at which the word scores highest. A gap stands where positions are left out. `ax` is where to draw, by
    default a new figure. Raises `LensError` for other axes and places that are not there.
    """
    if lens.axes not in (("stream", "position"), ("layer", "position")):
        hint = ": take one row, lens[{'batch': 0}]" if "batch" in lens.axes else ""
        raise LensError(f"a lens with the axes {lens.axes}; expected ('stream' or 'layer', 'position'){hint}")
    if color not in ("top", "answer"):
        raise LensError(f"color={color!r}; expected 'top' or 'answer'")
    chosen = _chosen(lens, positions)
    words, ids = lens.words[:, chosen, 0], lens.ids[:, chosen, 0].numpy()
    shown = lens.values[..., 0] if color == "top" else lens.scores.values
    values, colours, label = _coloured(shown[:, chosen].double().numpy(), lens.scores, color)
    gaps = np.cumsum([0.0, *(0.35 * (b != a + 1) for a, b in pairwise(chosen))])
    at = np.arange(len(chosen)) + gaps
    rows, width = len(words), at[-1] + 1
    cell = max(CELL[0], min(max((len(w) for w in words.flatten()), default=1), LONGEST) * SIZES[1] * LETTER / 72 + 0.1)
    if ax is None:
        ax = new_figure(max(cell * width + 2.0, 4.0), CELL[1] * rows + 1.5).subplots()
        high = CELL[1]
    else:
        cell, high = _room(ax, width, rows)
    figure = _figure(ax)
    from matplotlib.patches import Rectangle

    own = lens.scores.method["answer_id"]
    ax.set(xlim=(-0.5, width - 0.5), ylim=(-0.5, rows - 0.5))
    mapped = _mappable(colours)
    for i, j in np.ndindex(*values.shape):
        x, value = float(at[j]), values[i, j]
        ground = mapped.to_rgba(value) if np.isfinite(value) else (0.85, 0.85, 0.85, 1.0)
        ax.add_patch(Rectangle((x - 0.5, i - 0.5), 1, 1, facecolor=ground, edgecolor="white", linewidth=0.8))
        _word(ax, str(words[i, j]), (x, float(i)), _ink(ground), cell, high)
        if ids[i, j] == own:
            ax.add_patch(Rectangle((x - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor=OWN, linewidth=1.3))
    names = lens.scores.labels_of("position")
    ax.set_xticks(
        at, [_short(str(names[j])) for j in chosen], fontsize=8, rotation=40, ha="right", rotation_mode="anchor"
    )
    upright = lens.axes[0]
    ax.set_yticks(range(rows), [plain(str(name)) for name in lens.scores.labels_of(upright)], fontsize=8)
    ax.set_ylabel(upright)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    bar = figure.colorbar(mapped, ax=ax, pad=0.015, label=plain(label), aspect=max(8, 2.2 * rows))
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    _title(ax, title or _said(lens))
    return figure


OWN = "#D55E00"
"""The outline of cells whose highest word is the lens's own."""


def words_over_image(
    lens: Lens,
    image: Any,
    roles: Roles | None = None,
    *,
    color: str = "top",
    ax: Axes | None = None,
    title: str = "",
    index: int = 0,
) -> Figure:
    """Write the highest word of every patch over the original picture, each where its pixels came from.

    `lens` is `[row, col]`, or `[position]` with its roles; `image` the picture that the inputs were made from. The
    label under a word has the colour of its score (`color="top"`) or of that of the lens's own word ("answer"), which
    is outlined where it is the highest. `ax` is where to draw, by default a new figure. Raises `LensError` without
    roles that know the way to the picture's pixels, for other axes, or for a picture of another size.
    """
    grid = lens.over_image(index) if lens.axes == ("position",) else lens
    if grid.axes != ("row", "col"):
        hint = ", ".join(f"{axis!r}: 0" for axis in grid.axes if axis not in ("row", "col", "position"))
        raise LensError(f"a lens with the axes {lens.axes}; expected ('row', 'col'): pick one, lens[{{{hint}}}]")
    if color not in ("top", "answer"):
        raise LensError(f"color={color!r}; expected 'top' or 'answer'")
    roles = roles or (grid.scores.roles[0] if grid.scores.roles else None)
    if roles is None:
        raise LensError("the words need roles: make the inputs with model.prepare, and pass inputs.roles[0]")
    picture = load_image(image)
    if picture.size != roles.image_size(index):
        raise LensError(f"a picture of {picture.size}; the inputs were made from one of {roles.image_size(index)}")
    rows, cols = roles.grid(index)
    if grid.words.shape[:2] != (rows, cols):
        raise LensError(f"a lens of {grid.words.shape[:2]} patches; image {index} has {(rows, cols)}")
    left, top, right, bottom = roles.region(index)
    x0, y0 = min(left, 0.0), min(top, 0.0)
    x1, y1 = max(right, float(picture.width)), max(bottom, float(picture.height))
    most = min(max((len(w) for w in grid.words[..., 0].flatten()), default=1), LONGEST)
    cell = float(np.clip((most + 1) * 7.5 * LETTER / 72 + 0.1, 0.4, 14.0 / cols))
    inch = cell * cols / (right - left)
    alone = ax is None
    if ax is None:
        ax = new_figure((x1 - x0) * inch + 0.3, (y1 - y0) * inch * 1.02 + 1.25).subplots()
    else:
        inch = min(_room(ax, x1 - x0, y1 - y0))
        cell = inch * (right - left) / cols
    figure = _figure(ax)
    _picture_under(ax, picture)
    shown = grid.values[..., 0] if color == "top" else grid.scores.values
    values, colours, label = _coloured(shown.double().numpy(), grid.scores, color)
    mapped = _mappable(colours)
    own = grid.scores.method["answer_id"]
    for row, col in np.ndindex(rows, cols):
        a, b, c, d = roles.box_of_patch(row, col, index)
        ground = mapped.to_rgba(values[row, col])
        is_own = int(grid.ids[row, col, 0]) == own
        edge = {"edgecolor": OWN, "linewidth": 1.6} if is_own else {"edgecolor": "white", "linewidth": 0.5}
        box = {"boxstyle": "round,pad=0.22,rounding_size=0.5", "facecolor": ground, "alpha": 0.9, **edge}
        centre = (a + c) / 2, (b + d) / 2
        _word(ax, str(grid.words[row, col, 0]), centre, _ink(ground), cell * 0.9, (d - b) * inch, box)
    thin = {"color": "white", "alpha": 0.6, "linewidth": 0.6}
    ax.vlines(np.linspace(left, right, cols + 1), top, bottom, **thin)
    ax.hlines(np.linspace(top, bottom, rows + 1), left, right, **thin)
    ax.set(xlim=(x0, x1), ylim=(y1, y0), xticks=[], yticks=[], facecolor="0.88", aspect="equal", anchor="N")
    bar = figure.colorbar(
        mapped,
        ax=ax,
        location="bottom",
        pad=0.02,
        shrink=0.8,
        aspect=max(20.0, 5 * figure.get_figwidth()),
        label=plain(label),
    )
    bar.ax.tick_params(labelsize=8)
    _title(ax, title or _said(grid), alone)
    return figure


def _picture_under(ax: Axes, picture: Image.Image) -> None:
    """The picture, paler, so that letters can be read on it."""
    factor = max(*picture.size, LARGEST) / LARGEST
    small = picture if factor == 1 else picture.resize([max(1, round(side / factor)) for side in picture.size])
    pale = 0.55 * np.asarray(small.convert("RGB"), np.float32) / 255 + 0.45
    ax.imshow(pale, extent=(0, picture.width, picture.height, 0), interpolation="antialiased")


def _chosen(lens: Lens, positions: Sequence[int] | None) -> list[int]:
    """Places along the positions, ascending."""
    n = lens.scores.length("position")
    if positions is not None:
        bad = [p for p in positions if not -n <= p < n]
        if bad or not len(positions):
            raise LensError(f"positions {list(positions)}; expected some of {-n} … {n - 1}, places along the lens")
        return sorted({p % n for p in positions})
    there = [i for i in range(n) if int(lens.ids[0, i, 0]) >= 0]
    if len(there) <= COLUMNS:
        return there
    names = lens.scores.labels_of("position")
    roles = lens.scores.roles[0] if lens.scores.roles else None
    patches = [i for i in there if (roles.labels[i] == "image" if roles else "patch (" in str(names[i]))]
    best = sorted(patches, key=lambda i: -float(lens.scores.values[:, i].max()))[:PATCHES]
    text = [i for i in there if i not in set(patches)]
    return sorted([*best, *text[-(COLUMNS - len(best)) :]])


def _coloured(values: np.ndarray, scores: Scores, color: str) -> tuple[np.ndarray, dict[str, Any], str]:
    """The numbers that colours stand for, their map and limits, and what they are called."""
    word = scores.method.get("answer") or scores.method.get("answer_id")
    whose = "the highest word" if color == "top" else f"“{word}”"
    if scores.unit == UNITS["log_prob"]:
        return np.exp(values), {"cmap": "viridis", "vmin": 0.0, "vmax": 1.0}, f"probability of {whose}"
    return values, colour_limits(values), f"{scores.unit} of {whose}"


def _mappable(colours: dict[str, Any]) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    return ScalarMappable(Normalize(colours["vmin"], colours["vmax"]), colours["cmap"])


def _word(
    ax: Axes,
    word: str,
    at: tuple[float, float],
    ink: str,
    width: float,
    height: float,
    box: dict[str, Any] | None = None,
) -> None:
    """A word in the middle of a cell of some inches, as large as it fits, on a label if there is a `box`."""
    letters, room = _plain_letters(word), (width - 0.03) * 72
    around = 0.5 if box else 0.0
    size = min(SIZES[1], 0.45 * height * 72, room / (_ems(letters) + around or 1))
    if size < SIZES[0]:
        size = SIZES[0]
        while len(letters) > 1 and (_ems(letters) + 1 + around) * size > room:
            letters = letters[:-1]
        letters += "…"
    if letters:
        ax.text(*at, plain(letters), ha="center", va="center", fontsize=size, color=ink, bbox=box, clip_on=True)


def _ems(letters: str) -> float:
    """About how wide letters are, in units of their size."""
    return sum(1.0 if letter in "mwMW@%…" or ord(letter) > 0x2E7F else LETTER for letter in letters)


def _plain_letters(word: str) -> str:
    """A word without what cannot be printed, spaces made visible."""
    text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in word)
    return text if text.strip() else text.replace(" ", "␣")


def _short(name: str) -> str:
    text = _plain_letters(name)
    return plain(text if len(text) <= LONGEST + 8 else text[: LONGEST + 7] + "…")


def _ink(ground: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out."""
    r, g, b, _ = ground
    return "white" if 0.299 * r + 0.587 * g + 0.114 * b < 0.5 else "black"


def _said(lens: Lens) -> str:
    method = lens.scores.method
    word = method.get("answer") if method.get("answer") is not None else method.get("answer_id")
    return f"{method.get('score', 'lens')}, “{word}” outlined"


def _room(ax: Axes, columns: float | int, rows: float | int) -> tuple[float, float]:
    """Inches for one of some columns and rows in axes that were given, of which labels and a bar take a part."""
    box, dpi = ax.get_window_extent(), _figure(ax).dpi
    return SHARE * box.width / dpi / columns, SHARE * box.height / dpi / rows


def _title(ax: Axes, text: str, alone: bool = False) -> None:
    """A title, on more lines where the figure is narrow; the figure's own where the axes are `alone`.

    Axes of a fixed shape settle after the layout made room for their title, so that it may stand outside.
    """
    figure = _figure(ax)
    lines = textwrap.fill(plain(text), int(figure.get_figwidth() / 0.085))
    if alone:
        figure.set_layout_engine("constrained", h_pad=0.08)
        figure.suptitle(lines, fontsize=10)
    else:
        ax.set_title(lines, fontsize=10)


def _figure(ax: Axes) -> Figure:
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure
