"""TransformerLens's own tools run with the picture in sight, and its LLaVA bridge agrees as one more oracle."""

from __future__ import annotations

import copy
import subprocess

import pandas as pd
import pytest
import torch
from random_models import example, hf_llava
from transformer_lens import patching
from transformer_lens.head_detector import detect_head
from transformer_lens.utilities import get_act_name
from word_tokenizer import word_tokenizer

from llava_lens import HookedLlava, Inputs
from llava_lens.errors import LensError

ODD = ["plain", "grouped"]
FAMILIES = {
    "resid_pre": ("resid_pre", "layer pos"),
    "resid_mid": ("resid_mid", "layer pos"),
    "attn_out": ("attn_out", "layer pos"),
    "mlp_out": ("mlp_out", "layer pos"),
    "attn_head_out_by_pos": ("z", "layer pos head"),
    "attn_head_q_by_pos": ("q", "layer pos head"),
    "attn_head_k_by_pos": ("k", "layer pos head"),
    "attn_head_v_by_pos": ("v", "layer pos head"),
    "attn_head_pattern_by_pos": ("pattern", "layer head dest"),
    "attn_head_out_all_pos": ("z", "layer head"),
    "attn_head_q_all_pos": ("q", "layer head"),
    "attn_head_k_all_pos": ("k", "layer head"),
    "attn_head_v_all_pos": ("v", "layer head"),
    "attn_head_pattern_all_pos": ("pattern", "layer head"),
}
"""TransformerLens's sweep → the activation it patches, and the axes it sweeps."""


def study(odd):
    """A model, a clean input and a corrupt picture with the same tokens."""
    hf = hf_llava(odd)
    model = HookedLlava.from_hf(hf, word_tokenizer())
    raw = example(hf, images=(1, 1), text=3)
    clean = Inputs(raw["input_ids"], raw["pixel_values"])
    corrupt = Inputs(raw["input_ids"], -raw["pixel_values"])
    return model, clean, corrupt


def metric(logits):
    return (logits[:, -1, 5] - logits[:, -1, 6]).sum()


def place(name, axes, where):
    """The index of one swept cell in its activation."""
    at = dict(zip(axes.split(), where, strict=True))
    every = slice(None)
    if name == "pattern":
        return every, at["head"], at.get("dest", every)
    return (every, at.get("pos", every), *([at["head"]] if "head" in at else []))


@pytest.mark.parametrize(
    ("family", "odd"),
    [*((family, "grouped") for family in FAMILIES), ("resid_pre", "plain"), ("attn_head_k_all_pos", "plain")],
)
def test_patching_under_looking_at_equals_a_loop_by_hand(family, odd):
    model, clean, corrupt = study(odd)
    name, axes = FAMILIES[family]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with model.looking_at(corrupt):
            swept = getattr(patching, f"get_act_patch_{family}")(model, corrupt.tokens, cache, metric)
        kv = model.cfg.n_key_value_heads if name in "kv" else model.cfg.n_heads
        sizes = {"layer": model.cfg.n_layers, "pos": clean.n_pos, "dest": clean.n_pos, "head": kv}
        assert swept.shape == tuple(sizes[axis] for axis in axes.split())
        baseline = metric(model(corrupt))
        cells = torch.cartesian_prod(*(torch.arange(size) for size in swept.shape))
        for where in cells[:: max(1, len(cells) // 12)].tolist():

            def put(act, hook, where=where):
                act[place(name, axes, where)] = cache[hook.name][place(name, axes, where)]

            by_hand = model.run_with_hooks(corrupt, fwd_hooks=[(get_act_name(name, where[0]), put)])
            assert swept[tuple(where)] == metric(by_hand), where
        assert (swept != baseline).any()


def test_patching_one_weight_of_a_pattern():
    model, clean, corrupt = study("grouped")
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)

        def put(act, hook):
            act[:, 1, -1, 3] = cache[hook.name][:, 1, -1, 3]

        by_hand = metric(model.run_with_hooks(corrupt, fwd_hooks=[("blocks.0.attn.hook_pattern", put)]))
        cell = pd.DataFrame([[0, 1, clean.n_pos - 1, 3]], columns=["layer", "head_index", "dest_pos", "src_pos"])
        with model.looking_at(corrupt):
            swept = patching.generic_activation_patch(
                model,
                corrupt.tokens,
                cache,
                metric,
                patching.layer_head_dest_src_pos_pattern_patch_setter,
                "pattern",
                index_df=cell,
            )
    assert swept[0] == by_hand


def test_every_head_at_once_with_the_baseline_per_example():
    model, clean, corrupt = study("grouped")

    def per_row(logits):
        return logits[:, -1, 5] - logits[:, -1, 6]

    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with model.looking_at(corrupt):
            swept = patching.get_act_patch_attn_head_all_pos_every(model, corrupt.tokens, cache, metric)
            result = patching.get_act_patch_resid_pre(
                model, corrupt.tokens, cache, per_row, reduce="none", baseline=True
            )
    assert isinstance(swept, torch.Tensor) and swept.shape == (5, model.cfg.n_layers, model.cfg.n_heads)
    assert result.baseline is not None and torch.equal(result.baseline, per_row(model(corrupt)).detach())


def test_patching_without_the_picture_raises_instead_of_running_blind():
    model, clean, corrupt = study("plain")
    _, cache = model.run_with_cache(clean)
    with pytest.raises(LensError, match="18 image tokens in the prompt, but 0 picture"):
        patching.get_act_patch_resid_pre(model, corrupt.tokens, cache, metric)
    assert not any(model.hook(name).live for name in model.hook_dict)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("kind", ["previous_token_head", "duplicate_token_head", "induction_head"])
def test_detect_head_sees_the_picture(kind, odd):
    model, clean, _ = study(odd)
    text = "w5 <image> w6 w7 w8 w6 w7 w8"
    assert clean.pixels is not None
    one = Inputs(model.to_tokens(text), clean.pixels[:1])
    with model.looking_at(one), torch.no_grad():
        scores = detect_head(model, text, kind)
        _, cache = model.run_with_cache(one, remove_batch_dim=True)
    tokens = one.tokens[0]
    wanted = torch.zeros(len(tokens), len(tokens))
    for query in range(len(tokens)):
        for key in range(query + 1):
            wanted[query, key] = {
                "previous_token_head": key == query - 1,
                "duplicate_token_head": key < query and tokens[key] == tokens[query],
                "induction_head": key > 0 and tokens[key - 1] == tokens[query],
            }[kind]
    for layer in range(model.cfg.n_layers):
        pattern = cache["pattern", layer]
        torch.testing.assert_close(scores[layer], (pattern * wanted).sum((1, 2)) / pattern.sum((1, 2)))
    with pytest.raises(LensError, match="9 image tokens in the prompt, but 0 picture"):
        detect_head(model, text, kind)


@pytest.fixture
def nothing_is_installed(monkeypatch):
    """The bridge installs torchvision with pip when it is missing; a test must not change its environment."""
    from transformer_lens.model_bridge.sources.transformers import helpers

    def refuse(*command, **_):
        raise AssertionError(f"a subprocess was started: {command}")

    monkeypatch.setattr(helpers, "_ensure_torchvision", lambda: False)
    for name in ("check_call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, refuse)


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens_own_bridge_agrees(tmp_path, nothing_is_installed):
    """Its eager attention against ours, the same operations: equal up to 1e-6 of the largest value."""
    from transformer_lens.model_bridge import TransformerBridge

    hf = hf_llava("grouped", "eager")
    rewired = copy.deepcopy(hf)  # the bridge changes the model it is given
    rewired.config.architectures = ["LlavaForConditionalGeneration"]
    tokenizer = word_tokenizer()
    rewired.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path), hf_model=rewired, tokenizer=type(tokenizer).from_pretrained(tmp_path), device="cpu"
    )
    inputs = example(hf, images=(1, 1))
    with torch.no_grad():
        theirs, their_cache = bridge.run_with_cache(inputs["input_ids"], pixel_values=inputs["pixel_values"])
        ours, cache = HookedLlava.from_hf(hf).run_with_cache(**inputs)
    pairs = [(ours, theirs)]
    for layer in range(hf.config.text_config.num_hidden_layers):
        for name in ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern",
                     "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z"):  # fmt: skip
            pairs.append((cache[f"blocks.{layer}.{name}"], their_cache[f"blocks.{layer}.{name}"]))
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-6 * float(mine.abs().max()))
