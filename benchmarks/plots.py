"""Two pictures of committed results: how many times faster than each case's baseline, and how costs grow.

Unusual: a picture carries a digest of the numbers that it shows, so that a stale one is found without drawing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Spread
from benchmarks.rows import Report, Row

FAMILIES = {"llava_lens": ("#0072B2", "o"), "transformer_lens": ("#D55E00", "s"), "Hugging Face": ("#777777", "^")}
"""Colour (Okabe and Ito's, told apart by colour-blind readers) and mark of whose variant it is."""
ALONE = ("curves/", "kernels/", "startup/")
"""Cases that are no race with a baseline of somebody else's, or have a picture of their own."""
AXES = ("positions", "layers", "images")
Point = tuple[str, str, str, Spread]
"""Case, whose variant it is, its name, and how many times faster than the baseline it is, by round."""


def family(variant: str) -> str:
    """Whose a variant is."""
    return next((name for name in ("llava_lens", "transformer_lens") if variant.startswith(name)), "Hugging Face")


def points(reports: Iterable[Report]) -> list[Point]:
    """Every variant but the baselines, of the cases that are a race."""
    rows = [row for report in reports for row in report.rows if not row.case.startswith(ALONE)]
    found = [row for row in rows if row.variant != row.baseline]
    return [(_short(row), family(row.variant), row.variant, row.times_faster_by_round) for row in found]


def _short(row: Row) -> str:
    kept = ("size", "batch")
    return f"{row.case} {' '.join(str(row.params[key]) for key in kept if key in row.params)} (1 = {row.baseline})"


def ratios(reports: Sequence[Report]) -> Any:
    """A line per case, a mark per variant, its bar from the slowest round to the fastest, on a logarithmic axis."""
    from matplotlib.figure import Figure

    found = points(reports)
    cases = list(dict.fromkeys(case for case, *_ in found))
    figure = Figure(figsize=(9, 1.2 + 0.17 * (len(found) + len(cases))), layout="constrained")
    ax = figure.subplots()
    ax.axvline(1, color="black", linewidth=1)
    bottom, middles = 0.0, []
    for place, case in enumerate(cases):
        own = sorted((each for each in found if each[0] == case), key=lambda each: list(FAMILIES).index(each[1]))
        if place % 2 == 0:
            ax.axhspan(bottom, bottom + len(own) + 1, color="#F4F4F4", zorder=0)
        for i, (_, whose, variant, spread) in enumerate(own):
            colour, mark = FAMILIES[whose]
            y, bar = bottom + i + 1, [[spread.median - spread.low], [spread.high - spread.median]]
            ax.errorbar(spread.median, y, xerr=bar, fmt=mark, color=colour, markersize=5, capsize=2.5, linewidth=1.2)
            named = variant.removeprefix(f"{whose} ") if variant != whose else ""
            ax.annotate(named, (spread.high, y), (5, -3), textcoords="offset points", color=colour, fontsize=8)
        middles.append(bottom + (len(own) + 1) / 2)
        bottom += len(own) + 1
    for name, (colour, mark) in FAMILIES.items():
        ax.plot([], [], mark, color=colour, markersize=5, label=name)
    ax.set(xscale="log", yticks=middles, ylim=(bottom, 0))
    ax.set_yticklabels(cases)
    ax.xaxis.set_major_formatter("{x:g}×")
    ax.set_xlabel("times faster than the baseline (mark: median of the rounds; bar: slowest to fastest)")
    ax.margins(x=0.12)
    ax.grid(axis="x", which="both", color="#DDDDDD", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(FAMILIES), frameon=False)
    return figure


def grown(reports: Iterable[Report], axis: str) -> list[Row]:
    """The rows of one series."""
    return [row for report in reports for row in report.rows if row.case == f"curves/{axis}"]


def curves(reports: Sequence[Report]) -> Any:
    """Seconds above, peak memory below, as the prompt, the model and the number of pictures grow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    panels = figure.subplots(2, len(AXES), sharey="row", sharex="col")
    for column, axis in enumerate(AXES):
        rows = grown(reports, axis)
        for variant in dict.fromkeys(row.variant for row in rows):
            own = [row for row in rows if row.variant == variant]
            colour, mark = FAMILIES[family(variant)]
            x, seconds = [row.params[axis] for row in own], [row.seconds for row in own]
            bars = [[s.median - s.low for s in seconds], [s.high - s.median for s in seconds]]
            how: dict[str, Any] = dict(color=colour, marker=mark, markersize=5, label=variant)
            panels[0, column].errorbar(x, [s.median for s in seconds], yerr=bars, capsize=2.5, **how)
            panels[1, column].plot(x, [(row.peak_bytes or float("nan")) / 2**20 for row in own], **how)
        panels[1, column].set(xlabel=axis, yscale="log", xticks=sorted({row.params[axis] for row in rows}))
        panels[0, column].set(yscale="log")
    panels[0, 0].set_ylabel("seconds for every cell")
    panels[1, 0].set_ylabel("peak memory, MiB")
    for ax in panels.flat:
        ax.grid(color="#DDDDDD", linewidth=0.6)
    panels[0, 0].legend(frameon=False)
    return figure


def digest(shown: Any) -> str:
    """A short name of some numbers."""
    return hashlib.sha256(json.dumps(shown, default=vars, sort_keys=True).encode()).hexdigest()[:16]


PLOTS: dict[str, tuple[Callable[[Sequence[Report]], Any], Callable[[Sequence[Report]], Any]]] = {
    "benchmarks_ratios.png": (ratios, points),
    "benchmarks_curves.png": (curves, lambda reports: [grown(reports, axis) for axis in AXES]),
}
"""Picture → who draws it, and the numbers that it shows."""


def stale(path: Path, reports: Sequence[Report]) -> bool:
    """Whether a picture is missing, or shows other numbers than these."""
    from PIL import Image

    if not path.exists():
        return True
    with Image.open(path) as image:
        return image.info.get("Description") != digest(PLOTS[path.name][1](reports))


def draw(path: Path, reports: Sequence[Report]) -> None:
    """Write a picture with its digest."""
    figure, shown = PLOTS[path.name]
    figure(reports).savefig(path, dpi=110, metadata={"Description": digest(shown(reports)), "Software": "llava-lens"})
