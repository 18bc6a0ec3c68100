"""The page: one file without a network, every text escaped, every map where its pixels came from."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llava_lens import Explanation, HookedLlava, explain
from llava_lens.analysis import Scores
from llava_lens.errors import LensError
from llava_lens.page import explanation_page
from llava_lens.page.parts import bars
from llava_lens.pictures import Axis, Picture, PixelMap
from llava_lens.plots.canvas import colour_limits, painted
from llava_lens.tiny import render_scene

QUESTION = "What is the color of the circle?"
SIZE = (400, 160)
VOID = {"meta", "img", "input", "br", "line", "rect"}


def picture() -> Image.Image:
    return render_scene(3).image.resize(SIZE)


@cache
def explained() -> Explanation:
    model = HookedLlava.tiny()
    inputs = model.prepare(QUESTION, picture())
    return explain(model, inputs, versus="blue", by=("layer", "head", "neuron", "source"), method="dla")


class Page(HTMLParser):
    """Tags with their attributes and the text inside each; fails where tags do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag, f"</{tag}> in {self.open}"

    def handle_data(self, data: str) -> None:
        self.words.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        found = [attrs for name, attrs in self.tags if name == tag]
        return [attrs for attrs in found if not kind or kind in (attrs.get("class") or "").split(" ")]

    @property
    def text(self) -> str:
        return " ".join(data for tag, data in self.words if tag not in ("style", "script"))


def drawn(address: str | None) -> np.ndarray:
    assert address is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def box_of(style: str | None, region: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """The box of the original's pixels that a style places in a panel showing the picture and the region."""
    at = {name: float(share) / 100 for name, share in re.findall(r"(\w+):(-?[\d.]+)%", style or "")}
    x0, y0 = min(region[0], 0.0), min(region[1], 0.0)
    wide, high = max(region[2], SIZE[0]) - x0, max(region[3], SIZE[1]) - y0
    left, top = x0 + at["left"] * wide, y0 + at["top"] * high
    return left, top, left + at["width"] * wide, top + at["height"] * high


def test_the_page_is_whole_and_needs_no_network() -> None:
    text = explanation_page(explained(), picture(), "llava-lens explain a.png 'b'")
    page = Page(text)
    for _, attrs in page.tags:
        for name in ("src", "href", "action", "data"):
            assert (attrs.get(name) or "data:").startswith("data:")
    assert "http" not in text and "url(" not in text and "@import" not in text and "import(" not in text
    assert len(page.all("script")) == 1 and "src" not in page.all("script")[0]
    e = explained()
    for said in (QUESTION, e.answer, "blue", f"{e.lead:+.3f}", "llava-lens explain a.png 'b'", "final_post", "dla"):
        assert said in page.text, said
    for entry in e.top_heads:
        assert f"L{entry.place[0]}H{entry.place[1]}" in page.text and f"{entry.value:+.4f}" in page.text
    assert page.text.count(" neuron ") >= 10 and " ← " in page.text
    assert {name for name, _ in page.tags} >= {"table", "svg", "figure", "input", "pre"}


def test_without_a_command_and_neurons_their_parts_are_left_out() -> None:
    e = replace(explained(), direct={}, neurons=None, versus=None, lead=None)
    text = Page(explanation_page(e, picture())).text
    assert "Again" not in text and "Neurons" not in text and "Compared" not in text


def test_every_text_stays_text() -> None:
    bad = '</title><script>alert("1")</script>\'"&<img src=x onerror=1>'
    e = replace(
        explained(), question=bad, text=bad, answer=bad, versus=bad, model=bad, about=bad, likeliest=((bad, 0.5),)
    )
    e = replace(e, roles=replace(e.roles, text=bad))
    page = Page(explanation_page(e, picture(), bad))
    assert len(page.all("script")) == 1 and not any("onerror" in attrs for _, attrs in page.tags)
    assert len(page.all("img")) == 5 and page.text.count(bad) >= 8


def test_letters_that_are_no_text_are_spelled_out() -> None:
    bad = "a\x00b\x1b[2J\u202ec\ud800"
    e = replace(explained(), question=bad, text=bad, answer=bad, versus=bad, likeliest=((bad, 0.5), ("b", 0.2)))
    text = explanation_page(e, picture(), bad)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert text.encode() and r'<h1 dir="auto">a\x00b\x1b[2J\u202ec\ud800</h1>' in text
    assert "👩\u200d💻" in explanation_page(replace(e, question="👩\u200d💻"), picture())


def test_the_page_holds_the_pictures_pixels_alone_and_few_of_them(tmp_path: Path) -> None:
    taken, large = Image.Exif(), picture().resize((1600, 640))
    taken[0x010E] = "SECRET"
    large.save(tmp_path / "large.jpg", exif=taken, comment=b"SECRET", dpi=(72, 72))
    wide, tall = (Axis(size=n, pad=0, padded=n, resized=64, crop=0, n=8, patch=8) for n in large.size)
    e = explained()
    e = replace(e, roles=replace(e.roles, pictures=(Picture((8, 8), False, PixelMap(wide, tall)),)))
    page = Page(explanation_page(e, tmp_path / "large.jpg"))
    held = [base64.b64decode((each["src"] or "").partition(",")[2]) for each in page.all("img")]
    assert len(held) == 5 and not any(b"SECRET" in each for each in held)
    assert [max(drawn(each["src"]).shape) for each in page.all("img", "under")] == [1200, 600, 600]


def padded() -> Explanation:
    """As if the picture had been padded to a square, so that patches stick out of it above and below."""
    tall = Axis(size=160, pad=120, padded=400, resized=64, crop=0, n=8, patch=8)
    wide = Axis(size=400, pad=0, padded=400, resized=64, crop=0, n=8, patch=8)
    e = explained()
    return replace(e, roles=replace(e.roles, pictures=(Picture((8, 8), False, PixelMap(wide, tall)),)))


@pytest.mark.parametrize("make", [explained, padded])
def test_maps_are_painted_where_their_pixels_came_from(make: Callable[[], Explanation]) -> None:
    e = make()
    page = Page(explanation_page(e, picture()))
    overs = page.all("img", "over")
    assert len(overs) == 2
    region = e.roles.region()
    for over, scores in zip(overs, (e.map, e.patch_attention()), strict=True):
        assert np.array_equal(drawn(over["src"]), painted(scores.values.double().numpy(), scores is e.map))
        assert box_of(over["style"], region) == pytest.approx(region, abs=0.1)
    row, col = e.map.top(1)[0].place
    best = page.all("div", "best")[0]["style"]
    assert box_of(best, region) == pytest.approx(e.roles.box_of_patch(row, col), abs=0.1)
    told = [json.loads(figure["data-values"] or "") for figure in page.all("figure") if "data-values" in figure]
    assert np.allclose(np.array(told[0], float), e.map.values.numpy(), rtol=1e-3)
    under = drawn(page.all("img", "under")[0]["src"]).astype(int)
    assert under.shape[:2] == SIZE[::-1] and np.abs(under - np.asarray(picture().convert("RGB"))).mean() < 4


def test_bars_are_as_tall_as_the_scores_and_stand_on_their_side_of_zero() -> None:
    values = torch.tensor([[2.0, -1.0], [0.5, 0.0], [-3.0, 1.5]], dtype=torch.float64)
    page = Page(bars(Scores(values, ("layer", "part"), {"part": ("attn", "mlp")}, "nats")))
    rects = [{name: float(rect[name] or 0) for name in ("x", "y", "height")} for rect in page.all("rect")]
    tall = np.array([rect["height"] for rect in rects])
    assert np.allclose(tall / tall.max(), values.abs().flatten().numpy() / 3, atol=0.002)
    zero = float(page.all("line")[0]["y1"] or 0)
    for rect, value in zip(rects, values.flatten().tolist(), strict=True):
        assert rect["y"] + (rect["height"] if value > 0 else 0) == pytest.approx(zero, abs=0.11)
    assert [rect["x"] for rect in rects] == sorted(rect["x"] for rect in rects)
    assert "layer 2 mlp: +1.5000 nats" in page.text


def test_another_pictures_size_is_refused() -> None:
    with pytest.raises(LensError, match=r"a picture of \(9, 9\)"):
        explanation_page(explained(), Image.new("RGB", (9, 9)))


def test_painted_colours_are_those_of_the_charts() -> None:
    import matplotlib

    values = np.array([[-2.0, 0.0, 1.0]])
    look = colour_limits(values)
    wanted = matplotlib.colormaps[look["cmap"]]((values + 2) / 4, bytes=True)[..., :3]
    assert np.array_equal(painted(values), wanted)
    plain = painted(np.array([[0.0, 4.0]]))[0]
    assert plain[0].tolist() == [68, 1, 84] and plain[1].tolist() == [253, 231, 36]
