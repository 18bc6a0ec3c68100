"""TransformerLens's names on the model: shapes, views, factored circuits, directions and single tokens."""

from __future__ import annotations

import pytest
import torch
from random_models import example, hf_llama, hf_llava
from tokenizers import Tokenizer, models, normalizers
from transformer_lens import FactoredMatrix
from transformers import PreTrainedTokenizerFast

from llava_lens import HookedLlava
from llava_lens.errors import LensError
from llava_lens.sweep.metrics import ids_of

ODDS = ["plain", "grouped", "wide_grouped_heads", "attention_bias", "mlp_bias", "tied"]


@pytest.fixture(params=ODDS)
def model(request):
    return HookedLlava.from_hf(hf_llava(request.param))


def test_config_has_transformer_lens_field_names(model):
    cfg, text = model.cfg, model.cfg
    assert (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_mlp, cfg.d_vocab, cfg.n_ctx) == (3, 4, 64, 112, 97, 128)
    assert cfg.normalization_type == "RMS" and cfg.final_rms and not cfg.attn_only and cfg.act_fn == "silu"
    assert cfg.vision.n_layers == 3 and cfg.vision.n_layers_total == 4 and text.vision.normalization_type == "LN"
    assert cfg.device == torch.device("cpu") and cfg.dtype == torch.float32


def test_stacked_weights_have_transformer_lens_shapes(model):
    c = model.cfg
    layer, head, kv, d, width = c.n_layers, c.n_heads, c.n_key_value_heads, c.d_model, c.d_head
    shapes = {
        "W_E": (c.d_vocab, d), "W_U": (d, c.d_vocab), "b_U": (c.d_vocab,),
        "W_Q": (layer, head, d, width), "W_K": (layer, kv, d, width), "W_V": (layer, kv, d, width),
        "W_O": (layer, head, width, d), "b_Q": (layer, head, width), "b_K": (layer, kv, width),
        "b_V": (layer, kv, width), "b_O": (layer, d), "W_in": (layer, d, c.d_mlp), "W_gate": (layer, d, c.d_mlp),
        "W_out": (layer, c.d_mlp, d), "b_in": (layer, c.d_mlp), "b_out": (layer, d),
        "b_gate": (layer, c.d_mlp),
    }  # fmt: skip
    for name, shape in shapes.items():
        assert tuple(getattr(model, name).shape) == shape, name
    assert bool(model.b_Q.any()) == c.attn_bias and bool(model.b_out.any()) == c.mlp_bias


def test_weights_per_block_are_views_that_write_through(model):
    attn = model.blocks[1].attn
    before = attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        attn.W_Q[2].zero_()
        width = model.cfg.d_head
        assert not attn.q_proj.weight[2 * width : 3 * width].any()
        attn.q_proj.weight.copy_(before)
    for name in ("W_Q", "W_K", "W_V", "W_O"):
        view = getattr(attn, name)
        linear = getattr(attn, name[2].lower() + "_proj")
        assert view.untyped_storage().data_ptr() == linear.weight.untyped_storage().data_ptr()


def test_weights_reproduce_the_activations(model):
    """Every `W_*` and `b_*` by what it does to cached activations, in both towers."""
    inputs = example(hf_llava())
    with torch.no_grad():
        _, cache = model.run_with_cache(**inputs)
        for tower, part in ((model, cache), (model.vision, cache.vision)):
            for layer, block in enumerate(tower.blocks):
                check_block(block, part, layer)


def check_block(block, cache, layer):
    def equal(ours, name):
        torch.testing.assert_close(ours, cache[name, layer], rtol=1e-5, atol=1e-4)

    x = cache["normalized", layer, "ln1"] * block.ln1.w + block.ln1.b
    for name, W, b in (("q", "W_Q", "b_Q"), ("k", "W_K", "b_K"), ("v", "W_V", "b_V")):
        equal(torch.einsum("bpd,hdw->bphw", x, getattr(block.attn, W)) + getattr(block.attn, b), name)
    equal(torch.einsum("bphw,hwd->bphd", cache["z", layer], block.attn.W_O), "result")
    equal(cache["result", layer].sum(2) + block.attn.b_O, "attn_out")
    x = cache["normalized", layer, "ln2"] * block.ln2.w + block.ln2.b
    linear = x @ block.mlp.W_in + block.mlp.b_in
    if hasattr(block.mlp, "W_gate"):
        equal(linear, "pre_linear")
        linear = x @ block.mlp.W_gate + block.mlp.b_gate
    equal(linear, "pre")
    equal(cache["post", layer] @ block.mlp.W_out + block.mlp.b_out, "mlp_out")


def test_tokens_and_strings():
    model = HookedLlava.tiny()
    text = "What is the color of the circle?"
    tokens = model.to_tokens(text)
    assert tokens.shape == (1, 9) and model.to_string(tokens[0]) == model.to_string(tokens)[0]
    words = ["<s>", "what", "is", "the", "color", "of", "the", "circle", "?"]
    assert model.to_str_tokens(text) == model.to_str_tokens(tokens) == words
    assert model.to_str_tokens(text, prepend_bos=False) == words[1:]
    assert model.to_single_str_token(model.to_single_token("circle")) == "circle"
    slots = model.to_str_tokens("<image> what").count("<image>")
    assert slots == model.cfg.tokens_per_image == 64
    with pytest.raises(LensError, match=r"'dark red' is 2 tokens \['<unk>', 'red'\]"):
        model.to_single_token("dark red")


def marked_tokenizer(own_blank):
    """Words that open with `▁`; with `own_blank` every text gets one in front, a blank of its own or not."""
    pieces = ["▁", *"Yes\n", "Ye", "Yes", "▁Yes"]
    merges = [("Y", "e"), ("Ye", "s"), ("▁", "Yes")]
    bpe = models.BPE({word: i for i, word in enumerate(["<unk>", *pieces])}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if own_blank:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("own_blank", [True, False])
def test_a_word_is_one_token_however_it_is_marked(own_blank):
    tokenizer = marked_tokenizer(own_blank)
    model = HookedLlava.from_hf(hf_llama("plain"), tokenizer)
    marked, inner = (tokenizer.convert_tokens_to_ids(word) for word in ("▁Yes", "Yes"))
    assert model.to_single_token(" Yes") == model.to_single_token("▁Yes") == marked != inner
    assert model.to_single_token("Yes") == (marked if own_blank else inner)
    assert ids_of(model, " Yes Yes") == ids_of(model, "▁Yes Yes" if not own_blank else "Yes Yes") == [marked, marked]
    assert ids_of(model, "▁Yes") == [marked]
    if own_blank:
        newline = tokenizer.convert_tokens_to_ids("\n")
        with pytest.raises(LensError, match=rf"is 2 tokens \['▁', .*; the vocabulary's own is token {newline}$"):
            model.to_single_token("\n")


def test_circuits_are_factored(model):
    group = model.cfg.n_heads // model.cfg.n_key_value_heads
    assert isinstance(model.QK, FactoredMatrix) and isinstance(model.OV, FactoredMatrix)
    layer, head = 1, 3
    attn = model.blocks[layer].attn
    OV, QK = torch.as_tensor(model.OV.AB), torch.as_tensor(model.QK.AB)
    torch.testing.assert_close(OV[layer, head], attn.W_V[head // group] @ attn.W_O[head])
    torch.testing.assert_close(QK[layer, head], attn.W_Q[head] @ attn.W_K[head // group].T)
    assert model.all_head_labels()[:5] == ["L0H0", "L0H1", "L0H2", "L0H3", "L1H0"]


def test_residual_directions_give_logits(model):
    tokens = torch.tensor([[4, 9, 11]])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    normalized = cache["normalized"]
    directions = model.tokens_to_residual_directions(torch.tensor([5, 7]))
    torch.testing.assert_close(normalized @ directions.T, logits[..., [5, 7]], rtol=1e-5, atol=1e-5)
    assert model.tokens_to_residual_directions(5).shape == (model.cfg.d_model,)
    with pytest.raises(LensError, match=r"token 97: expected 0 … 96"):
        model.tokens_to_residual_directions(97)


def test_accumulated_bias_is_what_no_input_explains(model):
    total = sum(b.attn.b_O + b.mlp.b_out for b in model.blocks)
    torch.testing.assert_close(model.accumulated_bias(3), total)
    one = model.blocks[0].attn.b_O + model.blocks[1].attn.b_O
    torch.testing.assert_close(model.accumulated_bias(1, mlp_input=True, include_mlp_biases=False), one)


def test_placement_follows_the_model():
    model = HookedLlava.from_hf(hf_llama()).to(torch.float64)
    assert model.cfg.dtype == torch.float64
    assert model(torch.tensor([[3, 4]])).dtype == torch.float64
    hf_llama.cache_clear()


def test_a_model_without_tokenizer_says_so(model):
    with pytest.raises(LensError, match="no tokenizer"):
        model.to_single_token("red")
    with pytest.raises(LensError, match="no processor"):
        model.prepare("what?")
