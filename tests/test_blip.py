"""BLIP with hooks against Hugging Face's: bit for bit, edit for edit, weight for weight."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
import pytest
import torch
from random_blip import ODD, START, blip_config, blip_example, blip_processor, hf_blip
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from llava_lens.errors import LensError, UnknownHook
from llava_lens.hooks import Hook
from llava_lens.models.blip import HookedBlip
from llava_lens.models.blip_config import BlipConfig
from llava_lens.models.blip_inputs import BlipInputs
from llava_lens.weights import MissingWeights, NotLlava, UnknownWeights, WrongWeights

BF16, FP32 = torch.bfloat16, torch.float32
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def blip(odd: str = "plain", dtype: torch.dtype = FP32, processor: bool = False) -> Any:
    return HookedBlip.from_hf(hf_blip(odd, dtype), blip_processor() if processor else None)


@torch.no_grad()
def reference(hf: Any, example: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What comes out of the three parts in Hugging Face's own forward, which returns no logits."""
    seen = {}
    parts = {"vision": (hf.vision_model, "last_hidden_state"), "encoder": (hf.text_encoder, "last_hidden_state")}
    parts["logits"] = (hf.text_decoder, "logits")
    handles = [
        part.register_forward_hook(lambda _, __, out, name=name, what=what: seen.update({name: getattr(out, what)}))
        for name, (part, what) in parts.items()
    ]
    hf(**example)
    for handle in handles:
        handle.remove()
    return seen


# ---- parity


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("odd", ODD)
def test_everything_is_bit_equal_to_hugging_face(odd, padded, dtype):
    hf = hf_blip(odd, dtype)
    example = blip_example(hf, padded)
    if padded:
        example["decoder_attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0]])
    theirs, model = reference(hf, example), blip(odd, dtype)
    with torch.no_grad():
        logits, cache = model.run_with_cache(**example)
        plain = model(**example)
    last = hf.config.text_config.num_hidden_layers - 1
    assert torch.equal(cache["vision.hook_features"], theirs["vision"])
    assert torch.equal(cache.encoder["normalized_resid_post", last], theirs["encoder"])
    assert torch.equal(logits, theirs["logits"]) and torch.equal(plain, logits)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_answers_are_hugging_faces(seed):
    hf = hf_blip("one_layer")
    example = blip_example(hf, padded=seed % 2 == 1, seed=seed)
    del example["decoder_input_ids"]
    theirs = hf.generate(**example, max_new_tokens=8)
    ours = blip("one_layer").generate(example, max_new_tokens=8)
    assert torch.equal(ours, theirs)
    assert ours[0, 0] == START


def test_answers_end_at_their_end_token():
    example = blip_example(hf_blip("one_layer"), padded=False)
    del example["decoder_input_ids"]
    tokens = blip("one_layer").generate(example, max_new_tokens=8)
    assert tokens.shape[1] < 9 and (tokens == 3).any(1).all()
    assert set(tokens[tokens.cumsum(1).gt(0) & ((tokens == 3).cumsum(1) - (tokens == 3).long()).bool()].tolist()) <= {0}


def test_no_attention_but_the_explicit_one_exists_for_blip():
    """So there is no choice of implementation to be equal under."""
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        type(hf_blip())._from_config(blip_config(), attn_implementation="sdpa")


def test_gradients_are_hugging_faces():
    hf, model = hf_blip(), blip()
    example = blip_example(hf)
    pixels = example.pop("pixel_values").requires_grad_()
    found = []
    handle = hf.text_decoder.register_forward_hook(lambda _, __, out: found.append(out.logits))
    hf(**example, pixel_values=pixels)
    handle.remove()
    grads = [
        torch.autograd.grad(logits[:, -1, 5].sum(), pixels)[0]
        for logits in (found[0], model(**example, pixel_values=pixels))
    ]
    # the same terms are summed in another order where a tensor was used twice; they are up to 1e-2 large
    assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-6)
    with_hook = model.run_with_cache(
        **example, pixel_values=pixels, incl_bwd=True, metric=lambda logits: logits[:, -1, 5].sum()
    )[1]
    assert_close(with_hook["vision.hook_pixels_grad"], grads[0], rtol=1e-5, atol=1e-6)


# ---- hooks


def test_every_hook_fires_and_has_its_axes():
    model = blip()
    _, cache = model.run_with_cache(**blip_example(hf_blip()))
    hooks = {name: module for name, module in model.named_modules() if isinstance(module, Hook)}
    assert list(cache.cache_dict) and set(cache.cache_dict) == set(hooks) == set(model.hook_dict)
    assert all(isinstance(cache[name], hook.annotation) for name, hook in hooks.items())
    assert {"vision.blocks.0.attn.hook_pattern", "encoder.blocks.0.cross_attn.hook_pattern"} <= set(hooks)


def test_every_edit_takes_effect_downstream_and_nowhere_else():
    model, example = blip("one_layer"), blip_example(hf_blip("one_layer"))
    with torch.no_grad():
        clean, cache = model.run_with_cache(**example)
    before = {name: cache[name].clone() for name in cache.cache_dict}
    order = list(before)
    for place, name in enumerate(order):
        factor = 1 + torch.rand(before[name].shape, generator=torch.Generator().manual_seed(place))
        names = order[max(place - 1, 0) : place + 1]
        with torch.no_grad():
            with model.hooks(fwd_hooks=[(name, partial(times_in_place, factor))]):
                out, edited = model.run_with_cache(**example, names_filter=names)
            if place % 3 == 0:
                same = model.run_with_hooks(**example, fwd_hooks=[(name, partial(times, factor))])
                assert torch.equal(out, same), name
        assert [n for n in names if not torch.equal(edited[n], before[n])] == [name]
        assert not torch.equal(out, clean), name


def times(factor, act, hook):
    return act * factor


def times_in_place(factor, act, hook):
    act.mul_(factor)


@pytest.mark.parametrize(
    "place", ["encoder.blocks.1.cross_attn", "decoder.blocks.0.cross_attn", "encoder.blocks.0.attn"]
)
@pytest.mark.parametrize("hook", ["hook_z", "hook_result"])
def test_a_head_taken_out_is_a_weight_set_to_zero(place, hook):
    hf, head, width = hf_blip(), 2, 12
    example = blip_example(hf)
    stack, _, layer, part = place.split(".")
    bert = hf.text_encoder if stack == "encoder" else hf.text_decoder.bert
    attention = getattr(bert.encoder.layer[int(layer)], {"attn": "attention", "cross_attn": "crossattention"}[part])

    def zero(act, hook):
        act[:, :, head] = 0

    ours = blip().run_with_hooks(**example, fwd_hooks=[(f"{place}.{hook}", zero)])
    weight = attention.output.dense.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[:, head * width : (head + 1) * width] = 0
        theirs = reference(hf, example)["logits"]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    # `hook_result` adds up heads that were multiplied one by one, in float32
    assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert not torch.allclose(reference(hf, example)["logits"], theirs, atol=1e-4)


def test_unknown_hooks_raise_and_none_outlives_its_run():
    model, example = blip(), blip_example(hf_blip())
    with pytest.raises(UnknownHook, match=r"'encoder.blocks.0.cross_attn.hook_patern'; nearest: 'encoder.blocks.0.cro"):
        model.run_with_hooks(**example, fwd_hooks=[("encoder.blocks.0.cross_attn.hook_patern", print)])
    with pytest.raises(ZeroDivisionError):
        model.run_with_hooks(**example, fwd_hooks=[("hook_logits", lambda act, hook: 1 / 0)])
    assert not any(hook.live for hook in model.hook_dict.values())
    model.add_hook("decoder.hook_embed", lambda act, hook: act * 0)
    assert not torch.equal(model(**example), blip()(**example))
    model.reset_hooks()
    with (
        pytest.raises(UnknownHook, match="never fired: the run did not reach it"),
        model.hooks([("hook_logits", print)]),
    ):
        model.n_runs += 1


# ---- caches


def test_a_cache_has_the_keys_of_each_stack():
    model, example = blip(), blip_example(hf_blip())
    _, cache = model.run_with_cache(**example)
    assert torch.equal(cache.encoder["pattern", 1, "cross_attn"], cache["encoder.blocks.1.cross_attn.hook_pattern"])
    assert cache.encoder["pattern", 1, "cross_attn"].shape == (2, 4, 7, 10)
    assert cache.decoder["pattern", -1].shape == (2, 4, 3, 3)
    assert cache.decoder["scale", 0, "ln_cross"].shape == (2, 3, 1)
    assert cache.vision["resid_post", 0].shape == (2, 10, 48)
    with pytest.raises(LensError, match=r"does not say in which stack: cache.vision\[…\], cache.encoder"):
        cache["pattern", 0]
    with pytest.raises(UnknownHook, match=r"nearest: 'encoder.hook_full_embed'"):
        cache["encoder.hook_ful_embed"]
    with pytest.raises(UnknownHook, match="layer 3"):
        cache.encoder["pattern", 3]
    _, part = model.run_with_cache(**example, names_filter="encoder.hook_embed")
    with pytest.raises(UnknownHook, match="was not kept"):
        part.encoder["pattern", 0]


def test_sums_close_in_the_tower_and_are_refused_elsewhere():
    model = blip()
    _, cache = model.run_with_cache(**blip_example(hf_blip()))
    parts = cache.vision.decompose_resid(layer=None)
    # float32 sums in another order
    assert_close(parts.sum(0), cache.vision["resid_post", -1], rtol=1e-5, atol=1e-5)
    normed = cache.vision.apply_ln_to_stack(parts).sum(0) * model.vision.ln_final.w + model.vision.ln_final.b
    assert_close(normed, cache["vision.hook_features"], rtol=1e-4, atol=1e-4)
    for sums in ("decompose_resid", "accumulated_resid", "logit_attrs", "stack_head_results", "logit_lens"):
        with pytest.raises(LensError, match=f"{sums}: BLIP's texts are normed after every part"):
            getattr(cache.encoder, sums)()
        with pytest.raises(LensError, match=rf"{sums}: BLIP has three stacks.*cache\.vision\.{sums}"):
            getattr(cache, sums)()
    with pytest.raises(LensError, match="pos_slice: question and answer have positions of their own"):
        model.run_with_cache(**blip_example(hf_blip()), pos_slice=-1)
    with pytest.raises(LensError, match="cache_bytes is LLaVA's"):
        model.cache_bytes(**blip_example(hf_blip()))


def test_a_cache_is_sliced_and_saved(tmp_path):
    model, example = blip(), blip_example(hf_blip())
    _, cache = model.run_with_cache(**example)
    one = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(one["encoder.hook_embed"], cache["encoder.hook_embed"][1])
    assert torch.equal(one["vision.hook_embed"], cache["vision.hook_embed"][1])
    assert one.inputs is not None and torch.equal(one.inputs.tokens, example["input_ids"][1:])
    cache.save(tmp_path / "cache.safetensors")
    again = type(cache).load(tmp_path / "cache.safetensors", model)
    assert type(again) is type(cache) and all(torch.equal(again[name], cache[name]) for name in cache.cache_dict)
    assert torch.equal(again.decoder["pattern", 0], cache.decoder["pattern", 0])


def test_weights_have_transformer_lenss_shapes_and_make_the_queries():
    model = blip()
    _, cache = model.run_with_cache(**blip_example(hf_blip()))
    for stack in ("vision", "encoder"):
        attn = getattr(model, stack).blocks[0].attn
        x = cache["vision.hook_embed"] if stack == "vision" else cache["encoder.hook_full_embed"]
        x = model.vision.blocks[0].ln1(x) if stack == "vision" else x
        for letter in "QKV":
            made = torch.einsum("bpm,hmd->bphd", x, getattr(attn, f"W_{letter}")) + getattr(attn, f"b_{letter}")
            held = cache[f"{stack}.blocks.0.attn.hook_{letter.lower()}"]
            assert_close(made, held, rtol=1e-5, atol=1e-5)  # float32, in another order


# ---- weights


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip")
    hf_blip("odd_widths").save_pretrained(folder)
    blip_processor().save_pretrained(folder)
    return folder


def rewritten(saved, folder, change) -> str:
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def check_same(model, other, inputs):
    """Equal weights; logits up to rounding, which depends on where in memory a file's weights lie."""
    theirs = other.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in model.state_dict().items())
    assert_close(model(inputs), other(inputs), rtol=0, atol=1e-5)


def test_a_saved_checkpoint_loads(saved):
    model = HookedBlip.from_pretrained(str(saved))
    check_same(model, blip("odd_widths"), model.prepare("what color is the dog?", PICTURE))
    assert HookedBlip.from_pretrained(str(saved), dtype=BF16).cfg.dtype == BF16
    assert model.decoder.unembed.weight is model.decoder.embed.weight


def test_published_files_hold_tied_weights_twice_and_position_ids(saved, tmp_path):
    def as_published(tensors):
        words = "text_decoder.bert.embeddings.word_embeddings.weight"
        tensors["text_decoder.cls.predictions.decoder.weight"] = tensors[words].clone()
        bias = next(t for name, t in tensors.items() if name.endswith(("predictions.bias", "predictions.decoder.bias")))
        for name in ("bias", "decoder.bias"):
            tensors[f"text_decoder.cls.predictions.{name}"] = bias.clone()
        for name in ("text_encoder", "text_decoder.bert"):
            tensors[f"{name}.embeddings.position_ids"] = torch.arange(24)[None]

    model = HookedBlip.from_pretrained(rewritten(saved, tmp_path, as_published))
    check_same(model, blip("odd_widths"), model.prepare("red ball", PICTURE))


BROKEN: list[tuple[Any, type[Exception], str]] = [
    (
        lambda t: t.pop("text_encoder.encoder.layer.1.crossattention.self.key.weight"),
        MissingWeights,
        r"encoder.blocks.1.cross_attn.k_proj.weight \(published as text_encoder.encoder.layer.1.crossattention.self",
    ),
    (lambda t: t.update({"text_encoder.pooler.dense.weight": torch.zeros(2)}), UnknownWeights, "text_encoder.pooler"),
    (
        lambda t: t.update({"vision_model.encoder.layers.7.layer_norm1.bias": torch.zeros(48)}),
        UnknownWeights,
        "the model has no vision.blocks.7.ln1.bias",
    ),
    (lambda t: t.update({"vision_model.post_layernorm.bias": torch.zeros(4)}), WrongWeights, r"expected \(48,\)"),
    (
        lambda t: t.update({"text_decoder.cls.predictions.decoder.weight": torch.zeros(43, 48)}),
        WrongWeights,
        "decoder.embed.weight and decoder.unembed.weight differ",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BROKEN, ids=["missing", "pooler", "layer", "shape", "untied"])
def test_broken_checkpoints_name_the_weight(saved, tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        HookedBlip.from_pretrained(rewritten(saved, tmp_path, change))


def test_other_families_and_untied_ones_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(NotLlava, match="is a 'llava' checkpoint; expected 'blip'"):
        HookedBlip.from_pretrained(str(tmp_path))
    for name, config, message in (
        ("tie_word_embeddings", lambda c: c, "tie_word_embeddings is off"),
        ("is_decoder", lambda c: c.text_config, "is_decoder is off"),
    ):
        config_ = type(hf_blip().config).from_dict(hf_blip().config.to_dict())
        setattr(config(config_), name, False)
        with pytest.raises(LensError, match=message):
            BlipConfig.from_hf(config_)


# ---- inputs


def test_prepare_is_hugging_faces_processor():
    model, processor = blip(processor=True), cast(Any, blip_processor())
    questions = ["What color is the dog?", "red ball"]
    theirs = processor(images=[PICTURE, PICTURE], text=questions, padding=True, return_tensors="pt")
    ours = model.prepare(questions, PICTURE)
    assert torch.equal(ours["input_ids"], theirs["input_ids"])
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
    assert ours["decoder_input_ids"].tolist() == [[START], [START]]
    assert torch.equal(model(ours), model(**ours)) and set(ours.for_hf()) == set(ours)
    assert torch.equal(model(ours.row(0)), model(model.prepare(questions[0], PICTURE)))


def test_positions_have_roles_in_every_stack():
    model = blip(processor=True)
    inputs = model.prepare("What color is the dog?", PICTURE, answer="red")
    encoder, vision, decoder = (inputs.roles_in(stack) for stack in ("encoder", "vision", "decoder"))
    assert encoder.labels == ("system", *("question",) * 6, "template")
    assert inputs.positions_of("dog").tolist() == [5] and inputs.positions("question").tolist() == [1, 2, 3, 4, 5, 6]
    assert decoder.labels == ("system", "answer") and decoder.last == 1
    assert vision.positions("image").tolist() == list(range(10)) and vision.token_of(1, 2) == 6
    assert vision.box_of_patch(1, 2) == pytest.approx((40, 40 / 3, 60, 80 / 3))
    assert vision.patch_of_pixel(59, 0) == (0, 2) and vision.image_size() == (60, 40)
    batch = model.prepare(["red", "What color is the dog?"], [PICTURE, PICTURE], answer=["", "red ball"])
    assert batch.roles_in("encoder", 0).labels[3:] == ("padding",) * 5
    assert batch.roles_in("decoder", 0).labels == ("system", "padding", "padding")
    with pytest.raises(LensError, match="no stack 'encode'; nearest: 'encoder'"):
        batch.roles_in("encode", 0)
    with pytest.raises(LensError, match="a batch of 2: say which row"):
        batch.roles_in("encoder")
    _, cache = model.run_with_cache(**{k: v for k, v in batch.items() if k != "roles"}, names_filter="hook_logits")
    assert cache.inputs is not None and cache.inputs.roles_in("encoder", 0).labels[:3] == ("text",) * 3


def test_a_painted_patch_changes_that_patch_alone():
    model = blip(processor=True)
    inputs = model.prepare("red", PICTURE)
    x0, y0, x1, y1 = (round(edge) for edge in inputs.roles_in("vision").box_of_patch(1, 1))
    painted = PICTURE.copy()
    painted[y0 + 4 : y1 - 4, x0 + 6 : x1 - 6] = 255  # the resize looks a few pixels beyond each edge
    changed = (model.prepare("red", painted)["pixel_values"] != inputs["pixel_values"])[0].any(0)
    rows, columns = changed.nonzero().T.tolist()
    assert {row // 8 for row in rows} == {1} and {column // 8 for column in columns} == {1}


def given(**changes: Any) -> dict[str, Any]:
    return {**blip_example(hf_blip()), **changes}


BAD: list[tuple[Any, str]] = [
    (given(pixel_values=None), r"no pixel values; expected \(2, 3, 24, 24\)"),
    (given(pixel_values=torch.zeros(1, 3, 24, 24)), r"shape \(1, 3, 24, 24\); expected \(2, 3, 24, 24\)"),
    (given(input_ids=torch.full((2, 7), 43)), "token ids 43 … 43 in the question; expected 0 … 42"),
    (given(decoder_input_ids=torch.full((2, 25), 4)), "the answer takes 25 tokens; the context holds 24"),
    (given(decoder_input_ids=torch.full((1, 2), 4)), r"answer tokens of shape \(1, 2\); expected \[2, pos\]"),
    (given(attention_mask=torch.zeros(2, 7).long()), "a row of the question that is nothing but padding"),
    (given(decoder_input_ids=None, decoder_attention_mask=torch.ones(2, 1).long()), "expected both or neither"),
    ({"pixel_values": torch.zeros(2, 3, 24, 24)}, "expected BlipInputs, or input_ids and pixel_values"),
    (given(pixels=None), "unknown input 'pixels'; nearest: 'pixel_values'"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD, ids=range(len(BAD)))
def test_bad_inputs_are_refused(inputs, message):
    with pytest.raises(LensError, match=message):
        blip()(**inputs)


def test_bad_questions_are_refused():
    model = blip(processor=True)
    for question, image, message in (
        ("What colr is it?", PICTURE, "words that the tokenizer does not know: 'colr'; nearest: 'color'"),
        (" ", PICTURE, "question ' '; expected some text"),
        ("red", None, "BLIP needs a picture"),
        (["red", "blue"], [PICTURE], "2 questions, 1 images, 2 answers"),
    ):
        with pytest.raises(LensError, match=message):
            model.prepare(question, image)
    with pytest.raises(LensError, match="no processor"):
        blip().prepare("red", PICTURE)
    assert isinstance(model.prepare("red", PICTURE), BlipInputs)
