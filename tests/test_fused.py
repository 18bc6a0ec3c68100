"""The fused path: close to the reference, the same bits whoever looks, and closed region by region where one writes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from random_models import ODD, example, hf_llama, hf_llava
from torch import nn

from llava_lens import HookedLlava, Inputs, packing
from llava_lens.analysis import knock_out, patch
from llava_lens.errors import LensError
from llava_lens.hooks import reader
from llava_lens.packing import Packed
from llava_lens.regions import regions_of


def pair(odd: str = "plain", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model on the reference path and one on the fused path, of equal weights."""
    reference, fused = (HookedLlava.from_hf(copy.deepcopy(hf_llava(odd)).to(dtype)) for _ in range(2))
    fused.use("fused")
    return reference.requires_grad_(False), fused.requires_grad_(False)


def inputs_for(odd: str, **how) -> Inputs:
    given = example(hf_llava(odd), **how)
    return Inputs(given["input_ids"], given.get("pixel_values"), given.get("attention_mask"))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((one.double() - other.double()).abs().max() / other.double().abs().max())


def seen(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """Logits of what is not padding."""
    return logits if inputs.attention_mask is None else logits[inputs.attention_mask.bool()]


def held(model: nn.Module) -> int:
    """Bytes of the memory behind all weights."""
    stores = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in model.parameters()}
    return sum(stores.values())


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("odd", ODD)
def test_the_fused_path_is_the_reference_up_to_rounding(odd, pad):
    inputs = inputs_for(odd, images=(1, 2) if pad else (1, 1), pad=pad)
    for dtype, most in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        reference, fused = pair(odd, dtype)
        assert distance(seen(fused(inputs), inputs), seen(reference(inputs), inputs)) < most


def test_every_region_of_a_plain_model_is_fused():
    _, fused = pair()
    assert {why for part in fused.plan().ways for why in fused.plan()[part].values()} == {"fused"}
    assert str(fused.plan()).splitlines()[0] == "path 'fused'"
    assert "all: fused" in str(fused.plan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_further_from_float64_than_the_reference(dtype):
    inputs = inputs_for("plain")
    exact = pair("plain", torch.float64)[0](inputs)
    reference, fused = pair("plain", dtype)
    with torch.no_grad():
        ours, theirs = ((model(inputs).double() - exact).norm() for model in (fused, reference))
    assert ours < 1.1 * theirs


@pytest.mark.parametrize("odd", ["plain", "grouped", "attention_bias", "mlp_bias", "gelu_decoder"])
def test_looking_changes_no_bit_and_shows_what_the_reference_shows(odd):
    reference, fused = pair(odd)
    inputs = inputs_for(odd)
    bare = fused(inputs)
    logits, cache = fused.run_with_cache(inputs)
    assert torch.equal(bare, logits)
    _, expected = reference.run_with_cache(inputs)
    assert set(cache.cache_dict) == set(expected.cache_dict)
    for name in expected.cache_dict:
        finite = expected[name].isfinite()
        assert torch.equal(finite, cache[name].isfinite()), name
        assert distance(cache[name][finite], expected[name][finite]) < 1e-5, name


def test_a_reader_of_any_hook_changes_no_bit_and_keeps_what_it_saw():
    _, fused = pair("grouped")
    inputs = inputs_for("grouped")
    bare = fused(inputs)
    for name in fused.hook_dict:
        shown = []

        @reader
        def look(act, hook, shown=shown):
            shown.append((act, act.clone()))

        assert torch.equal(fused.run_with_hooks(inputs, fwd_hooks=[(name, look)]), bare), name
        ((act, then),) = shown
        assert torch.equal(act, then), f"{name} was written on after it was shown"


def test_an_edit_anywhere_is_that_of_the_reference():
    reference, fused = pair("grouped")
    inputs = inputs_for("grouped")
    bare, inner = fused(inputs), ("blocks.1.", "blocks.2.", "vision.blocks.1.")

    def edit(act, hook):
        act.mul_(1 + 0.3 * torch.rand(act.shape, generator=torch.Generator().manual_seed(0)))

    for name in (each for each in fused.hook_dict if not each.startswith(inner)):
        ours, expected = (model.run_with_hooks(inputs, fwd_hooks=[(name, edit)]) for model in (fused, reference))
        assert distance(ours, expected) < 1e-5, name
        assert distance(bare, expected) > 1e-4, f"{name}: the edit does nothing"


def test_a_writer_closes_its_region_of_its_layer_alone():
    _, fused = pair()
    regions = dict(regions_of(fused))
    for hook in {str(each.name) for region in regions.values() for each in region.hooks}:
        around = [name for name, region in regions.items() if hook in {each.name for each in region.hooks}]
        with fused.hooks(fwd_hooks=[(hook, lambda act, hook: None)]):
            assert [name for name, each in regions.items() if not each.open()] == around
            part, what = split(around[0])
            assert fused.plan()[part][what] == f"{hook.rpartition('.')[2]} may be written"
        with fused.hooks(fwd_hooks=[(hook, reader(lambda act, hook: None))]):
            assert all(each.open() for each in regions.values())


def split(region: str) -> tuple[str, str]:
    """`blocks.0.attn.qkv` as the plan has it: the block, and the region in it."""
    head, block, rest = region.partition("blocks.")
    number, _, inside = rest.partition(".")
    outside, _, name = region.rpartition(".")
    return (f"{head}blocks.{number}", inside) if block else (outside, name)


def test_gradients_take_the_reference_path_and_the_plan_says_so():
    reference, fused = pair()
    for model in (reference, fused):
        model.requires_grad_(True)
    inputs = inputs_for("plain")
    losses = [model(inputs)[:, -1].square().sum() for model in (reference, fused)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, one), other in zip(reference.named_parameters(), fused.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name
    assert fused.plan()["blocks.0"]["mlp.neurons"] == "gradients are on"
    with torch.inference_mode():
        assert fused.plan()["blocks.0"]["mlp.neurons"] == "fused"


def test_a_gradient_asked_for_at_a_hook_flows():
    reference, fused = pair()
    inputs = inputs_for("plain")
    with torch.no_grad():
        _, cache = reference.run_with_cache(inputs, names_filter="hook_embed")
    embedded = cache["hook_embed"]  # for both: the tower, from which no gradient is asked, stays fused

    def start(act, hook):
        assert distance(act, embedded) < 1e-5
        return embedded.detach().requires_grad_(True)

    names = ["hook_embed", "blocks.0.attn.hook_pattern", "blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"]
    grads = []
    for model in (reference, fused):
        with model.hooks(fwd_hooks=[("hook_embed", start)]):
            _, cache = model.run_with_cache(
                inputs, names_filter=names, incl_bwd=True, metric=lambda logits: logits[0, -1, 5]
            )
        grads.append([cache[f"{name}_grad"] for name in names])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def test_no_weight_is_held_twice_and_edits_of_weights_are_seen():
    reference, fused = pair("grouped")
    assert held(fused) == held(reference)
    inputs = inputs_for("grouped")
    with torch.no_grad():
        for model in (reference, fused):
            model.blocks[1].attn.W_K[0].mul_(-1)
            model.blocks[0].mlp.gate_proj.weight[3] = 0
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    for model in (reference, fused):
        model.blocks[1].attn.v_proj.weight = nn.Parameter(model.blocks[1].attn.v_proj.weight * 2, requires_grad=False)
    assert "lie apart" in fused.plan()["blocks.1"]["attn.qkv"]
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    fused.use("fused")
    assert fused.plan()["blocks.1"]["attn.qkv"] == "fused"
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    assert held(fused) == held(reference)


def test_a_model_that_moved_or_was_copied_is_still_right():
    reference, fused = pair()
    inputs = inputs_for("plain")
    twin = copy.deepcopy(fused)
    with torch.no_grad():
        twin.blocks[0].attn.q_proj.weight.zero_()
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    assert distance(twin(inputs), reference(inputs)) > 1e-4
    fused.to(torch.float64)
    assert fused.plan()["blocks.0"]["attn.qkv"] == "fused"
    assert distance(fused(inputs), reference.to(torch.float64)(inputs)) < 1e-13
    stale: list[Any] = [
        packed for part in fused.modules() for packed in vars(part).values() if isinstance(packed, Packed)
    ]
    assert all(packed.together[0].dtype == torch.float64 for packed in stale)


def test_weights_shared_with_hugging_face_stay_theirs():
    hf = copy.deepcopy(hf_llava())
    model: Any = HookedLlava.from_hf(hf)
    before = hf.model.language_model.layers[0].self_attn.q_proj.weight.clone()
    model.use("fused")
    with torch.no_grad():
        model.blocks[0].attn.q_proj.weight.zero_()
    assert torch.equal(hf.model.language_model.layers[0].self_attn.q_proj.weight, before)


def test_use_is_a_switch_and_a_context():
    model = HookedLlava.from_hf(hf_llava())
    assert model.path == "reference"
    with model.use("fused") as same:
        assert same is model and model.path == "fused"
        with pytest.raises(RuntimeError), model.use("reference"):
            raise RuntimeError
        assert model.path == "fused"
    with torch.inference_mode():
        assert model.path == "reference" and "the reference path is chosen" in str(model.plan())
    with pytest.raises(LensError, match=r"'fuse'.*'fused'"):
        model.use("fuse")
    with pytest.raises(LensError, match=r"'blocks.9'.*blocks.0"):
        model.plan()["blocks.9"]


def test_generation_and_interventions_are_those_of_the_reference():
    inputs: Any = inputs_for("plain")
    reference, fused = pair()
    prompt = Inputs(inputs.tokens[:1], inputs.pixels[:1])
    assert torch.equal(reference.generate(prompt, 12), fused.generate(prompt, 12))
    clean, corrupt = (
        Inputs.from_tokens(inputs.tokens[i : i + 1], reference.cfg, inputs.pixels[i : i + 1]) for i in (0, 1)
    )
    for run in (
        lambda model: patch(model, clean, corrupt, "resid_pre", ("layer", "position"), progress=False).values,
        lambda model: patch(model, clean, corrupt, "z", ("layer", "head"), progress=False).values,
        lambda model: knock_out(model, clean, "last", "image", progress=False).values,
    ):
        assert torch.allclose(run(fused), run(reference), atol=1e-4)


def test_a_decoder_alone():
    reference, fused = HookedLlava.from_hf(hf_llama("grouped")), HookedLlava.from_hf(hf_llama("grouped"))
    fused.use("fused")
    tokens = torch.randint(3, 90, (2, 9))
    with torch.inference_mode():
        assert distance(fused(tokens), reference(tokens)) < 1e-5


def test_a_compiler_that_traces_gets_the_reference(monkeypatch):
    _, fused = pair()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fused.plan()["blocks.0"]["mlp.neurons"].startswith("torch.compile, autocast")
    assert not any(region.open() for _, region in regions_of(fused))


def test_autocast_gets_the_reference():
    _, fused = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.plan()["blocks.0"]["mlp.neurons"].startswith("torch.compile, autocast")


def test_packed_for_a_cpu_it_is_the_same_and_edits_are_seen(monkeypatch):
    monkeypatch.setattr(packing, "WORTH_BLOCKING", 0)
    reference, fused = pair("grouped")
    inputs = inputs_for("grouped")
    fused.optimize_for_cpu()
    assert fused.path == "fused" and fused.blocks[0].attn.packed._blocked is not None
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    copies = fused.blocks[0].attn.packed._blocked
    with fused.use("reference"):
        assert torch.equal(fused(inputs), reference(inputs))
    assert fused.blocks[0].attn.packed._blocked is copies, "a while on the other path drops nothing"
    for model in (reference, fused):
        with torch.no_grad():
            model.blocks[0].attn.W_V.mul_(2)
            model.blocks[2].mlp.out_proj.weight.neg_()
        model.blocks[1].mlp.gate_proj.weight = nn.Parameter(
            model.blocks[1].mlp.gate_proj.weight * 3, requires_grad=False
        )
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    fused.to(torch.float64)
    assert distance(fused(inputs), reference.to(torch.float64)(inputs)) < 1e-13


def test_what_cannot_be_packed_for_a_cpu_says_so(monkeypatch):
    model = pair()[1].to(torch.bfloat16)
    with pytest.raises(LensError, match=r"torch.bfloat16 on cpu; .* float32 on a CPU"):
        model.optimize_for_cpu()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(LensError, match=r"without oneDNN's packed products; use\('fused'\)"):
        model.to(torch.float32).optimize_for_cpu()


@pytest.mark.parametrize("odd", ["plain", "grouped", "attention_bias", "wide_heads", "layer_list"])
def test_the_bytes_of_a_cache_are_foretold_on_the_fused_path_too(odd):
    _, fused = pair(odd)
    inputs = inputs_for(odd)
    for names in (None, "blocks.1.attn.hook_v", "blocks.0.attn.hook_pattern", lambda name: name.endswith("_out")):
        _, cache = fused.run_with_cache(inputs, names_filter=names)
        assert fused.cache_bytes(inputs, names_filter=names) == cache.nbytes, names
