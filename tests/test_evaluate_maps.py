"""Maps are scored on the tiny model as by hand, paired, resumable, and nothing half counted; the report says it all."""

from __future__ import annotations

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llava_lens import HookedLlava
from llava_lens.analysis import Scores
from llava_lens.analysis.intervals import bootstrap
from llava_lens.errors import LensError
from llava_lens.maps.case import Case, Runs
from llava_lens.maps.evaluate import MapItem, MapReport, evaluate_maps, labelled
from llava_lens.maps.items import Kept
from llava_lens.maps.masking import Masking
from llava_lens.tiny import questions, render_scene

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import maps
from benchmarks.rows import machine

MODEL = HookedLlava.tiny()
QUICK = {"steps": 2, "k": (0.1,), "progress": False}


def items_of(seed: int) -> list[MapItem]:
    """The scene's questions for a colour, one of each object that has a shape of its own."""
    scene = render_scene(seed)
    asked = [question for question in questions(scene) if question.text.startswith("What is the color")]
    return [MapItem(MODEL.prepare(q.text, scene.image), mask=scene.objects[q.about[0]].mask) for q in asked if q.about]


ITEMS = [
    replace(first, contrast=second, name=f"scene {seed}")
    for seed in (4_000_000, 4_000_002)
    for first, second, *_ in [items_of(seed)]
]


def oracle(case: Case) -> torch.Tensor:
    """1 on every patch of the upper left quarter, however the question goes."""
    rows, cols = case.grid
    grid = torch.zeros(rows, cols)
    grid[: rows // 2, : cols // 2] = 1
    return grid.flatten()


@pytest.fixture(scope="module")
def report() -> MapReport:
    return evaluate_maps(MODEL, ITEMS, ["random", "attention", oracle], **QUICK)


def place(report: MapReport, method: str, measure: str) -> torch.Tensor:
    return report.items.values[:, report.methods.index(method), report.measures.index(measure)]


# ---- what is measured


@torch.no_grad()
def test_deletion_and_insertion_are_those_of_runs_by_hand(report):
    from llava_lens.maps import importance_map

    for i, item in enumerate(ITEMS):
        scores = importance_map(MODEL, item.inputs, "attention").values.flatten()
        order = scores.argsort(descending=True).tolist()
        case = Case.of(MODEL, item.inputs)
        for operator in ("pixel", "embedding", "attention"):
            curve = {"deletion": 0.0, "insertion": 0.0}
            counts = [0, 1, 6, 32, 64]
            for name in curve:
                probs = []
                for count in counts:
                    kept = torch.full((1, 64), name == "deletion")
                    kept[0, order[:count]] = name == "insertion"
                    probs.append(float(Masking(case, operator).run(kept).prob))
                curve[name] = sum(
                    (b - a) / 64 * (p + q) / 2 for a, b, p, q in zip(counts, counts[1:], probs, probs[1:], strict=False)
                )
                assert float(place(report, "attention", f"{name}/{operator}")[i]) == pytest.approx(
                    curve[name], abs=1e-5
                )


def test_masks_and_chance_are_those_of_the_exact_patches(report):
    for i, item in enumerate(ITEMS):
        mask = item.inputs.roles[0].patches_of_mask(item.mask).flatten()
        quarter = oracle(Case.of(MODEL, item.inputs)).bool()
        share = float((mask & quarter).sum() / quarter.sum())
        assert float(place(report, "oracle", "pointing")[i]) == pytest.approx(share)
        assert float(place(report, "oracle", "energy")[i]) == pytest.approx(share)
        chance = report.chance.values[i, report.measures.index("pointing")]
        assert float(chance) == pytest.approx(float(mask.double().mean()))
    assert float(report.chances.values[report.measures.index("deletion/pixel")].isnan())


def test_what_knows_nothing_of_question_and_weights_is_found_out(report):
    for method in ("oracle", "random"):
        assert torch.equal(place(report, method, "contrast_correlation"), torch.ones(2).double())
        assert torch.equal(place(report, method, "contrast_moved"), torch.zeros(2).double())
        assert torch.equal(place(report, method, "randomised"), torch.ones(2).double())
    assert (place(report, "attention", "contrast_correlation") < 0.99).all()
    assert (place(report, "attention", "randomised_size") < 0.9).all()
    assert torch.equal(place(report, "attention", "randomised_size"), place(report, "attention", "randomised").abs())


def test_costs_are_counted_and_memory_that_cannot_be_measured_is_nan(report):
    cost = report.cost.values
    assert cost[report.methods.index("random"), :2].tolist() == [0, 0]
    assert cost[report.methods.index("attention"), :2].tolist() == [1, 0]
    assert (cost[:, 2] > 0).all() and cost[:, 3].isnan().all()


def test_memory_is_measured_once_for_each_method():
    calls = []

    def memory(run) -> int:
        run()
        calls.append(1)
        return 1000 * len(calls)

    found = evaluate_maps(
        MODEL, ITEMS, ["random", "centre"], memory=memory, sanity=False, operators=("attention",), **QUICK
    )
    assert found.cost.values[:, 3].tolist() == [1000.0, 2000.0] and len(calls) == 2
    assert found.costs.values[1, :, 3].isnan().all()


def test_an_additive_model_behind_every_operator(monkeypatch):
    """The map of what each patch is worth has the best deletion and insertion there can be."""
    worth = torch.rand(64, generator=torch.Generator().manual_seed(1)).double() / 64

    def run(self, kept):
        prob = kept.double() @ worth
        return Runs(prob, prob, torch.zeros(len(kept), dtype=torch.long))

    monkeypatch.setattr(Masking, "run", run)
    methods = {"truth": lambda case: worth, "backwards": lambda case: -worth, "centre": "centre"}
    found = evaluate_maps(MODEL, ITEMS[:1], methods, sanity=False, steps=64, k=(0.5,), progress=False)
    ranked = worth.sort(descending=True).values
    left = torch.cat([torch.zeros(1).double(), ranked.cumsum(0)])
    insertion = float((left[1:] + left[:-1]).sum()) / 2 / 64
    for operator in ("pixel", "embedding", "attention"):
        assert float(place(found, "truth", f"insertion/{operator}")) == pytest.approx(insertion)
        assert float(place(found, "truth", f"deletion/{operator}")) == pytest.approx(float(worth.sum()) - insertion)
        assert float(place(found, "backwards", f"deletion/{operator}")) == pytest.approx(insertion)
        half = float(place(found, "truth", f"comprehensiveness@0.5/{operator}"))
        assert half == pytest.approx(float(ranked[:32].sum()))
        assert float(place(found, "truth", f"occlusion/{operator}")) == pytest.approx(1.0)
        assert found.best(f"deletion/{operator}") == "truth"


def test_one_run_call_for_each_operator_and_item(monkeypatch):
    calls, real = [], Masking.run

    def run(self, kept):
        calls.append((self.operator, len(kept)))
        assert len(kept.unique(dim=0)) == len(kept)
        return real(self, kept)

    monkeypatch.setattr(Masking, "run", run)
    evaluate_maps(MODEL, ITEMS, ["random", "centre"], operators=("attention", "pixel"), sanity=False, **QUICK)
    assert [operator for operator, _ in calls] == ["attention", "pixel"] * 2


# ---- pairs and intervals


def made(values: torch.Tensor, **facts) -> MapReport:
    """A report of given values `[item, method, measure]`."""
    n, methods, measures = values.shape
    names = ("deletion/pixel", "pointing", "contrast_moved")[:measures]
    labels = {"item": tuple(f"{i}" for i in range(n)), "method": tuple("abcd"[:methods]), "measure": names}
    two = {axis: labels[axis] for axis in ("item", "measure")}
    costs = torch.zeros(n, methods, 4)
    return MapReport(
        Scores(values, ("item", "method", "measure"), labels, method={"seed": 5, **facts}),
        Scores(torch.full((n, measures), 0.25), ("item", "measure"), two),
        Scores(costs, ("item", "method", "cost"), {axis: labels[axis] for axis in ("item", "method")}),
    )


def ends(scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    assert scores.low is not None and scores.high is not None
    return scores.low, scores.high


def test_differences_are_paired():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(50, generator=draw)
    values = torch.stack([base, base + 0.1 + 0.01 * torch.randn(50, generator=draw)], 1)[..., None]
    report = made(values.double())
    low, high = bootstrap((values[:, 1] - values[:, 0]).double(), seed=5)
    assert all(map(torch.equal, ends(report.difference("b", "a")), (low, high)))
    wide = ends(report.means)
    assert float(high - low) < 0.02 < 0.3 < float(wide[1][0, 0] - wide[0][0, 0])
    every = report.differences("a")
    assert torch.equal(ends(every)[0][1], low) and float(every.values[0, 0]) == 0.0 == float(ends(every)[1][0, 0])
    other = made(values.double(), seed=6).means
    assert not torch.equal(ends(other)[0], wide[0]) and torch.equal(other.values, report.means.values)


def test_a_mean_is_over_the_items_that_have_the_measure_the_same_for_all_methods():
    values = torch.arange(24).reshape(4, 2, 3).double()
    values[1, :, 1] = math.nan  # no mask
    values[2, 0, 2] = math.nan  # one method lacks it
    report = made(values)
    assert report.n == {"deletion/pixel": 4, "pointing": 3, "contrast_moved": 4}
    assert report.means.values[:, 1].tolist() == [values[[0, 2, 3], m, 1].mean() for m in (0, 1)]
    assert report.means.values[0, 2].isnan() and not report.means.values[1, 2].isnan()
    low, _ = bootstrap(values[[0, 2, 3], :, 1], seed=5)
    assert torch.equal(ends(report.means)[0][:, 1], low)
    assert report.chances.values.tolist() == [0.25] * 3
    nothing = made(torch.full((3, 2, 1), math.nan))
    assert nothing.means.values.isnan().all() and nothing.n == {"deletion/pixel": 0}
    with pytest.raises(LensError, match="no method has numbers for 'deletion/pixel'"):
        nothing.best("deletion/pixel")


def test_the_best_is_the_lowest_or_the_highest():
    values = torch.tensor([[0.2, 0.9], [0.1, 0.3], [0.3, 0.95]])[None].repeat(4, 1, 1)
    report = made(values.double())
    assert report.best("deletion/pixel") == "b" and report.best("pointing") == "c"
    rows = {
        line.split()[1]: line for line in report.table(["deletion/pixel", "pointing"]).splitlines() if line[1] == " "
    }
    assert "**0.100** [0.100, 0.100]" in rows["b"] and "**" not in rows["a"] and "**0.950**" in rows["c"]
    assert rows["chance"].split()[3] == "0.250" and rows["n"].split()[3] == "4"
    assert rows["method"].startswith("| method | deletion/pixel ↓")
    for call in (lambda: report.table(["pointign"]), lambda: report.best("pointign")):
        with pytest.raises(LensError, match="no measure 'pointign'; nearest: 'pointing'"):
            call()
    with pytest.raises(LensError, match="no method 'z'"):
        report.difference("a", "z")


def test_a_report_comes_back_from_its_file(report, tmp_path):
    report.save(tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    again = MapReport.load(tmp_path / "report.json")
    assert repr(again) == repr(report) and again.method == report.method
    frame = again.to_frame()
    assert len(frame) == len(report.methods) * len(report.measures) and set(frame["n"]) <= {1, 2}
    assert {"method", "measure", "score", "low", "high"} <= set(frame.columns)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(LensError, match=r"other\.json was not written by save: KeyError: 'items'"):
        MapReport.load(tmp_path / "other.json")


# ---- going on, the same again, and refusing


def test_an_interrupted_evaluation_goes_on_where_it_was(report, tmp_path, monkeypatch):
    file = tmp_path / "items.jsonl"
    methods = ["random", "attention", oracle]
    evaluate_maps(MODEL, ITEMS, methods, file=file, **QUICK)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    file.write_text("".join(lines[:2]) + lines[2][:50])  # cut off in the middle of the last item
    scored, real = [], Masking.run

    def run(self, kept):
        scored.append(self.case.number)
        return real(self, kept)

    monkeypatch.setattr(Masking, "run", run)
    again = evaluate_maps(MODEL, ITEMS, methods, file=file, **QUICK)
    assert set(scored) == {1} and len(file.read_text().splitlines()) == 3
    assert torch.equal(again.items.values.nan_to_num(9), report.items.values.nan_to_num(9))
    assert again.items.labels == report.items.labels
    for other in ({"seed": 1}, {"steps": 3}, {"sanity": False}):
        with pytest.raises(LensError, match=r"items.jsonl holds another evaluation"):
            evaluate_maps(MODEL, ITEMS, methods, file=file, **{**QUICK, **other})
    with pytest.raises(LensError, match="holds another evaluation"):
        evaluate_maps(MODEL, ITEMS[::-1], methods, file=file, **QUICK)
    twin = copy.copy(MODEL)
    twin.cfg = replace(MODEL.cfg, eps=1e-3)
    with pytest.raises(LensError, match="holds another evaluation"):
        evaluate_maps(twin, ITEMS, methods, file=file, **QUICK)
    head, *rows = lines
    for text, message in [
        ("[1]\n", "holds another evaluation"),
        ("a list of mine, without an end of line", "holds another evaluation, or something else"),
        (head[:9] + "x", "holds another evaluation"),
        (head + '{"i": 0}\n', r"items.jsonl, line 2 is damaged"),
        (head + rows[0] + rows[1].replace('"chance": [', '"chance": [1.0, '), r"line 3 is damaged"),
        (head + rows[0].replace("[", "", 1) + rows[1], r"line 2 is damaged"),
        (head + rows[0].replace('"i": 0', '"i": "0"'), r"line 2 is damaged"),
    ]:
        file.write_text(text)
        with pytest.raises(LensError, match=message):
            evaluate_maps(MODEL, ITEMS, methods, file=file, **QUICK)
        assert file.read_text() == text
    for cut in ("", head[:9], head):  # what an interruption leaves at the very start
        file.write_text(cut)
        Kept(file, json.loads(head)["evaluation"], {})
        assert file.read_text() == head


def test_the_seed_draws_the_random_map_and_the_ties():
    few = {"sanity": False, "operators": ("attention",), **QUICK}
    flat = {"flat": lambda case: torch.ones(len(case.patches)), "random": "random"}
    one, same, other = (evaluate_maps(MODEL, ITEMS[:1], flat, seed=seed, **few) for seed in (0, 0, 1))
    assert torch.equal(one.items.values.nan_to_num(9), same.items.values.nan_to_num(9))
    for method in flat:
        assert float(place(one, method, "deletion/attention")) != float(place(other, method, "deletion/attention"))
    assert float(place(one, "flat", "pointing")) == pytest.approx(
        float(one.chances.values[one.measures.index("pointing")])
    )


def test_a_mask_may_be_of_patches_and_items_need_not_have_one():
    whole = ITEMS[0]
    patches = whole.inputs.roles[0].patches_of_mask(whole.mask)
    few = {"operators": ("attention",), "sanity": False, **QUICK}
    items = [replace(whole, contrast=None), MapItem(whole.inputs, mask=patches, name="b"), MapItem(whole.inputs)]
    found = evaluate_maps(MODEL, items, ["attention"], **few)
    pointing = place(found, "attention", "pointing")
    assert pointing[0] == pointing[1] and pointing[2].isnan() and found.n["pointing"] == 2
    assert found.n["contrast_correlation"] == 0 and found.n["deletion/attention"] == 3
    assert found.items.labels_of("item") == ("scene 4000000", "b", "item 2")


def test_the_sanity_check_may_take_the_first_items_only():
    found = evaluate_maps(MODEL, ITEMS, ["centre"], operators=("attention",), sanity=1, **QUICK)
    assert found.n["randomised"] == 1 and found.method["randomised_items"] == 1


GOOD = MapItem(ITEMS[0].inputs)


@pytest.mark.parametrize(
    "item, message",
    [
        (MapItem(MODEL.prepare("What is it?")), "item 1: no picture; make the inputs with model.prepare"),
        (
            replace(GOOD, mask=torch.ones(9, 9, dtype=torch.bool)),
            r"item 1: a mask \[9, 9\]; expected pixels \[256, 256\] or p",
        ),
        (replace(GOOD, mask=torch.ones(8, 8)), "item 1: a mask of float32; expected booleans"),
        (replace(GOOD, mask=torch.zeros(8, 8, dtype=torch.bool)), "item 1: a mask that touches no patch"),
        (replace(GOOD, contrast=ITEMS[1]), "item 1: its contrast is about another picture"),
        (replace(GOOD, answer="nosuchword"), r"item 1: .*nosuchword"),
        (replace(GOOD, image=1), "item 1: image 1; expected 0 … 0"),
        (replace(GOOD, name="item 0"), "2 items with 1 names"),
    ],
)
def test_an_item_that_cannot_be_scored_is_named(item, message):
    with pytest.raises(LensError, match=message):
        evaluate_maps(MODEL, [GOOD, item], ["centre"], sanity=False, operators=("attention",), **QUICK)


def test_a_map_that_cannot_be_scored_is_named_with_its_item(tmp_path):
    def half(case: Case) -> torch.Tensor:
        return torch.ones(32)

    def holes(case: Case) -> torch.Tensor:
        return torch.full((64,), math.nan if case.number else 1.0)

    few = {"sanity": False, "operators": ("attention",), **QUICK}
    with pytest.raises(LensError, match=r"^scene 4000000: method 'half' gave \[32\]; expected"):
        evaluate_maps(MODEL, ITEMS, ["centre", half], **few)
    file = tmp_path / "items.jsonl"
    with pytest.raises(LensError, match=r"^scene 4000002: method 'holes' gave numbers that are not finite"):
        evaluate_maps(MODEL, ITEMS, ["centre", holes], file=file, **few)
    assert len(file.read_text().splitlines()) == 2  # the first item is whole, the second is not there

    def refuses(case: Case) -> torch.Tensor:
        raise LensError("no heads")

    with pytest.raises(LensError, match=r"^scene 4000000: method 'refuses': no heads"):
        evaluate_maps(MODEL, ITEMS, [refuses], **few)


def test_methods_and_operators_are_checked_before_anything_runs():
    assert list(labelled(["random", ("occlusion", {"size": 3}), oracle])) == ["random", "occlusion size=3", "oracle"]
    assert list(labelled({"mine": ("occlusion", {"size": 3})})) == ["mine"]
    for methods, message in [
        (["attentoin"], "method 'attentoin'; nearest: 'attention'"),
        ([("occlusion", {"sise": 3})], "has no option 'sise'; nearest: 'size'"),
        (["random", "random"], "method 'random' comes twice"),
        ([], "no methods; expected at least one"),
    ]:
        with pytest.raises(LensError, match=message):
            evaluate_maps(MODEL, ITEMS, methods)
    with pytest.raises(LensError, match=r"operators \['pixl'\]; nearest: 'pixel'"):
        evaluate_maps(MODEL, ITEMS, ["random"], operators=("pixl",))
    with pytest.raises(LensError, match="0 items with 0 names"):
        evaluate_maps(MODEL, [], ["random"])
    for settings, message in [
        ({"steps": 0}, "steps=0"),
        ({"k": (2.0,)}, r"k=\(2.0,\); expected"),
        ({"k": (0.1, 0.1)}, "expected shares that differ"),
        ({"sanity": -1}, "sanity=-1; expected"),
    ]:
        with pytest.raises(LensError, match=f"^[^:]*{message}"):
            evaluate_maps(MODEL, ITEMS, [never], **settings)
    late = replace(GOOD, answer="red blue", name="late")
    with pytest.raises(LensError, match=r"^late: answer 'red blue' is 2 tokens"):
        evaluate_maps(MODEL, [GOOD, late], [never])


def never(case: Case) -> torch.Tensor:
    raise AssertionError("a map is made")


def test_inference_mode_changes_nothing():
    few = {"sanity": 1, "operators": ("attention",), **QUICK}
    plain = evaluate_maps(MODEL, ITEMS[:1], ["relevancy"], **few)
    with torch.inference_mode():
        same = evaluate_maps(MODEL, ITEMS[:1], ["relevancy"], **few)
    assert torch.equal(plain.items.values.nan_to_num(9), same.items.values.nan_to_num(9))


# ---- the run on held-out scenes


def test_the_area_between_both_curves_is_their_difference_and_its_mean_over_the_operators(report):
    operators = report.method["operators"]
    value = {name: report.items.values[..., i] for i, name in enumerate(report.measures)}
    each = [value[f"insertion/{operator}"] - value[f"deletion/{operator}"] for operator in operators]
    for operator, expected in zip(operators, each, strict=True):
        torch.testing.assert_close(value[f"between/{operator}"], expected)
    assert bool(value["between"].isfinite().all())
    torch.testing.assert_close(value["between"], torch.stack(each).mean(0))


def test_the_benchmarks_page_says_what_the_report_says(report):
    counts = {"scenes": 2}
    found = {
        "machine": machine("cpu"),
        "sets": {"held_out": {"about": "two scenes", "counts": counts, **maps.summary(report)}},
    }
    page = maps.text(json.loads(json.dumps(found, allow_nan=False)))
    assert "### Held out\n\nTwo scenes. 2 scenes." in page
    row = next(line for line in page.splitlines() if line.startswith("| attention") and "[" in line)
    low, high = ends(report.means)
    at = report.methods.index("attention"), report.measures.index("between")
    assert f"{float(report.means.values[at]):.3f}" in row and f"[{float(low[at]):.3f}, {float(high[at]):.3f}]" in row
    assert page.count("| chance") == 4  # for each operator's occlusion, and for the masks


def test_held_out_items_ask_for_one_object_and_then_for_another():
    items = maps.held_out(MODEL, 3, 1)
    assert [item.contrast is not None for item in items] == [True, False, False]
    first, second = items[0], items[0].contrast
    assert second is not None and not (first.mask & second.mask).any()
    assert first.mask.any() and torch.equal(first.inputs.pixels, second.inputs.pixels)
    assert len({item.name for item in items}) == 3


def test_sets_of_wrong_answers_and_of_traps_say_how_many_were_asked(monkeypatch):
    monkeypatch.setattr(maps, "answer", lambda model, text, scene: scene.objects[0].color)
    items, counts = maps.gathered(maps.absent(MODEL), 2, "")
    assert counts == {"scenes": 2, "asked": 2, "found": 2} and len(items) == 2
    first = render_scene(maps.FIRST["absent"])
    same = [torch.from_numpy(thing.mask) for thing in first.objects if thing.color == first.objects[0].color]
    assert torch.equal(items[0].mask, torch.stack(same).any(0))
    items, counts = maps.gathered(maps.wrong(MODEL), 1, "")
    asked = [question for question in questions(render_scene(maps.FIRST["wrong"])) if question.about]
    right = sum(question.answer == render_scene(maps.FIRST["wrong"]).objects[0].color for question in asked)
    assert counts == {"scenes": 1, "asked": len(asked), "found": len(asked) - right} and len(items) == 1
