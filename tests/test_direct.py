"""Direct logit attribution against loops over weights in float64, and the sums that must close."""

from __future__ import annotations

import copy
import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import hooked, inputs_of
from random_models import example, hf_llama, hf_llava
from torch import Tensor

from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import attribution_names, direct_logit_attribution
from llava_lens.analysis.attribution.direct import AXES
from llava_lens.errors import LensError
from llava_lens.tiny import questions, render_scene
from llava_lens.tiny.evaluate import HELD_OUT

ODD = ["plain", "grouped", "wide_grouped_heads", "attention_bias", "mlp_bias", "tied", "full", "gelu_decoder"]
BATCHES = [((1, 1), None, torch.float32), ((1, 2), "left", torch.float64), ((2, 0), "right", torch.float32)]


@cache
def run(
    odd: str, dtype: torch.dtype = torch.float64, images: tuple[int, ...] = (1, 1), pad: str | None = None
) -> tuple[HookedLlava, Tensor, LlavaCache]:
    model = hooked(odd, dtype)
    with torch.no_grad():
        return model, *model.run_with_cache(inputs_of(model, odd, images, pad))


def fact(scores: Any, name: str, row: int) -> Any:
    """One row's fact; rows that agree share one."""
    found = scores.method[name]
    return found[row] if isinstance(found, list) else found


def rest_of(scores: Any, row: int) -> float:
    return sum(fact(scores, "rest", row).values())


class ByHand:
    """One row's decoder in float64 with no batch and no einsum: what each part adds to the stream at position t."""

    def __init__(self, model: HookedLlava, cache: LlavaCache, row: int, t: int):
        self.model, self.cache, self.row, self.t = model, cache, row, t
        self.weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = self.weights[f"{name}.weight"] @ x
        return out + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else out

    def stream(self, layer: int, where: str, t: int) -> Tensor:
        return self.cache[f"blocks.{layer}.hook_resid_{where}"][self.row, t]

    def normed(self, name: str, x: Tensor) -> Tensor:
        return self.weights[f"{name}.weight"] * x / ((x * x).mean() + self.model.cfg.eps) ** 0.5

    def logit(self, vector: Tensor, token: int) -> float:
        x = self.stream(self.model.cfg.n_layers - 1, "post", self.t)
        scaled = vector * self.weights["ln_final.weight"] / ((x * x).mean() + self.model.cfg.eps) ** 0.5
        head = "unembed.weight" if "unembed.weight" in self.weights else "embed.weight"
        return float(self.weights[head][token] @ scaled)

    def source(self, layer: int, head: int, p: int) -> Tensor:
        cfg, name = self.model.cfg, f"blocks.{layer}.attn"
        v = self.linear(f"{name}.v_proj", self.normed(f"blocks.{layer}.ln1", self.stream(layer, "pre", p)))
        kv = head // (cfg.n_heads // cfg.n_key_value_heads)
        padded = torch.zeros(cfg.n_heads * cfg.d_head, dtype=torch.float64)
        padded[head * cfg.d_head : (head + 1) * cfg.d_head] = v[kv * cfg.d_head : (kv + 1) * cfg.d_head]
        weight = self.cache[f"{name}.hook_pattern"][self.row, head, self.t, p]
        return weight * (self.weights[f"{name}.o_proj.weight"] @ padded)

    def neuron(self, layer: int, k: int) -> Tensor:
        name = f"blocks.{layer}.mlp"
        x = self.normed(f"blocks.{layer}.ln2", self.stream(layer, "mid", self.t))
        act = F.gelu if self.model.cfg.act_fn == "gelu" else F.silu
        gate = act(self.linear(f"{name}.gate_proj", x))
        return (gate * self.linear(f"{name}.in_proj", x))[k] * self.weights[f"{name}.out_proj.weight"][:, k]

    def bias(self, layer: int, name: str) -> Tensor:
        found = self.weights.get(f"blocks.{layer}.{name}.bias")
        return torch.zeros(self.model.cfg.d_model, dtype=torch.float64) if found is None else found


# ---- against loops by hand


@pytest.mark.parametrize("odd", ODD)
def test_every_split_equals_loops_over_the_weights(odd: str) -> None:
    model, logits, cache = run(odd)
    row, t, token, versus = 1, 14, 5, 60
    hand = ByHand(model, cache, row, t)
    found = {by: direct_logit_attribution(cache, token, versus, by, t, row=row) for by in AXES}

    def said(vector: Tensor) -> float:
        return hand.logit(vector, token) - hand.logit(vector, versus)

    for layer in range(3):
        heads = []
        for head in range(4):
            sources = [hand.source(layer, head, p) for p in range(t + 1)]
            heads.append(torch.stack(sources).sum(0))
            got = found["source"].values[layer, head]
            assert got[: t + 1].tolist() == pytest.approx([said(each) for each in sources], abs=1e-12)
            assert not got[t + 1 :].any()
            assert float(found["head"].values[layer, head]) == pytest.approx(said(heads[-1]), abs=1e-12)
        neurons = [hand.neuron(layer, k) for k in range(112)]
        assert found["neuron"].values[layer].tolist() == pytest.approx([said(each) for each in neurons], abs=1e-12)
        attn = torch.stack(heads).sum(0) + hand.bias(layer, "attn.o_proj")
        mlp = torch.stack(neurons).sum(0) + hand.bias(layer, "mlp.out_proj")
        assert found["layer"].values[layer].tolist() == pytest.approx([said(attn), said(mlp)], abs=1e-12)
        assert found["component"].values[1 + 2 * layer :][:2].tolist() == found["layer"].values[layer].tolist()
    embed = said(hand.stream(0, "pre", t))
    assert float(found["component"].values[0]) == pytest.approx(embed, abs=1e-12)
    for by in ("layer", "head", "neuron", "source"):
        assert found[by].method["rest"]["embed"] == pytest.approx(embed, abs=1e-12)
    lead = float(logits[row, t, token] - logits[row, t, versus])
    for scores in found.values():
        assert scores.method["logit"] == pytest.approx(lead, abs=1e-12)


@pytest.mark.parametrize("odd", ["plain", "grouped", "attention_bias", "mlp_bias"])
def test_components_are_transformer_lenss(odd: str) -> None:
    _, _, cache = run(odd)
    split: Any = cache.decompose_resid(return_labels=True)
    stack, labels = split
    results: Any = cache.stack_head_results()
    theirs = cache.logit_attrs(stack, tokens=torch.tensor([7, 7]), incorrect_tokens=torch.tensor([9, 9]))
    ours = direct_logit_attribution(cache, 7, 9)
    torch.testing.assert_close(ours.values, theirs[..., -1].T, atol=1e-12, rtol=0)
    spelled = ["embed", *(f"{layer}_{part}_out" for layer in range(3) for part in ("attn", "mlp"))]
    assert labels == spelled and ours.labels_of("component")[:3] == ("embed", "L0 attn", "L0 mlp")
    heads = cache.logit_attrs(results, tokens=torch.tensor([7, 7]))
    ours = direct_logit_attribution(cache, 7, by="head")
    torch.testing.assert_close(ours.values.flatten(1), heads[..., -1].T, atol=1e-12, rtol=0)


# ---- sums that close


@pytest.mark.parametrize("images, pad, dtype", BATCHES)
@pytest.mark.parametrize("odd", ["wide_grouped_heads", "attention_bias", "mlp_bias", "full"])
def test_scores_and_rest_sum_to_the_models_logit(odd: str, images: tuple[int, ...], pad: Any, dtype: Any) -> None:
    _, logits, cache = run(odd, dtype, images, pad)
    close = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert cache.inputs is not None
    for by in AXES:
        scores = direct_logit_attribution(cache, by=by)
        assert scores.axes == ("batch", *AXES[by]) and scores.values.dtype == dtype and scores.unit == "logits"
        for row in range(2):
            own = logits[row, cache.inputs.roles_of(row).last]
            assert fact(scores, "answer_id", row) == int(own.argmax())
            logit = float(own.max())
            assert fact(scores, "logit", row) == pytest.approx(logit, rel=close)
            total = float(scores.values[row].double().sum()) + rest_of(scores, row)
            assert total == pytest.approx(logit, rel=close)
        assert scores.closure is not None and scores.closure <= close * min(
            fact(scores, "logit", row) for row in range(2)
        )


def test_bfloat16_closes_as_far_as_its_rounding() -> None:
    _, _, cache = run("grouped", torch.bfloat16)
    for by in AXES:
        scores = direct_logit_attribution(cache, by=by)
        assert scores.values.dtype == torch.float32 and scores.closure is not None
        assert 1e-6 < scores.closure < 0.05


@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_of_a_padded_batch_equal_each_row_alone(pad: str) -> None:
    model, _, cache = run("grouped", torch.float64, (1, 1), pad)
    assert cache.inputs is not None
    for by in AXES:
        both = direct_logit_attribution(cache, 8, by=by)
        for row in range(2):
            with torch.no_grad():
                _, alone = model.run_with_cache(cache.inputs.row(row), names_filter=attribution_names(model, by))
            own = direct_logit_attribution(alone, 8, by=by)
            mine = both[{"batch": row}]
            assert torch.equal(mine.values, direct_logit_attribution(cache, 8, by=by, row=row).values)
            if by == "source":
                own, mine = own.over_image(), mine.over_image()
            torch.testing.assert_close(mine.values, own.values, atol=1e-12, rtol=0)


# ---- answers and positions


def test_several_answers_stand_in_front() -> None:
    _, _, cache = run("plain")
    many = direct_logit_attribution(cache, [3, None, 5], [7, 8, 9], "head", row=0)
    assert many.axes == ("answer", "layer", "head") and many.method["versus_id"] == [7, 8, 9]
    own = many.method["answer_id"][1]
    assert many.labels_of("answer") == ("3 − 7", f"{own} − 8", "5 − 9")
    for i, pair in enumerate(((3, 7), (own, 8), (5, 9))):
        alone = direct_logit_attribution(cache, *pair, "head", row=0)
        torch.testing.assert_close(many.values[i], alone.values, atol=1e-13, rtol=0)
        assert many.method["rest"]["embed"][i] == pytest.approx(alone.method["rest"]["embed"], abs=1e-13)
        assert many.method["logit"][i] == pytest.approx(alone.method["logit"], abs=1e-13)
    one = direct_logit_attribution(cache, [3], 7, "head")
    assert one.axes == ("batch", "answer", "layer", "head") and one.labels_of("answer") == (3,)
    assert torch.equal(one.values[0, 0], many.values[0])


def test_an_answer_of_several_tokens_is_refused_cut_or_added_up() -> None:
    model = HookedLlava.tiny()
    picture = render_scene(0).image
    question = "What is the color of the circle?"
    with torch.no_grad():
        _, cache = model.run_with_cache(model.prepare(question, picture, answer="red"))
        _, before = model.run_with_cache(model.prepare(question, picture))
    with pytest.raises(LensError, match=r"answer 'red blue' is 2 tokens.*several='first'.*several='all'"):
        direct_logit_attribution(cache, "red blue")
    first = direct_logit_attribution(cache, "red blue", by="source", several="first")
    torch.testing.assert_close(first.values, direct_logit_attribution(cache, "red", by="source").values)
    assert first.method["scored"] == "the first of 2 tokens"
    for by in AXES:
        whole = direct_logit_attribution(cache, "red blue", by=by, several="all")
        last = cache["resid_pre", 0].shape[1] - 1
        single = [direct_logit_attribution(cache, w, by=by, position=p) for w, p in (("red", last - 1), ("blue", last))]
        torch.testing.assert_close(whole.values, single[0].values + single[1].values, atol=1e-5, rtol=1e-5)
        assert whole.method["logit"] == pytest.approx(sum(each.method["logit"] for each in single), rel=1e-6)
        assert whole.method["query"] == [last - 1, last] and whole.closure is not None and whole.closure < 1e-4
        lead = direct_logit_attribution(before, "red", ["blue"], by=by)
        assert lead.method["answer"] == "red" and lead.method["versus"] == "blue" and lead.axes == AXES[by]


def test_any_position_also_of_a_cut_cache_and_without_a_batch_axis() -> None:
    model, _, cache = run("plain")
    inputs = inputs_of(model, "plain", (1, 1), None)
    with torch.no_grad():
        _, cut = model.run_with_cache(inputs, pos_slice=(10, 16))
        _, bare = model.run_with_cache(inputs.with_roles(model.cfg).row(0), remove_batch_dim=True)
    for by in AXES:
        whole = direct_logit_attribution(cache, 4, by=by, position=12)
        n = cache["resid_pre", 0].shape[1]
        assert torch.equal(whole.values, direct_logit_attribution(cache, 4, by=by, position=12 - n).values)
        torch.testing.assert_close(direct_logit_attribution(bare, 4, by=by, position=12).values, whole.values[0])
        if by == "source":
            with pytest.raises(LensError, match=r"values of 6 positions, attention to 18: by='source'.*pos_slice"):
                direct_logit_attribution(cut, 4, by=by, position=12)
        else:
            assert torch.equal(direct_logit_attribution(cut, 4, by=by, position=12).values, whole.values)


def test_a_model_without_a_tower() -> None:
    model = HookedLlava.from_hf(hf_llama())
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([[1, 5, 9, 13]]))
    for by in AXES:
        scores = direct_logit_attribution(cache, by=by)
        assert float(scores.values.sum()) + rest_of(scores, 0) == pytest.approx(float(logits[0, -1].max()), rel=1e-5)


# ---- what is refused


@pytest.mark.parametrize("by", AXES)
def test_only_what_is_read_must_be_kept_and_each_missing_entry_is_named(by: str) -> None:
    model, _, full = run("plain")
    names = attribution_names(model, by)
    kept = LlavaCache({n: full.cache_dict[n] for n in names}, model, inputs=full.inputs)
    assert torch.equal(direct_logit_attribution(kept, by=by).values, direct_logit_attribution(full, by=by).values)
    for name in names:
        less = LlavaCache({n: full.cache_dict[n] for n in names if n != name}, model, inputs=full.inputs)
        with pytest.raises(LensError, match=rf"lacks {name};.*attribution_names\(model, '{by}'\)"):
            direct_logit_attribution(less, by=by)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"by": "heads"}, "by='heads'; expected 'component', .*; nearest: 'head'"),
        ({"answer": 97}, "answer 97; expected a token id, 0 … 96"),
        ({"versus": 97}, "versus 97; expected a token id, 0 … 96"),
        ({"answer": []}, "an empty list"),
        ({"answer": [1, 2], "versus": [1, 2, 3]}, r"3 in versus=, 2 in answer="),
        ({"row": 2}, "row 2; expected -2 … 1"),
        ({"position": 18}, "position 18; expected -18 … 17"),
    ],
)
def test_what_is_not_there_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, _, cache = run("plain")
    with pytest.raises(LensError, match=message):
        direct_logit_attribution(cache, **arguments)


def test_padding_and_unknown_words_are_refused() -> None:
    _, _, cache = run("plain", images=(1, 1), pad="right")
    with pytest.raises(LensError, match="position 20 of row 0 is padding"):
        direct_logit_attribution(cache, position=20)
    model = HookedLlava.tiny()
    with torch.no_grad():
        _, cache = model.run_with_cache(model.prepare("What is the color of the star?", render_scene(0).image))
    with pytest.raises(LensError, match="nonsense"):
        direct_logit_attribution(cache, "nonsense")


def test_another_models_cache_is_refused() -> None:
    _, _, cache = run("grouped")
    entries = dict(cache.cache_dict)
    other = HookedLlava.from_hf(hf_llava("wide_heads"))
    with pytest.raises(LensError, match=r"'blocks.0.attn.hook_z' is \[2, 18, 4, 16\]; .*d_head 24"):
        direct_logit_attribution(LlavaCache(entries, other, inputs=cache.inputs), by="head")
    with pytest.raises(LensError, match=r"'blocks\.2.*and the model has 2 layers"):
        shallow = HookedLlava.from_hf(hf_llava("shallow"))
        direct_logit_attribution(LlavaCache(entries, shallow, inputs=cache.inputs))


@pytest.mark.parametrize("by, weight", [("head", "attn.o_proj"), ("source", "attn.o_proj"), ("neuron", "mlp.out_proj")])
def test_weights_changed_after_the_run_are_noticed(by: str, weight: str) -> None:
    model, _, cache = run("plain")
    changed = copy.deepcopy(model)
    with torch.no_grad():
        getattr(changed.blocks[1], weight.split(".")[0]).get_submodule(weight.split(".")[1]).weight.mul_(1.05)
    other = LlavaCache(cache.cache_dict, changed, inputs=cache.inputs)
    with pytest.raises(LensError, match=r"of layer 1 do not sum .*by='layer'.*weights changed"):
        direct_logit_attribution(other, by=by)


@pytest.mark.parametrize(
    "by, hook", [("head", "hook_attn_out"), ("source", "attn.hook_result"), ("neuron", "hook_mlp_out")]
)
def test_an_edited_output_is_read_as_it_was_or_refused(by: str, hook: str) -> None:
    model, _, _ = run("plain", torch.float32)

    def edit(act: Tensor, hook: Any) -> Tensor:
        act[:, -1, 0] = 0
        return act * 1.5

    with torch.no_grad(), model.hooks([(f"blocks.1.{hook}", edit)]):
        logits, cache = model.run_with_cache(inputs_of(model, "plain", (1, 1), None))
    with pytest.raises(LensError, match="a hook edited it"):
        direct_logit_attribution(cache, by=by)
    scores = direct_logit_attribution(cache, by="layer")
    assert scores.method["logit"] == pytest.approx(logits[:, -1].amax(-1).tolist(), rel=1e-5)
    assert scores.closure is not None and scores.closure < 1e-5


def test_a_names_filter_for_nothing_known_is_refused() -> None:
    model, _, _ = run("plain")
    with pytest.raises(LensError, match=r"by='hed'.*nearest: 'head'"):
        attribution_names(model, "hed")
    assert set(attribution_names(model, "head", "neuron")) > set(attribution_names(model, "head"))


# ---- the trained model


@cache
def asked() -> list[tuple[Any, Any]]:
    """Held-out scenes with a colour question each."""
    found, seed = [], HELD_OUT + 90_000
    while len(found) < 12:
        scene = render_scene(seed)
        found += [(scene, q) for q in questions(scene) if q.kind == "color" and q.text.startswith("What is")][:1]
        seed += 1
    return found


def test_on_a_colour_question_the_map_points_at_the_object() -> None:
    model = HookedLlava.tiny()
    inputs = model.prepare([q.text for _, q in asked()], [scene.image for scene, _ in asked()])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    scores = direct_logit_attribution(cache, by="source")
    assert scores.closure is not None and scores.closure < 1e-5 * min(scores.method["logit"])
    heads = direct_logit_attribution(cache, by="head")
    torch.testing.assert_close(scores.values.sum(-1), heads.values, atol=1e-5, rtol=1e-4)
    maps = scores.over_image().sum("layer", "head").values.flatten(1)
    on_object = [
        bool(inputs.roles_of(i).patches_of_mask(scene.objects[q.about[0]].mask).flatten()[maps[i].argmax()])
        for i, (scene, q) in enumerate(asked())
    ]
    assert sum(on_object) >= 11


def test_taking_away_the_top_head_lowers_the_logit_more_than_the_median_head_does() -> None:
    model = HookedLlava.tiny()
    few = asked()[:4]
    inputs = model.prepare([q.text for _, q in few], [scene.image for scene, _ in few])
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs, names_filter=attribution_names(model, "head"))
    heads = direct_logit_attribution(cache, by="head")
    right = torch.tensor(heads.method["answer_id"])[:, None]
    drops = torch.zeros(4, 4, 8)
    for layer in range(4):
        for head in range(8):

            def silence(act: Tensor, hook: Any, head: int = head) -> Tensor:
                act[:, -1, head] = 0
                return act

            with torch.no_grad():
                out = model.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", silence)])
            drops[:, layer, head] = (logits[:, -1].gather(1, right) - out[:, -1].gather(1, right))[:, 0]
    for row in range(4):
        layer, head = heads[{"batch": row}].top(1)[0].place
        assert drops[row, layer, head] > drops[row].median()


def test_inputs_of_hugging_faces_processor_do() -> None:
    model = HookedLlava.from_hf(hf_llava("plain"))
    with torch.no_grad():
        _, cache = model.run_with_cache(**example(hf_llava("plain"), (1,)))
    assert direct_logit_attribution(cache, by="source").over_image().axes == ("layer", "head", "row", "col")


def test_ids_of_numpy_and_torch_are_ids_and_arrays_several() -> None:
    _, _, cache = run("plain")
    wanted = direct_logit_attribution(cache, [3, 4], 5).values
    for given in (np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), torch.tensor(4)]):
        assert torch.equal(direct_logit_attribution(cache, given, np.int64(5)).values, wanted)
    one = direct_logit_attribution(cache, np.int64(3), torch.tensor(5))
    assert one.axes == ("batch", "component")
    torch.testing.assert_close(one.values, wanted[:, 0])
    json.dumps(one.to_json())
    with pytest.raises(LensError, match=r"versus tensor\(1.5000\); expected one token id or a string"):
        direct_logit_attribution(cache, 3, torch.tensor(1.5))
