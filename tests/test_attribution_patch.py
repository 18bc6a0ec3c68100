"""First-order effects against finite differences of slow, full runs; the corrections against slow ones of their own."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import pytest
import torch
from brute_force import brute_force, by_hand, hooked, images_before, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.attribution_patch import Screened, attribution_patch
from llava_lens.analysis.interventions.grid import Cell, Grid, Reach
from llava_lens.analysis.interventions.patch import patch
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.sweep import Row, kl, log_prob, logit_diff, recovery, run_cells, settle
from llava_lens.sweep.edits import FRONT
from llava_lens.tiny import questions, render_scene

PADDED = ("grouped", (2, 1), "left", 1)
"""Grouped heads, and the row with padding in front; two pictures of the other row come before its own."""
LISTED = ("layer_list", (2,), None, 0)
CASES = {"padded": PADDED, "longer row": ("grouped", (2, 1), "left", 0), "layer list": LISTED}
SWEPT: dict[str, Any] = {
    **dict.fromkeys(("resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post"), ("layer", "position")),
    **dict.fromkeys(("attn_in", "mlp_in", "ln1.hook_scale", "ln2.hook_normalized"), ("layer", "position")),
    **dict.fromkeys(("q", "k", "v", "z", "rot_q", "rot_k", "pattern", "result", "attn_scores"), ("layer", "head")),
    **dict.fromkeys(("vision.q", "vision.k", "vision.v", "vision.z", "vision.pattern"), ("layer", "head")),
    **dict.fromkeys(("vision.resid_pre", "vision.resid_mid", "vision.mlp_out"), ("layer", "patch")),
    **dict.fromkeys(("post", "pre", "pre_linear", "vision.post"), ("layer", "neuron")),
    **dict.fromkeys(("projector.hook_out", "projector.hook_pre", "vision.hook_features"), ("patch",)),
    **dict.fromkeys(("hook_embed", "hook_text_embed", "ln_final.hook_normalized", "hook_logits"), ("position",)),
    "vision.hook_pixels": (),
}


@cache
def pair(odd: str, images: tuple[int, ...], pad: str | None) -> tuple[Inputs, Inputs]:
    """Other pictures, and one other word behind them."""
    model = hooked(odd)
    clean = inputs_of(model, odd, images, pad)
    assert clean.pixels is not None
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(clean.pixels.shape, generator=generator, dtype=torch.float64)
    tokens = clean.tokens.clone()
    tokens[:, -3] = (tokens[:, -3] + 5) % 80 + 3
    return clean, Inputs(tokens, clean.pixels + 0.6 * noise, clean.attention_mask)


def part_of(model: HookedLlava, cache: Any, edit: Any, row: int, first: int) -> Tensor:
    sample = first + edit.image if edit.hook.startswith(FRONT) else row
    return edit.part(cache[edit.hook][sample], model.hook(edit.hook).axes.split()[1:])


class Slow:
    """The metric of a row with cells partly patched, each a full forward pass of the whole padded batch."""

    def __init__(self, case: Any, hook: str, direction: str = "denoise", metric: Any = None, **reach: Any):
        odd, images, pad, self.row = case
        self.model, both = hooked(odd), pair(odd, images, pad)
        self.inputs, source = both[::-1] if direction == "denoise" else both
        self.first = images_before(self.inputs, self.row, self.model)
        one, other = (Row.of(self.model, inputs.check(self.model.cfg), self.row) for inputs in both)
        sweep = reach.pop("sweep", SWEPT.get(hook))
        self.grid: Grid = Reach(hook, sweep, **reach).grid(self.model, one, self.inputs.n_pos)
        self.setting = settle(self.model, one, other, metric)
        self.at = [one.columns[i] for i in self.setting.bound.places(len(one.columns))]
        with torch.no_grad():
            self.base, self.source = (
                self.model.run_with_cache(inputs, names_filter=self.grid.hooks)[1] for inputs in (self.inputs, source)
            )

    def value(self, cell: Cell, alpha: float) -> float:
        def mixed(edit: Any) -> Tensor:
            base, source = (part_of(self.model, held, edit, self.row, self.first) for held in (self.base, self.source))
            return torch.where(base == source, base, base + alpha * (source - base))

        logits = brute_force(self.model, self.inputs, self.row, cell.edits(mixed), self.at)
        return float(self.setting.bound(logits[None])[0])

    def slope(self, cell: Cell, alpha: float) -> float:
        return (self.value(cell, alpha) - self.value(cell, -alpha)) / (2 * alpha)


def some(grid: Grid, n: int = 4) -> list[Cell]:
    return list(grid.cells[:: max(1, len(grid.cells) // n)])


def settings(hook: str) -> dict[str, Any]:
    return {"neurons": [0, 3]} if "neuron" in SWEPT[hook] else {}


def estimate(case: Any, hook: str, **how: Any) -> Scores:
    odd, images, pad, row = case
    how = {"sweep": SWEPT[hook], "top_k": 0, "row": row, **settings(hook)} | how
    screened = attribution_patch(hooked(odd), *pair(odd, images, pad), hook, **how)
    assert bool(screened.exact.values.isnan().all())
    return screened.estimate


def assert_first_order(slow: Slow, scores: Scores, cells: list[Cell]) -> None:
    """Central differences miss the estimate by the square of their step, down to rounding."""
    baseline = scores.method["baseline"]
    effects = torch.stack([scores.values[cell.index] for cell in cells]) - baseline
    slopes = [torch.tensor([slow.slope(cell, a) for cell in cells], dtype=torch.float64) for a in (2e-2, 1e-2)]
    misses = [float((slope - effects).abs().max()) for slope in slopes]
    assert baseline == pytest.approx(slow.value(cells[0], 0.0), abs=1e-12)
    assert float(effects.abs().max()) > 1e-4  # something is there to be estimated
    assert misses[0] < 2e-2 * max(0.1, float(effects.abs().max())) and misses[1] < 0.3 * misses[0] + 1e-10


IN_BOTH = [hook for hook in SWEPT if hook.startswith(FRONT)] + ["resid_pre", "k", "hook_embed"]


@pytest.mark.parametrize(
    "case,hook", [*(("padded", hook) for hook in SWEPT), *(("layer list", hook) for hook in IN_BOTH)]
)
def test_estimates_are_the_first_order_of_patching(case, hook):
    image = int(hook.startswith(FRONT) and case == "layer list")
    slow = Slow(CASES[case], hook, image=image, **settings(hook))
    cells = slow.grid.cells[-8:] if SWEPT[hook] == ("position",) else some(slow.grid)
    assert_first_order(slow, estimate(CASES[case], hook, image=image), list(cells))


@pytest.mark.parametrize("hook", ["resid_pre", "k", "vision.z"])
@pytest.mark.parametrize("how", [{"direction": "noise"}, {"full": True}, {"case": "longer row"}])
def test_so_are_those_of_the_other_direction_of_full_passes_and_of_a_longer_row(hook, how):
    how = dict(how)
    case, direction = CASES[how.pop("case", "padded")], how.get("direction", "denoise")
    assert_first_order(slow := Slow(case, hook, direction), estimate(case, hook, **how), some(slow.grid))


def own_end(logits: Tensor) -> Tensor:
    return logits[0, -1, 5].tanh() * logits[0, -1, 7]


def own_place(logits: Tensor) -> Tensor:
    return logits[0, logits.shape[1] - 1, 5] - logits.shape[1]


def own_everywhere(logits: Tensor) -> Tensor:
    return logits[0].log_softmax(-1)[:, 5].mean()


OWN = [own_end, own_place, own_everywhere]
METRICS = ["log_prob", "prob", "logit", kl(), logit_diff(5, 7), log_prob(9), recovery(), recovery(logit_diff(5, 7))]


@pytest.mark.parametrize("metric", [*METRICS, *OWN], ids=lambda metric: getattr(metric, "__name__", str(metric)))
def test_every_metric_is_differentiated(metric):
    slow = Slow(PADDED, "z", metric=metric)
    scores = estimate(PADDED, "z", metric=metric)
    assert_first_order(slow, scores, some(slow.grid))
    assert scores.unit == slow.setting.bound.unit


def test_an_answer_of_several_tokens_is_forced():
    model = HookedLlava.tiny(dtype=torch.float64)
    scene = render_scene(1_000_000)
    clean, corrupt = (model.prepare("What is there?", s.image) for s in (scene, scene.recolored(0, "pink")))
    one, other = (Row.of(model, i.with_roles(model.cfg, model.tokenizer)) for i in (clean, corrupt))
    metric = log_prob("the red circle")
    screened = attribution_patch(model, clean, corrupt, "z", ("layer", "head"), metric=metric, top_k=2, progress=False)
    grid = Reach("z", ("layer", "head")).grid(model, one, clean.n_pos)
    setting = settle(model, one, other, metric, grid.hooks)
    assert len(setting.bound.ids) == 3
    delta = {hook: setting.clean.acts[hook] - setting.corrupt.acts[hook] for hook in grid.hooks}
    cells = [
        cell.edits(lambda e, a=alpha: a * delta[e.hook][0][:, list(e.head)], "add")
        for cell in grid.cells
        for alpha in (1e-3, -1e-3)
    ]
    values = run_cells(setting, cells, progress=False).values.reshape(-1, 2)
    slopes = (values[:, 0] - values[:, 1]) / 2e-3
    effects = screened.estimate.values.flatten() - setting.corrupt_value
    assert float((slopes - effects).abs().max()) < 1e-4 * float(effects.abs().max())


@pytest.mark.parametrize("case", ["padded", "layer list"])
@pytest.mark.parametrize("hook,sweep", [("resid_pre", ("layer", "position")), ("z", ("layer", "head")),
                                        ("pattern", ("layer", "head")), ("vision.resid_mid", ("layer", "patch")),
                                        ("resid_pre", ("layer", "group")), ("attn_scores", ("layer",))])  # fmt: skip
def test_the_exact_part_is_that_of_patching(case, hook, sweep):
    odd, images, pad, _ = CASES[case]
    model, both = hooked(odd), pair(odd, images, pad)
    how: Any = {"at": {"words": [-1, -2], "more": [-4]}} if "group" in sweep else {}
    screened = attribution_patch(model, *both, hook, sweep, top_k=5, progress=False, **how)
    patched = patch(model, *both, hook, sweep, progress=False, **how)
    ran = ~screened.exact.values.isnan()
    n = len(both[0].tokens)
    assert int(ran.sum()) == n * min(5, int((~patched.values.isnan()).sum()) // n)
    assert torch.allclose(screened.exact.values[ran], patched.values[ran], rtol=0, atol=1e-12)
    assert screened.estimate.values.isnan().equal(patched.values.isnan())
    keys = ("axes", "unit", "labels", "roles")
    assert all(getattr(each, k) == getattr(patched, k) for each in (screened.exact, screened.estimate) for k in keys)
    assert screened.exact.method["baseline"] == pytest.approx(patched.method["baseline"], abs=1e-12)
    if sweep == ("layer", "head"):  # all cells, and the slow way too
        for full in (True, False):
            every = attribution_patch(model, *both, hook, sweep, top_k=10**6, full=full, progress=False, **how)
            assert torch.allclose(every.exact.values, patched.values, rtol=0, atol=1e-11, equal_nan=True)


def test_whole_axes_are_patched_as_by_hand_where_there_is_padding():
    for hook in ("z", "pattern", "attn_scores"):
        slow = Slow(PADDED, hook)
        odd, images, pad, row = PADDED
        for full in (True, False):
            patched = patch(slow.model, *pair(odd, images, pad), hook, SWEPT[hook], row=row, full=full, progress=False)
            for cell in some(slow.grid):
                assert float(patched.values[cell.index]) == pytest.approx(slow.value(cell, 1.0), abs=1e-11)


def test_several_layers_in_one_cell_add_up():
    alone = estimate(PADDED, "z")
    effects = alone.values - alone.method["baseline"]
    wide = estimate(PADDED, "z", window=2)
    together = torch.stack([effects[i : i + 2].sum(0) for i in range(3)])
    assert torch.allclose(wide.values - wide.method["baseline"], together, rtol=0, atol=1e-12)
    assert estimate(PADDED, "z", sweep=("head",)).values.sub(alone.method["baseline"]).allclose(effects.sum(0))


# ---- corrections


def pattern_part(case: Any, hook: str, cell: Cell, slow: Slow, tower: bool) -> float:
    """`Σ ∂metric/∂pattern · (pattern' − pattern)` with the pattern of a run that is patched in this layer."""
    (edited,) = cell.hooks
    name = edited.rpartition(".")[0] + ".hook_pattern"
    held, row = {}, slow.row

    def keep(act: Tensor, hook: Any) -> None:
        held["pattern"] = act.detach().clone()

    edits = cell.edits(lambda edit: part_of(slow.model, slow.source, edit, row, slow.first))
    hooks = [by_hand(edit, row, slow.first) for edit in edits]
    with torch.no_grad():
        slow.model.run_with_hooks(slow.inputs, fwd_hooks=[*hooks, (name, keep)])
    _, cache = slow.model.run_with_cache(
        slow.inputs, names_filter=[name], incl_bwd=True, metric=lambda z: slow.setting.bound(z[row, slow.at][None])[0]
    )
    change = (held["pattern"] - cache[name]) * cache[name + "_grad"]
    return float(change[slow.first + cell.image if tower else row].sum())


@pytest.mark.parametrize("hook", ["q", "k", "rot_q", "rot_k", "vision.q", "vision.k"])
@pytest.mark.parametrize(
    "sweep,reach",
    [
        (("layer", "head"), {}),
        (("layer", "position"), {}),
        (("layer", "head", "position"), {"at": [4, 5, 7]}),
        (("layer", "group"), {"at": {"a": [3, 5, 6], "b": [2, 4], "c": [2, 8]}}),
        (("layer", "neuron"), {"neurons": [0, 9], "at": [2, 8]}),
        (("layer",), {"heads": [1]}),
    ],
    ids=str,
)
def test_the_softmax_is_exact_with_qk(hook, sweep, reach):
    tower, reach = hook.startswith("vision."), dict(reach)
    if not tower and "at" in reach:  # behind the padding of the row
        move = {"a": [11, 19, 25], "b": [10, 24], "c": [20, 22]}
        reach["at"] = move if isinstance(reach["at"], dict) else [9, 19, 24]
    case = CASES["longer row" if tower else "padded"]
    slow = Slow(case, hook, sweep=sweep, image=int(tower), **reach)
    how: Any = {"correction": "qk", "sweep": sweep, "image": int(tower), **reach}
    scores = estimate(case, hook, **how)
    pieces = estimate(case, hook, **how, max_bytes=20_000)
    assert torch.allclose(pieces.values, scores.values, rtol=0, atol=1e-12, equal_nan=True)
    for cell in some(slow.grid, 6):
        wanted = pattern_part(case, hook, cell, slow, tower)
        assert float(scores.values[cell.index]) - scores.method["baseline"] == pytest.approx(wanted, abs=1e-11)


def test_qk_tells_what_a_saturated_softmax_hides():
    """With scores far apart the plain gradient is nothing, though another key would move all the attention."""
    case = ("plain", (1,), None, 0)
    odd, images, pad, _ = case
    model, both = hooked(odd), pair(odd, images, pad)

    def sharpen(act: Tensor, hook: Any) -> Tensor:
        return act * 40

    how: Any = {"fwd_hooks": [("blocks.2.attn.hook_rot_q", sharpen)], "layers": [2], "sweep": ("layer", "head")}
    plain, fixed = (
        attribution_patch(model, *both, "rot_k", correction=c, top_k=100, progress=False, **how) for c in (None, "qk")
    )
    assert fixed.largest_miss < 0.2 * plain.largest_miss


def dropped_slowly(case: Any, hook: str, slow: Slow) -> Tensor:
    """Effects with each block's contributions detached in a run of its own, `[block, cell]`, the plain ones first."""
    model, row = slow.model, slow.row
    blocks = [f"vision.blocks.{i}." for i in range(model.vision.cfg.n_layers)] if hook.startswith("vision") else []
    blocks += [f"blocks.{i}." for i in range(model.cfg.n_layers)]
    found: list[list[float]] = []
    for block in [None, *blocks]:
        nodes: dict[str, Tensor] = {}

        def keep(act: Tensor, hook: Any, nodes: Any = nodes) -> Tensor:
            nodes[hook.name] = act
            return act.view_as(act)

        hooks: list[Any] = [(name, keep) for name in slow.grid.hooks]
        if block is not None:
            hooks += [(block + name, lambda act, hook: act.detach()) for name in ("hook_attn_out", "hook_mlp_out")]
        logits = model.run_with_hooks(slow.inputs, fwd_hooks=hooks)
        value = slow.setting.bound(logits[row, slow.at][None])[0]
        grads = torch.autograd.grad(value, [nodes[n] for n in slow.grid.hooks], allow_unused=True)
        change = {
            n: (slow.source[n] - slow.base[n]) * (0 if g is None else g)
            for n, g in zip(slow.grid.hooks, grads, strict=True)
        }
        found.append([sum(float(part_of(model, change, e, row, slow.first).sum()) for e in cell.edits(0.0))
                      for cell in slow.grid.cells])  # fmt: skip
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("hook", ["z", "k", "attn_out", "mlp_out", "resid_pre", "resid_mid", "vision.z"])
@pytest.mark.parametrize("case,full", [("padded", True), ("padded", False), ("layer list", False)])
def test_graddrop_is_that_of_detached_blocks(hook, case, full):
    slow = Slow(CASES[case], hook)
    effects = dropped_slowly(CASES[case], hook, slow)
    inside = not hook.startswith("resid")
    n = len(effects) - 1
    wanted = effects[1:].abs().mean(0) * (n / (n - 1) if inside else 1) * torch.where(effects[0] < 0, -1, 1)
    scores = estimate(CASES[case], hook, correction="graddrop", full=full)
    got = torch.tensor([float(scores.values[cell.index]) for cell in slow.grid.cells], dtype=torch.float64)
    assert torch.allclose(got - scores.method["baseline"], wanted, rtol=0, atol=1e-11)
    star = estimate(CASES[case], hook, correction="star", full=full)
    same = torch.equal(star.values.nan_to_num(0), scores.values.nan_to_num(0))
    assert same == (hook != "k")


def test_star_is_graddrop_on_the_exact_softmax():
    """In the last block only its own dropping matters, which leaves nothing: n − 1 equal estimates over n − 1."""
    star, fixed = (estimate(PADDED, "q", correction=c) for c in ("star", "qk"))
    star, fixed = (scores.values - scores.method["baseline"] for scores in (star, fixed))
    assert torch.equal(star.sign(), fixed.sign())
    assert torch.allclose(star[-1], fixed[-1], rtol=1e-10, atol=0)
    assert not torch.allclose(star[0], fixed[0], rtol=1e-2, atol=0)


# ---- what it leaves alone, and what it says


def test_weights_keep_out_of_it():
    model, both = hooked("plain"), pair("plain", (1,), None)
    wanted = [p.requires_grad for p in model.parameters()]
    first = attribution_patch(model, *both, "k", ("layer", "head"), correction="star", top_k=2, progress=False)
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(hook.live for hook in model.hook_dict.values())
    try:
        model.requires_grad_(False)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                for hook in ("k", "vision.resid_pre"):
                    again = attribution_patch(model, *both, hook, ("layer",), top_k=2, progress=False, metric=own_end)
                assert again.estimate.values.isfinite().all()
                again = attribution_patch(model, *both, "k", ("layer", "head"), correction="star", progress=False)
        assert torch.allclose(again.estimate.values, first.estimate.values, rtol=0, atol=1e-12)
        assert not any(p.requires_grad for p in model.parameters())
    finally:
        model.requires_grad_(True)


def test_hooks_of_the_user_hold_in_every_run():
    model, both = hooked("grouped"), pair("grouped", (2, 1), "left")
    hooks = [("blocks.1.hook_mlp_out", lambda act, hook: act * 0.3)]
    screened = attribution_patch(model, *both, "mlp_out", "layer", row=1, fwd_hooks=hooks, progress=False)
    held = estimate(PADDED, "mlp_out", sweep="layer")
    assert screened.exact.method["path"].startswith("full")
    assert not torch.allclose(screened.estimate.values, held.values, atol=1e-3)
    assert abs(screened.estimate.values[2] - screened.exact.values[2]) < abs(screened.effects[1][2])
    with pytest.raises(LensError, match=r"is not the softmax of its queries and keys .* leave out correction='qk'"):
        double = [("blocks.1.attn.hook_attn_scores", lambda act, hook: act * 2)]
        attribution_patch(model, *both, "q", row=1, fwd_hooks=double, correction="qk", top_k=0)


def test_screened_ranks_by_the_exact_effect_and_says_how_good_the_estimate_was():
    model, both = hooked("grouped"), pair("grouped", (2, 1), "left")
    screened = attribution_patch(model, *both, "z", ("layer", "head"), top_k=8, progress=False)
    assert screened.exact.axes == ("batch", "layer", "head") and len(screened.top(100)) == 16
    estimated, exact = screened.effects
    ran = ~exact.isnan()
    assert float((~ran).sum()) == 2 * 12 - 16
    top = screened.top(12)
    assert [abs(e.effect) for e in top] == sorted(exact[ran].abs().tolist(), reverse=True)[:12]
    assert min(e.effect for e in top) < 0 < max(e.effect for e in top)
    for entry in top:
        baseline = screened.exact.method["baseline"][entry.place[0]]
        assert entry.exact - baseline == pytest.approx(entry.effect)
        assert entry.estimate == float(screened.estimate.values[entry.place])
    for row in range(2):  # the cells run are those with the largest estimates
        least = estimated[row][ran[row]].abs().min()
        assert bool((estimated[row][~ran[row]].abs() <= least).all())
    wanted = torch.corrcoef(torch.stack((estimated[ran], exact[ran])))[0, 1]
    assert screened.correlation == pytest.approx(float(wanted))
    assert screened.largest_miss == pytest.approx(float((estimated - exact)[ran].abs().max()))
    shown = repr(screened)
    assert "16 of 24 cells run exactly: correlation" in shown and "largest estimates" in shown
    assert all(word in shown for word in ("estimate", "exact", "effect", "noise_floor"))
    nothing = attribution_patch(model, *both, "z", ("layer", "head"), top_k=0)
    assert nothing.top() == [] and nothing.correlation != nothing.correlation
    assert nothing.largest_miss != nothing.largest_miss and "0 of 24 cells run exactly" in repr(nothing)


@pytest.mark.parametrize(
    "how,message",
    [
        ({"metric": lambda z: float(z[0, -1, 5])}, "returned float, through which no gradient passes"),
        ({"metric": lambda z: z[0, -1, 5].detach()}, "returned a tensor without a graph"),
        ({"metric": lambda z: z[0, -1].argmax()}, "returned a tensor without a graph"),
        ({"metric": lambda z: torch.ones((), requires_grad=True) * 2}, "does not depend on the logits"),
        ({"metric": lambda z: (z[0, -1, 5] - z[0, -1, 5].detach()).sqrt()}, "gradient .* not finite"),
        ({"metric": kl(), "direction": "noise"}, "kl is smallest on the clean run"),
        ({"direction": "both"}, "expected 'denoise' or 'noise'"),
        ({"correction": "qkv"}, "expected None, 'qk', 'graddrop' or 'star'"),
        ({"correction": "qk"}, "correction='qk' at 'resid_pre'; it is for q, k, rot_q and rot_k"),
        ({"top_k": -1}, "top_k=-1; expected 0 or more"),
        ({"hook": "resid_per"}, "nearest: 'resid_pre'"),
        ({"layers": [7]}, "layer 7; expected 0 … 2"),
        ({"rows": 1}, "unknown option 'rows'"),
    ],
)
def test_errors_say_what_was_expected(how, message):
    with pytest.raises(LensError, match=message):
        inspect.unwrap(attribution_patch)(hooked("plain"), *pair("plain", (1,), None), **how)


def test_graddrop_needs_a_block_to_go_around():
    model = hooked("plain")
    cfg, blocks = model.cfg, model.blocks
    try:
        model.blocks = torch.nn.ModuleList(list(model.blocks)[:1])
        object.__setattr__(cfg, "n_layers", 1)
        with pytest.raises(LensError, match="a model of one block"):
            attribution_patch(model, *pair("plain", (1,), None), "blocks.0.attn.hook_z", "head", correction="graddrop")
    finally:
        model.blocks = blocks
        object.__setattr__(cfg, "n_layers", 3)


# ---- the trained model


@cache
def scene_pair(n: int = 6) -> tuple[HookedLlava, Inputs, Inputs, list[str]]:
    model, asked, clean, corrupt = HookedLlava.tiny(), [], [], []
    for seed in range(1_050_000, 1_050_000 + n):
        scene = render_scene(seed)
        question = next(q for q in questions(scene) if q.kind == "color")
        assert question.about is not None
        other = next(c for c in ("red", "blue", "green") if c != question.answer)
        asked.append((question.text, question.answer))
        clean.append(scene.image)
        corrupt.append(scene.recolored(question.about[0], other).image)
    texts = [text for text, _ in asked]
    return model, model.prepare(texts, clean), model.prepare(texts, corrupt), [answer for _, answer in asked]


def correlations(screened: Screened) -> list[float]:
    """Of each pair on its own: several pairs together would correlate by being different."""
    each = []
    for i, baseline in enumerate(screened.exact.method["baseline"]):
        exact, guess = screened.exact[{"batch": i}], screened.estimate[{"batch": i}]
        one = Screened(guess, Scores(exact.values, exact.axes, method={"baseline": baseline}))
        each.append(one.correlation)
    return each


@pytest.mark.parametrize("hook,sweep,least", [("resid_pre", ("layer", "position"), 0.7), ("z", ("layer", "head"), 0.9)])
def test_on_the_embedded_model_estimates_go_with_exact_effects(hook, sweep, least):
    model, clean, corrupt, answers = scene_pair()
    screened = attribution_patch(model, clean, corrupt, hook, sweep, metric=log_prob(answers), progress=False, top_k=60)
    each = correlations(screened)
    print(f"{hook}: correlation of estimate and exact effect {[round(c, 2) for c in each]}")
    assert sum(each) / len(each) > least
