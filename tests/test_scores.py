"""Scores: intervals go wherever values go, means are paired and sure of what they say, differences fit place by place.

The sums, picks and files of scores without intervals are in `test_attribution.py`.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

from llava_lens.analysis import Scores
from llava_lens.analysis.intervals import bootstrap
from llava_lens.analysis.scores import stacked
from llava_lens.errors import LensError
from llava_lens.pictures import Picture
from llava_lens.roles import Roles

ROLES = Roles(("system", "image", "image", "question"), ("<s>", "<image>", "<image>", "dog"), (Picture((1, 2)),))
OTHER = Roles(
    ("system", "image", "image", "question"), ("<s>", "<image>", "<image>", "cat"), (Picture((1, 2)),), "cat?"
)


def sure() -> Scores:
    values = torch.tensor([[0.5, -1.0, math.nan, 3.0], [2.0, 0.25, 0.0, -2.0]])
    labels = {"position": ("<s>", "patch (0, 0)", "patch (0, 1)", "dog")}
    ends = {"low": values - 0.25, "high": values + 0.5}
    return Scores(values, ("layer", "position"), labels, "nats", {"answer": "red"}, 1e-7, (ROLES,), **ends)


def check_ends(scores: Scores) -> None:
    """The interval of every value is still its own."""
    assert scores.low is not None and scores.high is not None
    assert torch.equal((scores.values - 0.25).nan_to_num(9), scores.low.to(scores.values).nan_to_num(9))
    assert torch.equal((scores.values + 0.5).nan_to_num(9), scores.high.to(scores.values).nan_to_num(9))


def sample(n: int = 20, *cells: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, *cells, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- intervals travel with values


def test_intervals_are_picked_and_gridded_with_their_values() -> None:
    scores = sure()
    check_ends(scores)
    for picked in (scores[{"position": slice(1, 3), "layer": 1}], scores[{"layer": -1}], scores.over_image()):
        check_ends(picked)
    assert scores.over_image().values.shape == (2, 1, 2)
    twice = stacked([scores, scores])
    check_ends(twice)
    check_ends(twice.over_image())
    assert stacked([scores, replace(scores, low=None, high=None)]).low is None


def test_a_sum_has_no_interval() -> None:
    assert sure().sum("layer").low is None and sure().sum("layer").high is None


def test_intervals_survive_a_file_and_older_files_have_none(tmp_path: Any) -> None:
    sure().save(tmp_path / "scores.json")
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    check_ends(Scores.load(tmp_path / "scores.json"))
    older = {key: value for key, value in sure().to_json().items() if key not in ("low", "high")}
    again = Scores.from_json(older)
    assert again.low is None and again.high is None and again.axes == sure().axes
    with pytest.raises(LensError, match="infinite scores cannot be written"):
        replace(sure(), high=sure().values + math.inf).to_json()


def test_intervals_that_do_not_fit_are_refused() -> None:
    values = torch.zeros(2)
    with pytest.raises(LensError, match="low without high; expected both or neither"):
        Scores(values, ("layer",), low=values)
    with pytest.raises(LensError, match="high without low; expected both or neither"):
        Scores(values, ("layer",), high=values)
    with pytest.raises(LensError, match=r"high of \[3\] for values \[2\]; expected one per value"):
        Scores(values, ("layer",), low=values, high=torch.zeros(3))


def test_intervals_are_kept_without_their_graph() -> None:
    values = torch.zeros(2, requires_grad=True)
    scores = Scores(values, ("layer",), low=values * 1, high=values * 2)
    assert not any(each.requires_grad for each in (scores.values, scores.low, scores.high) if each is not None)


def test_intervals_are_printed() -> None:
    lines = repr(sure()).splitlines()
    assert lines[1].split() == ["layer", "position", "score", "95", "%"]
    assert lines[2].split(maxsplit=3) == ["0", "dog", "+3", "[+2.75, +3.5]"]
    assert repr(sure()[{"layer": 1, "position": 1}]).splitlines()[1] == "+0.25 [+0, +0.75]"
    assert "95 %" not in repr(replace(sure(), low=None, high=None))
    many = replace(sure(), method={"answer": ["red"] * 50})
    assert "answer [red, red, red, red, … 50 in all]" in repr(many)


# ---- means


def test_a_mean_is_the_mean_and_knows_its_sample() -> None:
    rows = sample(20, 3, 4)
    labels = {"head": ("a", "b", "c", "d")}
    mean = Scores(rows, ("batch", "layer", "head"), labels, "nats", {"score": "x"}, 1e-6).mean()
    torch.testing.assert_close(mean.values, rows.mean(0))
    assert (mean.axes, mean.labels, mean.unit, mean.closure) == (("layer", "head"), labels, "nats", 1e-6)
    assert mean.method == {"score": "x", "n": 20}
    assert mean.low is not None and mean.high is not None
    assert bool((mean.low < mean.values).all()) and bool((mean.values < mean.high).all())
    assert Scores(rows.float(), ("batch", "layer", "head")).mean().values.dtype == torch.float32


def test_of_several_axes_the_first_is_the_sample() -> None:
    scores = Scores(sample(5, 7, 3), ("layer", "batch", "head"), closure=1e-6)
    both = scores.mean(("batch", "head"))
    by_hand = Scores(scores.values.mean(2), ("layer", "batch")).mean()
    assert both.axes == ("layer",) and both.method["n"] == 7 and both.closure is None
    for ours, theirs in ((both.values, by_hand.values), (both.low, by_hand.low), (both.high, by_hand.high)):
        torch.testing.assert_close(ours, theirs)
    assert scores.mean("layer").method["n"] == 5
    assert scores.mean(["head", "batch", "layer"]).values.shape == ()


def test_the_interval_is_that_of_a_plain_loop() -> None:
    rows = sample(9, 2)
    low, high = bootstrap(rows, seed=3, resamples=200)
    drawn = torch.randint(9, (200, 9), generator=torch.Generator().manual_seed(3))
    means = torch.stack([rows[chosen].mean(0) for chosen in drawn])
    torch.testing.assert_close(low, means.quantile(0.025, 0))
    torch.testing.assert_close(high, means.quantile(0.975, 0))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """1500 samples of 60 skewed numbers with mean 1; the exact rate is near 0.94, four standard errors are 0.025."""
    rows = -torch.rand(60, 1500, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log()
    low, high = bootstrap(rows)
    covered = ((low <= 1) & (high >= 1)).double().mean()
    assert 0.90 < covered < 0.97, covered
    narrow = float((high - low).mean()) / (2 * 1.96 * 60**-0.5)
    assert 0.9 < narrow < 1.05, narrow


def test_all_cells_are_averaged_over_the_same_rows() -> None:
    row = sample(30)
    scores = Scores(torch.stack((row, row + 5, -row), 1), ("batch", "layer")).mean()
    low, high = scores.low, scores.high
    assert low is not None and high is not None
    torch.testing.assert_close(low[1], low[0] + 5)
    torch.testing.assert_close((low[2], high[2]), (-high[0], -low[0]))
    again = Scores(row[:, None], ("batch", "layer")).mean()
    assert again.low is not None and again.low[0] == low[0]
    other = Scores(row[:, None], ("batch", "layer")).mean(seed=1)
    assert other.low is not None and other.low[0] != low[0]


def test_blocks_of_cells_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sample(6, 5, 3)
    whole = bootstrap(rows)
    monkeypatch.setattr("llava_lens.analysis.intervals.BLOCK", 4)
    for ours, theirs in zip(bootstrap(rows), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_rows_have_an_interval_of_their_value() -> None:
    mean = Scores(torch.full((10, 2), 0.1, dtype=torch.float64), ("batch", "layer")).mean()
    assert mean.low is not None and mean.high is not None
    assert torch.equal(mean.low, mean.values) and torch.equal(mean.high, mean.values)


def test_one_row_has_no_interval() -> None:
    mean = Scores(sample(1, 3), ("batch", "layer")).mean()
    assert mean.low is None and mean.high is None and mean.method["n"] == 1


def test_cells_that_were_not_swept_stay_empty_and_torn_ones_are_refused() -> None:
    rows = sample(4, 2, 2)
    rows[:, 1, 0] = math.nan
    scores = Scores(rows, ("batch", "layer", "head"), {"head": ("a", "b")})
    mean = scores.mean()
    for each in (mean.values, mean.low, mean.high):
        assert each is not None and each.isnan().tolist() == [[False, False], [True, False]]
    rows[2, 0, 1] = math.nan
    said = "1 of the 4 scores over batch are not finite at layer 0, head 'b'; expected numbers, or NaN in all of them"
    with pytest.raises(LensError, match=said):
        scores.mean()
    with pytest.raises(LensError, match="8 scores over batch, layer are not finite at head 'a'"):
        scores.mean(("batch", "layer"))
    with pytest.raises(LensError, match="4 of the 4 scores over batch are not finite; expected"):
        Scores(torch.full((4,), math.inf), ("batch",)).mean()


def test_means_that_cannot_be_are_refused() -> None:
    scores = Scores(sample(4, 2), ("batch", "layer"))
    with pytest.raises(LensError, match="no axis 'bach'; nearest: 'batch'; the axes are batch, layer"):
        scores.mean("bach")
    with pytest.raises(
        LensError, match=r"mean over the axes \('layer', 'layer'\); expected one or more of batch, layer"
    ):
        scores.mean(("layer", "layer"))
    with pytest.raises(LensError, match="no places along batch; a mean takes at least one"):
        scores[{"batch": slice(0, 0)}].mean()


def test_roles_stay_where_all_rows_have_the_same() -> None:
    axes, rows = ("batch", "position"), sample(2, 4)
    assert Scores(rows, axes, roles=(ROLES, ROLES)).mean().roles == (ROLES,)
    mixed = Scores(rows, axes, roles=(ROLES, OTHER)).mean()
    assert mixed.roles == (Roles(ROLES.labels, (), ROLES.pictures),)
    assert mixed.over_image().low is not None
    shifted = Roles(("image", "image", "system", "question"), ROLES.tokens, ROLES.pictures)
    upright = Roles(ROLES.labels, ROLES.tokens, (Picture((2, 1)),))
    for other in (shifted, upright):
        assert Scores(rows, axes, roles=(ROLES, other)).mean().roles is None
    assert Scores(rows, axes, roles=(ROLES, OTHER)).mean("position").roles is None
    three = Scores(sample(2, 3, 4), ("batch", "layer", "position"), roles=(ROLES, OTHER))
    assert three.mean("layer").roles == (ROLES, OTHER)


# ---- differences


def test_a_difference_is_paired_and_says_what_was_taken_away() -> None:
    shared = sample(30) * 10
    noise = sample(30, seed=1) * 0.1
    a = Scores(shared + 1 + noise, ("batch",), unit="nats", method={"score": "x", "knockout": "image"}, closure=1e-6)
    b = Scores(shared, ("batch",), unit="nats", method={"score": "x", "knockout": None}, closure=2e-6)
    gap = a - b
    assert gap.method == {"score": "x", "knockout": "image", "minus": [{"knockout": None}]} and gap.unit == "nats"
    assert gap.closure == pytest.approx(3e-6) and (gap - b).method["minus"] == [{"knockout": None}] * 2
    json.dumps(gap.to_json())
    mean = gap.mean()
    assert mean.low is not None and mean.high is not None
    assert 0.9 < mean.low < mean.high < 1.1  # the rows' own spread of ±10 would make it ±3
    assert (sure() - sure()).low is None and (sure() - sure()).roles == (ROLES,)
    assert (sure() - replace(sure(), roles=None)).roles is None
    assert (sure() - replace(sure(), closure=None)).closure is None


def test_differences_of_what_does_not_fit_are_refused() -> None:
    scores = Scores(torch.zeros(2, 3), ("layer", "head"), {"head": ("a", "b", "c")}, "nats")
    with pytest.raises(LensError, match=r"\('layer', 'head'\) in nats minus scores over \('head',\) in nats; expected"):
        _ = scores - scores.sum("layer")
    with pytest.raises(LensError, match=r"in nats minus .* in no unit; expected the same axes and unit"):
        _ = scores - replace(scores, unit="")
    with pytest.raises(LensError, match="place 1 of 'head' is 'b' minus 'x'; expected the same labels"):
        _ = scores - replace(scores, labels={"head": ("a", "x", "c")})
    with pytest.raises(LensError, match="2 places of 'layer' minus 1; expected the same labels"):
        _ = scores - scores[{"layer": slice(0, 1)}]
    assert (scores - replace(scores, labels={**scores.labels, "layer": (0, 1)})).values.abs().max() == 0


def test_facts_that_only_some_rows_have_are_kept_when_stacked() -> None:
    one, two = (Scores(torch.zeros(1), ("layer",), method=method) for method in ({"a": 1}, {"a": 1, "b": 2}))
    assert stacked([one, two]).method == {"a": 1, "b": [None, 2]}
    assert stacked([two, one]).method == {"a": 1, "b": [2, None]}


# ---- frames


def test_a_frame_has_a_row_per_score() -> None:
    frame = sure().to_frame()
    assert list(frame.columns) == ["layer", "position", "score", "low", "high"] and len(frame) == 8
    row = frame[(frame.layer == 1) & (frame.position == "patch (0, 0)")].iloc[0]
    assert (row.score, row.low, row.high) == (0.25, 0.0, 0.75)
    assert frame.score.isna().sum() == 1
    bare = replace(sure(), low=None, high=None)
    assert list(bare.to_frame().columns) == ["layer", "position", "score"]
    assert bare.sum("layer")[{"position": 0}].to_frame().score.tolist() == [2.5]


def test_a_frame_without_pandas_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(LensError, match="needs pandas, which is not installed: pip install pandas"):
        sure().to_frame()


def test_effects_are_taken_against_the_baseline():
    scores = Scores(torch.tensor([[1.0, 4.0], [2.0, 8.0]]), ("batch", "layer"), method={"baseline": [1.0, 2.0]})
    assert scores.effect().values.tolist() == [[0.0, 3.0], [0.0, 6.0]] and scores.effect().method["baseline"] == 0
    one = Scores(
        torch.tensor([3.0]), ("layer",), method={"baseline": 1.0}, low=torch.tensor([2.0]), high=torch.tensor([5.0])
    )
    moved = one.effect()
    assert moved.low is not None and moved.high is not None
    assert (moved.values.item(), moved.low.item(), moved.high.item()) == (2.0, 1.0, 4.0)
    with pytest.raises(LensError, match=r"take effect\(\) before mean\(\)"):
        scores.mean().effect()
    with pytest.raises(LensError, match="no baseline"):
        Scores(torch.zeros(1), ("layer",)).effect()


def test_the_largest_either_way():
    scores = Scores(torch.tensor([1.0, -3.0, float("nan"), 2.0]), ("layer",))
    assert [entry.value for entry in scores.top(2, absolute=True)] == [-3.0, 2.0]


# ---- labels, and notebooks


def test_places_are_found_by_their_labels() -> None:
    values = torch.arange(6.0).reshape(2, 3)
    scores = Scores(values, ("layer", "part"), {"layer": (3, 8), "part": ("attn", "mlp", "attn")}, "nats")
    assert torch.equal(scores[{"part": "mlp"}].values, values[:, 1])
    assert torch.equal(scores.sel(layer=8).values, values[1]) and float(scores.sel(layer=3, part="mlp").values) == 1
    assert torch.equal(scores[{"layer": 1}].values, scores.sel(layer=8).values), "a number in [] counts places"
    with pytest.raises(LensError, match=r"part 'mpl' is not there; nearest: 'mlp'"):
        scores[{"part": "mpl"}]
    with pytest.raises(LensError, match=r"part 'attn' is the name of 2 places, \[0, 2\]; take one by its number"):
        scores[{"part": "attn"}]
    with pytest.raises(LensError, match="layer 5 is not there"):
        scores.sel(layer=5)
    with pytest.raises(LensError, match="no axis 'head'"):
        scores.sel(head=1)
    rows = Scores(values, ("batch", "position"), {"batch": ("a", "b")}, roles=(ROLES, OTHER))
    assert rows[{"batch": "b"}].roles == (OTHER,)


class Read(HTMLParser):
    """The cells of a grid and of a table, and every tag."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "i":
            facts = dict(attrs)
            self.cells.append((facts["title"] or "", facts["style"] or ""))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_notebook_shows_signed_cells_and_text_stays_text() -> None:
    values = torch.tensor([[1.0, -0.5], [0.0, math.nan]])
    labels = {"head": ("<script>alert(1)</script>", 'say "hi"')}
    scores = Scores(values, ("layer", "head"), labels, "nats", {"answer": "<b>red"})
    read = Read(scores._repr_html_())
    assert "script" not in read.tags and "b" not in read.tags
    assert any("<script>alert(1)</script>" in word for word in read.words)
    told = {title: style for title, style in read.cells}
    assert next(iter(told)).startswith("layer 1"), "layer counts from the bottom, so the last comes first"
    one = next(style for title, style in told.items() if title.endswith("+1 nats"))
    half = next(style for title, style in told.items() if title.endswith("-0.5 nats"))
    zero = next(style for title, style in told.items() if title.endswith("+0 nats"))
    assert "rgba(178,24,43,1.00)" in one and "rgba(33,102,172,0.50)" in half and ",0.00)" in zero
    assert "nan" in next(t for t in told if 'say "hi"' in t and t.startswith("layer 1"))


def test_a_notebook_shows_no_grid_of_what_is_large_or_has_other_axes() -> None:
    for shape, axes in (((3, 200), ("layer", "position")), ((4,), ("layer",)), ((), ())):
        read = Read(Scores(torch.rand(shape), axes)._repr_html_())
        assert read.cells == [] and "table" in read.tags
    assert Read(Scores(torch.zeros(2, 0), ("layer", "head"))._repr_html_()).cells == []


@pytest.mark.parametrize("place", [slice(None, None, -1), slice(None, None, 0), True, 3, -4])
def test_places_that_there_are_not_are_refused(place):
    scores = Scores(torch.arange(12.0).reshape(3, 4), ("layer", "head"))
    with pytest.raises(LensError, match=r"^layer .*; expected"):
        scores[{"layer": place}]
    with pytest.raises(LensError, match="the top -1"):
        scores.top(-1)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"axes": 3}', "\x00"])
def test_a_file_that_holds_no_scores_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(LensError, match=r"a.json was not written by save: \w+: "):
        Scores.load(tmp_path / "a.json")
