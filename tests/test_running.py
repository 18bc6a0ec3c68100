"""Parts of a forward pass: starting and stopping at a layer, losses, the KV cache, and what must raise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_models import IMAGE, example, hf_llama, hf_llava
from word_tokenizer import word_tokenizer

from llava_lens import HookedLlava, Inputs
from llava_lens.errors import LensError, UnknownHook
from llava_lens.kv_cache import KVCache


@pytest.fixture(scope="module")
def hf():
    return hf_llava("grouped")


@pytest.fixture(scope="module")
def model(hf):
    with torch.no_grad():
        yield HookedLlava.from_hf(hf, word_tokenizer())


@pytest.fixture(scope="module")
def inputs(hf):
    return example(hf, images=(1, 1), pad="left")


def fired(model):
    """How often each hook was called, with a listener on all of them."""
    return {name: model.hook(name).fired for name in model.hook_dict}


# ---- a part of the layers


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_starting_at_a_layer_gives_the_same_bits_and_skips_what_is_earlier(attention, inputs):
    model = HookedLlava.from_hf(hf_llava("grouped", attention))
    logits, cache = model.run_with_cache(**inputs)
    mask = inputs["attention_mask"]
    for layer in range(model.cfg.n_layers):
        heard: list = []
        before = fired(model)
        with model.hooks(fwd_hooks=[(lambda name: True, lambda act, hook, heard=heard: heard.append(hook.name))]):
            again = model(cache["resid_pre", layer], start_at_layer=layer, attention_mask=mask)
        assert torch.equal(again, logits), layer
        early = [n for n in model.hook_dict if n.startswith(("vision.", "projector.", "hook_embed", "hook_text_embed"))]
        early += [n for n in model.hook_dict if any(n.startswith(f"blocks.{i}.") for i in range(layer))]
        assert not set(early) & set(heard) and len(early) > 40
        assert all(model.hook(n).fired == before[n] for n in early)
        assert set(heard) == set(model.hook_dict) - set(early)
    stream = cache["resid_post", -1]
    assert torch.equal(model(stream, start_at_layer=model.cfg.n_layers), logits)
    assert torch.equal(model(cache["resid_pre", 1], start_at_layer=-2, attention_mask=mask), logits)


def test_skipping_earlier_layers_ignores_their_weights(hf, inputs):
    model = HookedLlava.from_hf(hf)
    with torch.no_grad():
        stream = model(**inputs, stop_at_layer=2)
    broken = HookedLlava.from_hf(hf)
    del broken.vision, broken.projector
    broken.blocks[0] = broken.blocks[1] = torch.nn.Identity()  # would fail when called with a mask
    mask = inputs["attention_mask"]
    assert torch.equal(broken(stream, start_at_layer=2, attention_mask=mask), model(**inputs))


def test_stopping_at_every_layer(model, inputs):
    _, cache = model.run_with_cache(**inputs)
    n = model.cfg.n_layers
    for layer in range(n):
        heard: list = []
        with model.hooks(fwd_hooks=[(lambda name: True, lambda act, hook, heard=heard: heard.append(hook.name))]):
            assert torch.equal(model(**inputs, stop_at_layer=layer), cache["resid_pre", layer])
        assert not any(name.startswith(f"blocks.{i}.") for name in heard for i in range(layer, n))
        assert not any(name.startswith(("ln_final", "hook_logits")) for name in heard)
        assert torch.equal(model(**inputs, stop_at_layer=layer - n), cache["resid_pre", layer])
    assert torch.equal(model(**inputs, stop_at_layer=n), cache["resid_post", -1])
    middle = model(cache["resid_pre", 1], start_at_layer=1, stop_at_layer=2, attention_mask=inputs["attention_mask"])
    assert torch.equal(middle, cache["resid_pre", 2])


@pytest.mark.parametrize("which", ["start_at_layer", "stop_at_layer"])
@pytest.mark.parametrize("layer", [4, -4])
def test_a_layer_out_of_range_raises_with_the_range(model, inputs, which, layer):
    with pytest.raises(LensError, match=rf"{which}={layer}: expected -3 … 3 for 3 layers"):
        model(**inputs, **{which: layer})


def test_starting_wrongly_raises(model, inputs):
    with pytest.raises(LensError, match=r"start_at_layer needs the stream \[batch, pos, 64\], got a tensor \[2, "):
        model(inputs["input_ids"], start_at_layer=1)
    stream = model(**inputs, stop_at_layer=2)
    with pytest.raises(LensError, match="start_at_layer=2 lies behind stop_at_layer=1"):
        model(stream, start_at_layer=2, stop_at_layer=1)
    with pytest.raises((LensError, TypeError), match="atention_mask"):
        model(stream, start_at_layer=2, atention_mask=inputs["attention_mask"])
    with pytest.raises(UnknownHook, match="the run did not reach it"):
        model.run_with_hooks(stream, start_at_layer=2, fwd_hooks=[("blocks.1.hook_mlp_out", lambda act, hook: act)])


def test_a_cache_that_starts_late_knows_no_earlier_inputs(model, inputs):
    stream = model(**inputs, stop_at_layer=2)
    _, cache = model.run_with_cache(stream, start_at_layer=2)
    assert cache.inputs is None


# ---- losses


def labels_of(inputs):
    """Hugging Face's labels: no image token, no padding, and no token that padding would have to predict."""
    tokens, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    labels = tokens.masked_fill((tokens == IMAGE) | ~mask, -100)
    labels[:, 1:][~mask[:, :-1]] = -100
    return labels


@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_loss_is_hugging_face_s_and_the_one_by_hand(hf, model, pad):
    inputs = example(hf, images=(1, 2), pad=pad)
    labels = labels_of(inputs)
    logits, loss = model(**inputs, return_type="both")
    torch.testing.assert_close(loss, hf(**inputs, labels=labels).loss, rtol=1e-6, atol=0)
    assert torch.equal(logits, model(**inputs)) and torch.equal(loss, model(**inputs, return_type="loss"))
    per_token = model(**inputs, return_type="loss", loss_per_token=True)
    by_hand = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(per_token, by_hand.view_as(per_token))
    counts = labels[:, 1:] != -100
    torch.testing.assert_close(loss, per_token.sum() / counts.sum())
    assert not per_token[~counts].any() and (per_token[counts] > 0).all()


def test_a_loss_from_a_later_layer(model, inputs):
    stream = model(**inputs, stop_at_layer=1)
    named = {"attention_mask": inputs["attention_mask"], "return_type": "loss", "start_at_layer": 1}
    assert torch.equal(model(stream, input_ids=inputs["input_ids"], **named), model(**inputs, return_type="loss"))
    with pytest.raises(LensError, match="a loss needs the tokens"):
        model(stream, **named)
    with pytest.raises(LensError, match="a loss needs the tokens and the logits of every position"):
        model(**inputs, return_type="loss", logits_to_keep=1)


def test_no_return_value_and_kept_logits(model, inputs):
    assert model(**inputs, return_type=None) is None
    logits = model(**inputs)
    assert torch.equal(model(**inputs, logits_to_keep=2), logits[:, -2:])
    assert torch.equal(model(**inputs, logits_to_keep=torch.tensor([3, 1])), logits[:, [3, 1]])


# ---- the KV cache


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_pieces_with_a_cache_equal_the_full_pass(attention, pad):
    """Up to the rounding of sums taken in another order: 1e-5 of the largest logit."""
    model = HookedLlava.from_hf(hf_llava("grouped", attention))
    inputs = example(hf_llava("grouped"), images=(1, 1), pad=pad)
    tokens, mask = inputs["input_ids"], inputs["attention_mask"]
    full, length = model(**inputs), tokens.shape[1]
    image_end = int((tokens == IMAGE).nonzero()[:, 1].max()) + 1
    seen = mask.bool()
    for told in ("nothing", "new", "all"):
        cache = KVCache(model.cfg.n_layers)
        first = slice(0, image_end)
        parts = [model(tokens[:, first], pixel_values=inputs["pixel_values"], attention_mask=mask[:, first],
                       past_kv_cache=cache)]  # fmt: skip
        for start, stop in ((image_end, image_end + 3), *((i, i + 1) for i in range(image_end + 3, length))):
            padding = {"nothing": None, "new": mask[:, start:stop], "all": mask[:, :stop]}[told]
            parts.append(model(tokens[:, start:stop], attention_mask=padding, past_kv_cache=cache))
            assert cache.length == stop
        joined = torch.cat(parts, 1)
        torch.testing.assert_close(joined[seen], full[seen], rtol=0, atol=1e-5 * float(full.abs().max()))


def test_a_cached_step_under_looking_at_takes_no_picture(model, inputs):
    held = Inputs(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    tokens, full = inputs["input_ids"], model(**inputs)
    cache = KVCache(model.cfg.n_layers)
    with model.looking_at(held):
        model(tokens[:, :-2], attention_mask=inputs["attention_mask"][:, :-2], past_kv_cache=cache)
        step = model(tokens[:, -2:], past_kv_cache=cache)
    torch.testing.assert_close(step, full[:, -2:], rtol=0, atol=1e-5 * float(full.abs().max()))


def test_a_cache_of_later_layers_counts_its_positions(model, inputs):
    stream = model(**inputs, stop_at_layer=1)
    full, mask = model(**inputs), inputs["attention_mask"]
    cache = KVCache(model.cfg.n_layers)
    model(stream[:, :-3], start_at_layer=1, attention_mask=mask[:, :-3], past_kv_cache=cache)
    assert cache.length == stream.shape[1] - 3
    end = model(stream[:, -3:], start_at_layer=1, past_kv_cache=cache)
    torch.testing.assert_close(end, full[:, -3:], rtol=0, atol=1e-5 * float(full.abs().max()))


# ---- pictures that must be there, and hooks that must be gone


def test_tokens_without_their_picture_raise(model, inputs):
    with pytest.raises(LensError, match=r"18 image tokens in the prompt, but 0 picture\(s\).*looking_at"):
        model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
    with pytest.raises(LensError, match=r"18 image tokens in the prompt, but 1 picture\(s\) fill 9"):
        model(inputs["input_ids"], pixel_values=inputs["pixel_values"][:1])
    with pytest.raises(LensError, match=r"18 image tokens in the prompt, but 3 picture\(s\) fill 27"):
        model(inputs["input_ids"], pixel_values=torch.zeros(3, 3, 24, 24))
    with pytest.raises(LensError, match="1 image for a model without a vision tower; expected none"):
        HookedLlava.from_hf(hf_llama())(torch.tensor([[5, 6]]), pixel_values=torch.zeros(1, 3, 24, 24))


def test_looking_at_lends_picture_and_padding_and_takes_them_back(model, inputs):
    held, full = Inputs(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]), model(**inputs)
    with model.looking_at(held):
        assert torch.equal(model(inputs["input_ids"]), full)
        twice = model(inputs["input_ids"].repeat(2, 1))
        torch.testing.assert_close(twice, full.repeat(2, 1, 1), rtol=0, atol=1e-5 * float(full.abs().max()))
        assert torch.equal(model(model(**inputs, stop_at_layer=1), start_at_layer=1), full)
        plain = model(torch.tensor([[1, 5, 6]]))
        with pytest.raises(LensError, match="3 sequences cannot share the pictures of the 2 looked at"):
            model(inputs["input_ids"][[0, 1, 0]])
    assert torch.equal(model(torch.tensor([[1, 5, 6]])), plain)
    with pytest.raises(LensError, match="0 picture"):
        model(inputs["input_ids"])
    with pytest.raises(RuntimeError), model.looking_at(held):
        raise RuntimeError
    with pytest.raises(LensError, match="0 picture"):
        model(inputs["input_ids"])


def test_a_picture_given_beside_inputs_raises(model, inputs):
    whole = Inputs(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    with pytest.raises(LensError, match="pixel_values given beside Inputs, which holds the whole input"):
        model(whole, pixel_values=inputs["pixel_values"])


def test_a_tower_hook_in_a_run_of_text_raises(model):
    with pytest.raises(UnknownHook, match="no picture went through the tower"):
        model.run_with_hooks(torch.tensor([[1, 5]]), fwd_hooks=[("vision.blocks.0.hook_mlp_out", lambda a, hook: a)])


def test_hooks_never_outlive_a_run_that_raises(model, inputs):
    plain = model(**inputs)

    def fail(act, hook):
        raise RuntimeError("a hook of the user's")

    for run in (model.run_with_hooks, model.run_with_cache):
        with pytest.raises(RuntimeError, match="user's"), model.hooks(fwd_hooks=[("blocks.2.hook_resid_mid", fail)]):
            run(**inputs)
    with pytest.raises(LensError, match="0 picture"):
        model.run_with_hooks(inputs["input_ids"], fwd_hooks=[("blocks.0.hook_resid_mid", fail)])
    assert not any(model.hook(name).live for name in model.hook_dict)
    assert torch.equal(model(**inputs), plain)


# ---- text


def test_text_becomes_tokens_as_it_stands(model):
    assert model.to_tokens("w5 <image> w6").tolist() == [[1, 5, *[IMAGE] * 9, 6]]
    assert model.to_tokens("w5 w6", prepend_bos=False).tolist() == [[5, 6]]
    assert model.to_tokens("<s> w5", prepend_bos=False).tolist() == [[1, 5]]
    assert model.to_tokens("w5", prepend_bos=True).tolist() == [[1, 5]]
    assert model.to_tokens(["w5", "w6 w7"]).tolist() == [[1, 5, 0], [1, 6, 7]]
    with pytest.raises(LensError, match=r"words that the tokenizer does not know: 'w55x'.*nearest: 'w55'"):
        model.to_tokens("w55x")
    with pytest.raises(LensError, match="<image> in 'w5 <image>', but this model has no vision tower"):
        HookedLlava.from_hf(hf_llama(), word_tokenizer()).to_tokens("w5 <image>")


def test_texts_run_with_their_padding(model):
    together = model(["w5", "w6 w7"], return_type="loss", loss_per_token=True)
    assert together[0, 1] == 0
    torch.testing.assert_close(together[1:], model("w6 w7", return_type="loss", loss_per_token=True))
    with pytest.raises(LensError, match="pad on the left"):
        model.generate(["w5", "w6 w7"])


def test_a_cache_knows_the_roles_that_the_tokens_tell():
    hf = hf_llava()
    model, inputs = HookedLlava.from_hf(hf), example(hf, images=(1, 1), pad="left")
    with torch.no_grad():
        _, cache = model.run_with_cache(**inputs, names_filter="hook_embed")
    for row, mask in enumerate(inputs["attention_mask"].bool()):
        roles = cache.inputs.roles_of(row)
        slots = (inputs["input_ids"][row] == hf.config.image_token_index).nonzero()[:, 0]
        assert torch.equal(roles.positions("image"), slots) and roles.last == len(mask) - 1
        assert torch.equal(roles.positions("padding"), (~mask).nonzero()[:, 0])
        assert roles.patch_of(int(slots[5])) == (0, 1, 2)


def test_what_a_cache_keeps_is_not_the_callers(model, inputs):
    pixels = inputs["pixel_values"].clone()
    with torch.no_grad():
        logits, cache = model.run_with_cache(**{**inputs, "pixel_values": pixels})
        cache["vision.hook_pixels"].zero_()
        assert torch.equal(pixels, inputs["pixel_values"])
        logits.zero_()
    assert cache["hook_logits"].any()


def test_two_cuts_of_the_logits_are_refused(model, inputs):
    with pytest.raises(LensError, match="both cut hook_logits"):
        model.run_with_cache(**inputs, pos_slice=0, logits_to_keep=1)
    with pytest.raises(LensError, match="logits_to_keep=-1: expected how many"):
        model(**inputs, logits_to_keep=-1)


def test_a_held_mask_is_for_the_prompt_it_came_with(model, inputs):
    held = Inputs(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
    other = torch.full_like(held.tokens, 5)
    with torch.no_grad():
        alone = model(other)
        with model.looking_at(held):
            assert torch.equal(model(other), alone)
            assert torch.equal(model(held.tokens), model(held))


def test_a_loss_without_a_word_to_predict_raises(model):
    with pytest.raises(LensError, match="needs two words in a row"):
        model(torch.tensor([[5]]), return_type="loss")
