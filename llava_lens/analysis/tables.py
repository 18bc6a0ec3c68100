"""Scores as tables: the few lines that they print or show in a notebook, and a pandas frame of all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_lens.analysis import markup
from llava_lens.errors import LensError

if TYPE_CHECKING:
    from llava_lens.analysis.scores import Entry, Scores

SHOWN = 5
"""How many scores are printed."""
LONGEST = 4
"""Longer lists in `method` are printed as their first items and their length."""


def shown(scores: Scores) -> str:
    """A head line with axes, unit and method, and the highest scores with their intervals."""
    columns, rows = _highest(scores)
    alone = " ".join(rows[0]) if not scores.axes else ""
    closes = "" if scores.closure is None else f"\nthe sum closes to {scores.closure:.1e} {scores.unit}".rstrip()
    return f"{_head(scores)}\n{alone or _table([columns, *rows])}{closes}"


def shown_as_html(scores: Scores) -> str:
    """The same for a notebook, with the cells of a grid that is not too large."""
    return markup.shown(scores, _head(scores), *_highest(scores))


def _head(scores: Scores) -> str:
    shape = " × ".join(f"{axis} {size}" for axis, size in zip(scores.axes, scores.values.shape, strict=True))
    said = ", ".join(f"{key} {_brief(value)}" for key, value in scores.method.items())
    return f"Scores[{shape}]" + (f" in {scores.unit}" if scores.unit else "") + (f": {said}" if said else "")


def _highest(scores: Scores) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Names of the columns, and the highest scores with their labels and intervals; a number alone as it is."""
    if not scores.axes:
        return ("score",), [(f"{float(scores.values):+.4g}", *_interval(scores, None))]
    columns = (*scores.axes, "score", *(() if scores.low is None else ("95 %",)))
    top = scores.top(SHOWN)
    return columns, [(*map(str, each.labels), f"{each.value:+.4g}", *_interval(scores, each)) for each in top]


def frame(scores: Scores) -> Any:
    """A pandas frame with a row per score; `Scores.to_frame` says more."""
    try:
        import pandas
    except ImportError as error:
        raise LensError("to_frame needs pandas, which is not installed: pip install pandas") from error
    places = itertools.product(*(scores.labels_of(axis) for axis in scores.axes))
    table = pandas.DataFrame(list(places), columns=list(scores.axes))
    for name, values in (("score", scores.values), ("low", scores.low), ("high", scores.high)):
        if values is not None:
            table[name] = values.flatten().tolist()
    return table


def _interval(scores: Scores, entry: Entry | None) -> tuple[str, ...]:
    """The interval of one score as a cell of the table, none where there are no intervals."""
    if scores.low is None or scores.high is None:
        return ()
    place = entry.place if entry else ()
    return (f"[{float(scores.low[place]):+.3g}, {float(scores.high[place]):+.3g}]",)


def _brief(value: Any) -> str:
    if isinstance(value, list) and len(value) > LONGEST:
        return f"[{', '.join(map(_brief, value[:LONGEST]))}, … {len(value)} in all]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
