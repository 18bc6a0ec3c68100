"""Heads and neurons against Hugging Face's weights in float64, loops by hand, and the sums that must close."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from random_models import example, hf_llava
from test_lens import CLOSE, WORD, Seen, check_place
from torch import Tensor

from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import (
    head_output,
    head_query_neurons,
    key_input,
    log_prob_increase,
    names_for_lens,
    query_neurons,
    value_input,
    value_neurons,
)
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.tiny import render_scene

ODD = ["plain", "wide_grouped_heads", "attention_bias", "mlp_bias", "gelu_decoder"]


class Parts(Seen):
    """What passed through a Hugging Face model, and what its attentions and MLPs gave out."""

    def __init__(self, odd: str):
        hf = hf_llava(odd, "eager", torch.float64)
        self.attn: list[Tensor] = []
        self.patterns: list[Tensor] = []
        self.mlp: list[Tensor] = []
        self.post: list[Tensor] = []
        self.values: list[Tensor] = []
        handles = []
        for block in hf.model.language_model.layers:
            handles += [
                block.self_attn.register_forward_hook(lambda _, a, out: self._attended(*out)),
                block.self_attn.v_proj.register_forward_hook(lambda _, a, out: self.values.append(out)),
                block.mlp.register_forward_hook(lambda _, a, out: self.mlp.append(out)),
                block.mlp.down_proj.register_forward_pre_hook(lambda _, a: self.post.append(a[0])),
            ]
        super().__init__(odd)
        for handle in handles:
            handle.remove()

    def _attended(self, out: Tensor, pattern: Tensor) -> None:
        self.attn.append(out)
        self.patterns.append(pattern.double())

    @torch.no_grad()
    def head(self, layer: int, head: int, query: int, source: int) -> Tensor:
        """`a · v @ W_O`, sliced out of the weights by hand."""
        attn, text = self.hf.model.language_model.layers[layer].self_attn, self.hf.config.text_config
        width, kv_head = attn.head_dim, head // (text.num_attention_heads // text.num_key_value_heads)
        v = self.values[layer][0, source, kv_head * width : (kv_head + 1) * width]
        out = attn.o_proj.weight[:, head * width : (head + 1) * width] @ v
        return self.patterns[layer][0, head, query, source] * out


@cache
def parts(odd: str) -> Parts:
    return Parts(odd)


@cache
def run(odd: str) -> tuple[HookedLlava, LlavaCache]:
    model = HookedLlava.from_hf(parts(odd).hf)
    with torch.no_grad():
        _, cache = model.run_with_cache(**parts(odd).inputs)
    return model, cache


# ---- what a head reads and writes


@pytest.mark.parametrize("odd", ODD)
def test_key_and_value_input_are_earlier_attentions_and_earlier_mlps(odd: str) -> None:
    reference, (_, cache) = parts(odd), run(odd)
    for layer in (1, 2):
        for position in (3, 17):
            attn, mlp = (sum(each[j][0, position] for j in range(layer)) for each in (reference.attn, reference.mlp))
            key, value = key_input(cache, layer, position, WORD), value_input(cache, layer, position, WORD)
            assert key.axes == ("position",)
            check_place(key, (0,), reference.frozen(attn, 0, -1))  # type: ignore[arg-type]
            check_place(value, (0,), reference.frozen(mlp, 0, -1))  # type: ignore[arg-type]
            own = key_input(cache, layer, position, WORD, norm="own")
            check_place(own, (0,), reference.own(attn))  # type: ignore[arg-type]
            assert own.scores.closure is None


@pytest.mark.parametrize("odd", ODD)
def test_key_input_value_input_and_embedding_add_up_to_the_stream(odd: str) -> None:
    reference, (_, cache) = parts(odd), run(odd)
    z = reference.hf.lm_head.weight[WORD] * reference.hf.model.language_model.norm.weight
    final = reference.streams[-1][0, -1]
    z = z.detach() / (final.pow(2).mean() + reference.hf.config.text_config.rms_norm_eps).sqrt()
    for layer in (0, 2, -1):
        key, value = (each(cache, layer, None, WORD, by="logit") for each in (key_input, value_input))
        start, stream = reference.streams[0][0] @ z, reference.streams[layer % 3][0] @ z
        torch.testing.assert_close(key.scores.values + value.scores.values + start, stream, atol=CLOSE, rtol=CLOSE)
        assert key.scores.closure is not None and key.scores.closure < 1e-12 and value.scores.closure is not None
    assert key.scores.over_image().axes == ("row", "col")


def test_a_changed_stream_shows_in_the_closure() -> None:
    model, cache = run("plain")
    changed = dict(cache.cache_dict)
    changed["blocks.2.hook_resid_pre"] = changed["blocks.2.hook_resid_pre"] + 1
    found = key_input(LlavaCache(changed, model, inputs=cache.inputs), 2, "last", WORD)
    assert found.scores.closure is not None and found.scores.closure > 0.01


@pytest.mark.parametrize("odd", ODD)
def test_a_heads_output_is_its_weighted_value_through_its_output_matrix(odd: str) -> None:
    reference, (_, cache) = parts(odd), run(odd)
    for query, source in ((-1, 4), (12, 12), (12, 3)):
        found = head_output(cache, 1, 3, source, WORD, position=query)
        check_place(found, (0,), reference.frozen(reference.head(1, 3, query, source), 0, query))
    whole = head_output(cache, 1, 3, answer=WORD, by="logit")
    assert whole.scores.closure is not None and whole.scores.closure < 1e-12
    summed = sum(reference.head(1, 3, -1, p) for p in range(reference.logits.shape[1]))
    norm = reference.hf.model.language_model.norm.weight.detach()
    scale = (reference.streams[-1][0, -1].pow(2).mean() + reference.hf.config.text_config.rms_norm_eps).rsqrt()
    expected = float((summed * norm * scale) @ reference.hf.lm_head.weight[WORD].detach())
    assert float(whole.scores.values.sum()) == pytest.approx(expected, abs=CLOSE)


# ---- neurons that raise a word


@pytest.mark.parametrize("odd", ODD)
def test_value_neurons_are_those_of_the_highest_increase(odd: str) -> None:
    reference, (_, cache) = parts(odd), run(odd)
    found = value_neurons(cache, WORD, k=4, exact=True)
    increases, norm = [], reference.hf.model.language_model.norm
    scale = (reference.streams[-1][0, -1].pow(2).mean() + norm.variance_epsilon).rsqrt()
    with torch.no_grad():
        for layer, block in enumerate(reference.hf.model.language_model.layers):
            m, base = reference.post[layer][0, -1], reference.mids[layer][0, -1]
            before = reference.frozen(base, 0, -1)[WORD]
            rows = (base + m[:, None] * block.mlp.down_proj.weight.T) * norm.weight * scale
            increases.append(torch.log_softmax(rows @ reference.hf.lm_head.weight.T, -1)[:, WORD] - before)
    expected = torch.stack(increases)
    torch.testing.assert_close(found.increases.values, expected, atol=CLOSE, rtol=0)
    order = expected.flatten().argsort(descending=True)[:4].tolist()
    assert found.neurons == tuple(divmod(i, expected.shape[1]) for i in order)
    assert found.scores.labels_of("neuron")[0] == f"L{found.neurons[0][0]}N{found.neurons[0][1]}"
    assert found.scores.values.tolist() == pytest.approx([float(expected[n]) for n in found.neurons], abs=CLOSE)
    layer, neuron = found.neurons[0]
    down = reference.hf.model.language_model.layers[layer].mlp.down_proj.weight[:, neuron].detach()
    logits = (reference.post[layer][0, -1, neuron] * down * norm.weight * scale) @ reference.hf.lm_head.weight.T
    check_place(found.promoted, (0,), logits.detach())
    check_place(found.demoted, (0,), -logits.detach())


def test_value_neurons_of_the_trained_model_say_what_they_promote() -> None:
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    with torch.no_grad():
        _, cache = model.run_with_cache(model.prepare("What is the color of the square?", scene.image))
    found = value_neurons(cache)
    assert found.increases.method["answer"] == "blue" and (found.scores.values.diff() <= 0).all()
    assert torch.equal(found.increases.values, log_prob_increase(cache, by="neuron").values)
    assert len(repr(found).splitlines()) == 11 and "ValueNeurons" in repr(found)
    fed = query_neurons(cache, found.neurons)
    assert fed.observed.closure is not None and fed.observed.closure < 1e-5 and "QueryNeurons" in repr(fed)


# ---- what feeds neurons and heads


@pytest.mark.parametrize("which", ["gate", "in"])
@pytest.mark.parametrize("odd", ODD)
def test_upstream_parts_add_up_to_the_pre_activation(odd: str, which: str) -> None:
    reference, (_, cache) = parts(odd), run(odd)
    at, targets = 9, [(2, 5), (0, 3), (1, 70)]
    found = query_neurons(cache, targets, at, which=which)
    assert found.neurons.axes == ("target", "layer", "neuron")
    assert found.heads.values.shape == (3, 3, 4) and found.neurons.values.shape == (3, 2, 112)
    for i, (layer, neuron) in enumerate(targets):
        block = reference.hf.model.language_model.layers[layer]
        proj = block.mlp.gate_proj if which == "gate" else block.mlp.up_proj
        with torch.no_grad():
            x = reference.mids[layer][0, at]
            observed = proj(block.post_attention_layernorm(x))[neuron]
            scale = (x.pow(2).mean() + block.post_attention_layernorm.variance_epsilon).sqrt()

            def part(vector: Tensor, block: Any = block, proj: Any = proj, n: int = neuron, s: Tensor = scale) -> float:
                return float(proj.weight[n] @ (block.post_attention_layernorm.weight * vector / s))

            for j in range(2):
                down = reference.hf.model.language_model.layers[j].mlp.down_proj.weight
                for other in (0, 60, 111):
                    value = float(found.neurons.values[i, j, other])
                    expected = part(reference.post[j][0, at, other] * down[:, other])
                    assert value == pytest.approx(expected, abs=CLOSE) if j < layer else value != value
            for j in range(3):
                value = float(found.heads.values[i, j, 2])
                summed = sum(part(reference.head(j, 2, at, p)) for p in range(at + 1))
                assert value == pytest.approx(summed, abs=CLOSE) if j <= layer else value != value
            embedding = part(reference.streams[0][0, at])
        assert float(found.rest.values[i, 0]) == pytest.approx(embedding, abs=CLOSE)
        assert float(found.observed.values[i]) == pytest.approx(float(observed), abs=CLOSE)
        total = sum(float(each.values[i].nansum()) for each in (found.neurons, found.heads, found.rest))
        assert total == pytest.approx(float(observed), abs=CLOSE)
        shares = found.shares.values[i].nansum() * observed
        assert float(shares) == pytest.approx(float(found.neurons.values[i].nansum()), abs=CLOSE)
    assert found.observed.closure is not None and found.observed.closure < 1e-10
    alone = query_neurons(cache, (1, 70), at, which=which)
    assert torch.equal(alone.neurons.values[0], found.neurons.values[2, :1])
    best = alone.top(3)
    assert [feed.share for feed in best] == sorted((alone.shares.values[0].flatten().tolist()), reverse=True)[:3]
    assert float(alone.neurons.values[0][best[0].neuron]) == best[0].value


@pytest.mark.parametrize("odd", [*ODD, "rope_yarn", "rope_llama3", "rope_dynamic", "rope_longrope"])
def test_upstream_parts_add_up_to_the_attention_score(odd: str) -> None:
    model, cache = run(odd)
    for layer, head, source, query in ((2, 3, 4, -1), (1, 0, 12, 12), (0, 2, 0, 5)):
        found = head_query_neurons(cache, layer, head, source, query)
        scores = cache["attn_scores", layer][0, head, query, source]
        assert float(found.observed.values[0]) == pytest.approx(float(scores), abs=1e-10)
        assert found.observed.closure is not None and found.observed.closure < 1e-10
        if layer:  # one neuron by hand: without its output the key, and with it the score, is smaller by its part
            blocks: Any = model.blocks
            block, m = blocks[layer], cache["post", 0][0, source, 7]
            stream = cache["resid_pre", layer][0, source] - m * blocks[0].mlp.W_out[7]
            scale = cache["scale", layer, "ln1"][0, source]
            with torch.no_grad():
                k = block.attn.k_proj(block.ln1.w * stream / scale).reshape(-1, model.cfg.d_head)
                angles = model.rotary(torch.arange(cache["resid_pre", 0].shape[1])[None], k.dtype)
                cos, sin = (each[0, 0, source] for each in angles)
                first, second = k.chunk(2, -1)
                k = (k * cos + torch.cat((-second, first), -1) * sin)[head * len(k) // model.cfg.n_heads]
                without = cache["rot_q", layer][0, query, head] @ k * block.attn.scale
            part = float(found.neurons.values[0, 0, 7])
            assert part == pytest.approx(float(scores - without), abs=1e-10) and abs(part) > 1e-9


@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_of_a_padded_batch_equal_each_row_alone(pad: str) -> None:
    hf = hf_llava("wide_grouped_heads", "sdpa")
    model = HookedLlava.from_hf(hf)
    given = example(hf, (1, 2), pad=pad)
    both = Inputs.from_tokens(given["input_ids"], model.cfg, given["pixel_values"], given["attention_mask"])
    with torch.no_grad():
        _, cache = model.run_with_cache(both)
        alone = [model.run_with_cache(both.row(i))[1] for i in range(2)]
    for i, one in enumerate(alone):
        kept = given["attention_mask"][i].bool()
        first = int(kept.nonzero()[0])
        for lens in (key_input, value_input):
            found, own = lens(cache, 2, None, WORD, row=i), lens(one, 2, None, WORD)
            torch.testing.assert_close(found.scores.values[kept], own.scores.values, atol=1e-5, rtol=1e-4)
        found, own = head_output(cache, 1, 2, "image", WORD, row=i), head_output(one, 1, 2, "image", WORD)
        torch.testing.assert_close(found.scores.values, own.scores.values, atol=1e-5, rtol=1e-4)
        whole = head_output(cache, 1, 2, answer=WORD, by="logit", row=i)
        assert whole.scores.closure is not None and whole.scores.closure < 1e-5
        assert value_neurons(cache, WORD, 3, row=i).neurons == value_neurons(one, WORD, 3).neurons
        fed, ours = query_neurons(cache, (2, 7), row=i), query_neurons(one, (2, 7))
        torch.testing.assert_close(fed.neurons.values, ours.neurons.values, atol=1e-5, rtol=1e-3)
        fed = head_query_neurons(cache, 2, 1, first + 4, row=i)
        ours = head_query_neurons(one, 2, 1, 4)
        torch.testing.assert_close(fed.neurons.values, ours.neurons.values, atol=1e-5, rtol=1e-3)
        assert fed.observed.closure is not None and fed.observed.closure < 1e-5
    assert key_input(cache, 2, "last", WORD).axes == ("batch", "position")
    with pytest.raises(LensError, match="a batch of 2: say which row=0 … 1"):
        query_neurons(cache, (2, 7))


def test_a_model_in_bfloat16_says_how_far_its_sums_miss() -> None:
    hf = hf_llava("plain", dtype=torch.bfloat16)
    model, inputs = HookedLlava.from_hf(hf), example(hf, (1,))
    with torch.no_grad():
        _, cache = model.run_with_cache(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    closures = [
        key_input(cache, 2, "last").scores.closure,
        head_output(cache, 1, 0).scores.closure,
        query_neurons(cache, (2, 3)).observed.closure,
        head_query_neurons(cache, 2, 1, 4).observed.closure,
    ]
    assert all(closure is not None and 1e-7 < closure < 0.1 for closure in closures)


# ---- what is refused


CALLS: dict[str, Any] = {
    "key_input": lambda cache: key_input(cache, 2, 4),
    "value_input": lambda cache: value_input(cache, 2, 4),
    "head_output": lambda cache: head_output(cache, 2, 1),
    "value_neurons": lambda cache: value_neurons(cache),
    "query_neurons": lambda cache: query_neurons(cache, (2, 1)),
    "head_query_neurons": lambda cache: head_query_neurons(cache, 2, 1, 4),
}


@pytest.mark.parametrize("what", CALLS)
def test_the_names_of_a_lens_are_enough_and_missing_ones_are_named(what: str) -> None:
    model, _ = run("plain")
    names = names_for_lens(model, what)
    with torch.no_grad():
        _, cache = model.run_with_cache(**parts("plain").inputs, names_filter=names)
        _, less = model.run_with_cache(**parts("plain").inputs, names_filter=names[:1])
    CALLS[what](cache)
    with pytest.raises(LensError, match=rf"lacks blocks\..*names_for_lens\(model, '{what}'\)"):
        CALLS[what](less)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda cache: key_input(cache, 3, 4), "layer 3; expected -3 … 2"),
        (lambda cache: key_input(cache, 1, 40), "position 40; expected"),
        (lambda cache: head_output(cache, 1, 4), "head 4; expected 0 … 3"),
        (lambda cache: value_neurons(cache, k=0), "k=0; expected 1 or more"),
        (lambda cache: query_neurons(cache, (1, 112)), "neuron 112; expected 0 … 111"),
        (lambda cache: query_neurons(cache, []), r"target \[\]; expected a neuron"),
        (lambda cache: query_neurons(cache, (1, 1), which="up"), "which='up'; expected 'gate' or 'in'"),
        (lambda cache: head_query_neurons(cache, 1, -1, 2), "head -1; expected 0 … 3"),
    ],
)
def test_what_is_not_there_is_refused(call: Any, message: str) -> None:
    with pytest.raises(LensError, match=message):
        call(run("plain")[1])


def test_a_cut_cache_is_refused_by_source() -> None:
    model, _ = run("plain")
    with torch.no_grad():
        _, cut = model.run_with_cache(**parts("plain").inputs, pos_slice=-1)
    with pytest.raises(LensError, match="values of 1 positions, attention to 18"):
        head_output(cut, 1, 0, "last", WORD)
    assert key_input(cut, 2, "last", WORD).scores.values.shape == (1,)


@pytest.mark.parametrize("read", [lambda c: key_input(c, 1, 4, 17, norm="froze"),
                                  lambda c: head_output(c, 1, 1, None, 17, norm="froze")])  # fmt: skip
def test_an_unknown_norm_is_not_taken_for_the_frozen_one(read: Any) -> None:
    with pytest.raises(LensError, match="norm='froze'; expected 'frozen' or 'own'; nearest: 'frozen'"):
        read(run("plain")[1])


def test_stale_weights_are_noticed_by_heads_and_neurons() -> None:
    model, cache = run("plain")
    changed: Any = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[0].attn.o_proj.weight.mul_(1.3)
    stale = LlavaCache(dict(cache.cache_dict), changed, inputs=cache.inputs)
    with pytest.raises(LensError, match="parts of the stream do not sum to the pre-activation: the model's weights"):
        query_neurons(stale, (1, 3))
    with pytest.raises(LensError, match="heads of layer 0 do not sum"):
        head_output(stale, 0, 1, answer=17)
