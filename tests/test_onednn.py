"""What the fused path takes from oneDNN on a CPU, and the patches' product: close, and no gradient lost.

Unusual: the random models are small, so the size from which oneDNN serves is set to one.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_fused import distance, inputs_for, pair
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from llava_lens import packing
from llava_lens.hooks import reader
from llava_lens.regions import regions_of
from llava_lens.vision import Patches


class Ops(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @property
    def onednn(self) -> int:
        return sum("mkldnn._linear_pointwise" in name for name in self.names)


@pytest.fixture
def all_large(monkeypatch):
    monkeypatch.setattr(packing, "WORTH_ONEDNN", 1)


@pytest.mark.parametrize("odd, biased", [("plain", 3), ("grouped", 3), ("attention_bias", 6)])
def test_large_products_are_onednns_and_equal_up_to_rounding(odd, biased, all_large):
    reference, fused = pair(odd)
    inputs = inputs_for(odd)
    with Ops() as ops:
        bare = fused(inputs)
    packed = sum(region.packed is not None for _, region in regions_of(fused))
    assert ops.onednn == packed - biased, "where the heads' output has a bias, it is added in the norm"
    assert distance(bare, reference(inputs)) < 1e-5
    look: Any = reader(lambda act, hook: None)
    assert torch.equal(fused.run_with_hooks(inputs, fwd_hooks=[(lambda name: True, look)]), bare)
    for model in (reference, fused):
        model.blocks[1].attn.v_proj.weight.data.mul_(2)
        model.blocks[0].mlp.out_proj.weight.data.neg_()
    assert distance(fused(inputs), reference(inputs)) < 1e-5
    assert distance(fused(inputs), bare) > 1e-3


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # torch's own, as the switch is set
@pytest.mark.parametrize("why", ["small", "switched off", "float64", "bfloat16"])
def test_what_onednn_should_not_take_is_torchs(why, monkeypatch):
    if why != "small":
        monkeypatch.setattr(packing, "WORTH_ONEDNN", 1)
    dtype = {"float64": torch.float64, "bfloat16": torch.bfloat16}.get(why, torch.float32)
    _, fused = pair("plain", dtype)
    off = torch.backends.mkldnn.flags(enabled=False) if why == "switched off" else nullcontext()
    with off, Ops() as ops:
        fused(inputs_for("plain"))
    assert ops.names and not ops.onednn


@pytest.mark.parametrize("how", ["as it lies", "in an order of its own"])
@pytest.mark.parametrize("name", ["blocks.1.attn.q_proj.weight", "blocks.1.mlp.gate_proj.weight"])
def test_a_product_behind_a_trained_weight_passes_its_gradient_on(name, how, all_large, monkeypatch):
    monkeypatch.setattr(packing, "WORTH_BLOCKING", 0)
    reference, fused = pair()
    if how != "as it lies":
        fused.optimize_for_cpu()
    inputs, grads = inputs_for("plain"), []
    for model in (reference, fused):
        weight = model.get_parameter(name).requires_grad_(True)
        model(inputs)[:, -1].square().sum().backward()
        grads.append(weight.grad)
    assert distance(grads[1], grads[0]) < 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # torch's own, as it loads its rules for forward derivatives
@pytest.mark.parametrize("grad", [True, False])
def test_a_derivative_carried_forward_arrives(grad, all_large):
    reference, fused = pair()
    x = torch.randn(1, 6, reference.cfg.d_model, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangents = [
            forward_ad.unpack_dual(model(forward_ad.make_dual(x, torch.ones_like(x)), start_at_layer=0)).tangent
            for model in (fused, reference)
        ]
        assert "forward derivatives" in fused.plan()["blocks.0"]["attn.qkv"]
    ours, expected = tangents
    assert ours is not None and expected is not None and torch.equal(ours, expected)


# ---- patches


@pytest.mark.parametrize("height, width", [(12, 12), (12, 20), (13, 15)])
def test_patches_by_a_product_are_those_of_the_convolution(height, width):
    cfg = pair()[0].cfg.vision
    patches = Patches(cfg).double().requires_grad_(False)
    pixels = torch.randn(3, cfg.n_channels, height, width, dtype=torch.float64)
    expected = patches(pixels)
    patches.product.fused = True
    with Ops() as ops:
        found = patches(pixels)
    assert not any("conv" in name for name in ops.names)
    assert found.shape == expected.shape and distance(found, expected) < 1e-14


def test_patches_that_are_trained_or_exchanged_are_convolved():
    _, fused = pair()
    inputs, conv = inputs_for("plain"), fused.vision.patch_embed
    conv.weight.requires_grad_(True)
    assert fused.plan()["vision.patch_embed"]["product"] == "gradients are on"
    with Ops() as ops:
        fused(inputs).sum().backward()
    assert any("conv" in name for name in ops.names)
    assert conv.weight.grad.abs().max() > 0
    conv.weight.requires_grad_(False)
    with torch.no_grad():
        bare = fused(inputs)
        fused.vision.patch_embed = nn.Conv2d(3, conv.out_channels, conv.kernel_size, conv.stride, bias=False)
        assert distance(fused(inputs), bare) > 1e-3
