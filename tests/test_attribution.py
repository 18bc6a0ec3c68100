"""Scores against a dense double-precision computation from Hugging Face's own modules, and the sums that must close."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import example, hf_llama, hf_llava
from torch import Tensor

from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import Scores, log_prob_increase, mean_attention, names_for
from llava_lens.analysis.attribution.increase import Base, Vocabulary
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.kernels import shift
from llava_lens.pictures import Picture
from llava_lens.roles import Roles

ODD = ["plain", "grouped", "wide_grouped_heads", "tied", "attention_bias", "mlp_bias", "eps_1e-6", "full"]
CLOSE = 2e-5
"""Hugging Face's norms compute in float32 whatever the model is in: 1e-7 relative, on logits of up to 10."""


class Dense:
    """Every vector of one run of a Hugging Face model, and the increase as its definition says it, in float64."""

    def __init__(self, odd: str, images: tuple[int, ...] = (1,), pad: str | None = None):
        self.hf = hf_llava(odd, "eager", torch.float64)
        self.inputs = example(self.hf, images, pad)
        self.seen: dict[tuple[str, int], Tensor] = {}
        decoder = self.hf.model.language_model
        handles = []
        for layer, block in enumerate(decoder.layers):
            handles += [
                block.register_forward_pre_hook(lambda _, args, layer=layer: self._keep("x", layer, args[0])),
                block.self_attn.register_forward_hook(lambda _, args, out, layer=layer: self._attended(layer, out)),
                block.self_attn.v_proj.register_forward_hook(lambda _, a, v, layer=layer: self._keep("v", layer, v)),
                block.mlp.register_forward_hook(lambda _, args, out, layer=layer: self._keep("mlp", layer, out)),
            ]
        handles.append(decoder.norm.register_forward_pre_hook(lambda _, args: self._keep("final", 0, args[0])))
        pixels = {"pixel_values": self.inputs["pixel_values"].double()}
        with torch.no_grad():
            self.logits = self.hf(**{**self.inputs, **pixels}).logits
        for handle in handles:
            handle.remove()

    def _keep(self, name: str, layer: int, value: Tensor) -> None:
        self.seen[name, layer] = value.detach().double()

    def _attended(self, layer: int, out: tuple[Tensor, Tensor]) -> None:
        self._keep("attn", layer, out[0])
        self._keep("pattern", layer, out[1])

    def log_prob(self, stream: Tensor, row: int, t: int, token: int) -> Tensor:
        norm, final = self.hf.model.language_model.norm, self.seen["final", 0][row, t]
        scale = 1 / torch.sqrt((final**2).mean() + norm.variance_epsilon)
        logits = (stream * scale * norm.weight.detach()) @ self.hf.lm_head.weight.detach().T
        return torch.log(torch.softmax(logits, -1))[..., token]

    def increase(self, y: Tensor, base: Tensor, row: int, t: int, token: int) -> float:
        return float(self.log_prob(base + y, row, t, token) - self.log_prob(base, row, t, token))

    def contribution(self, layer: int, head: int, position: int, row: int, t: int) -> Tensor:
        """`a · v @ W_O` of one head at one source position, sliced out of the weights by hand."""
        attn = self.hf.model.language_model.layers[layer].self_attn
        width, group = attn.head_dim, self.hf.config.text_config.num_attention_heads
        kv_head = head // (group // self.hf.config.text_config.num_key_value_heads)
        v = self.seen["v", layer][row, position, kv_head * width : (kv_head + 1) * width]
        W_O = attn.o_proj.weight.detach()[:, head * width : (head + 1) * width]
        return self.seen["pattern", layer][row, head, t, position] * (W_O @ v)


@cache
def dense(odd: str) -> Dense:
    return Dense(odd)


@cache
def run(odd: str) -> tuple[HookedLlava, Any, Any]:
    reference = dense(odd)
    model = HookedLlava.from_hf(reference.hf)
    pixels = {"pixel_values": reference.inputs["pixel_values"].double()}
    with torch.no_grad():
        logits, cache = model.run_with_cache(**{**reference.inputs, **pixels})
    return model, logits, cache


@pytest.mark.parametrize("odd", ODD)
def test_layers_equal_the_dense_definition(odd: str) -> None:
    reference, (_, _, cache) = dense(odd), run(odd)
    token = int(reference.logits[0, -1].argmax())
    found = log_prob_increase(cache, by="layer")
    assert found.method["answer_id"] == token
    for layer in range(3):
        x, attn, mlp = (reference.seen[name, layer][0, -1] for name in ("x", "attn", "mlp"))
        expected = [reference.increase(attn, x, 0, -1, token), reference.increase(mlp, x + attn, 0, -1, token)]
        assert found.values[layer].tolist() == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("odd", ODD)
def test_heads_and_positions_equal_the_dense_definition(odd: str) -> None:
    reference, (_, _, cache) = dense(odd), run(odd)
    token, n = 11, reference.logits.shape[1]
    heads = log_prob_increase(cache, token, by="head").values
    cells = log_prob_increase(cache, token, by=("head", "position"), exact=True).values
    for layer in range(3):
        x = reference.seen["x", layer][0, -1]
        for head in range(4):
            parts = [reference.contribution(layer, head, p, 0, -1) for p in range(n)]
            whole = torch.stack(parts).sum(0)
            assert float(heads[layer, head]) == pytest.approx(reference.increase(whole, x, 0, -1, token), abs=CLOSE)
            expected = [reference.increase(part, x, 0, -1, token) for part in parts]
            assert cells[layer, head].tolist() == pytest.approx(expected, abs=CLOSE)
    assert cells.abs().max() > 0.1


@pytest.mark.parametrize("odd", ODD)
def test_layers_telescope_to_the_models_log_probability(odd: str) -> None:
    model, logits, cache = run(odd)
    for token in (0, 42, None):
        found = log_prob_increase(cache, token, by="layer")
        word = found.method["answer_id"]
        log_p = logits[0, -1].log_softmax(-1)[word]
        assert found.method["log_prob"] == pytest.approx(float(log_p), abs=1e-10)
        embedded = Readout.of(model, cache["resid_post", -1][0, -1]).log_probs(cache["resid_pre", 0][0, -1])[word]
        assert float(found.values.sum()) == pytest.approx(float(log_p - embedded), abs=1e-10)
        assert found.closure is not None and found.closure < 1e-10


@pytest.mark.parametrize("odd", ["plain", "grouped", "attention_bias"])
def test_the_linear_form_is_the_gradient_and_never_below_the_increase(odd: str) -> None:
    model, _, cache = run(odd)
    linear = log_prob_increase(cache, by=("head", "position"), top_k=0)
    exact = log_prob_increase(cache, by=("head", "position"), exact=True)
    assert (linear.values - exact.values).min() > -1e-12
    assert (linear.values - exact.values).max() > 1e-3
    assert linear.closure is not None and linear.closure < 1e-10
    readout = Readout.of(model, cache["resid_post", -1][0, -1])
    base = cache["resid_pre", 1][0, -1].clone().requires_grad_()
    readout.log_probs(base)[7].backward()
    assert base.grad is not None
    found = Base.of(Vocabulary.of(model), readout, base.detach(), 7, own=False)
    torch.testing.assert_close(found.direction * found.factor, base.grad)


def test_the_highest_cells_are_exact_and_said_to_be() -> None:
    _, _, cache = run("plain")
    exact = log_prob_increase(cache, by=("head", "position"), exact=True)
    linear = log_prob_increase(cache, by=("head", "position"), top_k=0)
    mixed = log_prob_increase(cache, by=("head", "position"), top_k=20)
    is_exact = (mixed.values - exact.values).abs() < 1e-12
    assert mixed.method["exact"] == 20 == int(is_exact.sum()) and mixed.method["of"] == mixed.values.numel()
    assert torch.equal(mixed.values[~is_exact], linear.values[~is_exact])
    assert linear.values[is_exact].abs().min() >= linear.values[~is_exact].abs().max()
    for k in (5, 20, 60, 150):
        mixed = log_prob_increase(cache, by=("head", "position"), top_k=k)
        is_exact = (mixed.values - exact.values).abs() < 1e-12
        certain = mixed.method["certain"]
        assert 0 < certain >= int((exact.values[is_exact] > linear.values[~is_exact].max()).sum())
        assert [e.place for e in mixed.top(certain)] == [e.place for e in exact.top(certain)]
    assert exact.method["certain"] == exact.values.numel()


def test_positions_sum_over_all_heads_or_the_given_ones() -> None:
    _, _, cache = run("grouped")
    cells = log_prob_increase(cache, 5, by=("head", "position"), exact=True)
    summed = log_prob_increase(cache, 5, by="position", exact=True)
    torch.testing.assert_close(summed.values, cells.values.sum((0, 1)))
    two = log_prob_increase(cache, 5, by="position", heads=[(0, 1), (2, 3)], exact=True)
    torch.testing.assert_close(two.values, cells.values[0, 1] + cells.values[2, 3])
    assert two.method["exact"] == two.method["of"] == 2 * len(two.values)


def test_an_answer_in_words_and_any_query_position() -> None:
    reference, (_, _, cache) = dense("plain"), run("plain")
    found = log_prob_increase(cache, 3, by="layer", position=4)
    x, attn = reference.seen["x", 1][0, 4], reference.seen["attn", 1][0, 4]
    assert float(found.values[1, 0]) == pytest.approx(reference.increase(attn, x, 0, 4, 3), abs=CLOSE)
    assert found.method["query"] == 4
    assert torch.equal(found.values, log_prob_increase(cache, 3, position=4 - cache["resid_pre", 0].shape[1]).values)
    with pytest.raises(LensError, match="position 99; expected -"):
        log_prob_increase(cache, position=99)


def test_an_increase_too_small_for_two_log_softmaxes_keeps_its_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    log_p = torch.randn(500, generator=generator, dtype=torch.float64).log_softmax(-1)
    for size in (1e-7, 1e-3, 0.5, 3.0, 200.0):
        delta = size * torch.randn(3, 500, generator=generator, dtype=torch.float64)
        expected = (log_p + delta).log_softmax(-1)[:, 9] - log_p[9]
        got = shift(delta.float(), log_p.float(), 9).double()
        assert (got - expected).abs().max() < 1e-5 * size


@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_of_a_ragged_batch_equal_each_row_alone(pad: str) -> None:
    hf = hf_llava("grouped", "sdpa")
    model = HookedLlava.from_hf(hf)
    given = example(hf, (1, 1), pad=pad)
    both = Inputs.from_tokens(given["input_ids"], model.cfg, given["pixel_values"], given["attention_mask"])
    names = names_for(model, "layer", "head", "position")
    with torch.no_grad():
        _, cache = model.run_with_cache(both, names_filter=names)
        alone = [model.run_with_cache(both.row(i), names_filter=names)[1] for i in range(2)]
    for by in ("layer", "head"):
        found = log_prob_increase(cache, 8, by=by)
        assert found.axes[0] == "batch" and torch.equal(found.values[1], log_prob_increase(cache, 8, by, row=1).values)
        for i, one in enumerate(alone):
            torch.testing.assert_close(found.values[i], log_prob_increase(one, 8, by).values, atol=1e-5, rtol=1e-4)
    maps = log_prob_increase(cache, 8, by="position", exact=True).over_image()
    assert maps.axes == ("batch", "row", "col")
    attention = mean_attention(cache).over_image()
    for i, one in enumerate(alone):
        own = log_prob_increase(one, 8, by="position", exact=True).over_image()
        torch.testing.assert_close(maps.values[i], own.values, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(attention.values[i], mean_attention(one).over_image().values, atol=1e-6, rtol=1e-4)


def test_a_cache_without_batch_axis_and_a_model_without_tower() -> None:
    model = HookedLlava.from_hf(hf_llama())
    tokens = torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        _, bare = model.run_with_cache(tokens, remove_batch_dim=True)
    for by in ("layer", "head", "position"):
        assert torch.equal(log_prob_increase(cache, by=by).values, log_prob_increase(bare, by=by).values)


def test_mean_attention_is_the_mean_over_layers_and_heads() -> None:
    reference, (_, _, cache) = dense("plain"), run("plain")
    expected = torch.stack([reference.seen["pattern", layer][0, :, -1] for layer in range(3)]).mean((0, 1))
    torch.testing.assert_close(mean_attention(cache).values, expected, atol=1e-6, rtol=0)


def test_a_model_in_bfloat16_says_how_far_its_sum_misses() -> None:
    hf = hf_llava("plain", dtype=torch.bfloat16)
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, (1,))
    with torch.no_grad():
        _, cache = model.run_with_cache(**{**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
    found = log_prob_increase(cache)
    assert found.values.dtype == torch.float32 and found.closure is not None and 1e-6 < found.closure < 0.1


# ---- what is refused


def test_missing_entries_are_named_with_the_filter_that_keeps_them() -> None:
    hf = hf_llava("plain")
    model = HookedLlava.from_hf(hf)
    inputs = example(hf, (1,))
    with torch.no_grad():
        _, cache = model.run_with_cache(**inputs, names_filter=names_for(model, "head"))
    assert log_prob_increase(cache, by="head").closure is not None
    with pytest.raises(LensError, match=r"lacks blocks\.0\.attn\.hook_pattern.*names_for\(model, 'position'\)"):
        log_prob_increase(cache, by="position")
    with pytest.raises(LensError, match=r"names_for\(model, 'attention'\)"):
        mean_attention(cache)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"answer": 97}, "answer 97; expected a token id, 0 … 96"),
        ({"by": "neurone"}, "by='neurone'; expected 'layer', 'head', 'position'"),
        ({"row": 1}, "row 1; expected -1 … 0"),
        ({"by": "position", "heads": [(3, 0)]}, r"head \(3, 0\): layer 3; expected 0 … 2"),
        ({"by": "position", "heads": []}, "names no head"),
        ({"by": "head", "heads": [(0, 0)]}, "only by='position' sums over heads"),
        ({"by": "head", "top_k": -1}, "top_k=-1; expected 0 or more"),
    ],
)
def test_what_is_not_there_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, _, cache = run("plain")
    with pytest.raises(LensError, match=message):
        log_prob_increase(cache, **arguments)


def test_positions_of_a_cut_cache_are_refused() -> None:
    hf = hf_llava("plain")
    model = HookedLlava.from_hf(hf)
    with torch.no_grad():
        _, cut = model.run_with_cache(**example(hf, (1,)), pos_slice=-1)
        _, whole = model.run_with_cache(**example(hf, (1,)))
    torch.testing.assert_close(log_prob_increase(cut, by="head").values, log_prob_increase(whole, by="head").values)
    with pytest.raises(LensError, match="values of 1 positions, attention to 18"):
        log_prob_increase(cut, by="position")


def test_positions_are_the_prompts_also_in_a_cut_cache(tmp_path: Path) -> None:
    hf = hf_llava("plain")
    model = HookedLlava.from_hf(hf)
    with torch.no_grad():
        _, cut = model.run_with_cache(**example(hf, (1,)), pos_slice=(10, 16))
        _, whole = model.run_with_cache(**example(hf, (1,)))
    ours, theirs = (log_prob_increase(cache, by="layer", position=12) for cache in (cut, whole))
    assert ours.method["query"] == theirs.method["query"] == 12
    torch.testing.assert_close(ours.values, theirs.values)
    cut.save(tmp_path / "cut.safetensors")
    again = log_prob_increase(LlavaCache.load(tmp_path / "cut.safetensors", model), by="layer", position=12)
    torch.testing.assert_close(again.values, theirs.values)
    for question in (lambda: log_prob_increase(cut, by="layer"), lambda: mean_attention(cut, 3)):
        with pytest.raises(LensError, match=r"position \d+ is not among the 6 of 18 that the cache kept"):
            question()


# ---- Scores


ROLES = Roles(("system", "image", "image", "question"), ("<s>", "<image>", "<image>", "dog"), (Picture((1, 2)),))
"""A text token, an image of one row and two columns, and another text token."""


def named() -> Scores:
    values = torch.tensor([[0.5, -1.0, math.nan, 3.0], [2.0, 0.25, 0.0, -2.0]])
    labels = {"position": ("<s>", "patch (0, 0)", "patch (0, 1)", "dog")}
    return Scores(values, ("layer", "position"), labels, "nats", {"answer": "red"}, 1e-7, (ROLES,))


def test_scores_are_picked_by_axis_and_summed_by_name() -> None:
    scores = named()
    picked = scores[{"position": slice(1, 3), "layer": 1}]
    assert picked.axes == ("position",) and picked.labels_of("position") == ("patch (0, 0)", "patch (0, 1)")
    assert picked.values.tolist() == [0.25, 0.0]
    assert scores[{"layer": -1}].over_image().values.tolist() == [[0.25, 0.0]]
    assert scores.sum("layer").values[0] == 2.5 and scores[{"layer": 1}].sum().axes == ()
    top = scores.top(2)
    assert [(e.place, e.labels, e.value) for e in top] == [((0, 3), (0, "dog"), 3.0), ((1, 0), (1, "<s>"), 2.0)]
    assert len(scores.top(99)) == 7
    assert scores.over_image().axes == ("layer", "row", "col") and scores.over_image().values.shape == (2, 1, 2)
    with pytest.raises(LensError, match="no axis 'positon'; nearest: 'position'"):
        scores.sum("positon")
    with pytest.raises(LensError, match="layer 2; expected -2 … 1"):
        scores[{"layer": 2}]
    with pytest.raises(LensError, match="expected one name per axis"):
        Scores(torch.zeros(2), ("layer", "head"))
    with pytest.raises(LensError, match="carried no roles"):
        scores[{"position": slice(1, 3)}].over_image()


def test_scores_survive_a_file(tmp_path: Any) -> None:
    scores = named()
    scores.save(tmp_path / "scores.json")
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail)
    again = Scores.load(tmp_path / "scores.json")
    assert torch.equal(again.values.nan_to_num(9), scores.values.double().nan_to_num(9))
    assert (again.axes, again.labels, again.unit, again.method, again.closure, again.roles) == (
        scores.axes, scores.labels, scores.unit, scores.method, scores.closure, scores.roles,
    )  # fmt: skip


def test_scores_print_as_a_small_table() -> None:
    shown = repr(named())
    assert shown.splitlines()[0] == "Scores[layer 2 × position 4] in nats: answer red"
    assert shown.splitlines()[2].split() == ["0", "dog", "+3"]
    assert shown.endswith("the sum closes to 1.0e-07 nats") and len(shown.splitlines()) == 8
