"""The cache's keys, sums, sizes, slices and gradients, over odd configurations, at text and image positions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import cache as once
from pathlib import Path
from typing import Any

import make_keys
import pytest
import torch
from random_models import example, hf_llama, hf_llava

from llava_lens import HookedLlava, Inputs, LlavaCache
from llava_lens.errors import LensError, UnknownHook

ODD_STACKS = [
    "plain", "grouped", "one_kv_head", "wide_heads", "wide_grouped_heads", "tied", "attention_bias", "mlp_bias",
    "eps_1e-6", "gelu_decoder", "full", "last_layer", "positive_layer", "layer_list", "layer_list_full",
    "bare_projector", "gelu_tower",
]  # fmt: skip


@once
def model_of(odd: str = "plain", dtype: torch.dtype = torch.float32) -> Any:
    return HookedLlava.from_hf(hf_llava(odd, dtype=dtype))


@once
def run_of(odd: str = "plain", images: tuple[int, ...] = (1, 1), pad: str | None = None) -> Any:
    model = model_of(odd)
    inputs = model.read_inputs(**example(hf_llava(odd), images=images, pad=pad))
    with torch.no_grad():
        return inputs, *model.run_with_cache(inputs)


def fresh(odd: str = "plain", images: tuple[int, ...] = (1, 1)) -> Any:
    inputs, _, cache = run_of(odd, images)
    return LlavaCache(dict(cache.cache_dict), cache.model, inputs=inputs, asked=cache.asked)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to float32 rounding of a sum: 1e-5 of the largest number in it."""
    assert got.shape == expected.shape
    error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
    assert error < 1e-5, error


def both(cache: Any) -> Any:
    return {"decoder": cache, "tower": cache.vision}.items()


# ---- sums


@pytest.mark.parametrize("odd", ODD_STACKS)
@pytest.mark.parametrize("where", ["decoder", "tower"])
def test_sums_close_at_every_layer_and_position(odd, where):
    cache = dict(both(fresh(odd)))[where]
    stack = cache.model
    n = stack.cfg.n_layers
    assert (cache["hook_embed"] - cache["resid_pre", 0]).abs().max() == 0
    for layer in range(n + 1):
        stream = cache["resid_pre", layer] if layer < n else cache["resid_post", -1]
        close(cache.decompose_resid(layer).sum(0), stream)
        close(cache.accumulated_resid(layer)[-1], stream)
        heads, b_O = cache.stack_head_results(layer).sum(0), sum((b.attn.b_O for b in stack.blocks[:layer]), 0.0)
        if layer:
            close(heads + b_O, cache.decompose_resid(layer, mode="attn", incl_embeds=False).sum(0))
            close(cache.stack_head_results(layer, incl_remainder=True).sum(0), stream)
            close(cache.stack_neuron_results(layer, incl_remainder=True).sum(0), stream)
            mlps = cache.decompose_resid(layer, mode="mlp", incl_embeds=False).sum(0)
            close(cache.stack_neuron_results(layer).sum(0) + sum(b.mlp.b_out for b in stack.blocks[:layer]), mlps)
        for expand in (True, False):
            close(cache.get_full_resid_decomposition(layer, expand_neurons=expand).sum(0), stream)
        if layer < n:
            close(cache.decompose_resid(layer, mlp_input=True).sum(0), cache["resid_mid", layer])
            close(cache.accumulated_resid(layer, mlp_input=True)[-1], cache["resid_mid", layer])
            close(cache.get_full_resid_decomposition(layer, mlp_input=True).sum(0), cache["resid_mid", layer])
            for norm, mid in (("ln1", False), ("ln2", True)):
                normed = cache.decompose_resid(layer, mlp_input=mid, apply_ln=True).sum(0)
                close(normed, cache["normalized", layer, norm])


@pytest.mark.parametrize(
    "odd", ["plain", "grouped", "wide_grouped_heads", "attention_bias", "mlp_bias", "tied", "full"]
)
def test_attributions_sum_to_the_logit_difference_at_every_position(odd):
    inputs, logits, _ = run_of(odd)
    cache, right, wrong = fresh(odd), 5, 11
    difference = logits[..., right] - logits[..., wrong]
    assert (inputs.tokens == cache.model.cfg.image_token_id).any()
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition(expand_neurons=False)):
        close(cache.logit_attrs(stack, right, wrong).sum(0), difference)
    close(cache.logit_attrs(cache.get_full_resid_decomposition(), right).sum(0), logits[..., right])
    per_row = torch.tensor([5, 7])
    picked = torch.stack([logits[0, :, 5], logits[1, :, 7]])
    close(cache.logit_attrs(cache.decompose_resid(), per_row).sum(0), picked)


def test_attributions_with_a_position_and_without_a_batch():
    _, logits, cache = run_of(images=(1,))
    last = cache.logit_attrs(cache.decompose_resid(pos_slice=-1), 5, 11, pos_slice=-1).sum(0)
    close(last, logits[:, -1, 5] - logits[:, -1, 11])
    alone = fresh(images=(1,)).remove_batch_dim()
    close(alone.logit_attrs(alone.decompose_resid(), 5, has_batch_dim=False).sum(0), logits[0, :, 5])


def test_projections_and_neuron_slices_equal_the_long_way():
    cache = fresh()
    direction = cache.model.tokens_to_residual_directions(5)
    for layer in (1, 3):
        full = cache.get_full_resid_decomposition(layer, apply_ln=True) @ direction
        close(cache.get_full_resid_decomposition(layer, apply_ln=True, project_output_onto=direction), full)
    some = cache.stack_neuron_results(2, neuron_slice=(3, 6))
    close(some[:3], cache.stack_neuron_results(2)[3:6])


def test_a_sum_without_its_embedding_is_refused():
    model = model_of()
    with torch.no_grad():
        _, cache = model.run_with_cache(run_of()[0], names_filter=lambda n: n.endswith(("attn_out", "mlp_out")))
    with pytest.raises(UnknownHook, match="'hook_embed' exists but was not kept"):
        cache.decompose_resid()
    assert len(cache.decompose_resid(incl_embeds=False)) == 6


@pytest.mark.parametrize(
    "method", ["decompose_resid", "accumulated_resid", "stack_head_results", "stack_neuron_results"]
)
def test_a_layer_outside_the_stack_is_refused(method):
    cache = fresh()
    for layer in (-2, 4):
        with pytest.raises(LensError, match=f"{method}.*layer={layer}.*expected 0 … 3"):
            getattr(cache, method)(layer)
    with pytest.raises(LensError, match="layer of an MLP is 0 … 2"):
        cache.decompose_resid(mlp_input=True)
    assert torch.equal(cache.decompose_resid(-1), cache.decompose_resid(3))


def test_the_tower_says_what_it_lacks():
    tower = fresh().vision
    with pytest.raises(LensError, match=r"has no norm.*0 … 2"):
        tower.decompose_resid(apply_ln=True)
    with pytest.raises(LensError, match="no unembedding"):
        tower.logit_attrs(tower.decompose_resid(), 3)
    with pytest.raises(LensError, match="no unembedding"):
        tower.logit_lens()
    plain = HookedLlava.from_hf(hf_llama())
    with torch.no_grad(), pytest.raises(LensError, match="no vision tower"):
        _ = plain.run_with_cache(torch.tensor([[1, 2, 3]]))[1].vision


@pytest.mark.parametrize("odd", ["plain", "grouped", "attention_bias"])
def test_head_results_are_computed_when_they_were_not_kept(odd):
    with torch.no_grad():
        _, cache = model_of(odd).run_with_cache(run_of(odd)[0], names_filter=lambda n: not n.endswith("hook_result"))
    for part, (_, all_kept) in zip((cache, cache.vision), both(fresh(odd)), strict=True):
        assert ("result", 0) not in part
        part.compute_head_results()
        for layer in range(3):
            close(part["result", layer], all_kept["result", layer])
    assert "vision.blocks.0.attn.hook_result" in cache


def test_logit_lens_ends_in_the_logits():
    _, logits, cache = run_of("grouped")
    lens, labels = cache.logit_lens(incl_mid=True)
    assert labels == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    close(lens[-1], logits)
    model = cache.model
    with torch.no_grad():
        close(lens[3], model.unembed(model.ln_final(cache["resid_mid", 1])))
    assert cache.logit_lens(pos_slice=-1)[0].shape == (4, 2, 97)


# ---- keys


def test_keys_name_what_transformer_lens_names():
    cache = fresh()
    same = {
        ("resid_post", 1): "blocks.1.hook_resid_post",
        ("resid_post", -1): "blocks.2.hook_resid_post",
        ("pattern", 0): "blocks.0.attn.hook_pattern",
        ("scale", 0, "ln1"): "blocks.0.ln1.hook_scale",
        ("normalized", -3, "ln2"): "blocks.0.ln2.hook_normalized",
        ("pre_linear", 2): "blocks.2.mlp.hook_pre_linear",
        "embed": "hook_embed",
        "scale": "ln_final.hook_scale",
        "k1": "blocks.1.attn.hook_k",
    }
    for key, name in same.items():
        assert cache[key] is cache.cache_dict[name] and key in cache
    for key in ["hook_embed", ("q", 1), ("scale", 2, "ln2"), ("resid_mid", -1)]:
        name = cache.vision.full_name(key)
        assert cache.vision[key] is cache.cache_dict["vision." + name] and key in cache.vision
    assert "blocks.0.hook_nothing" not in cache and ("q", 9) not in cache


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("resid_post", 3), r"layer 3 in \('resid_post', 3\); expected -3 … 2"),
        (("resid_post", -4), "layer -4 .*expected -3 … 2"),
        ("blocks.7.hook_resid_post", "layer 7 .*expected -3 … 2"),
        (("resid_post", "one"), "layer 'one' .*expected a whole number"),
        (("resid_pots", 1), "no hook for the key .*nearest: 'resid_post'"),
        ("hook_embd", "no hook for the key 'hook_embd'; nearest: 'hook_embed'"),
        ("blocks.1.attn.hook_patern", "nearest: 'blocks.1.attn.hook_pattern'"),
        (("scale", 0), r"which norm: \('scale', 0, 'ln1'\) or 'ln2'"),
        ("resid_post", r"in every block; say the layer: \('resid_post', layer\)"),
        (("resid_post_grad", 1), "'blocks.1.hook_resid_post' has no gradient here: run with incl_bwd=True"),
        (3, "3 is no cache key"),
    ],
)
def test_a_wrong_key_says_what_is_wrong(key, message):
    with pytest.raises(LensError, match=message):
        fresh()[key]


def test_a_missing_entry_says_why():
    model, inputs = model_of(), run_of()[0]
    text = Inputs(inputs.tokens[:, -5:])
    with torch.no_grad():
        _, some = model.run_with_cache(inputs, names_filter=["blocks.0.attn.hook_q", "vision.blocks.1.hook_mlp_out"])
        _, no_picture = model.run_with_cache(text)
    for cache, key, name in (
        (some, ("mlp_out", 1), "blocks.1.hook_mlp_out"),
        (some.vision, ("q", 0), "vision.blocks.0.attn.hook_q"),
    ):
        with pytest.raises(UnknownHook, match=rf"'{re.escape(name)}' exists but was not kept.*names_filter='{name}'"):
            cache[key]
        with torch.no_grad():
            assert name in model.run_with_cache(inputs, names_filter=name)[1]
    with pytest.raises(UnknownHook, match=r"'vision.blocks.0.attn.hook_q' did not fire in this run: no picture"):
        no_picture.vision["q", 0]


def test_all_is_declared_and_the_key_types_are_fresh():
    inputs, _, cache = run_of()
    assert set(cache.cache_dict) == set(cache.model.hook_dict)
    assert make_keys.TARGET.read_text() == make_keys.source(), f"stale keys: run {make_keys.COMMAND}"
    assert torch.equal(cache.inputs.tokens, inputs.tokens) and torch.equal(cache.inputs.pixels, inputs.pixels)
    assert re.fullmatch(r"LlavaCache\(\d+ activations, [\d.]+ MiB, Inputs\(.*\)\)", repr(cache))


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright_checks_keys(tmp_path):
    root = Path(__file__).parent.parent
    file = root / "tests" / "typed_keys.py"
    done = subprocess.run(["pyright", "--outputjson", str(file)], cwd=root, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == 1 and not found["generalDiagnostics"], done.stdout


# ---- size, place and shape


def held(cache: Any) -> int:
    """Bytes of the distinct memory behind what a cache keeps, nothing of it formed."""
    storages = {act.untyped_storage().data_ptr(): act.untyped_storage() for act in cache.cache_dict.tensors()}
    return sum(storage.nbytes() for storage in storages.values())


DERIVED = ("hook_attn_scores", "hook_pattern", "hook_result", "hook_normalized", "hook_scale")
SIZED = ["plain", "wide_grouped_heads", "full", "first_layer", "layer_list_full", "plain in bfloat16"]


@pytest.mark.parametrize("odd", SIZED)
def test_the_estimate_is_the_size(odd):
    dtype = torch.bfloat16 if odd.endswith("bfloat16") else torch.float32
    model = model_of(odd.split()[0], dtype)
    inputs = example(hf_llava(odd.split()[0]), images=(2, 1), pad="left")
    filters = [
        None,
        "hook_embed",
        ["vision.hook_pixels", "projector.hook_out"],
        lambda n: n.endswith(("scale", "pattern")),
    ]
    for names_filter in filters:
        for how in ({}, {"dtype": torch.float16}, {"pos_slice": (2, 9, 3), "vision_pos_slice": [0, 4]}):
            with torch.no_grad():
                _, cache = model.run_with_cache(**inputs, names_filter=names_filter, **how)
            assert model.cache_bytes(**inputs, names_filter=names_filter, **how) == held(cache) == cache.nbytes


def test_the_estimate_knows_gradients_and_text():
    model, inputs = model_of("grouped"), run_of("grouped")[0]
    _, cache = model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
    assert held(cache) <= model.cache_bytes(inputs, incl_bwd=True) <= sum(act.nbytes for act in cache.values())
    text = Inputs(inputs.tokens[:, -5:])
    with torch.no_grad():
        assert model.cache_bytes(text) == held(model.run_with_cache(text)[1])
    with pytest.raises(UnknownHook, match="nearest"):
        model.cache_bytes(text, names_filter="hook_embd")


def test_each_tower_is_cut_by_its_own_slice():
    inputs, _, whole = run_of("grouped")
    with torch.no_grad():
        _, cut = model_of("grouped").run_with_cache(inputs, pos_slice=-1, vision_pos_slice=(0, 3))
    for name, act in whole.items():
        axes = whole.model.hook(name).axes.split()
        axis = "pos" if "pos" in axes else "query" if "query" in axes else None
        if axis:
            kept = torch.arange(3) if name.startswith("vision.") else torch.tensor([act.shape[axes.index(axis)] - 1])
            act = act.index_select(axes.index(axis), kept)
        if name.endswith(DERIVED):  # formed from the rows that were kept: a smaller product may round otherwise
            assert torch.allclose(cut[name], act, rtol=1e-5, atol=1e-5), name
        else:
            assert torch.equal(cut[name], act), name
    close(cut.decompose_resid().sum(0), whole["resid_post", -1][:, -1:])
    for how in ({"pos_slice": (90, 99)}, {"pos_slice": 90}, {"vision_pos_slice": [10]}, {"pos_slice": [-99]}):
        with (
            pytest.raises(LensError, match=rf"{next(iter(how))} .*selects nothing there is.*\d+ positions"),
            torch.no_grad(),
        ):
            model_of("grouped").run_with_cache(inputs, **how)
        with pytest.raises(LensError, match="selects nothing there is"):
            model_of("grouped").cache_bytes(inputs, **how)


def test_dtype_and_device_and_sharing():
    inputs, _, whole = run_of()
    with torch.no_grad():
        _, half = model_of().run_with_cache(inputs, dtype=torch.bfloat16, device="cpu")
    assert {act.dtype for act in half.values()} == {torch.bfloat16}
    assert torch.equal(half["pattern", 1], whole["pattern", 1].bfloat16())
    for cache in (half, fresh(), fresh().to(torch.float64), fresh().to("cpu")):
        assert cache["resid_post", 0].data_ptr() == cache["resid_pre", 1].data_ptr()
        assert cache["resid_mid", 0].data_ptr() == cache["mlp_in", 0].data_ptr()
    with torch.no_grad():
        _, away = model_of().run_with_cache(inputs, device="meta", names_filter=["hook_embed", "vision.hook_embed"])
    assert all(act.is_meta for act in away.values())
    moved = fresh()
    assert moved.to("meta") is moved and moved.vision["q", 0].is_meta and moved["q", 0].is_meta
    assert moved.vision.to(torch.float16)["q", 0].dtype == torch.float16 and moved["q", 0].dtype == torch.float32


def test_what_is_kept_does_not_follow_the_weights():
    model = HookedLlava.from_hf(hf_llava())
    with torch.no_grad():
        _, cache = model.run_with_cache(run_of(images=(1,))[0])
        before = {name: act.clone() for name, act in cache.items()}
        parameters = {name: p.clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.mul_(2)
        for name in cache:
            if name.endswith("hook_result"):  # formed when asked for, and from a weight that is no longer the run's
                with pytest.raises(LensError, match=f"{name}.*the model's weight was edited in place after the run"):
                    cache[name]
            else:
                assert torch.equal(cache[name], before[name])
        for name, p in model.named_parameters():
            p.copy_(parameters[name])


@pytest.mark.parametrize("images", [(1,), (2,), (0,)])
def test_remove_batch_dim_leaves_the_tower_its_images(images):
    cache = fresh(images=images)
    whole = dict(cache.cache_dict)
    assert cache.remove_batch_dim() is cache and not cache.has_batch_dim
    for name, act in cache.items():
        by_image = name.startswith(("vision.", "projector."))
        assert torch.equal(act, whole[name] if by_image and images == (2,) else whole[name][0]), name
    if sum(images):
        assert cache.vision.has_batch_dim == (images == (2,))
    for _, part in both(cache) if sum(images) else [("", cache)]:
        close(part.decompose_resid().sum(0), part["resid_post", -1])
        close(part.get_full_resid_decomposition(expand_neurons=False).sum(0), part["resid_post", -1])
        part.cache_dict.pop("blocks.0.attn.hook_result", None)
        part.stack_head_results(1)
    assert cache.remove_batch_dim() is cache
    with torch.no_grad():
        plain = model_of().run_with_cache(cache.inputs, remove_batch_dim=True, return_cache_object=False)[1]
    assert isinstance(plain, dict) and torch.equal(plain["hook_embed"], cache["hook_embed"])


def test_several_rows_or_images_keep_their_axis():
    with pytest.raises(LensError, match="a batch of 2; only a batch of 1"):
        fresh().remove_batch_dim()
    with pytest.raises(LensError, match="saw 2 images"):
        fresh().vision.remove_batch_dim()
    one = fresh(images=(1,))
    one.vision.remove_batch_dim()
    assert one["q", 0].ndim == 4 and one.vision["q", 0].ndim == 3 and not one.vision.has_batch_dim


def sliced(cache: LlavaCache, rows: Any) -> Any:
    return cache.apply_slice_to_batch_dim(rows)


def test_slicing_rows_takes_their_images_along():
    hf, model = hf_llava(), model_of()
    inputs = model.read_inputs(**example(hf, images=(1, 0, 2), pad="left"))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for rows, images in ([[2, 0], [1, 2, 0]], [(1, None), [1, 2]], [2, [1, 2]], [0, [0]], [1, []], [-1, [1, 2]]):
        part = sliced(cache, rows)
        assert type(part).__name__ == "LlavaCache" and part.has_batch_dim == (not isinstance(rows, int))
        index = slice(*rows) if isinstance(rows, tuple) else rows
        assert torch.equal(part["q", 1], cache["q", 1][index])
        towers = cache.vision["q", 1][images]
        assert torch.equal(part.vision["q", 1], towers[0] if isinstance(rows, int) and len(images) == 1 else towers)
        assert torch.equal(part.inputs.tokens, inputs.tokens[[rows] if isinstance(rows, int) else index])
        assert (0 if part.inputs.pixels is None else len(part.inputs.pixels)) == len(images)
        close(part.decompose_resid().sum(0), part["resid_post", -1])
    for rows in (3, [0, 5], (3, 9)):
        with pytest.raises(LensError, match="of a batch of 3: there are none"):
            cache.apply_slice_to_batch_dim(rows)
    with pytest.raises(LensError, match="slice the whole cache"):
        cache.vision.apply_slice_to_batch_dim(0)
    with pytest.raises(LensError, match="no batch axis"):
        cache.apply_slice_to_batch_dim(0).apply_slice_to_batch_dim(0)
    with pytest.raises(LensError, match="3 images for 3 prompts, and no inputs that say whose"):
        LlavaCache(dict(cache.items()), model).apply_slice_to_batch_dim([0])


# ---- gradients


@pytest.mark.parametrize(
    "name", ["blocks.1.hook_resid_post", "blocks.0.attn.hook_pattern", "vision.blocks.1.attn.hook_z"]
)
def test_gradients_are_finite_differences(name):
    model = model_of("grouped", torch.float64)
    inputs = example(hf_llava("grouped"))
    inputs["pixel_values"] = inputs["pixel_values"].double()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].log_softmax(-1)[:, 5].sum()

    _, cache = model.run_with_cache(**inputs, names_filter=name, incl_bwd=True, metric=metric)
    assert all(p.grad is None for p in model.parameters())
    gradient = cache[name + "_grad"]
    generator = torch.Generator().manual_seed(0)
    nudge = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)

    def nudged(step: float) -> float:
        with torch.no_grad(), model.hooks(fwd_hooks=[(name, lambda act, hook: act + step * nudge)]):
            return float(metric(model(**inputs)))

    slope = (nudged(1e-6) - nudged(-1e-6)) / 2e-6
    assert abs(slope) > 1e-3
    assert abs(float((gradient * nudge).sum()) - slope) < 1e-6 * abs(slope)  # the quotient's rounding


def test_gradients_of_everything_equal_autograd_by_hand():
    model, inputs = model_of("grouped"), run_of("grouped")[0]
    _, cache = model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
    held: dict[str, Any] = {}

    def hold(act, hook):
        act = act * 1
        act.retain_grad()
        held[hook.name] = act
        return act

    names = [
        name for name in model.hook_dict if name.endswith(("resid_post", "_out", "hook_embed", "hook_q", "hook_post"))
    ]
    with model.hooks(fwd_hooks=[(name, hold) for name in names]):
        model(inputs, return_type="loss").backward()
    model.zero_grad()
    for name in names:
        close(cache[name + "_grad"], held[name].grad)
    assert torch.equal(cache["resid_post_grad", -1], cache["blocks.2.hook_resid_post_grad"])
    assert torch.equal(cache["q_grad", 1], cache["blocks.1.attn.hook_q_grad"])
    assert cache.vision["z_grad", 0].abs().max() > 0
    with pytest.raises(UnknownHook, match="no gradient"):
        cache.vision["hook_pixels_grad"]


def test_gradients_need_a_scalar_and_a_graph():
    model, inputs = model_of(), run_of()[0]
    with pytest.raises(LensError, match="needs a scalar"):
        model.run_with_cache(inputs, incl_bwd=True)
    with torch.no_grad(), pytest.raises(LensError, match="nothing to differentiate"):
        model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
