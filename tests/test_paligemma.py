"""What is PaliGemma's own: prompts read both ways, Gemma's norm, its processor; sweeps where later places are seen."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import brute_force
from cases_paligemma import config, example, hf_paligemma
from model_battery import seen
from PIL import Image
from safetensors.torch import save_file
from test_sweep import random_cells
from torch import Tensor
from transformers import PaliGemmaProcessor, SiglipImageProcessorPil
from word_tokenizer import word_tokenizer

from llava_lens import HookedMLLM, Inputs
from llava_lens.analysis import (
    attribution_patch,
    direct_logit_attribution,
    knock_out,
    patch,
    path_patch,
    tower_attribution,
)
from llava_lens.errors import LensError
from llava_lens.models.paligemma import HookedPaliGemma
from llava_lens.shards import CheckpointError
from llava_lens.sweep import Row, log_prob, logit, run_cells, settle

SHAPES: dict[str, dict[str, Any]] = {
    "one": dict(images=(1,), written=(0,)),
    "answered": dict(images=(1, 1), written=(3, 3)),
    "right": dict(images=(2, 1, 0), written=(1, 0, 2), left=False),
    "text": dict(images=(0, 0), written=(2, 0)),
}


@cache
def precise() -> HookedPaliGemma:
    return HookedMLLM.from_hf(copy.deepcopy(hf_paligemma()).to(torch.float64), processor())


def double(given: dict[str, Tensor]) -> Inputs:
    model = precise()
    return model.read_inputs(**{n: v.double() if v.is_floating_point() else v for n, v in given.items()}).with_roles(
        model.cfg
    )


def processor() -> Any:
    images: Any = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    images.image_seq_length = 9
    return PaliGemmaProcessor(images, word_tokenizer())


def picture(seed: int = 0, size: tuple[int, int] = (50, 37)) -> Image.Image:
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ---- the forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_are_bit_equal_over_inputs(shape, attention, dtype):
    hf = hf_paligemma(attention=attention, dtype=dtype)
    given = example(hf, **SHAPES[shape])
    given = {n: v.to(dtype) if v.is_floating_point() else v for n, v in given.items()}
    mask = given["attention_mask"]
    assert torch.equal(seen(HookedPaliGemma.from_hf(hf)(**given), mask), seen(hf(**given).logits, mask))


@torch.no_grad()
def test_without_types_it_is_causal_as_hugging_faces_eager_attention():
    hf = hf_paligemma(attention="eager")
    given = {n: v for n, v in example(hf).items() if n != "token_type_ids"}
    plain = hf_paligemma()
    for inputs in (given, {"input_ids": torch.tensor([[5, 9, 14, 3, 8]])}):
        mask = inputs.get("attention_mask")
        assert torch.equal(seen(HookedPaliGemma.from_hf(hf)(**inputs), mask), seen(hf(**inputs).logits, mask))
        ones = {**inputs, "token_type_ids": torch.ones_like(inputs["input_ids"])}
        ours = HookedPaliGemma.from_hf(plain)(**inputs)
        torch.testing.assert_close(seen(ours, mask), seen(plain(**ones).logits, mask), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_prompt_sees_what_comes_later_and_what_is_written_does_not():
    model, inputs = precise(), double(example(hf_paligemma(), (1,), (2,)))
    tokens, end = inputs.tokens.clone(), inputs.n_pos
    stream = model(inputs, stop_at_layer=2)
    for at, first in ((end - 3, 0), (end - 2, end - 2), (end - 1, end - 1)):
        other = tokens.clone()
        other[0, at] = other[0, at] % 80 + 4
        moved = model(Inputs(other, inputs.pixels, None, None, inputs.extras), stop_at_layer=2)
        assert (moved != stream).any(-1)[0].nonzero()[0] == first


@torch.no_grad()
def test_several_tokens_at_a_time_behind_a_cache_equal_hugging_faces():
    from transformers import DynamicCache

    from llava_lens.kv_cache import KVCache

    hf, model = hf_paligemma(), HookedPaliGemma.from_hf(hf_paligemma())
    given, more = example(hf), torch.tensor([[5, 6, 7], [8, 9, 10]])
    theirs, ours = DynamicCache(config=hf.config.text_config), KVCache(model.cfg.n_layers)
    hf(**given, cache=theirs, use_cache=True)
    model(**given, past_kv_cache=ours)
    whole = torch.cat((given["attention_mask"], torch.ones_like(more)), 1)
    types = torch.zeros_like(more)  # behind a cache they say nothing
    true = hf(input_ids=more, attention_mask=whole, token_type_ids=types, cache=theirs, use_cache=True).logits
    assert torch.equal(model(input_ids=more, token_type_ids=types, past_kv_cache=ours), true)


def test_types_of_another_length_are_refused():
    given = example(hf_paligemma())
    given["token_type_ids"] = given["token_type_ids"][:, 1:]
    with pytest.raises(LensError, match="token_type_ids"):
        HookedPaliGemma.from_hf(hf_paligemma())(**given)


# ---- parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_norm_is_hugging_faces_shows_what_it_does_and_fuses(dtype):
    hf = hf_paligemma(dtype=dtype)
    model = HookedPaliGemma.from_hf(hf)
    blocks: Any = model.blocks
    theirs, ours = hf.model.language_model.layers[1].input_layernorm, blocks[1].ln1
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    true, shown = theirs(x), {}
    assert torch.equal(ours(x), true)
    assert torch.equal(ours.w, 1 + theirs.weight.float())
    ours.hook_scale.add_hook(lambda act, hook: shown.update(scale=act.clone()))
    ours.hook_normalized.add_hook(lambda act, hook: shown.update(normalized=act.clone()))
    assert torch.equal(ours(x), true)
    torch.testing.assert_close((x.float() / shown["scale"]).to(dtype), shown["normalized"])
    ours.hook_normalized.remove_hooks()
    ours.hook_normalized.add_hook(lambda act, hook: act.index_fill(1, torch.tensor([2]), 1.0))
    edited = ours(x)
    assert torch.equal(edited[:, 2], ours.w.to(dtype).expand(2, -1)) and torch.equal(edited[:, 3:], true[:, 3:])
    model.reset_hooks()
    with model.use("fused"):
        assert ours.norm.open(x)
        torch.testing.assert_close(ours(x), true)
        total, normed = ours.after_adding(x, x)
        assert torch.equal(total, x + x)
        torch.testing.assert_close(normed, theirs(x + x))


@torch.no_grad()
def test_what_a_token_puts_into_the_stream():
    for dtype in (torch.float32, torch.bfloat16):
        hf = hf_paligemma("paligemma_wide_heads", dtype=dtype)
        model, tokens = HookedPaliGemma.from_hf(hf), torch.arange(4, 20)[None]
        assert torch.equal(model.W_E[tokens], hf.get_input_embeddings()(tokens))
        assert torch.equal(model.embed_tokens(tokens), model.W_E[tokens])


# ---- sweeps


@pytest.mark.parametrize("left", [True, pytest.param(False, marks=pytest.mark.slow)])
@torch.no_grad()
def test_any_intervention_equals_a_full_forward_pass(left):
    model = precise()
    inputs = double(example(hf_paligemma(), (1, 2), (2, 0), left))
    rng = random.Random(f"paligemma {left}")
    for i in range(2):
        cells = random_cells(model, inputs, i, rng, 12 if left else 40, "pad")
        row = Row.of(model, inputs, i)
        names = sorted({edit.hook for cell in cells for edit in cell})
        out = run_cells(settle(model, row, metric=logit(7), names=names), cells, progress=False)
        assert out.path == "shortened runs" and out.floor <= 1e-11
        for cell, value in zip(cells, out.values.tolist(), strict=True):
            wanted = float(brute_force(model, inputs, i, cell, [row.last])[0, 7])
            assert value == pytest.approx(wanted, rel=1e-11, abs=1e-11), [(e.hook, e.how, e.selection) for e in cell]


SWEPT = {
    "resid_pre": ("layer", "position"),
    "vision.resid_pre": ("layer", "patch"),
    "projector.hook_out": ("patch",),
    "vision.ln_post.hook_normalized": ("patch",),
}


def pair() -> tuple[Inputs, Inputs]:
    """Another picture, and another word in the prompt."""
    clean = double(example(hf_paligemma(), (1,), (0,)))
    assert clean.pixels is not None
    tokens = clean.tokens.clone()
    tokens[0, -3] = tokens[0, -3] % 80 + 4
    noise = torch.randn(clean.pixels.shape, generator=torch.Generator().manual_seed(3)).double()
    return clean, Inputs(tokens, clean.pixels + noise, None, clean.roles, clean.extras)


@torch.no_grad()
def test_patching_with_an_answer_of_several_tokens():
    """The answer's tokens are written, and see but are not seen: type 1, whatever the prompt's are."""
    model, (clean, corrupt) = precise(), pair()
    answer = [9, 11, 13]
    ids, n = torch.tensor([answer[:-1]]), clean.n_pos
    types = torch.cat((torch.zeros(1, n, dtype=torch.long), torch.ones(1, 2, dtype=torch.long)), 1)
    longer = [
        Inputs(torch.cat((each.tokens, ids), 1), each.pixels, None, None, {"token_type_ids": types})
        for each in (clean, corrupt)
    ]
    source = model.run_with_cache(longer[0])[1]
    for hook, sweep, places in (
        ("resid_pre", ("layer", "position"), [(0, 0), (1, 4), (2, n - 3)]),
        ("z", ("layer", "head"), [(0, 1), (2, 3)]),
        ("mlp_out", ("layer", "position"), [(1, n - 2)]),
    ):
        scores = patch(model, clean, corrupt, hook, sweep, metric=log_prob("w9 w11 w13"), progress=False)
        for layer, which in places:

            def put(act: Tensor, hook: Any, at: Any = (slice(None),) * (1 + (hook == "z")) + (which,)) -> None:
                act[at] = source[hook.name][at]

            name = f"blocks.{layer}.{'attn.hook_z' if hook == 'z' else f'hook_{hook}'}"
            logits = model.run_with_hooks(longer[1], fwd_hooks=[(name, put)])[0].log_softmax(-1)
            wanted = sum(float(logits[n - 1 + i, token]) for i, token in enumerate(answer))
            assert float(scores.values[layer, which]) == pytest.approx(wanted, rel=1e-11), (hook, layer, which)


@torch.no_grad()
def test_the_same_tokens_of_another_type_are_another_run():
    model, (clean, _) = precise(), pair()
    written = torch.zeros_like(clean.tokens)
    written[:, -3:] = 1
    other = Inputs(clean.tokens, clean.pixels, None, clean.roles, {"token_type_ids": written})
    setting = settle(model, Row.of(model, clean), Row.of(model, other), logit(7))
    assert setting.corrupt_value == pytest.approx(float(model(other)[0, -1, 7]), rel=1e-11)
    assert setting.corrupt_value != setting.clean_value


@torch.no_grad()
def test_knocking_out_what_comes_later():
    model, (clean, _) = precise(), pair()
    end = clean.n_pos
    scores = knock_out(model, clean, from_="image", to=[end - 2], window=1, metric=logit(7), progress=False)

    def blind(act: Tensor, hook: Any) -> None:
        act[:, :, :9, end - 2] = -torch.inf

    for layer in range(3):
        wanted = model.run_with_hooks(clean, fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", blind)])[0, -1, 7]
        assert float(scores.values[layer]) == pytest.approx(float(wanted), rel=1e-11)
    assert len(set(scores.values.tolist())) > 1
    answered = double(example(hf_paligemma(), (1,), (2,)))
    with pytest.raises(LensError, match="comes later"):
        knock_out(model, answered, from_="image", to=[answered.n_pos - 1], metric=logit(7), progress=False)


@pytest.mark.parametrize("hook", ["k", *(pytest.param(h, marks=pytest.mark.slow) for h in SWEPT)])
def test_attribution_patching_is_the_first_order_of_patching(hook):
    model, (clean, corrupt) = precise(), pair()
    how: dict[str, Any] = dict(sweep=SWEPT.get(hook, ("layer", "head")), metric=logit(7), progress=False)
    assert clean.pixels is not None and corrupt.pixels is not None
    misses = []
    for step in (1e-3, 5e-4):
        pixels = clean.pixels + step * (corrupt.pixels - clean.pixels)
        near = Inputs(clean.tokens, pixels, None, clean.roles, clean.extras)
        found = attribution_patch(model, clean, near, hook, top_k=10000, **how)
        estimate, exact = found.effects
        assert float(exact.abs().max()) > 0
        misses.append(float((estimate - exact).abs().max()) / step)
    assert misses[1] < 0.6 * misses[0]


@pytest.mark.parametrize("side", ["q", "k"])
def test_the_softmax_is_exact_with_qk_where_later_keys_are_seen(side):
    """In the last layer at the last position nothing but the softmax and what is linear in it lies ahead of z."""
    model, (clean, corrupt) = precise(), pair()
    how: dict[str, Any] = dict(sweep=("layer", "head"), metric=logit(7), progress=False, top_k=0)
    found = attribution_patch(model, clean, corrupt, side, correction="qk", **how).estimate
    q, k, v = (f"blocks.1.attn.{name}" for name in ("hook_rot_q", "hook_rot_k", "hook_v"))
    with torch.no_grad():
        runs = [model.run_with_cache(inputs, names_filter=[q, k, v])[1] for inputs in (corrupt, clean)]
    _, cache = model.run_with_cache(
        corrupt, names_filter="blocks.1.attn.hook_z", incl_bwd=True, metric=lambda logits: logits[0, -1, 7]
    )
    at_z = cache.cache_dict["blocks.1.attn.hook_z_grad"][0]
    base, source = ([run[name][0] for name in (q, k, v)] for run in runs)
    moved = [source[0] if side == "q" else base[0], source[1] if side == "k" else base[1]]

    def pattern(q: Tensor, k: Tensor) -> Tensor:
        return (torch.einsum("qhd,kd->hqk", q, k[:, 0]) * model.cfg.d_head**-0.5).softmax(-1)

    change = pattern(*moved) - pattern(*base[:2])
    wanted = torch.einsum("hqk,kd,qhd->h", change, base[2][:, 0], at_z)
    wanted = wanted if side == "q" else wanted.sum()[None]
    got = found.values[1] - found.method["baseline"]
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_a_path_reaches_earlier_places_too():
    """An earlier place would see the values that a path changes; its own receiver must not hear of them."""
    model, (clean, corrupt) = precise(), pair()
    with torch.no_grad():
        source, base = (model.run_with_cache(inputs)[1] for inputs in (clean, corrupt))
    hearing = ["L1H0 v", "L1 mlp"]
    scores = path_patch(model, clean, corrupt, hearing, senders=["L0H1"], sweep=("sender", "position"),
                        metric=logit(7), progress=False)  # fmt: skip
    blocks: Any = model.blocks
    W_O = blocks[0].attn.W_O[1]
    for at in (3, clean.n_pos - 2):
        delta = torch.zeros_like(base["resid_pre", 1])
        delta[0, at] = (source["z", 0][0, at, 1] - base["z", 0][0, at, 1]) @ W_O
        block = blocks[1]
        v = block.ln1(base["resid_pre", 1] + delta) @ block.attn.W_V[0] + block.attn.b_V[0]

        def values(act: Tensor, hook: Any, v: Tensor = v) -> None:
            act[:, :, 0] = v

        def mlp(act: Tensor, hook: Any, delta: Tensor = delta) -> Tensor:
            return base["resid_mid", 1] + delta

        hooks = [("blocks.1.attn.hook_v", values), ("blocks.1.hook_mlp_in", mlp)]
        wanted = float(model.run_with_hooks(corrupt, fwd_hooks=hooks)[0, -1, 7])
        assert float(scores.values[0, at]) == pytest.approx(wanted, rel=1e-11)


@torch.no_grad()
def test_direct_attribution_closes_on_the_scaled_gain():
    model = HookedPaliGemma.from_hf(hf_paligemma())
    inputs = model.read_inputs(**example(hf_paligemma(), (1,), (2,))).with_roles(model.cfg)
    logits, cache = model.run_with_cache(inputs)
    for by in ("component", "head", "source"):
        found = direct_logit_attribution(cache, 5, by=by)
        assert found.closure is not None and abs(found.closure) <= 1e-3 * float(logits.abs().max())


# ---- the processor


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of transformers' own processor
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_those_of_hugging_faces_processor(side):
    theirs = processor()
    model = HookedPaliGemma.from_hf(hf_paligemma(), processor())
    theirs.tokenizer.padding_side = side
    images = [[picture(0)], [picture(1), picture(2)]]
    asked, answers = ["w5 w6", "<image><image> w7 w8 w9"], ["w20 w21", "w22"]
    for written in ("", answers):
        suffix = {} if not written else {"suffix": answers}
        texts = ["<image> w5 w6", asked[1]]
        true = theirs(images=images, text=texts, return_tensors="pt", padding=True, **suffix)
        ours = model.prepare(asked, images, written, padding_side=side)
        end = {n: true[n] for n in ("input_ids", "token_type_ids", "attention_mask")}
        if written:  # a suffix ends with <eos>, a start of the answer does not
            cut = [without_end(end, row, side, theirs.tokenizer.eos_token_id) for row in range(2)]
        else:
            cut = [{n: v[row][end["attention_mask"][row].bool()] for n, v in end.items()} for row in range(2)]
        for row, wanted in enumerate(cut):
            mine = ours.row(row)
            assert torch.equal(mine.tokens[0], wanted["input_ids"])
            assert torch.equal(mine.extras["token_type_ids"][0], wanted["token_type_ids"])
        assert ours.pixels is not None and torch.equal(ours.pixels, true["pixel_values"])
        if not written:
            assert torch.equal(ours.tokens, true["input_ids"])
            assert torch.equal(ours.extras["token_type_ids"], true["token_type_ids"])
            with torch.no_grad():
                mask = true["attention_mask"]
                assert torch.equal(seen(model(**true), mask), seen(hf_paligemma()(**true).logits, mask))
                assert torch.equal(seen(model(ours), mask), seen(model(**true), mask))


@pytest.mark.slow
def test_a_question_is_explained_and_its_map_is_drawn():
    import llava_lens
    from llava_lens.plots import explanation_png

    model = HookedPaliGemma.from_hf(hf_paligemma(), processor())
    image = picture(size=(60, 40))
    inputs = model.prepare("w5 w6", image, "w20")
    found = llava_lens.explain(model, inputs, "w9", versus="w11", method="flow", progress=False)
    assert "w9" in str(found)
    assert explanation_png(found, image)[:4] == b"\x89PNG"
    with pytest.raises(LensError, match="LinearProjector behind PaliGemmaVision"):
        tower_attribution(model.run_with_cache(inputs)[1], 5)


def without_end(given: dict[str, Tensor], row: int, side: str, eos: int) -> dict[str, Tensor]:
    keep = given["attention_mask"][row].bool()
    whole = {n: v[row][keep] for n, v in given.items()}
    assert int(whole["input_ids"][-1]) == eos
    return {n: v[:-1] for n, v in whole.items()}


def test_roles_of_a_prompt():
    model = HookedPaliGemma.from_hf(hf_paligemma(), processor())
    inputs = model.prepare("w5 w6", picture(), "w20")
    labels = inputs.roles_of().labels
    assert labels == ("image",) * 9 + ("system", "question", "question", "answer")
    assert inputs.positions_of("w6").tolist() == [11] and inputs.positions_of("w20").tolist() == [12]
    assert inputs.extras["token_type_ids"].tolist() == [[0] * 12 + [1]]
    plain = model.prepare("<image> w5 w6", picture(), template=False)
    assert plain.roles_of().labels.count("image") == 9 and "w5" in plain.roles_of().text


def test_a_painted_patch_changes_its_own_token_alone():
    model = HookedPaliGemma.from_hf(hf_paligemma(), processor())
    image = picture(size=(48, 48))
    inputs = model.prepare("w5", image)
    roles = inputs.roles_of()
    plain = inputs.pixels
    assert plain is not None
    for r, c in ((0, 0), (1, 2), (2, 1)):
        found: Any = roles.picture(0).map
        x0, y0, x1, y1 = (int(side) for side in found.box_of_patch(r, c))
        painted = np.asarray(image).copy()
        painted[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4] = 255 - painted[y0 + 4 : y1 - 4, x0 + 4 : x1 - 4]
        pixels = model.prepare("w5", Image.fromarray(painted)).pixels
        assert pixels is not None
        moved = (pixels != plain).any(1)[0].reshape(3, 8, 3, 8).any(3).any(1)
        assert moved.nonzero().tolist() == [[r, c]]
        assert roles.patch_of(roles.token_of(r, c)) == (0, r, c)


# ---- checkpoints


def test_weights_load_from_the_hubs_spelling(tmp_path):
    hf, source = hf_paligemma(), hf_paligemma().state_dict()
    hub = (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
           ("model.vision_tower.", "vision_tower.vision_model."),
           ("model.multi_modal_projector.", "multi_modal_projector."))  # fmt: skip
    spelt = {}
    for key, tensor in source.items():
        old, new = next((pair for pair in hub if key.startswith(pair[0])), ("", ""))
        spelt[new + key.removeprefix(old)] = tensor.clone().contiguous()
    spelt.pop("language_model.lm_head.weight")
    hf.config.save_pretrained(tmp_path)
    processor().tokenizer.save_pretrained(tmp_path)
    save_file(spelt, tmp_path / "model.safetensors")
    model = HookedMLLM.from_pretrained(tmp_path)
    assert type(model) is HookedPaliGemma and type(model.processor).__name__ == "PaliGemmaProcessor"
    given = example(hf)
    with torch.no_grad():
        assert torch.equal(model(**given), HookedPaliGemma.from_hf(hf)(**given))
    assert model.prepare("w5", picture()).n_pos == 11
    for name, message in (("vision_tower.vision_model.post_layernorm.weight", "post_layernorm"),
                          ("multi_modal_projector.linear.bias", "linear.bias")):  # fmt: skip
        save_file({key: tensor for key, tensor in spelt.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            HookedMLLM.from_pretrained(tmp_path)


def test_what_is_refused():
    from transformers import Gemma2Config, PaliGemmaConfig

    odd = config("paligemma")
    second = PaliGemmaConfig(
        text_config=Gemma2Config(hidden_size=64, num_hidden_layers=2),
        vision_config=odd.vision_config,
        projection_dim=64,
    )
    with pytest.raises(ValueError, match=r"a decoder of 'gemma2'; expected 'gemma'"):
        HookedPaliGemma.Config.from_hf(second)
    odd.projection_dim = 32
    with pytest.raises(ValueError, match="projection_dim 32"):
        HookedPaliGemma.Config.from_hf(odd)
