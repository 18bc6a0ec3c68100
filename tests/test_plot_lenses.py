"""Pictures of lenses: every word in its cell or patch, nothing overlaps, colours mean what the bar says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.patches import Rectangle

from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import Lens, logit_lens, visual_words
from llava_lens.errors import LensError
from llava_lens.plots import lens_grid, new_figure, png, words_over_image
from llava_lens.tiny import questions, render_scene

SIZES = {"square": (256, 256), "landscape": (400, 160), "portrait": (150, 420)}


@cache
def run(shape: str) -> tuple[Any, LlavaCache]:
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    picture, question = scene.image.resize(SIZES[shape]), questions(scene)[0]
    with torch.no_grad():
        return picture, model.run_with_cache(model.prepare(question.text, picture, answer=question.stem))[1]


def drawn(figure: Any) -> list[tuple[str, tuple[float, float], Any]]:
    """Every word inside the axes with its place and its box in pixels, labels included."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    found = []
    for text in figure.axes[0].texts:
        patch = text.get_bbox_patch()
        box = text.get_window_extent(renderer) if patch is None else patch.get_window_extent(renderer)
        found.append((text.get_text(), text.get_position(), box))
    return found


def apart(boxes: list[Any]) -> bool:
    return not any(one.overlaps(other) for one, other in combinations([box.padded(-0.5) for box in boxes], 2))


def whole(figure: Any) -> bool:
    """Whether the title and the bar's label are inside the figure."""
    renderer = figure.canvas.get_renderer()
    bar = figure.axes[1]
    texts = (figure._suptitle or figure.axes[0].title, bar.xaxis.label, bar.yaxis.label)
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    return all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)


def test_every_cell_says_its_highest_word_in_the_colour_of_its_probability() -> None:
    _, cache = run("square")
    lens = logit_lens(cache, "question")
    figure = lens_grid(lens)
    words = {(int(x), int(y)): word for word, (x, y), _ in drawn(figure)}
    cells = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_fill()]
    assert len(words) == len(cells) == lens.words[..., 0].size
    grounds = {(round(c.get_x() + 0.5), round(c.get_y() + 0.5)): c.get_facecolor() for c in cells}
    for stream, position in np.ndindex(*lens.words.shape[:2]):
        assert words[position, stream] == lens.words[stream, position, 0]
        expected = colormaps["viridis"](float(lens.values[stream, position, 0].exp()))
        assert grounds[position, stream] == pytest.approx(expected)
    outlined = {(round(p.get_x() + 0.46), round(p.get_y() + 0.44)) for p in figure.axes[0].patches
                if isinstance(p, Rectangle) and not p.get_fill()}  # fmt: skip
    own = lens.scores.method["answer"]
    assert outlined == {place for place, word in words.items() if word == own} and outlined
    answer = lens_grid(lens, color="answer")
    first: Any = answer.axes[0].patches[0]
    assert first.get_facecolor() == pytest.approx(colormaps["viridis"](float(lens.scores.values[0, 0].exp())))
    assert "“blue”" in answer.axes[1].get_ylabel()


@pytest.mark.parametrize("incl_mid", [False, True])
def test_words_stay_in_their_cells_and_nothing_overlaps(incl_mid: bool) -> None:
    _, cache = run("square")
    figure = lens_grid(logit_lens(cache, incl_mid=incl_mid))
    found = drawn(figure)
    assert apart([box for _, _, box in found])
    axes = figure.axes[0]
    for _, (x, y), box in found:
        (left, low), (right, high) = axes.transData.transform([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)])
        assert left <= box.x0 and box.x1 <= right and low <= box.y0 and box.y1 <= high
    assert whole(figure)


def test_of_many_positions_the_last_words_and_the_best_patches_are_drawn() -> None:
    _, cache = run("square")
    lens = logit_lens(cache)
    names = [label.get_text() for label in lens_grid(lens).axes[0].get_xticklabels()]
    best = lens.over_image().scores.values.amax(0).flatten().topk(2).indices.tolist()
    assert names[:2] == [f"patch ({i // 8}, {i % 8})" for i in sorted(best)] and len(names) == 16
    assert names[-1] == "is" == lens.scores.labels_of("position")[-1]
    ticks = lens_grid(lens, positions=[-1, -2, 0, 10]).axes[0].get_xticks()
    assert np.diff(ticks).tolist() == pytest.approx([1.35, 1.35, 1])
    cut = lens_grid(logit_lens(cache, "last"))
    assert drawn(cut)[-1][0] == "blue" and png(cut).startswith(b"\x89PNG")


@pytest.mark.parametrize("shape", SIZES)
def test_the_word_of_a_patch_stands_where_its_pixels_came_from(shape: str) -> None:
    picture, cache = run(shape)
    lens = visual_words(cache, answer="blue")
    figure = words_over_image(lens, picture)
    roles = lens.scores.roles[0] if lens.scores.roles else None
    assert roles is not None
    found = drawn(figure)
    assert len(found) == 64 and apart([box for _, _, box in found])
    for word, (x, y), box in found:
        patch = roles.patch_of_pixel(int(x), int(y)) if 0 <= x < picture.width and 0 <= y < picture.height else None
        if patch is not None:
            assert word == lens.words[patch[0], patch[1], 0]
            left, top, right, bottom = roles.box_of_patch(*patch)
            (x0, y0), (x1, y1) = figure.axes[0].transData.transform([(left, bottom), (right, top)])
            assert x0 <= box.x0 and box.x1 <= x1 and y0 <= box.y0 and box.y1 <= y1
    assert whole(figure)
    limits = (*figure.axes[0].get_xlim(), *figure.axes[0].get_ylim())
    left, top, right, bottom = roles.region()
    assert limits == (min(left, 0), max(right, picture.width), max(bottom, picture.height), min(top, 0))


def test_a_lens_of_positions_is_drawn_over_the_picture_too() -> None:
    picture, cache = run("square")
    lens = logit_lens(cache)[{"stream": 2}]
    over = words_over_image(lens, picture)
    assert [w for w, *_ in drawn(over)] == list(lens.over_image().words[..., 0].flatten())
    ax = new_figure(6, 6).subplots()
    assert words_over_image(lens, picture, ax=ax, title="mine") is ax.get_figure() and ax.get_title() == "mine"


def test_long_and_strange_words_fit() -> None:
    picture, cache = run("square")
    lens = visual_words(cache, answer="blue")
    names = ["extraordinarily", "$x_1$", " ", "\n", "mmmmmmmmm", "a"]
    odd = replace(lens, strings={i: names[i % len(names)] for i in lens.strings})
    ax = new_figure(3.2, 3.9).subplots()
    assert apart([box for _, _, box in drawn(words_over_image(odd, picture, ax=ax))])
    grid = logit_lens(cache, "question")
    odd = replace(grid, strings={i: names[i % len(names)] for i in grid.strings})
    assert apart([box for _, _, box in drawn(lens_grid(odd))])


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda lens, picture: lens_grid(lens.over_image()), "expected .'stream' or 'layer', 'position'."),
        (lambda lens, picture: lens_grid(lens, color="red"), "color='red'; expected 'top' or 'answer'"),
        (lambda lens, picture: lens_grid(lens, positions=[99]), "places along the lens"),
        (lambda lens, picture: words_over_image(lens.over_image(), picture), r"pick one, lens\[{'stream': 0}\]"),
        (lambda lens, picture: words_over_image(lens[{"stream": 0}], picture.resize((99, 99))), r"\(99, 99\)"),
        (lambda lens, picture: words_over_image(bare(lens.over_image()[{"stream": 0}]), picture), "needs? roles|need"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw: Any, message: str) -> None:
    picture, cache = run("square")
    with pytest.raises(LensError, match=message):
        draw(logit_lens(cache), picture)


def bare(lens: Lens) -> Lens:
    return replace(lens, scores=replace(lens.scores, roles=None))
