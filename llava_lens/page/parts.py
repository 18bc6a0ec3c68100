"""The drawn parts of the page: the picture, a map over it, and bars by layer.

Unusual: boxes are given as shares of the panel, so a map stays on its pixels at every size of the window.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
from PIL import Image

from llava_lens.analysis import markup
from llava_lens.analysis.markup import escaped
from llava_lens.analysis.scores import Scores
from llava_lens.explanation import Explanation
from llava_lens.plots.canvas import painted
from llava_lens.plots.pictures import LARGEST, extent_of, fitting
from llava_lens.roles import Roles

Box = tuple[float, float, float, float]
STEPS = 11
"""Colours of a legend."""
UNDER = 600
"""Pixels along a side of the picture under a map, which shows less of it."""
WIDE, HIGH, EDGE = 420, 190, 34
"""The chart of layers, and its margin for numbers, in its own units."""


def scene(e: Explanation, picture: Image.Image, caption: str) -> str:
    """The picture as it is, the map's strongest patch framed."""
    return (
        f'<figure class="card">{_open(e)}{_under(e, picture, "under")}{_best(e, e.map)}</div>'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


def stage(e: Explanation, picture: Image.Image, grid: Scores, caption: str) -> str:
    """A map over the picture, with its legend and a line for the patch that is pointed at."""
    values, two_sided, most = grid.values.double().numpy(), markup.signed(grid), markup.largest(grid)
    over = _address(painted(values, two_sided), "PNG")
    place = _style(e.roles.region(e.image), e.roles, e.image)
    low = -most if two_sided else 0.0
    ramp = painted(np.linspace(low, most, STEPS)[None], two_sided)[0]
    colours = ",".join(f"rgb({r},{g},{b})" for r, g, b in ramp.tolist())
    told = json.dumps([[f"{value:+.4g}" for value in line] for line in values.tolist()])
    ends = f"<span>{low:.3g}</span><span>{escaped(grid.unit)}</span><span>{most:.3g}</span>"
    return (
        f'<figure class="card" data-values="{escaped(told)}" data-unit="{escaped(grid.unit)}">{_open(e)}'
        f'{_under(e, picture, "under seen")}<img class="over" alt="{escaped(caption)}" src="{over}" style="{place}">'
        f'{_best(e, grid)}</div><div class="legend" style="background:linear-gradient(90deg,{colours})"></div>'
        f'<div class="ends">{ends}</div><figcaption>{escaped(caption)}</figcaption><output></output></figure>'
    )


def _open(e: Explanation) -> str:
    left, top, right, bottom = extent_of(e.roles, e.image)
    return f'<div class="stage" style="aspect-ratio:{(right - left) / (bottom - top):.5f}">'


def _under(e: Explanation, picture: Image.Image, kind: str) -> str:
    width, height = map(float, e.roles.image_size(e.image))
    pixels = np.asarray(fitting(picture, UNDER if "seen" in kind else LARGEST))
    address, place = _address(pixels, "JPEG"), _style((0.0, 0.0, width, height), e.roles, e.image)
    return f'<img class="{kind}" alt="the picture" src="{address}" style="{place}">'


def _best(e: Explanation, grid: Scores) -> str:
    row, col = grid.top(1)[0].place
    return f'<div class="best" style="{_style(e.roles.box_of_patch(row, col, e.image), e.roles, e.image)}"></div>'


def _style(box: Box, roles: Roles, index: int) -> str:
    """Where a box of the original's pixels lies in the panel."""
    left, top, right, bottom = extent_of(roles, index)
    wide, high = right - left, bottom - top
    x0, y0, x1, y1 = box
    shares = {
        "left": (x0 - left) / wide,
        "top": (y0 - top) / high,
        "width": (x1 - x0) / wide,
        "height": (y1 - y0) / high,
    }
    return ";".join(f"{name}:{share:.4%}" for name, share in shares.items())


def _address(pixels: np.ndarray, kind: str) -> str:
    """Pixels as an address that holds them, and nothing else that the picture's file may say (a place, a comment)."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **({"quality": 90} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(out.getvalue()).decode()}"


def bars(scores: Scores) -> str:
    """Scores `[layer, part]` as bars on both sides of zero, attention and MLP of a layer beside each other."""
    values, layers = scores.values.double().numpy(), scores.labels_of("layer")
    high, low = max(float(values.max()), 0.0), min(float(values.min()), 0.0)
    scale = (HIGH - 40) / ((high - low) or 1.0)
    zero, step = 12 + high * scale, (WIDE - EDGE) / len(values)
    drawn = []
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            x, tall = EDGE + i * step + step * (0.08 + 0.42 * j), abs(value) * scale
            y = zero - tall if value > 0 else zero
            part = ("attn", "mlp")[j]
            said = f"<title>layer {layers[i]} {part}: {value:+.4f} {escaped(scores.unit)}</title>"
            size = f'x="{x:.1f}" y="{y:.1f}" width="{step * 0.42:.1f}" height="{tall:.1f}"'
            drawn.append(f'<rect class="{part}" {size}>{said}</rect>')
    every = max(1, round(len(values) / 12))
    names = "".join(
        f'<text x="{EDGE + (i + 0.5) * step:.1f}" y="{HIGH - 6}" text-anchor="middle">{layers[i]}</text>'
        for i in range(0, len(values), every)
    )
    marks = "".join(
        f'<text x="{EDGE - 5}" y="{zero - value * scale + 4:.1f}" text-anchor="end">{value:.2g}</text>'
        for value in dict.fromkeys((high, 0.0, low))
        if value == 0.0 or abs(value) * scale > 14
    )
    line = f'<line x1="{EDGE}" x2="{WIDE}" y1="{zero:.1f}" y2="{zero:.1f}" stroke="currentColor" stroke-opacity=".5"/>'
    key = '<p class="faint"><span class="key">attention</span><span class="key two">MLP</span></p>'
    return f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img">{"".join(drawn)}{line}{names}{marks}</svg>{key}'
