"""What all pictures share: figures that belong to no display, colour maps that keep the sign, text taken literally."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIGNED, UNSIGNED = "RdBu_r", "viridis"
"""Colour maps for scores with a sign (centred on zero) and without; both are safe for colour-blind readers."""


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG file."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": "llava-lens"})
    return out.getvalue()


def new_figure(width: float | int, height: float | int) -> Figure:
    """An empty figure of this size in inches that belongs to no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Text that matplotlib takes literally, without mathematics."""
    return text.replace("$", r"\$")


def colour_limits(values: np.ndarray, signed: bool = False) -> dict[str, Any]:
    """Colour map and limits: centred on zero where there is a sign, from zero where there is none."""
    finite = values[np.isfinite(values)]
    largest = float(np.abs(finite).max()) if finite.size and np.abs(finite).max() > 0 else 1.0
    if signed or (finite < 0).any():
        return {"cmap": SIGNED, "vmin": -largest, "vmax": largest}
    return {"cmap": UNSIGNED, "vmin": 0.0, "vmax": largest}


def painted(values: np.ndarray, signed: bool = False) -> np.ndarray:
    """The colours of values `[row, col]` as a picture with one pixel per value, `[row, col, 3]`, from 0 to 255."""
    import matplotlib

    look = colour_limits(values, signed)
    share = (values - look["vmin"]) / (look["vmax"] - look["vmin"])
    return matplotlib.colormaps[look["cmap"]](share, bytes=True)[..., :3]
