"""Logits, gradients and every block's stream equal Hugging Face's, bit for bit, over odd configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import ODD, ROPES, example, hf_llama, hf_llava
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_lens import HookedLlava

SHAPES = {
    "batch": dict(images=(1, 1)),
    "one": dict(images=(1,)),
    "two_pictures": dict(images=(2,)),
    "ragged_left": dict(images=(1, 1, 1), pad="left"),
    "ragged_right": dict(images=(1, 1), pad="right"),
    "uneven_pictures": dict(images=(2, 0, 1), pad="left"),
    "text_only": dict(images=(0, 0)),
}


def logits_of(hf, inputs):
    with torch.no_grad():
        return hf(**inputs).logits


def test_every_rope_scaling_that_transformers_knows_is_tried():
    assert {rope["rope_type"] for rope in ROPES.values()} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("odd", ODD)
def test_logits_are_bit_equal_over_configurations(odd, attention, dtype):
    hf = hf_llava(odd, attention, dtype)
    model = HookedLlava.from_hf(hf)
    for shape in ("batch", "ragged_left"):
        inputs = example(hf, **SHAPES[shape])
        with torch.no_grad():
            assert torch.equal(model(**inputs), logits_of(hf, inputs)), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("odd", ["plain", "wide_grouped_heads"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_bit_equal_over_inputs(shape, odd, attention, dtype):
    hf = hf_llava(odd, attention, dtype)
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, **SHAPES[shape])
    with torch.no_grad():
        ours = model(**inputs)
    assert ours.dtype == dtype and torch.equal(ours, logits_of(hf, inputs))


@pytest.mark.parametrize("odd", ["plain", "grouped", "tied", "rope_llama3"])
def test_a_plain_llama_is_bit_equal(odd):
    hf = hf_llama(odd)
    model = HookedLlava.from_hf(hf)
    tokens = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)


@pytest.mark.parametrize("odd", ["plain", "grouped", "layer_list"])
def test_every_stream_is_bit_equal(odd):
    hf = hf_llava(odd)
    model = HookedLlava.from_hf(hf)
    inputs = example(hf)
    with torch.no_grad():
        theirs = hf(**inputs, output_hidden_states=True).hidden_states
        tower = hf.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        _, cache = model.run_with_cache(**inputs)
    for layer in range(model.cfg.n_layers):
        assert torch.equal(cache["resid_pre", layer], theirs[layer])
    for layer in range(model.cfg.vision.n_layers):
        assert torch.equal(cache[f"vision.blocks.{layer}.hook_resid_pre"], tower[layer])


@pytest.mark.parametrize("length", [20, 140])
def test_dynamic_rope_follows_the_length(length):
    hf, model = hf_llama("rope_dynamic"), HookedLlava.from_hf(hf_llama("rope_dynamic"))
    tokens = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(tokens), hf(tokens).logits)


def gradients(run, pixels, inputs, weights):
    """Of one answer's log-probability, by the pixels and by some weights of every room."""
    run.requires_grad_(True)
    run.zero_grad()
    pixels = pixels.clone().requires_grad_()
    out = run(**{**inputs, "pixel_values": pixels})
    logits = out if isinstance(out, torch.Tensor) else out.logits
    return torch.autograd.grad(logits[:, -1].log_softmax(-1)[:, 5].sum(), [pixels, *weights])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("odd", ["plain", "grouped", "layer_list_full"])
def test_gradients_equal(odd, attention):
    hf: Any = hf_llava(odd, attention)
    model: Any = HookedLlava.from_hf(hf)
    inputs = example(hf)
    decoder, tower = hf.model.language_model, hf.model.vision_tower
    theirs = [
        decoder.embed_tokens.weight, decoder.layers[0].self_attn.k_proj.weight, decoder.layers[1].mlp.up_proj.weight,
        decoder.norm.weight, hf.model.multi_modal_projector.linear_1.weight, tower.embeddings.class_embedding,
        tower.encoder.layers[0].mlp.fc1.weight, tower.pre_layrnorm.bias,
    ]  # fmt: skip
    ours = [
        model.embed.weight, model.blocks[0].attn.k_proj.weight, model.blocks[1].mlp.in_proj.weight,
        model.ln_final.weight, model.projector.linear_1.weight, model.vision.class_embed,
        model.vision.blocks[0].mlp.in_proj.weight, model.vision.ln_pre.bias,
    ]  # fmt: skip
    pairs = zip(
        gradients(model, inputs["pixel_values"], inputs, ours),
        gradients(hf, inputs["pixel_values"], inputs, theirs),
        strict=True,
    )
    for mine, reference in pairs:
        assert reference.abs().max() > 0
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5 * float(reference.abs().max()))


def test_ragged_rows_equal_the_singles():
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    for pad in ("left", "right"):
        inputs = example(hf, images=(1, 1, 1), pad=pad)
        with torch.no_grad():
            together = model(**inputs)
            for row, keep in enumerate(inputs["attention_mask"].bool()):
                one = slice(row, row + 1)
                alone = model(inputs["input_ids"][one, keep], pixel_values=inputs["pixel_values"][one])
                torch.testing.assert_close(together[row, keep], alone[0], rtol=1e-5, atol=1e-4)


def test_float64_agrees_with_float32_and_stays_float64():
    hf = hf_llava("grouped")
    inputs = example(hf)
    model = HookedLlava.from_hf(hf)
    with torch.no_grad():
        single = model(**inputs)
        precise = HookedLlava.from_hf(hf_llava("grouped", dtype=torch.float64))(**inputs)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(single.double(), precise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 5])])
def test_logits_to_keep_equals_hugging_face(keep):
    hf = hf_llava()
    inputs = example(hf)
    with torch.no_grad():
        ours = HookedLlava.from_hf(hf)(**inputs, logits_to_keep=keep)
        assert torch.equal(ours, hf(**inputs, logits_to_keep=keep).logits)


def test_the_tower_stops_at_the_last_layer_read():
    assert len(HookedLlava.from_hf(hf_llava()).vision.blocks) == 3
    assert len(HookedLlava.from_hf(hf_llava("layer_list")).vision.blocks) == 3
    assert len(HookedLlava.from_hf(hf_llava("first_layer")).vision.blocks) == 0
