"""Maps against their definitions spelt out apart: loops over heads and patches, finite differences, all the masks.

Tolerance: both ways add the same numbers in another order, in float64, unless a line says more.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from random_models import hf_llava
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.corruptions import gaussian, mean_embedding
from llava_lens.errors import LensError
from llava_lens.maps import METHODS, Case, Masking, importance_map
from llava_lens.maps.perturbation import random_masks
from llava_lens.plots import overlay
from llava_lens.sweep.journal import digest
from llava_lens.sweep.rows import Row
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.pictures import patches_of

TOKEN, OTHER = 11, 42
ODD = ["plain", "grouped", "wide_grouped_heads", "attention_bias", "full"]
CHEAP = [name for name in METHODS if name not in ("rise", "occlusion", "causal_tracing", "integrated_gradients")]


class Slow:
    """Everything of one run, in float64, and the answer's score and its gradient read from the stream."""

    def __init__(self, odd: str = "plain", versus: int | None = None):
        self.model, self.versus = hooked(odd), versus
        self.inputs = inputs_of(self.model, odd, (1,), None)
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(self.inputs)
        self.logits, self.cache = logits, cache
        kept = hf_llava(odd).config.vision_feature_select_strategy == "full"
        self.at = self.inputs.slots(self.model.cfg)[0].nonzero()[int(kept) :, 0].tolist()

    def map(self, method: str, **options: Any) -> Tensor:
        found = importance_map(self.model, self.inputs, method, TOKEN, self.versus, progress=False, **options)
        assert found.axes == ("row", "col") and found.values.shape == (3, 3)
        return found.values.flatten()

    def score(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(-1)[TOKEN] if self.versus is None else logits[TOKEN] - logits[self.versus]

    def read(self, y: Tensor) -> Tensor:
        final = self.cache["resid_post", -1][0, -1]
        scale = 1 / torch.sqrt((final**2).mean() + self.model.cfg.eps)
        return (y * scale * self.model.ln_final.weight.detach()) @ self.model.unembed.weight.detach().T

    def contribution(self, layer: int, head: int, position: int) -> Tensor:
        cfg = self.model.cfg
        attn: Any = self.model.blocks[layer].attn
        kv = head // (cfg.n_heads // cfg.n_key_value_heads)
        v = self.cache["v", layer][0, position, kv]
        W_O = attn.o_proj.weight.detach()[:, head * cfg.d_head : (head + 1) * cfg.d_head]
        return self.cache["pattern", layer][0, head, -1, position] * (W_O @ v)

    def cells(self, number: Any, positions: Any = None) -> Tensor:
        """`number(layer, contribution)` of every layer, head and position."""
        positions = self.at if positions is None else positions
        each = [[[float(number(layer, self.contribution(layer, head, p))) for p in positions]
                 for head in range(4)] for layer in range(3)]  # fmt: skip
        return torch.tensor(each, dtype=torch.float64)

    def increase(self, layer: int, y: Tensor) -> Tensor:
        base = self.cache["resid_pre", layer][0, -1]
        return self.score(self.read(base + y)) - self.score(self.read(base))

    def run(self, inputs: Inputs | None = None, hooks: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.model.run_with_hooks(inputs or self.inputs, fwd_hooks=list(hooks))[0, -1]

    def patch_pixels(self, i: int) -> Tensor:
        inside = torch.zeros(24, 24, dtype=torch.float64)
        inside[8 * (i // 3) : 8 * (i // 3) + 8, 8 * (i % 3) : 8 * (i % 3) + 8] = 1
        return inside


@cache
def slow(odd: str = "plain", versus: int | None = None) -> Slow:
    return Slow(odd, versus)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-10) -> None:
    assert float(theirs.abs().max()) > 1e-6 and float(theirs.std()) > 1e-9
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- attention


@pytest.mark.parametrize("odd", ODD)
def test_attention_and_rollout_are_hugging_faces(odd: str) -> None:
    mine, hf = slow(odd), hf_llava(odd, "eager", torch.float64)
    with torch.no_grad():
        attentions = hf(**mine.inputs.for_hf(), output_attentions=True).attentions
    expected = [sum(float(a[0, h, -1, p]) for a in attentions for h in range(4)) / 12 for p in mine.at]
    close(mine.map("attention"), torch.tensor(expected, dtype=torch.float64), 1e-5)  # its softmax is in float32
    some = [sum(float(attentions[l][0, h, -1, p]) for l in (0, 2) for h in (1, 3)) / 4 for p in mine.at]  # noqa: E741
    close(mine.map("attention", layers=[0, -1], heads=(1, 3)), torch.tensor(some, dtype=torch.float64), 1e-5)
    R = torch.eye(mine.inputs.n_pos, dtype=torch.float64)
    for a in attentions:
        A = sum(a[0, h].double() for h in range(4)) / 4 + torch.eye(len(R))
        R = torch.stack([row / row.sum() for row in A]) @ R
    close(mine.map("rollout"), R[-1, mine.at], 1e-5)


@pytest.mark.parametrize("odd", ODD)
def test_value_norms_are_those_of_the_contributions(odd: str) -> None:
    close(slow(odd).map("value_norm"), slow(odd).cells(lambda layer, c: c.norm()).sum((0, 1)))


# ---- direct contributions


@pytest.mark.parametrize(
    ("odd", "versus"),
    [("wide_grouped_heads", None), ("attention_bias", None), ("full", OTHER),
     *[pytest.param(odd, None, marks=pytest.mark.slow) for odd in ("plain", "grouped")]],
)  # fmt: skip
def test_direct_contributions_are_the_definitions(odd: str, versus: int | None) -> None:
    mine = slow(odd, versus)

    def logit(layer: int, c: Tensor) -> Tensor:
        z = mine.read(c)
        return z[TOKEN] - (0 if versus is None else z[versus])

    def first_order(layer: int, c: Tensor) -> Tensor:
        base = mine.cache["resid_pre", layer][0, -1].clone().requires_grad_()
        mine.score(mine.read(base)).backward()
        assert base.grad is not None
        return c @ base.grad

    close(mine.map("dla"), mine.cells(logit).sum((0, 1)))
    close(mine.map("lpi_linear"), mine.cells(first_order).sum((0, 1)), 1e-8)
    increases = mine.cells(mine.increase)
    close(mine.map("lpi", exact=True), increases.sum((0, 1)), 1e-8)
    close(mine.map("lpi"), increases.sum((0, 1)), 12e-4)  # each of the heads is off by 1e-4 at most
    heads = torch.zeros(3, 4, dtype=torch.float64)
    for layer, head in itertools.product(range(3), range(4)):
        whole = sum(mine.contribution(layer, head, p) for p in range(mine.inputs.n_pos))
        heads[layer, head] = mine.increase(layer, whole)  # type: ignore[arg-type]
    for k in (1, 3, 12):
        top = heads.flatten().topk(k).indices
        close(mine.map("lpi_top", k=k, exact=True), increases.flatten(0, 1)[top].sum(0), 1e-8)


def test_direct_maps_say_how_they_close() -> None:
    mine = slow("attention_bias")
    for name in ("dla", "lpi", "lpi_linear", "lpi_top"):
        found = importance_map(mine.model, mine.inputs, name, TOKEN)
        assert found.closure is not None and found.closure < 1e-10
        assert found.unit == ("logits" if name == "dla" else "nats")
    some = importance_map(mine.model, mine.inputs, "lpi", TOKEN, top_k=5)
    assert some.method["exact_cells"] == 5 and some.method["cells"] == 12 * mine.inputs.n_pos


def test_the_lens_is_the_models_own_reading() -> None:
    for versus in (None, OTHER):
        mine = slow("grouped", versus)
        each = []
        for layer in range(3):
            with torch.no_grad():
                logits = mine.model.read_out(mine.cache["resid_post", layer])[0, mine.at]
            each.append(torch.stack([l.softmax(-1)[TOKEN] if versus is None else mine.score(l) for l in logits]))  # noqa: E741
            close(mine.map("logit_lens", layer=layer), each[-1])
        close(mine.map("logit_lens"), torch.stack(each).amax(0))
        close(mine.map("logit_lens", layer="mean"), torch.stack(each).mean(0))
        last = mine.logits[0, mine.at].softmax(-1)[:, TOKEN]
        assert versus is not None or torch.allclose(each[-1], last)


# ---- gradients


def slope(mine: Slow, at: str, alpha: float, step: float = 1e-4) -> Tensor:
    """`d/dε score(x' + (α + ε [on patch i]) (x − x'))` of every patch, by central differences."""
    pixels = mine.inputs.pixels
    assert pixels is not None
    mean = pixels.mean((-2, -1), keepdim=True)
    found = []
    for i in range(9):
        scores = []
        for sign in (1, -1):
            if at == "pixels":
                x = mean + (alpha + sign * step * mine.patch_pixels(i)) * (pixels - mean)
                scores.append(mine.score(mine.run(replace(mine.inputs, pixels=x))))
            else:

                def edit(act: Tensor, hook: Any, i: int = i, sign: int = sign) -> Tensor:
                    own = act[0, mine.at].clone()
                    move = torch.zeros(9, 1, dtype=own.dtype)
                    move[i] = sign * step
                    act[0, mine.at] = own.mean(0) + (alpha + move) * (own - own.mean(0))
                    return act

                scores.append(mine.score(mine.run(hooks=[("hook_embed", edit)])))
        found.append((scores[0] - scores[1]) / (2 * step))
    return torch.stack(found)


@pytest.mark.parametrize("at", ["pixels", "embedding"])
@pytest.mark.parametrize(("odd", "versus"), [("full", None), pytest.param("grouped", OTHER, marks=pytest.mark.slow)])
def test_integrated_gradients_are_slopes_along_the_way(odd: str, versus: int | None, at: str) -> None:
    mine = slow(odd, versus)
    expected = torch.stack([slope(mine, at, alpha) for alpha in (0.25, 0.75)]).mean(0)
    close(mine.map("integrated_gradients", at=at, steps=2), expected, 1e-5)


@pytest.mark.parametrize("at", ["pixels", "embedding"])
def test_integrated_gradients_add_up(at: str) -> None:
    mine = slow("grouped")
    found = {n: importance_map(mine.model, mine.inputs, "integrated_gradients", TOKEN, at=at, steps=n, progress=False)
             for n in (8, 64)}  # fmt: skip
    with torch.no_grad():
        operator = "pixel" if at == "pixels" else "embedding"
        case = Case.of(mine.model, mine.inputs, TOKEN)
        change = float(case.whole.score[0] - Masking(case, operator).run(~case.all_kept()).score[0])
    for scores in found.values():
        assert scores.method["change"] == pytest.approx(change, abs=1e-10)
        assert scores.method["sum"] == pytest.approx(float(scores.values.sum()))
        assert scores.closure == pytest.approx(abs(float(scores.values.sum()) - change), abs=1e-10)
    closures = [float(scores.closure or 0) for scores in found.values()]
    assert closures[1] < 0.01 * abs(change) and closures[1] < 0.1 * closures[0]


def test_integrated_gradients_of_the_probability_add_up_to_its_change() -> None:
    mine = slow("grouped")
    found = importance_map(
        mine.model, mine.inputs, "integrated_gradients", TOKEN, at="embedding", of="prob", steps=32, progress=False
    )
    with torch.no_grad():
        case = Case.of(mine.model, mine.inputs, TOKEN)
        change = float(case.whole.prob[0] - Masking(case, "embedding").run(~case.all_kept()).prob[0])
    assert found.unit == "probability" and found.method["change"] == pytest.approx(change, abs=1e-10)
    assert found.closure is not None and found.closure < 0.01 * abs(change)


@pytest.mark.parametrize("odd", ["plain", "full"])
def test_gradient_times_input_is_the_slope_of_making_a_patch_larger(odd: str) -> None:
    mine, step = slow(odd), 1e-5
    pixels = mine.inputs.pixels
    assert pixels is not None

    def scaled(act: Tensor, hook: Any, at: int, factor: float) -> Tensor:
        act[0, at] *= factor
        return act

    by_pixels, by_embedding = [], []
    for i, at in enumerate(mine.at):
        both = []
        for factor in (1 + step, 1 - step):
            x = replace(mine.inputs, pixels=pixels * (1 + (factor - 1) * mine.patch_pixels(i)))
            hook = ("hook_embed", lambda act, hook, at=at, factor=factor: scaled(act, hook, at, factor))
            both.append((mine.score(mine.run(x)), mine.score(mine.run(hooks=[hook]))))
        by_pixels.append((both[0][0] - both[1][0]) / (2 * step))
        by_embedding.append((both[0][1] - both[1][1]) / (2 * step))
    close(mine.map("gradient"), torch.stack(by_pixels), 1e-6)
    close(mine.map("gradient", at="embedding"), torch.stack(by_embedding), 1e-6)


# ---- perturbation


@pytest.mark.parametrize("size", [1, 3])
def test_occlusion_is_one_run_a_patch(size: int) -> None:
    mine = slow("grouped")
    pixels = mine.inputs.pixels
    assert pixels is not None
    expected = []
    for row, col in itertools.product(range(3), range(3)):
        x = pixels.clone()
        reach = size // 2
        top, left = max(row - reach, 0) * 8, max(col - reach, 0) * 8
        x[..., top : (row + reach + 1) * 8, left : (col + reach + 1) * 8] = pixels.mean((-2, -1), keepdim=True)
        expected.append(mine.score(mine.logits[0, -1]) - mine.score(mine.run(replace(mine.inputs, pixels=x))))
    close(mine.map("occlusion", size=size, operator="pixel"), torch.stack(expected))


def test_rise_estimates_the_expected_answer_given_each_patch() -> None:
    mine = slow("grouped")
    case = Case.of(mine.model, mine.inputs, TOKEN)
    every = torch.tensor(list(itertools.product((False, True), repeat=9)))
    f, keep = Masking(case, max_bytes=2**30).run(every).prob, 0.4
    weights = torch.where(every, keep, 1 - keep).double().prod(1)
    exact = torch.stack([(f * weights * every[:, i]).sum() / (weights * every[:, i]).sum() for i in range(9)])
    n = 1000
    found = mine.map("rise", n=n, keep=keep, cell=1)
    spread = torch.stack([((f**2 * weights * every[:, i]).sum() / keep**2 - exact[i] ** 2) / n for i in range(9)])
    assert float(((found - exact) / spread.sqrt()).abs().max()) < 4
    assert float(found.std()) > 0
    masks = random_masks((3, 3), n, 1, keep, Case.of(mine.model, mine.inputs, TOKEN).generator())
    drawn = f[(masks.long() * 2 ** torch.arange(8, -1, -1)).sum(1)]
    close(found, torch.stack([drawn[masks[:, i]].sum() / (n * keep) for i in range(9)]))


def test_rise_is_its_seeds_and_its_masks_are_cells() -> None:
    mine = slow("plain")
    one, again, other = (mine.map("rise", n=20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    masks = random_masks((7, 5), 4000, 3, 0.3, torch.Generator().manual_seed(0)).reshape(-1, 7, 5)
    share = masks.double().mean(0)
    assert float((share - 0.3).abs().max()) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    steps = (masks[:, 1:] != masks[:, :-1]).any(-1)  # rows where something changes are a cell apart
    assert not bool((steps[:, 1:] & steps[:, :-1]).any())
    assert bool(steps.any(0).all())  # the cells lie anywhere


# ---- causes


def test_causal_tracing_is_one_run_a_patch() -> None:
    mine, layer = slow("grouped"), 1
    row = Row.of(mine.model, mine.inputs.with_roles(mine.model.cfg), 0)
    gains = []
    for repeat in range(2):
        generator = torch.Generator().manual_seed(int(digest(5, 0, repeat), 16))
        (edit,) = gaussian(2.0)(mine.model, row, generator)

        def noisy(act: Tensor, hook: Any, edit: Any = edit) -> Tensor:
            act[0, list(edit.pos)] += edit.value
            return act

        corrupt = mine.run(hooks=[("hook_embed", noisy)]).softmax(-1)[TOKEN]
        each = []
        for at in mine.at:

            def restore(act: Tensor, hook: Any, at: int = at) -> Tensor:
                act[0, at] = mine.cache["resid_post", layer][0, at]
                return act

            hooks = [("hook_embed", noisy), (f"blocks.{layer}.hook_resid_post", restore)]
            each.append(mine.run(hooks=hooks).softmax(-1)[TOKEN] - corrupt)
        gains.append(torch.stack(each))
    options: Any = {"layer": layer, "restore": "resid_post", "sigma": 2, "repeats": 2, "seed": 5}
    close(mine.map("causal_tracing", **options), torch.stack(gains).mean(0))
    each = [mine.map("causal_tracing", **{**options, "layer": layer}) for layer in range(3)]
    close(mine.map("causal_tracing", **{**options, "layer": "mean"}), torch.stack(each).mean(0))
    first = mine.map("causal_tracing", corruption=mean_embedding())
    assert float(first.std()) > 0


@pytest.mark.parametrize("versus", [None, OTHER])
def test_attribution_patching_is_gradient_times_difference(versus: int | None) -> None:
    mine = slow("full", versus)
    pixels = mine.inputs.pixels
    assert pixels is not None
    blank = replace(mine.inputs, pixels=pixels.mean((-2, -1), keepdim=True).expand_as(pixels))
    other = replace(mine.inputs, pixels=pixels.flip(-1))
    for corrupt, given in ((blank, None), (other, other)):
        with torch.no_grad():
            held = [mine.model.run_with_cache(x)[1]["hook_embed"][0, mine.at] for x in (mine.inputs, corrupt)]
        for direction, inputs in (("noise", mine.inputs), ("denoise", corrupt)):
            nodes: list[Tensor] = []

            def keep(act: Tensor, hook: Any, nodes: list[Tensor] = nodes) -> Tensor:
                nodes.append(act.detach().requires_grad_())
                return nodes[0].view_as(nodes[0])

            score = mine.score(mine.model.run_with_hooks(inputs, fwd_hooks=[("hook_embed", keep)])[0, -1])
            (gradient,) = torch.autograd.grad(score, nodes)
            expected = ((held[0] - held[1]) * gradient[0, mine.at]).sum(-1)
            close(mine.map("attribution_patching", corrupt=given, direction=direction), expected, 1e-8)


# ---- floors


def test_the_floors_know_nothing_of_the_model() -> None:
    mine = slow("plain")
    assert torch.equal(mine.map("random"), mine.map("random"))
    assert not torch.equal(mine.map("random"), mine.map("random", seed=1))
    rows = importance_map(mine.model, inputs_of(mine.model, "plain", (1, 1), None), "random", TOKEN).values
    assert torch.equal(rows[0].flatten(), mine.map("random")) and not torch.equal(rows[0], rows[1])
    edge, corner = 1 - 2**-0.5, 0.0
    expected = [[corner, edge, corner], [edge, 1.0, edge], [corner, edge, corner]]
    torch.testing.assert_close(mine.map("centre").reshape(3, 3), torch.tensor(expected))


# ---- what all have in common


FAST: dict[str, dict[str, Any]] = {
    "rise": {"n": 4}, "causal_tracing": {"repeats": 2}, "integrated_gradients": {"steps": 3}
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_a_batch_are_as_alone(name: str) -> None:
    model = hooked("grouped")
    batch = inputs_of(model, "grouped", (1, 2), "left").with_roles(model.cfg)
    options: Any = {"progress": False, **FAST.get(name, {})}
    both = importance_map(model, batch, name, TOKEN, OTHER, **options)
    assert both.axes == ("batch", "row", "col") and both.roles is not None and len(both.roles) == 2
    for i in range(2):
        one = importance_map(model, batch, name, TOKEN, OTHER, row=i, **options)
        torch.testing.assert_close(both.values[i], one.values, rtol=1e-9, atol=1e-12)
        if name != "rise" and (name != "random" or i == 0):
            alone = importance_map(model, batch.row(i), name, TOKEN, OTHER, **options)
            torch.testing.assert_close(both.values[i], alone.values, rtol=1e-9, atol=1e-12)
    second = importance_map(model, batch, name, TOKEN, OTHER, row=1, image=1, **options)
    assert name in ("centre", "random") or not torch.allclose(second.values, both.values[1])
    json.dumps(both.to_json())


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_counted(name: str) -> None:
    model = HookedLlava.from_hf(hf_llava("plain"))
    inputs = inputs_of(model, "plain", (1,), None)
    seen = {"forward": 0, "backward": 0}

    def back(gradient: Tensor) -> None:
        seen["backward"] += len(gradient)

    def watch(act: Tensor, hook: Any) -> Tensor | None:
        seen["forward"] += len(act)
        if torch.is_grad_enabled() and act.requires_grad:
            act = act.view_as(act)
            act.register_hook(back)
            return act
        return None

    options: Any = {"progress": False, **FAST.get(name, {})}
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", watch)]) if name not in ("random", "centre") else model.hooks()
    ):
        found = importance_map(model, inputs, name, TOKEN, **options)
    assert found.method["passes"] == seen


@pytest.mark.parametrize("name", CHEAP)
def test_low_precision_is_near(name: str) -> None:
    full, low = hooked("wide_grouped_heads", torch.float64), hooked("wide_grouped_heads", torch.bfloat16)
    made = [inputs_of(model, "wide_grouped_heads", (1,), None) for model in (full, low)]
    exact, near = (importance_map(model, x, name, TOKEN) for model, x in zip((full, low), made, strict=True))
    assert near.values.dtype in (torch.float32, torch.float64)
    together = torch.stack((exact.values.flatten().double(), near.values.flatten().double()))
    assert float(torch.corrcoef(together)[0, 1]) > 0.9


@pytest.mark.parametrize(
    "name", ["lpi", "relevancy", "gradient", "integrated_gradients", "occlusion", "causal_tracing"]
)
def test_inference_mode_and_frozen_weights_change_nothing(name: str) -> None:
    model = HookedLlava.from_hf(hf_llava("plain"))
    options: Any = {"progress": False, **FAST.get(name, {})}
    expected = importance_map(model, inputs_of(model, "plain", (1,), None), name, **options).values
    with torch.inference_mode():
        inputs = inputs_of(model, "plain", (1,), None)
        close_to = importance_map(model, inputs, name, **options).values
    model.requires_grad_(False)
    frozen = importance_map(model, inputs, name, **options).values
    model.requires_grad_(True)
    for found in (close_to, frozen):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert all(weight.grad is None for weight in model.parameters())


def test_a_method_of_ones_own() -> None:
    mine = slow("plain")

    def brightest(case: Case, *, power: int = 1) -> Tensor:
        """Mean pixel value of the patch."""
        case.count(forward=0)
        case.notes["seen"] = True
        return torch.stack([(case.picture * mine.patch_pixels(i)).sum() for i in range(9)]) ** power

    found = importance_map(mine.model, mine.inputs, brightest, TOKEN, power=2)
    assert found.method["score"] == "brightest" and found.method["power"] == 2 and found.method["seen"]
    close(found.values.flatten(), brightest(Case.of(mine.model, mine.inputs, TOKEN), power=2))
    given = importance_map(mine.model, mine.inputs, partial(brightest, power=2), TOKEN)
    assert given.method["score"] == "brightest" and torch.equal(given.values, found.values)
    with pytest.raises(LensError, match=r"method 'brightest' has no option 'pover'; nearest: 'power'; it takes: power"):
        importance_map(mine.model, mine.inputs, brightest, TOKEN, pover=2)
    bad: Any = (
        (lambda case: torch.zeros(4), r"gave \[4\]; expected one number for each of the 9 patches, \[9\]"),
        (lambda case: 3.0, "gave float; expected one number"),
        (lambda case: torch.full((9,), torch.nan), "gave numbers that are not finite"),
    )
    for wrong, message in bad:
        with pytest.raises(LensError, match=message):
            importance_map(mine.model, mine.inputs, wrong, TOKEN)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lpii", {}, "method 'lpii'; nearest: 'lpi'.*; expected random, centre"),
        ("lpi", {"topk": 3}, "method 'lpi' has no option 'topk'; nearest: 'top_k'; it takes: exact, tolerance, top_k"),
        ("random", {"n": 3}, "method 'random' has no option 'n'; it takes: none"),
        ("lpi_top", {"k": 0}, "k=0; expected 1 … 12 heads"),
        ("attention", {"heads": 4}, "heads=4; expected some of 0 … 3"),
        ("attention", {"layers": 3}, "layer 3; expected 0 … 2"),
        ("logit_lens", {"layer": "last"}, "layer='last'; expected a layer, 'best' or 'mean'"),
        ("causal_tracing", {"layer": "best"}, "layer='best'; expected a layer, several, or 'mean'"),
        ("gradient", {"at": "pixel"}, "at='pixel'; expected 'pixels' or 'embedding'"),
        ("integrated_gradients", {"steps": 0}, "steps=0; expected 1 or more"),
        ("integrated_gradients", {"of": "logit"}, "of='logit'; expected 'score' or 'prob'"),
        ("occlusion", {"size": 2}, "size=2; expected an odd number of patches, 1 or more"),
        ("rise", {"n": 0}, "n=0, keep=0.5; expected 1 mask or more, and a probability above 0"),
        ("rise", {"cell": 4}, "cell=4; expected 1 … 3 patches"),
        ("lpi", {"several": "all"}, "several='all': a map explains one token"),
        ("lpi", {"row": 1}, "row 1; expected -1 … 0"),
        ("lpi", {"image": 1}, "image 1; expected 0 … 0"),
    ],
)
def test_what_is_not_there_is_refused(method: Any, options: dict[str, Any], message: str) -> None:
    mine = slow("plain")
    with pytest.raises(LensError, match=message):
        importance_map(mine.model, mine.inputs, method, TOKEN, **options)


def test_every_method_says_what_it_is() -> None:
    for name, method in METHODS.items():
        assert method.about and "\n" not in method.about and (method.run.__doc__ or name)
        own = method.run.__module__.endswith((".floors", ".flow"))
        assert own or method.source.startswith("arXiv ")
        assert method.unit in ("score", "probability", "logits", "")


# ---- known scenes


@cache
def tiny() -> HookedLlava:
    return HookedLlava.tiny()


@cache
def asked(n: int) -> list[tuple[Inputs, Tensor, Any, str]]:
    """Colour questions, with the patches of the asked object."""
    found = []
    for seed in range(20_000_000, 20_000_000 + n):
        scene = render_scene(seed)
        question = next(q for q in questions(scene) if q.kind == "color" and q.text.startswith("What is"))
        assert question.about is not None and len(question.about) == 1
        on = torch.as_tensor(patches_of(scene, question.about[0]) > 0).flatten()
        found.append((tiny().prepare(question.text, scene.image), on, scene.image, question.answer))
    return found


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("lpi", {}, 0.9), ("occlusion", {"operator": "embedding"}, 0.6), ("relevancy", {}, 0.5),
     ("relevancy", {"through": "both"}, 0.5), ("causal_tracing", {"repeats": 1}, 0.6)],
)  # fmt: skip
def test_the_strongest_patch_lies_on_the_asked_object(name: str, options: dict[str, Any], least: float) -> None:
    hits, chance = [], []
    for inputs, on, _, _ in asked(8):
        found = importance_map(tiny(), inputs, name, progress=False, **options)
        hits.append(bool(on[int(found.values.argmax())]))
        chance.append(float(on.double().mean()))
    assert sum(hits) / 8 >= least > 2.5 * sum(chance) / 8


def test_a_map_is_drawn_over_its_picture_and_names_its_answer() -> None:
    inputs, _, image, answer = asked(8)[0]
    found = importance_map(tiny(), inputs)
    assert overlay(found, image).axes
    assert found.method["answer"] == answer and found.method["score"] == "lpi"
    assert found.method["passes"] == {"forward": 1, "backward": 0}
    red = importance_map(tiny(), inputs, "dla", answer, versus="gray")
    assert red.method["versus"] == "gray" and red.unit == "logits"
    with pytest.raises(LensError, match="expected one"):
        importance_map(tiny(), inputs, answer="red circle")
    first = importance_map(tiny(), inputs, answer="red circle", several="first")
    assert first.method["answer"] == "red" and first.method["scored"] == "the first of 2 tokens"
