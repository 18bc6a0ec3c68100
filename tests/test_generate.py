"""Generation equals Hugging Face's `generate` token for token, and hooks live in every step and not beyond."""

from __future__ import annotations

import json

import pytest
import torch
from random_models import IMAGE, example, hf_llama, hf_llava
from word_tokenizer import word_tokenizer

from llava_lens import HookedLlava, Inputs
from llava_lens.errors import LensError, UnknownHook

SHAPES = {
    "one": dict(images=(1,)),
    "batch": dict(images=(1, 1)),
    "two_pictures": dict(images=(2,)),
    "ragged": dict(images=(1, 1, 1), pad="left"),
    "uneven_pictures": dict(images=(2, 0, 1), pad="left"),
    "text_only": dict(images=(0, 0)),
}
NEVER = dict(suppress_tokens=[IMAGE])
"""What `<image>` is for our `generate`, said in Hugging Face's way."""


def theirs(hf, inputs, new=10, **how):
    how = {"do_sample": False, **NEVER, **how}
    return hf.generate(**inputs, max_new_tokens=new, **how)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_tokens_are_hugging_face_s(shape, cached):
    hf = hf_llava("grouped")
    inputs = example(hf, **SHAPES[shape])
    ours = HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=10, use_kv_cache=cached)
    assert torch.equal(ours, theirs(hf, inputs, use_cache=cached))


@pytest.mark.parametrize("odd", ["plain", "wide_grouped_heads", "rope_llama3", "rope_longrope", "layer_list_full"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_over_configurations(odd, attention, dtype):
    hf = hf_llava(odd, attention, dtype)
    inputs = example(hf, images=(1, 1), pad="left")
    assert torch.equal(HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=6), theirs(hf, inputs, 6))


def test_dynamic_rope_goes_on_past_the_context_like_hugging_face():
    hf = hf_llama("rope_dynamic")
    tokens = torch.randint(3, 90, (1, 122), generator=torch.Generator().manual_seed(0))
    ours = HookedLlava.from_hf(hf).generate(tokens, max_new_tokens=12)
    assert ours.shape[1] > 128
    assert torch.equal(ours, hf.generate(tokens, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampled_tokens_are_hugging_face_s(how):
    hf = hf_llava()
    inputs = example(hf, images=(1, 1), pad="left")
    torch.manual_seed(3)
    expected = theirs(hf, inputs, 12, **{"do_sample": True, "top_k": 0, **how})
    torch.manual_seed(3)
    model = HookedLlava.from_hf(hf)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=True, **how), expected)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=True, generator=3, **how), expected)
    assert not torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=True, generator=4, **how), expected)


def test_repetition_penalty_without_sampling():
    hf = hf_llava()
    inputs = example(hf, images=(1, 1))
    ours = HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=12, repetition_penalty=1.8)
    assert torch.equal(ours, theirs(hf, inputs, 12, repetition_penalty=1.8))
    assert not torch.equal(ours, theirs(hf, inputs, 12))


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("cached", [True, False])
def test_rows_stop_where_hugging_face_s_do(cached, pad):
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1, 1), pad="left")
    start = inputs["input_ids"].shape[1]
    free = theirs(hf, inputs, 10)[:, start:]
    stop = [int(free[0, 2]), int(free[1, 4])]
    model.cfg = model.cfg.__class__(**{**vars(model.cfg), "pad_token_id": pad})
    ours = model.generate(**inputs, max_new_tokens=10, stop_tokens=stop, use_kv_cache=cached)
    expected = theirs(hf, inputs, 10, eos_token_id=stop, pad_token_id=pad)
    assert torch.equal(ours, expected)
    assert (ours[0, start + 3 :] == (stop[0] if pad is None else pad)).all()


def test_generation_ends_when_every_row_has():
    hf = hf_llava("grouped")
    inputs = example(hf, images=(1,))
    new = theirs(hf, inputs, 6)[0, inputs["input_ids"].shape[1] :].tolist()
    ours = HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=30, stop_tokens=new[-1])
    assert ours.shape[1] == inputs["input_ids"].shape[1] + new.index(new[-1]) + 1


def test_the_checkpoint_says_where_to_stop(tmp_path):
    hf = hf_llava()
    assert HookedLlava.from_hf(hf).cfg.eos_token_ids == (2,)
    before = hf.generation_config.eos_token_id, hf.generation_config.pad_token_id
    hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = [4, 7], 11
    try:
        cfg = HookedLlava.from_hf(hf).cfg
        assert cfg.eos_token_ids == (4, 7) and cfg.pad_token_id == 11
        hf.save_pretrained(tmp_path)
    finally:
        hf.generation_config.eos_token_id, hf.generation_config.pad_token_id = before
    word_tokenizer().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == [4, 7]
    cfg = HookedLlava.from_pretrained(str(tmp_path)).cfg
    assert cfg.eos_token_ids == (4, 7) and cfg.pad_token_id == 11
    (tmp_path / "generation_config.json").unlink()
    assert HookedLlava.from_pretrained(str(tmp_path)).cfg.eos_token_ids == (2,)


def worded():
    hf = hf_llava("grouped")
    return hf, HookedLlava.from_hf(hf, word_tokenizer())


def test_text_and_stop_words():
    hf, model = worded()
    inputs = example(hf, images=(1, 1))
    new = theirs(hf, inputs, 6)[:, inputs["input_ids"].shape[1] :]
    texts = [" ".join(f"w{i}" for i in row) for row in new.tolist()]
    assert model.generate(**inputs, max_new_tokens=6, return_type="text", stop_tokens=()) == texts
    stopped = model.generate(**inputs, max_new_tokens=6, return_type="text", stop_tokens=f"w{new[0, 1]}")
    assert stopped[0] == " ".join(texts[0].split()[:2])
    with pytest.raises(LensError, match=r"w4 w5.*2 tokens"):
        model.generate(**inputs, stop_tokens=["w4 w5"])
    with pytest.raises(LensError, match="no tokenizer"):
        HookedLlava.from_hf(hf).generate(**inputs, return_type="text")


def test_generated_inputs_can_be_run_again():
    hf, model = worded()
    raw = example(hf, images=(1, 1), pad="left")
    prompt = Inputs.from_tokens(
        raw["input_ids"], model.cfg, raw["pixel_values"], raw["attention_mask"], model.tokenizer
    )
    start = prompt.n_pos
    free = theirs(hf, raw, 8)[0, start:].tolist()
    length = max(free.index(token) for token in free[:6]) + 1
    stop = free[length - 1]
    made = model.generate(prompt, max_new_tokens=8, stop_tokens=stop, return_type="inputs")
    tokens = model.generate(prompt, max_new_tokens=8, stop_tokens=stop)
    assert torch.equal(made.tokens, tokens)
    assert made.positions("answer", row=0).tolist() == list(range(start, start + length)) and length > 1
    assert made.attention_mask is not None and not made.attention_mask[0, start + length :].any()
    answer = tokens[0, start + 1]
    assert made.positions_of(f"w{answer}", row=0).tolist()[-1] >= start + 1
    logits = model(made)
    assert torch.equal(logits[:, start - 1].argmax(-1), tokens[:, start])
    assert made.row(0).n_pos == int(made.attention_mask[0].sum())


def test_hooks_live_at_every_step_and_not_beyond():
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1))
    length = inputs["input_ids"].shape[1]
    shapes: list = []

    def look(act, hook):
        shapes.append((hook.name, tuple(act.shape)))

    names = ["blocks.1.attn.hook_pattern", "blocks.1.hook_resid_post", "vision.blocks.0.hook_resid_pre"]
    plain = model.generate(**inputs, max_new_tokens=3, stop_tokens=())
    with model.hooks(fwd_hooks=[(name, look) for name in names]):
        assert torch.equal(model.generate(**inputs, max_new_tokens=3, stop_tokens=()), plain)
        assert [s for n, s in shapes if n == names[0]] == [
            (2, 4, length, length),
            *((2, 4, 1, length + i) for i in (1, 2)),
        ]
        assert [s for n, s in shapes if n == names[1]] == [(2, length, 64), (2, 1, 64), (2, 1, 64)]
        assert len([s for n, s in shapes if n == names[2]]) == 1
        shapes.clear()
        model.generate(**inputs, max_new_tokens=3, stop_tokens=(), use_kv_cache=False)
        assert [s for n, s in shapes if n == names[1]] == [(2, length + i, 64) for i in range(3)]
        assert len([s for n, s in shapes if n == names[2]]) == 3
    assert not any(model.hook(name).live for name in model.hook_dict)


@pytest.mark.parametrize("cached", [True, False])
def test_an_edit_in_every_step_equals_the_full_passes_by_hand(cached):
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1))

    def knock_out(z, hook):
        z[:, :, 2] = 0

    hooks: list = [("blocks.1.attn.hook_z", knock_out)]
    tokens = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            logits = model.run_with_hooks(tokens, pixel_values=inputs["pixel_values"], fwd_hooks=hooks)
            logits[..., IMAGE] = -torch.inf
            tokens = torch.cat((tokens, logits[:, -1].argmax(-1)[:, None]), 1)
    ours = model.generate(**inputs, max_new_tokens=6, stop_tokens=(), fwd_hooks=hooks, use_kv_cache=cached)
    assert torch.equal(ours, tokens)
    assert not torch.equal(ours, model.generate(**inputs, max_new_tokens=6, stop_tokens=()))


def test_hooks_are_gone_when_one_raises():
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1,))
    steps = []

    def fail_later(act, hook):
        steps.append(hook)
        if len(steps) == 3:
            raise RuntimeError("third step")

    plain = model.generate(**inputs, max_new_tokens=4)
    with pytest.raises(RuntimeError, match="third step"):
        model.generate(**inputs, max_new_tokens=4, stop_tokens=(), fwd_hooks=[("blocks.0.hook_mlp_out", fail_later)])
    assert not any(model.hook(name).live for name in model.hook_dict)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4), plain)


def test_hooks_that_cannot_act_raise():
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    with pytest.raises(UnknownHook, match="no picture went through the tower"):
        model.generate(
            **example(hf, images=(0,)),
            max_new_tokens=2,
            fwd_hooks=[("vision.blocks.0.hook_mlp_out", lambda a, hook: a)],
        )
    with pytest.raises(UnknownHook, match=r"nearest: 'blocks.0.hook_mlp_out'"):
        model.generate(**example(hf, images=(0,)), fwd_hooks=[("blocks.0.hook_mlp_outs", lambda a, hook: a)])


@pytest.mark.parametrize("cached", [True, False])
def test_the_picture_stays_in_sight(cached):
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1), pad="left")
    expected = theirs(hf, inputs, 6)
    with model.looking_at(Inputs(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])):
        assert torch.equal(model.generate(inputs["input_ids"], max_new_tokens=6, use_kv_cache=cached), expected)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.equal(model.generate(**other, max_new_tokens=6, use_kv_cache=cached), expected)
    with pytest.raises(LensError, match="18 image tokens in the prompt, but 0 picture"):
        model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_kv_cache=cached)


def test_steps_are_reported():
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1))
    steps: list = []
    ours = model.generate(**inputs, max_new_tokens=4, stop_tokens=(), on_step=steps.append)
    assert torch.equal(torch.stack(steps, 1), ours[:, -4:])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dict(max_new_tokens=112), "a prompt of 18 tokens and max_new_tokens=112 make 130; the context holds 128"),
        (dict(max_new_tokens=0), "max_new_tokens=0: expected at least 1"),
        (dict(temperature=0.5), "temperature without do_sample=True"),
        (dict(top_k=3, generator=1), "top_k, generator without do_sample=True"),
        (dict(do_sample=True, temperature=0.0), "temperature"),
        (dict(do_sample=True, top_p=1.5), "top_p"),
        (dict(stop_tokens=[97]), r"stop_tokens \[97\]: expected 0 … 96"),
    ],
    ids=str,
)
def test_wrong_settings_raise_before_anything_runs(how, message):
    hf = hf_llava("grouped")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1,))
    runs = model.n_runs
    with pytest.raises(LensError, match=message):
        model.generate(**inputs, **how)
    assert model.n_runs == runs


def test_right_padding_raises():
    hf = hf_llava("grouped")
    with pytest.raises(LensError, match=r"rows \[0\] end in padding.*pad on the left"):
        HookedLlava.from_hf(hf).generate(**example(hf, images=(1, 1), pad="right"))


def test_the_context_can_be_filled_to_the_brim():
    hf = hf_llava("grouped")
    inputs = example(hf, images=(1,))
    new = hf.config.text_config.max_position_embeddings - inputs["input_ids"].shape[1]
    ours = HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=new, stop_tokens=())
    assert ours.shape[1] == hf.config.text_config.max_position_embeddings
