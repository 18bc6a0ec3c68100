"""The account through projector and tower: against loops by hand, against gradients of a frozen run, and its sums."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, LlavaCache
from llava_lens.activations import activation
from llava_lens.analysis import attribution_names, direct_logit_attribution, tower_attribution
from llava_lens.analysis.attribution.features import Picture
from llava_lens.analysis.attribution.tower import AXES, into_projector, parts
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.evaluate import HELD_OUT

ODD = ["plain", "wide_grouped_heads", "attention_bias", "mlp_bias", "layer_list_full", "gelu_tower", "bare_projector"]
BATCHES = [((1, 1), None, torch.float32), ((1, 2), "left", torch.float64), ((2, 1), "right", torch.float32)]
TOKEN, VERSUS = 5, 60


@cache
def run(
    odd: str, dtype: torch.dtype = torch.float64, images: tuple[int, ...] = (1, 2), pad: str | None = "left"
) -> tuple[HookedLlava, Inputs, Tensor, LlavaCache]:
    model = hooked(odd, dtype)
    inputs = inputs_of(model, odd, images, pad)
    with torch.no_grad():
        logits, found = model.run_with_cache(inputs)
    return model, inputs.with_roles(model.cfg), logits, found


def fact(scores: Any, name: str, row: int) -> Any:
    """One row's fact; rows that agree share one."""
    found = scores.method[name]
    return found[row] if isinstance(found, list) else found


def whole(scores: Any, row: int | None = None) -> float:
    """Scores and rest of one row (None: the only one) together."""
    values = scores.values if row is None else scores.values[row]
    rest = scores.method["rest"] if row is None else fact(scores, "rest", row)
    return float(values.double().sum()) + sum(rest.values())


# ---- against an independent truth


def frozen_gradient(model: HookedLlava, inputs: Inputs, cache: LlavaCache, row: int, at: int) -> Tensor:
    """The logit lead's gradient at the projector's output, with what `through="all"` holds made constant."""

    def constant(name: str) -> tuple[str, Any]:
        return name, lambda act, hook: cache[name].clone()

    held: list[Any] = [constant("ln_final.hook_scale")]
    for layer in range(model.cfg.n_layers):
        held += [constant(f"blocks.{layer}.{name}") for name in
                 ("ln1.hook_scale", "ln2.hook_scale", "attn.hook_pattern", "mlp.hook_pre")]  # fmt: skip
    out = cache["projector.hook_out"].clone().requires_grad_()
    logits = model.run_with_hooks(inputs, fwd_hooks=[*held, ("projector.hook_out", lambda act, hook: out + 0)])
    (logits[row, at, TOKEN] - logits[row, at, VERSUS]).backward()
    assert out.grad is not None
    return out.grad


def direct_by_hand(model: HookedLlava, cache: LlavaCache, row: int, at: int, slots: list[int]) -> Tensor:
    """The direct path's direction of every feature, with loops over layers, heads and positions."""
    cfg, weights = model.cfg, {name: weight.detach() for name, weight in model.named_parameters()}
    final = cache[f"blocks.{cfg.n_layers - 1}.hook_resid_post"][row, at]
    read = weights["unembed.weight"][TOKEN] - weights["unembed.weight"][VERSUS]
    read = read * weights["ln_final.weight"] / ((final**2).mean() + cfg.eps).sqrt()
    found = []
    for slot in slots:
        total = read.clone() if slot == at else torch.zeros_like(read)
        for layer in range(cfg.n_layers):
            name, x = f"blocks.{layer}.attn", cache[f"blocks.{layer}.hook_resid_pre"][row, slot]
            for head in range(cfg.n_heads):
                own = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
                kv = head // (cfg.n_heads // cfg.n_key_value_heads)
                shared = slice(kv * cfg.d_head, (kv + 1) * cfg.d_head)
                at_value = read @ weights[f"{name}.o_proj.weight"][:, own]
                at_norm = at_value @ weights[f"{name}.v_proj.weight"][shared]
                weight = cache[f"{name}.hook_pattern"][row, head, at, slot]
                total += weight * at_norm * weights[f"blocks.{layer}.ln1.weight"] / ((x**2).mean() + cfg.eps).sqrt()
        found.append(total)
    return torch.stack(found)


def component_by_hand(model: HookedLlava, cache: LlavaCache, image: int, directions: Tensor) -> Tensor:
    """Every component's share in every feature `[component, feature]`, pushed forward through the projector."""
    cfg, projector = model.cfg.vision, model.projector
    assert cfg is not None
    start, d = 0 if cfg.keep_class_token else 1, cfg.d_model
    names = ["hook_embed"]
    names += [f"blocks.{layer}.hook_{part}_out" for layer in range(cfg.n_layers) for part in ("attn", "mlp")]
    W_1, W_2 = projector.linear_1.weight.detach(), projector.linear_2.weight.detach()
    shares = torch.zeros(len(names) + 1, cfg.n_features, dtype=torch.float64)
    for f in range(cfg.n_features):
        pre = cache["projector.hook_pre"][image, f]
        factor = activation(model.cfg.projector_act_fn)(pre) / pre
        for i, name in enumerate(names):
            wide = torch.zeros(d * len(cfg.feature_layers), dtype=torch.float64)
            for block, read in enumerate(cfg.feature_layers):
                if i == 0 or read > (i - 1) // 2:
                    wide[block * d : (block + 1) * d] = cache[f"vision.{name}"][image, start + f]
            shares[i, f] = (W_2 @ (factor * (W_1 @ wide))) @ directions[f]
        if projector.linear_1.bias is not None:
            b_1, b_2 = projector.linear_1.bias.detach(), projector.linear_2.bias.detach()
            shares[-1, f] = (W_2 @ (factor * b_1) + b_2) @ directions[f]
    return shares


@pytest.mark.parametrize("through", ["direct", "all"])
@pytest.mark.parametrize("odd", ODD)
def test_components_equal_loops_by_hand_and_the_gradient_of_a_frozen_run(odd: str, through: Any) -> None:
    model, inputs, _, cache = run(odd)
    row, image, number, vision = 1, 2, 1, model.cfg.vision
    assert vision is not None and inputs.roles is not None
    slots = inputs.roles[row].positions("image", number).tolist()
    for at in (inputs.n_pos - 1, slots[-2]):
        if through == "direct":
            directions = direct_by_hand(model, cache, row, at, slots)
        else:
            directions = frozen_gradient(model, inputs, cache, row, at)[image]
        expected = component_by_hand(model, cache, image, directions)
        found = tower_attribution(cache, TOKEN, VERSUS, position=at, row=row, image=number, through=through)
        patches = expected[:, -vision.n_patches :].reshape(-1, *vision.grid)
        assert found.axes == ("component", "row", "col") and found.method["image"] == number
        torch.testing.assert_close(found.values, patches, atol=1e-12, rtol=0)
        assert patches.abs().max() > 1e-4
        if vision.keep_class_token:
            assert found.method["rest"]["class token"] == pytest.approx(float(expected[:, 0].sum()), abs=1e-12)
        total = float((directions * cache["projector.hook_out"][image]).sum())
        assert found.method["through_image"] == pytest.approx(total, abs=1e-12)


def test_without_earlier_layers_the_direct_path_is_what_the_sources_add() -> None:
    model = copy.deepcopy(hooked("grouped"))
    with torch.no_grad():
        for block in list[Any](model.blocks)[:-1]:
            block.attn.o_proj.weight.zero_()
            block.mlp.out_proj.weight.zero_()
        _, cache = model.run_with_cache(inputs_of(model, "grouped", (1,), None))
    sources = direct_logit_attribution(cache, TOKEN, VERSUS, "source").over_image().sum("layer", "head")
    found = tower_attribution(cache, TOKEN, VERSUS).sum("component")
    torch.testing.assert_close(found.values, sources.values, atol=1e-12, rtol=0)


# ---- sums that close


@pytest.mark.parametrize("odd", ["plain", "first_layer", "one_layer_list", "positive_layer", "layer_list_full"])
def test_the_components_sum_to_the_projectors_input(odd: str) -> None:
    model, _, _, cache = run(odd, torch.float32)
    picture = Picture.of(cache, 1, 0)
    seen = picture.projected("hook_in")
    every = torch.eye(seen.shape[1])[:, None].expand(-1, len(seen), -1)
    nothing = torch.zeros(every.shape[:2])
    components, rest = parts(picture, every, nothing, "component")
    assert not rest
    torch.testing.assert_close(components.sum(1).T, seen, rtol=1e-5, atol=1e-5 * float(seen.abs().max()))
    heads, rest = parts(picture, every, nothing, "head")
    summed = heads.sum((1, 2)) + sum(rest.values())
    torch.testing.assert_close(summed.T, seen, rtol=1e-5, atol=1e-5 * float(seen.abs().max()))
    out = torch.eye(model.cfg.d_model)[:, None].expand(-1, len(seen), -1)
    at_in, biases = into_projector(picture, out)
    again = (at_in * seen).sum(-1) + biases
    torch.testing.assert_close(again.T, picture.projected("hook_out"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("images, pad, dtype", BATCHES)
@pytest.mark.parametrize("odd", ["attention_bias", "mlp_bias", "layer_list_full", "first_layer"])
def test_everything_closes(odd: str, images: tuple[int, ...], pad: Any, dtype: Any) -> None:
    _, inputs, logits, cache = run(odd, dtype, images, pad)
    assert inputs.roles is not None
    close = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for by in AXES:
        for through in ("direct", "all"):
            found = tower_attribution(cache, by=by, through=through)
            assert found.axes == ("batch", *AXES[by]) and found.values.dtype == dtype
            assert found.closure is not None and found.closure < close * 5
            for row in range(2):
                logit = float(logits[row, inputs.roles[row].last].max())
                assert fact(found, "logit", row) == pytest.approx(logit, rel=close)
                total = logit if through == "all" else fact(found, "through_image", row)
                assert whole(found, row) == pytest.approx(total, abs=close * 5)


def test_heads_sources_and_neurons_sum_to_their_components() -> None:
    _, _, _, cache = run("layer_list_full")
    for through in ("direct", "all"):
        found = {by: tower_attribution(cache, TOKEN, by=by, row=0, through=through) for by in AXES}
        component, head = found["component"].values, found["head"].values
        shares = [fact(found[by], "rest", 0) for by in ("component", "head", "source", "neuron")]
        attention, mlps = component[1:-1:2].sum(), component[2:-1:2].sum()
        assert float(attention) == pytest.approx(float(head.sum()) + shares[1]["biases"], abs=1e-12)
        assert float(mlps) == pytest.approx(shares[1]["MLPs"], abs=1e-12)
        assert float(component[0].sum()) == pytest.approx(shares[1]["embed"], abs=1e-12)
        assert float(component[-1].sum()) == pytest.approx(shares[1]["projector"], abs=1e-12)
        neurons = float(found["neuron"].values.sum()) + shares[3]["biases"]
        sources = float(found["source"].values.sum()) + shares[2]["class token"] + shares[2]["biases"]
        assert neurons + shares[3]["attention"] == pytest.approx(sources + shares[2]["MLPs"], abs=1e-12)


def test_bfloat16_closes_as_far_as_its_rounding() -> None:
    _, _, _, cache = run("plain", torch.bfloat16)
    for by in AXES:
        for through in ("direct", "all"):
            found = tower_attribution(cache, by=by, through=through)
            assert found.values.dtype == torch.float32 and found.closure is not None and 1e-6 < found.closure < 0.1


# ---- answers, rows, pictures, caches


def test_rows_pictures_and_answers_stand_apart() -> None:
    model, inputs, _, cache = run("grouped")
    with torch.no_grad():
        _, alone = model.run_with_cache(inputs.row(1), remove_batch_dim=True)
        _, single = model.run_with_cache(inputs.row(0), remove_batch_dim=True)
    assert not single.has_image_dim and alone.has_image_dim
    for by in AXES:
        both = tower_attribution(cache, [TOKEN, None], VERSUS, by, through="all")
        for row, own in ((0, single), (1, alone)):
            found = tower_attribution(own, [TOKEN, None], VERSUS, by, through="all")
            assert found.axes == ("answer", *AXES[by])
            torch.testing.assert_close(both.values[row], found.values, atol=1e-12, rtol=0)
        second = tower_attribution(cache, TOKEN, VERSUS, by, through="all", row=1, image=1)
        torch.testing.assert_close(
            second.values, tower_attribution(alone, TOKEN, VERSUS, by, through="all", image=1).values
        )
        assert not torch.equal(second.values, both.values[1, 0])
        shared = second.method["rest"]["other images"]
        first = tower_attribution(cache, TOKEN, VERSUS, by, through="all", row=1).method["through_image"]
        assert shared == pytest.approx(first, abs=1e-12)


@pytest.mark.parametrize("through", ["direct", "all"])
@pytest.mark.parametrize("by", AXES)
def test_only_what_is_read_must_be_kept(by: str, through: Any) -> None:
    model, _, _, full = run("plain")
    names = attribution_names(model, by, through=through)
    kept = LlavaCache({n: full.cache_dict[n] for n in names}, model, inputs=full.inputs)
    ours, theirs = (tower_attribution(c, by=by, through=through) for c in (kept, full))
    torch.testing.assert_close(ours.values, theirs.values)  # a pattern's row formed alone may round otherwise
    for name in names[:: max(1, len(names) // 8)]:
        less = LlavaCache({n: full.cache_dict[n] for n in names if n != name}, model, inputs=full.inputs)
        with pytest.raises(LensError, match=rf"lacks {name};.*attribution_names\(model, '{by}', through='{through}'\)"):
            tower_attribution(less, by=by, through=through)


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"by": "layer"}, "by='layer'; expected 'component', 'head', 'neuron', 'source'"),
        ({"through": "al"}, "through='al'; expected 'direct' or 'all'; nearest: 'all'"),
        ({"image": 1}, "row 0: image 1; expected 0 … 0"),
        ({"image": -1, "row": 1}, "row 1: image -1; expected 0 … 1"),
        ({"row": 2}, "row 2; expected -2 … 1"),
        ({"answer": 97}, "answer 97; expected a token id"),
    ],
)
def test_what_is_not_there_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, _, _, cache = run("plain")
    with pytest.raises(LensError, match=message):
        tower_attribution(cache, **arguments)


def test_cut_caches_and_runs_without_a_picture_are_refused() -> None:
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1,), None)
    with torch.no_grad():
        _, cut = model.run_with_cache(inputs, pos_slice=-1)
        _, short = model.run_with_cache(inputs, vision_pos_slice=slice(1, None))
        _, text = model.run_with_cache(torch.tensor([[1, 5, 9]]))
        _, mixed = model.run_with_cache(inputs_of(model, "plain", (1, 0), "left"))
    with pytest.raises(LensError, match=r"does not hold the positions .*without pos_slice"):
        tower_attribution(cut)
    with pytest.raises(LensError, match=r"'vision\.hook_embed' holds 9 of 10 positions.*vision_pos_slice"):
        tower_attribution(short)
    with pytest.raises(LensError, match="no picture to attribute to: this cache is of a run without any"):
        tower_attribution(text)
    with pytest.raises(LensError, match="image 0 of row 1; expected none: the prompt has no picture"):
        tower_attribution(mixed)
    assert tower_attribution(mixed, row=0).axes == AXES["component"]


def test_edits_and_changed_weights_are_noticed() -> None:
    model = hooked("plain", torch.float32)
    inputs = inputs_of(model, "plain", (1,), None)

    def edited(name: str) -> LlavaCache:
        with torch.no_grad(), model.hooks([(name, lambda act, hook: act * 1.3 + 0.1)]):
            return model.run_with_cache(inputs)[1]

    for name, message in (
        ("hook_embed", "is not the projector's output"),
        ("projector.hook_out", "hook_out is not the second layer of the cached hook_post"),
        ("projector.hook_pre", "hook_pre is not the first layer of the cached hook_in"),
        ("vision.blocks.1.hook_attn_out", r"heads of tower layer 1 do not sum to the cached hook_attn_out \(by='comp"),
    ):
        with pytest.raises(LensError, match=message):
            tower_attribution(edited(name), by="head")
    read = tower_attribution(edited("vision.blocks.1.hook_attn_out"))
    assert read.closure is not None and read.closure < 1e-5
    with pytest.raises(LensError, match="neurons of tower layer 0"):
        tower_attribution(edited("vision.blocks.0.hook_mlp_out"), by="neuron")


# ---- the trained model


def test_on_a_colour_question_the_direct_path_is_the_objects() -> None:
    model = HookedLlava.tiny()
    scenes = [render_scene(seed) for seed in range(HELD_OUT + 91_000, HELD_OUT + 91_040)]
    asked = [
        (s, next((q for q in questions(s) if q.kind == "color" and q.text.startswith("What is")), None)) for s in scenes
    ]
    pairs = [(s, q) for s, q in asked if q is not None][:12]
    inputs = model.prepare([q.text for _, q in pairs], [s.image for s, _ in pairs])
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    maps = {through: tower_attribution(cache, through=through) for through in ("direct", "all")}
    for through, scores in maps.items():
        assert scores.closure is not None and scores.closure < 1e-5 * float(logits[:, -1].max())
        grids = scores.sum("component").values.flatten(1)
        hits = [
            bool(inputs.roles_of(i).patches_of_mask(s.objects[q.about[0]].mask).flatten()[grids[i].argmax()])  # type: ignore[index]
            for i, (s, q) in enumerate(pairs)
        ]
        assert sum(hits) >= 10, through
