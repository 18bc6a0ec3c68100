"""Scores as HTML: tables and coloured cells, for a notebook and for the page that explains an answer.

Unusual: everything that is said is escaped here, and colours are written into the cells, so that the pieces stand
anywhere without a style sheet.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Container, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_lens.analysis.scores import Scores

POSITIVE, NEGATIVE, AMOUNT = "178,24,43", "33,102,172", "0,120,110"
"""Red and blue, the ends of the diverging map that pictures use, and a green for what has no sign."""
MISSING = "rgba(128,128,128,.35)"
"""What has no score."""
SIGNED_UNITS = ("nats", "logits", "logit")
"""What is counted from zero both ways, also where no number happens to lie below it."""
UNSAFE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters without tab and line ends, the overrides of the direction of writing, and halves of letters."""
RIGHT = ' style="text-align:right"'
CELLS = 48
"""Longest side of a grid that is drawn in full."""


def escaped(text: object) -> str:
    """Text that stays text, in an attribute too; letters that HTML forbids or that turn others around are spelled out.

    >>> escaped('<b title="x">'), escaped("a\\x00b\\u202ec")
    ('&lt;b title=&quot;x&quot;&gt;', 'a\\\\x00b\\\\u202ec')
    """
    return html.escape(UNSAFE.sub(lambda letter: repr(letter[0])[1:-1], str(text)))


def signed(scores: Scores) -> bool:
    """Whether zero is the middle of these scores rather than their lower end."""
    return scores.unit in SIGNED_UNITS or bool((scores.values < 0).any())


def largest(scores: Scores) -> float:
    """The largest finite absolute score, 1 where there is none but zero: what full colour stands for."""
    finite = scores.values[scores.values.isfinite()].abs()
    return float(finite.max()) if finite.numel() and float(finite.max()) > 0 else 1.0


def tint(value: float, most: float, two_sided: bool) -> str:
    """A background for a score: the stronger the further from zero, transparent at zero, on any ground."""
    if not math.isfinite(value):
        return MISSING
    colour = (POSITIVE if value > 0 else NEGATIVE) if two_sided else AMOUNT
    return f"rgba({colour},{min(abs(value) / most, 1.0):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> str:
    """A table of text and numbers; numbers stand to the right."""
    said = f"<caption>{escaped(caption)}</caption>" if caption else ""
    right = [bool(rows) and all(isinstance(row[i], float | int) for row in rows) for i in range(len(head))]
    top = "".join(f"<th{RIGHT if at else ''}>{escaped(name)}</th>" for name, at in zip(head, right, strict=True))
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f"<table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"<td{RIGHT}>{value:+.4f}</td>"
    return f"<td{RIGHT}>{value}</td>" if isinstance(value, int) else f"<td>{escaped(value)}</td>"


def heat(
    scores: Scores, name: Callable[[int, int], str], marked: Container[tuple[int, ...]] = (), side: str = "12px"
) -> str:
    """Scores with two axes as a grid of coloured cells that tell their name and value; `layer` counts from the bottom.

    `marked` places get a ring. `side` is how large a cell is, in any of CSS's units.
    """
    values, most, two_sided = scores.values.tolist(), largest(scores), signed(scores)
    rows = list(range(len(values)))
    rows = rows[::-1] if scores.axes[0] == "layer" else rows
    cells = []
    for row in rows:
        for col, value in enumerate(values[row]):
            ring = ";box-shadow:inset 0 0 0 2px currentColor" if (row, col) in marked else ""
            said = escaped(f"{name(row, col)}  {value:+.4g} {scores.unit}".rstrip())
            cells.append(f'<i title="{said}" style="background:{tint(value, most, two_sided)}{ring}"></i>')
    columns = len(values[0]) if values else 0
    style = f"display:inline-grid;grid:auto-flow {side}/repeat({columns},{side});gap:1px;border:1px solid #8886"
    return f'<div class="heat" role="img" style="{style}">{"".join(cells)}</div>'


def placed(scores: Scores) -> Callable[[int, int], str]:
    """What a cell of two axes is called: `layer 3, head 5`, by its labels."""
    (one, other), (rows, cols) = scores.axes, (scores.labels_of(axis) for axis in scores.axes)
    return lambda row, col: f"{one} {rows[row]}, {other} {cols[col]}"


def shown(scores: Scores, head: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A notebook's view: what the scores are, the cells of a grid that is not too large, and the highest scores."""
    drawn = ""
    if len(scores.axes) == 2 and 0 < max(scores.values.shape) <= CELLS and scores.values.numel():
        drawn = heat(scores, placed(scores))
    closes = "" if scores.closure is None else f"<p>the sum closes to {scores.closure:.1e} {escaped(scores.unit)}</p>"
    return f"<div><p>{escaped(head)}</p>{drawn}{table(columns, rows)}{closes}</div>"
