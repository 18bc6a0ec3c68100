"""Pictures: every patch is drawn where its pixels came from, colours keep their sign, nothing overlaps."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lens import HookedLlava
from llava_lens.analysis import Explanation, Scores, explain
from llava_lens.errors import LensError
from llava_lens.plots import explanation_figure, heads_map, new_figure, overlay, png
from llava_lens.tiny import render_scene

SIZES = {"square": (256, 256), "landscape": (400, 160), "portrait": (150, 420)}
QUESTION = "What is the color of the circle?"


@cache
def model() -> HookedLlava:
    return HookedLlava.tiny()


def picture(size: tuple[int, int]) -> Image.Image:
    return render_scene(3).image.resize(size)


@cache
def explained(shape: str, question: str = QUESTION) -> Explanation:
    return explain(model(), model().prepare(question, picture(SIZES[shape])))


def grid_of(row: int, col: int, unit: str = "", value: float = 1.0) -> Scores:
    values = torch.zeros(8, 8)
    values[row, col] = value
    return Scores(values, ("row", "col"), unit=unit)


def pixel(figure: Any, x: float, y: float) -> np.ndarray:
    """The drawn colour at a place of the picture, in the picture's own pixels."""
    figure.canvas.draw()
    drawn = np.asarray(figure.canvas.buffer_rgba())
    right, up = figure.axes[0].transData.transform((x, y))
    return drawn[len(drawn) - 1 - int(up), int(right), :3].astype(int)


@pytest.mark.parametrize("shape", SIZES)
def test_a_patch_is_drawn_where_its_pixels_came_from(shape: str) -> None:
    roles, image = explained(shape).roles, Image.new("RGB", SIZES[shape], "grey")
    for row, col in ((0, 0), (3, 5), (7, 1)):
        figure = overlay(grid_of(row, col), image, roles)
        left, top, right, bottom = roles.box_of_patch(row, col)
        x, y, w, h = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
        inside, beside = pixel(figure, x, y), pixel(figure, x + (w if col < 7 else -w), y)
        assert np.abs(inside - beside).sum() > 200
        for dx, dy in ((0.3, 0.3), (-0.3, 0.3), (0.3, -0.3)):
            assert np.abs(pixel(figure, x + dx * w, y + dy * h) - inside).sum() < 12


@pytest.mark.parametrize("unit, value, limits", [("", 2.0, (0, 2)), ("", -2.0, (-2, 2)), ("nats", 2.0, (-2, 2))])
def test_signed_scores_are_centred_on_zero(unit: str, value: float, limits: tuple[float, float]) -> None:
    e = explained("square")
    figure = overlay(grid_of(1, 1, unit, value), picture(SIZES["square"]), e.roles)
    drawn = figure.axes[0].images[1]
    assert drawn.get_clim() == limits and drawn.get_cmap().name == ("RdBu_r" if limits[0] else "viridis")
    assert figure.axes[0].images[0].get_cmap() is not drawn.get_cmap() and len(figure.axes) == 2  # the colour bar


def test_scores_over_positions_find_their_patches() -> None:
    e = explained("square")
    figure = overlay(e.positions, picture(SIZES["square"]))
    assert np.array_equal(np.asarray(figure.axes[0].images[1].get_array()), e.patches().values.numpy())


@pytest.mark.parametrize("shape", SIZES)
def test_a_page_is_complete_and_nothing_overlaps(shape: str) -> None:
    e = replace(explained(shape), question="Is this $x^2$ and a very long question that goes on and on " * 6)
    figure = explanation_figure(e, picture(SIZES[shape]))
    figure.canvas.draw()
    page = figure.bbox
    texts = [*figure.texts, *[ax.title for ax in figure.axes if ax.get_title()]]
    texts += [text for ax in figure.axes for text in ax.texts]
    boxes = {id(text): text.get_window_extent() for text in texts}
    assert len(boxes) == 6
    for box in boxes.values():
        assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    panels = [box for ax in figure.axes if ax.images and (box := ax.get_tightbbox())]
    assert len(panels) == 4
    for one in range(len(panels)):
        for other in panels[:one]:
            assert not panels[one].overlaps(other)
    written = Image.open(io.BytesIO(png(figure)))
    assert written.format == "PNG" and written.info["Software"] == "llava-lens"


def test_heads_are_drawn_by_layer_and_the_marked_ones_get_a_dot() -> None:
    e = explained("square")
    figure = heads_map(e.heads, marked=[(2, 5)])
    ax = figure.axes[0]
    assert np.array_equal(np.asarray(ax.images[0].get_array()), e.heads.values.numpy())
    assert ax.collections[0].get_offsets().tolist() == [[5.0, 2.0]]  # type: ignore[union-attr]
    low, high = ax.images[0].get_clim()
    assert low == -high and (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")


def test_what_does_not_fit_is_refused() -> None:
    e = explained("square")
    with pytest.raises(LensError, match=r"a picture of \(9, 9\); the inputs were made from one of \(256, 256\)"):
        overlay(e.patches(), picture((9, 9)), e.roles)
    with pytest.raises(LensError, match="overlay needs roles"):
        overlay(replace(e.patches(), roles=None), picture((256, 256)))
    with pytest.raises(LensError, match=r"axes \('layer', 'head'\); expected \('row', 'col'\)"):
        overlay(e.heads, picture((256, 256)), e.roles)
    with pytest.raises(LensError, match=r"expected \('layer', 'head'\)"):
        heads_map(e.patches())


def test_scores_that_are_all_zero_can_be_drawn() -> None:
    e = explained("square")
    assert overlay(grid_of(0, 0, "nats", 0.0), picture((256, 256)), e.roles).axes[0].images[1].get_clim() == (-1, 1)


def test_matplotlib_is_imported_when_something_is_drawn_and_no_global_figure_is_made() -> None:
    code = "import sys, llava_lens.plots\nassert 'matplotlib' not in sys.modules\n"
    code += "from llava_lens.plots import new_figure, png\npng(new_figure(1, 1))\n"
    code += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert new_figure(2, 1).get_size_inches().tolist() == [2, 1]
