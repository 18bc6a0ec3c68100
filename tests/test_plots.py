"""Pictures: every patch is drawn where its pixels came from, colours keep their sign, nothing overlaps."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lens import Explanation, HookedLlava, explain
from llava_lens.analysis import Scores
from llava_lens.errors import LensError
from llava_lens.plots import (
    attention_over_image,
    attention_viewer,
    curves,
    explanation_figure,
    grid,
    heads_map,
    layer_bars,
    maps_page,
    new_figure,
    overlay,
    plot,
    png,
)
from llava_lens.plots.viewer import grouped
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


# ---- layers, many maps, attention


def test_bars_by_layer_stand_on_their_side_of_zero() -> None:
    values = torch.tensor([[1.0, -2.0], [0.5, 0.0], [-3.0, 4.0]])
    ax = layer_bars(Scores(values, ("layer", "part"), {"part": ("attn", "mlp")}, "logits"), title="direct").axes[0]
    tall = torch.tensor([[bar.get_height() for bar in part] for part in ax.containers]).T
    assert torch.equal(tall, values) and all(bar.get_y() == 0 for part in ax.containers for bar in part)
    left = [[bar.get_x() for bar in part] for part in ax.containers]
    assert all(a < b < c for a, b, c in zip(left[0], left[1], [*left[0][1:], 99], strict=True)), "attention comes first"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["attn", "mlp"]  # type: ignore[union-attr]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("layer", "logits", "direct")
    alone = layer_bars(Scores(values[:, 0], ("layer",), {"layer": (3, 8, 9)}, "nats")).axes[0]
    assert alone.get_legend() is None and [name for _, name in ticks(alone.xaxis)] == ["3", "8", "9"]
    with pytest.raises(LensError, match=r"axes \('head', 'layer'\); expected \('layer', 'part'\)"):
        layer_bars(Scores(values, ("head", "layer")))
    with pytest.raises(LensError, match="9 bars for each layer; expected at most 8"):
        layer_bars(Scores(torch.zeros(2, 9), ("layer", "head")))


def test_many_maps_have_panels_of_one_size_in_their_order() -> None:
    e = explained("landscape")
    maps = {"a": grid_of(0, 0), "$b$": grid_of(1, 2, "nats", -1.0), "c": e.patches(), "d": e.patch_attention()}
    figure = maps_page(maps, picture(SIZES["landscape"]), e.roles, columns=3, title="all")
    figure.canvas.draw()
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["the picture", "a", r"\$b\$", "c", "d"]
    for ax, scores in zip(panels[1:], maps.values(), strict=True):
        assert np.array_equal(np.asarray(ax.images[1].get_array()), scores.values.numpy())
    sizes = np.array([(ax.get_window_extent().width, ax.get_window_extent().height) for ax in panels])
    assert np.ptp(sizes, 0).max() < 0.05 * sizes.min()
    assert len(maps_page({"a": maps["c"]}, picture(SIZES["landscape"]), scene=False).axes) == 2
    with pytest.raises(LensError, match="0 maps; expected 1 … 64"):
        maps_page({}, picture(SIZES["landscape"]))
    with pytest.raises(LensError, match="maps_page needs roles"):
        maps_page({"a": grid_of(0, 0)}, picture(SIZES["landscape"]))


@cache
def watched() -> tuple[Any, Any]:
    inputs = model().prepare(QUESTION, picture(SIZES["square"]))
    with torch.no_grad():
        return inputs, model().run_with_cache(inputs)[1]


def test_attention_over_the_picture_is_that_of_the_cache() -> None:
    inputs, cache = watched()
    query = int(inputs.positions_of("circle")[0])
    figure = attention_over_image(cache, picture(SIZES["square"]), 1, [2, 5], position=query)
    panels = [ax for ax in figure.axes if "L1H" in ax.get_title()]
    seen = cache["pattern", 1][0, :, query, inputs.positions("image")]
    for ax, head in zip(panels, (2, 5), strict=True):
        assert np.allclose(np.asarray(ax.images[1].get_array()).flatten(), seen[head].numpy())
        assert ax.get_title() == f"L1H{head}: {float(seen[head].sum()):.0%} on it"
    assert f"'circle' (position {query}) in layer 1" in figure.get_suptitle()
    with torch.no_grad():
        _, alone = model().run_with_cache(inputs, names_filter="blocks.1.attn.hook_pattern", pos_slice=-1)
    last = attention_over_image(alone, picture(SIZES["square"]), 1, 3).axes[0].images[1].get_array()
    assert np.allclose(np.asarray(last).flatten(), cache["pattern", 1][0, 3, -1, inputs.positions("image")].numpy())
    for wrong, said in (((9,), "layer 9; expected 0 … 3"), ((1, 8), "heads=8; expected some of 0 … 7")):
        with pytest.raises(LensError, match=said):
            attention_over_image(cache, picture(SIZES["square"]), *wrong)
    with pytest.raises(LensError, match=r"the cache lacks blocks\.0\.attn\.hook_pattern"):
        attention_over_image(alone, picture(SIZES["square"]), 0)
    with pytest.raises(LensError, match="a pattern of 1 queries"):
        grouped(alone, 1, 0, "together")


@pytest.mark.parametrize("how, n", [("together", 14), ("left out", 13), ("patches", 77)])
def test_the_viewers_tokens_share_all_attention(how: str, n: int) -> None:
    inputs, cache = watched()
    names, patterns = grouped(cache, 2, 0, how)
    assert len(names) == n and patterns.shape == (8, n, n)
    assert how == "left out" or (patterns.sum(-1) - 1).abs().max() < 1e-5
    pattern, image = cache["pattern", 2][0], inputs.positions("image")
    if how == "together":
        at = names.index("<image 0>")
        torch.testing.assert_close(patterns[:, -1, at], pattern[:, -1, image].sum(-1))
        torch.testing.assert_close(patterns[:, at, 0], pattern[:, image, 0].mean(-1))
    if how == "patches":
        assert torch.equal(patterns, pattern) and names[3:5] == ["(0, 0)", "(0, 1)"]


def test_the_viewer_hands_tokens_on_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _, cache = watched()
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(LensError, match=r"needs circuitsvis, which is not installed: .* 'llava-lens\[viewer\]'"):
        attention_viewer(cache, 1)
    with pytest.raises(LensError, match="image='apart'; expected 'together', 'left out' or 'patches'"):
        attention_viewer(cache, 1, image="apart")
    parts = ModuleType("circuitsvis"), ModuleType("circuitsvis.attention")
    parts[1].attention_patterns = lambda tokens, attention: (tokens, attention)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "circuitsvis", parts[0])
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", parts[1])
    tokens, attention = attention_viewer(cache, 1)
    assert tokens == grouped(cache, 1, 0, "together")[0] and attention.shape == (8, 14, 14)


# ---- heat maps


def ticks(axis: Any) -> list[tuple[float, str]]:
    return [(float(tick.get_loc()), tick.label1.get_text()) for tick in axis.get_major_ticks()]


def clear_of_each_other(figure: Any, axis: Any) -> bool:
    """No tick label runs into another one: labels that are turned by 45° stand a line apart instead."""
    figure.canvas.draw()
    texts = [tick.label1 for tick in axis.get_major_ticks()]
    boxes = [text.get_window_extent() for text in texts]
    if texts[0].get_rotation():
        step = min(abs(b.x1 - a.x1) for a, b in pairwise(boxes))
        return step / 2**0.5 > texts[0].get_fontsize() * figure.dpi / 72
    return not any(a.overlaps(b) for a, b in pairwise(boxes))


def named_grid() -> Scores:
    values = torch.tensor([[1.0, 2.0, math.nan], [0.5, 0.0, 1.5]])
    labels = {
        "source": ("image", "question"),
        "destination": ("mlp", "a very long name of a place, much too long", "$x$\n"),
    }
    return Scores(values, ("source", "destination"), labels, "probability")


def test_a_grid_names_its_places_and_leaves_missing_cells_grey() -> None:
    figure = grid(named_grid(), title="knockout")
    ax, bar = figure.axes
    assert ticks(ax.yaxis) == [(0, "image"), (1, "question")]
    assert [name for _, name in ticks(ax.xaxis)] == ["mlp", "a very long name of a p…", r"\$x\$\n"]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("destination", "source", "knockout")
    assert bar.get_ylabel() == "probability" and ax.images[0].get_clim() == (0, 2)
    assert ax.xaxis.get_major_ticks()[0].label1.get_rotation() == 45 and clear_of_each_other(figure, ax.xaxis)
    assert pixel(figure, 2, 0).tolist() == [183] * 3 and len(set(pixel(figure, 1, 0).tolist())) == 3


def test_layers_count_from_the_bottom_and_other_axes_from_the_top() -> None:
    by_layer = Scores(torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), ("layer", "head"))
    for scores, up in ((by_layer, True), (replace(by_layer, axes=("part", "head")), False)):
        ax = grid(scores).axes[0]
        assert (ax.transData.transform((0, 1))[1] > ax.transData.transform((0, 0))[1]) == up
        assert ax.images[0].get_clim() == (-1, 1) and ax.images[0].get_cmap().name == "RdBu_r"


def test_many_places_get_few_ticks_and_numbers_for_names() -> None:
    names = {"position": tuple(f"patch ({i // 24}, {i % 24})" for i in range(616))}
    figure = grid(Scores(torch.rand(32, 616), ("layer", "position"), names))
    ax = figure.axes[0]
    across, up = ticks(ax.xaxis), ticks(ax.yaxis)
    assert across[:2] == [(0, "0"), (50, "50")] and across[-1] == (600, "600")
    assert 5 < len(up) <= 32 and clear_of_each_other(figure, ax.xaxis) and clear_of_each_other(figure, ax.yaxis)
    some = grid(
        Scores(torch.rand(27, 2), ("layer", "head"), {"layer": tuple(range(3, 30))}), ax=new_figure(3, 2).subplots()
    )
    assert ticks(some.axes[0].yaxis)[0] == (2, "5") and ticks(some.axes[0].yaxis)[1] == (7, "10")
    uneven = grid(Scores(torch.rand(3, 2), ("layer", "head"), {"layer": (3, 8, 31)}))
    assert ticks(uneven.axes[0].yaxis) == [(0, "3"), (1, "8"), (2, "31")]


def test_no_cell_is_lost_where_there_are_more_than_pixels() -> None:
    values = torch.zeros(2, 4000)
    values[:, ::2] = 1.0
    ax = new_figure(3, 2).subplots()
    figure = grid(Scores(values, ("layer", "position")), ax=ax)
    shades = np.array([pixel(figure, x, 0) for x in range(200, 3800, 90)])
    assert np.ptp(shades, 0).max() < 60, "half of the cells are 1 everywhere, so that every pixel is halfway"


# ---- curves


def swept(n: int = 12, unit: str = "nats", **labels: Any) -> Scores:
    rows = torch.randn(20, n, generator=torch.Generator().manual_seed(0))
    return Scores(rows, ("batch", "layer"), labels, unit).mean()


def legend(figure: Any) -> list[str]:
    found = figure.axes[0].get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def test_curves_draw_values_bands_and_a_baseline() -> None:
    from matplotlib.collections import PolyCollection

    one, two = swept(), replace(swept(), low=None, high=None)
    figure = curves({"patches": one, "text": two}, title="by layer", baseline=("clean", 0.5))
    ax = figure.axes[0]
    assert [line.get_label() for line in ax.lines if str(line.get_label())[0] != "_"] == ["patches", "text", "clean"]
    assert np.allclose(np.asarray(ax.lines[0].get_ydata()), one.values) and ax.lines[0].get_marker() == "o"
    assert ax.lines[0].get_color() != ax.lines[1].get_color() and ax.lines[0].get_marker() != ax.lines[1].get_marker()
    bands = [each for each in ax.collections if isinstance(each, PolyCollection)]
    corners = np.asarray(bands[0].get_paths()[0].vertices)
    assert len(bands) == 1 and one.low is not None and one.high is not None
    assert corners[:, 1].min() == pytest.approx(float(one.low.min()))
    assert corners[:, 1].max() == pytest.approx(float(one.high.max()))
    assert legend(figure) == ["patches", "text", "clean", "95 % interval\nof the mean, n = 20"]
    dashed = next(line for line in ax.lines if line.get_label() == "clean")
    assert dashed.get_linestyle() == "--" and np.asarray(dashed.get_ydata()).tolist() == [0.5, 0.5]
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("layer", "nats", "by layer")
    assert legend(curves(two)) == [] and legend(curves(two, baseline=1)) == ["baseline"]
    figure.canvas.draw()
    assert not ax.get_legend().get_window_extent().overlaps(ax.get_window_extent())  # type: ignore[union-attr]


def test_the_second_axis_becomes_the_curves() -> None:
    scores = Scores(torch.arange(6.0).reshape(3, 2), ("part", "head"), {"part": ("attn", "mlp", "both")})
    figure = curves(scores)
    assert legend(figure) == ["head 0", "head 1"] and ticks(figure.axes[0].xaxis) == [
        (0, "attn"),
        (1, "mlp"),
        (2, "both"),
    ]
    assert np.asarray(figure.axes[0].lines[1].get_ydata()).tolist() == [1, 3, 5]
    assert legend(curves(replace(scores, labels={"head": ("the", "the")}))) == ["the (0)", "the (1)"]


def test_layers_stand_at_their_numbers() -> None:
    ax = curves(swept(4, layer=(0, 1, 8, 31))).axes[0]
    assert np.asarray(ax.lines[0].get_xdata()).tolist() == [0, 1, 8, 31]
    assert ticks(ax.xaxis) == [(0, "0"), (1, "1"), (8, "8"), (31, "31")]
    long = curves(Scores(torch.rand(616), ("position",)))
    assert ticks(long.axes[0].xaxis)[1] == (50, "50") and clear_of_each_other(long, long.axes[0].xaxis)


def test_a_place_that_stands_alone_keeps_its_interval() -> None:
    from matplotlib.collections import LineCollection

    scores = swept(3)
    holed = replace(scores, values=torch.tensor([1.0, math.nan, 2.0]))
    bars = [each for each in curves(holed).axes[0].collections if isinstance(each, LineCollection)]
    assert scores.low is not None and scores.high is not None
    ends = [[float(scores.low[i]), float(scores.high[i])] for i in (0, 2)]
    assert np.allclose([segment[:, 1] for segment in bars[0].get_segments()], ends)


def test_plot_draws_one_axis_as_curves_and_two_as_a_grid() -> None:
    assert plot(swept(), title="one").axes[0].lines and plot(named_grid()).axes[0].images
    figure = new_figure(6, 3)
    left, right = figure.subplots(1, 2)
    assert plot(swept(), ax=left) is figure and plot(named_grid(), ax=right) is figure


def test_what_no_chart_can_show_is_refused() -> None:
    three = Scores(torch.zeros(2, 2, 2), ("layer", "batch", "head"))
    said = r"3 axes \(layer, batch, head\); expected {}: sum or pick batch, scores.mean\('batch'\) or scores\[{{'batch'"
    for draw, expected in ((plot, "one or two"), (grid, "two")):
        with pytest.raises(LensError, match=said.format(expected)):
            draw(three)
    with pytest.raises(LensError, match=r"expected one or two: sum or pick batch and layer, "):
        curves(three)
    with pytest.raises(
        LensError, match=r"'a' has 3 axes \(layer, batch, head\); expected one: sum or pick batch and layer"
    ):
        curves({"a": three})
    with pytest.raises(LensError, match="expected one or two: this is a single number"):
        plot(three.sum())
    with pytest.raises(LensError, match=r"draw them over the picture: overlay\(scores, image, roles\)"):
        plot(grid_of(1, 1))
    with pytest.raises(LensError, match=r"sum or pick layer, .*; overlay draws patches \(row, col\)"):
        plot(replace(three, axes=("layer", "row", "col")))
    with pytest.raises(LensError, match="9 curves; expected 1 … 8: pick some, or draw two axes with grid"):
        curves(Scores(torch.zeros(2, 9), ("layer", "head")))
    with pytest.raises(LensError, match="0 curves"):
        curves({})
    with pytest.raises(
        LensError, match=r"'b' is layer 0 … 2 \(3 places\) in nats, 'a' layer 0 … 11 \(12 places\) in nats; "
    ):
        curves({"a": swept(), "b": swept(3)})
    with pytest.raises(LensError, match=r"in no unit, 'a' .* in nats; expected the same axis, labels and unit"):
        curves({"a": swept(), "b": swept(unit="")})
