"""Increases against two log-softmaxes in float64 of the same cached entries, and bounds that must hold."""

from __future__ import annotations

import copy
import itertools
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import example, hf_llava
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.cases.increase import dense
from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import log_prob_increase, names_for
from llava_lens.analysis.attribution.cells import Screen, certain, doubt, largest, parted, to_settle
from llava_lens.analysis.attribution.increase import Base, Vocabulary, cheap_bound, tight_bound
from llava_lens.analysis.attribution.query import Query
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.kernels import shift

ALL = ("layer", "head", "position", ("head", "position"), "neuron")
CELLS = ("head", ("head", "position"), "neuron")
EXACT = 1e-6
"""Nats, in float32, of cells that move log-probabilities by up to about 1; larger ones by their size."""
ODD = {  # odd model → images per row, padding, dtype, query
    "grouped": ((1, 1), "left", torch.float32, -1),
    "wide_grouped_heads": ((2, 1), "right", torch.float32, 12),
    "attention_bias": ((1,), None, torch.float32, -1),
    "mlp_bias": ((1, 1), None, torch.float32, -3),
    "one_kv_head": ((1,), None, torch.bfloat16, -1),
    "tied": ((1,), None, torch.bfloat16, 10),
    "full": ((1,), None, torch.float64, -1),
}


@cache
def run(odd: str) -> tuple[HookedLlava, LlavaCache]:
    images, pad, dtype, _ = ODD[odd]
    hf = hf_llava(odd, "sdpa", dtype)
    model = HookedLlava.from_hf(hf)
    given = example(hf, images, pad=pad)
    inputs = Inputs.from_tokens(
        given["input_ids"], model.cfg, given["pixel_values"].to(dtype), given["attention_mask"] if pad else None
    )
    with torch.no_grad():
        return model, model.run_with_cache(inputs)[1]


def brute(cache: LlavaCache, row: int, t: int, token: int, by: Any, scale: str) -> Tensor:
    """Every vector written out, added to its base, normed, unembedded and put through two log-softmaxes, in float64."""
    model = cache.model
    unembed, gain = model.unembed.weight.detach().double(), model.ln_final.w.detach().double()
    entry = lambda key, layer: cache[key, layer][row].double()  # noqa: E731
    final = entry("resid_post", model.cfg.n_layers - 1)[t]

    def log_p(x: Tensor) -> Tensor:
        by_whom = final if scale == "final" else x
        normed = x / (by_whom.pow(2).mean(-1, keepdim=True) + model.cfg.eps).sqrt() * gain
        return (normed @ unembed.T).log_softmax(-1)[..., token]

    found = []
    for layer, block in enumerate(model.blocks):
        x, attn, mlp = (entry(key, layer)[t] for key in ("resid_pre", "attn_out", "mlp_out"))
        if by == "layer":
            found.append(torch.stack([log_p(x + attn) - log_p(x), log_p(x + attn + mlp) - log_p(x + attn)]))
            continue
        if by == "neuron":
            y, base = entry("post", layer)[t][:, None] * block.mlp.W_out.detach().double(), x + attn
        else:
            share = model.cfg.n_heads // model.cfg.n_key_value_heads
            v = entry("v", layer).repeat_interleave(share, 1)
            mixed = torch.einsum("hp,phd->hpd", entry("pattern", layer)[:, t], v)
            mixed = entry("z", layer)[t][:, None] if by == "head" else mixed
            y, base = torch.einsum("hpd,hde->hpe", mixed, block.attn.W_O.detach().double()), x
        found.append(log_p(base + y) - log_p(base))
    values = torch.stack(found)
    return values.sum((0, 1)) if by == "position" else values[..., 0] if by == "head" else values


def place(odd: str, row: int) -> int:
    """The query's position in the cache."""
    _, cache = run(odd)
    assert cache.inputs is not None and cache.inputs.roles is not None
    asked, roles = ODD[odd][3], cache.inputs.roles[row]
    return roles.last if asked == -1 else asked % len(roles)


def close(found: Tensor, wanted: Tensor, error: float) -> None:
    assert found.shape == wanted.shape and torch.isfinite(found).all()
    assert ((found.double() - wanted).abs() <= error * (1 + wanted.abs())).all(), (found - wanted).abs().max()


@pytest.mark.parametrize("scale", ["final", "own"])
@pytest.mark.parametrize("odd", ODD)
def test_every_question_equals_two_log_softmaxes_in_float64(odd: str, scale: str) -> None:
    model, cache = run(odd)
    rows, double = range(len(ODD[odd][0])), ODD[odd][2] == torch.float64
    for by in ALL:
        wanted = torch.stack([brute(cache, row, place(odd, row), 17, by, scale) for row in rows])
        wanted = wanted if len(wanted) > 1 else wanted[0]
        exact = log_prob_increase(cache, 17, by, ODD[odd][3], scale=scale, exact=True)
        cells = model.cfg.n_layers * model.cfg.n_heads if by == "position" else 1  # summed: their errors add up
        close(exact.values, wanted, 1e-12 if double else EXACT * cells**0.5)
        assert exact.method["exact"] == exact.method["of"] and exact.method["certified"] == 0
        for tolerance in (1e-2, 1e-4):
            found = log_prob_increase(cache, 17, by, ODD[odd][3], scale=scale, tolerance=tolerance)
            left = found.method["certified"]
            left = torch.tensor(left if isinstance(left, list) else [left])
            assert (left <= tolerance).all()
            missed = (found.values - wanted).flatten(1) if len(rows) > 1 else (found.values - wanted).flatten()[None]
            assert (missed.abs().amax(-1) <= left + 1e-5).all()
            if by != "layer":
                assert missed.min() > -1e-5  # first order is never below


@pytest.mark.parametrize("scale", ["final", "own"])
@pytest.mark.parametrize("odd", ODD)
def test_layers_telescope_under_both_scales(odd: str, scale: str) -> None:
    model, cache = run(odd)
    found = log_prob_increase(cache, 17, "layer", ODD[odd][3], row=0, scale=scale)
    t, (unembed, gain) = place(odd, 0), (each.detach().double() for each in (model.unembed.weight, model.ln_final.w))
    streams = torch.stack([cache["resid_post", -1][0, t], cache["resid_pre", 0][0, t]]).double()
    norms = (streams if scale == "own" else streams[:1]).pow(2).mean(-1, keepdim=True)
    normed = streams / (norms + model.cfg.eps).sqrt()
    after, before = ((normed * gain) @ unembed.T).log_softmax(-1)[:, 17].tolist()
    assert found.method["log_prob"] == pytest.approx(after, abs=1e-5)
    assert found.method["log_prob_of_embedding"] == pytest.approx(before, abs=1e-5)
    rounding = 0.1 if ODD[odd][2] == torch.bfloat16 else 1e-5  # the stream itself is rounded between the layers
    assert found.closure is not None and found.closure < rounding
    assert float(found.values.sum()) == pytest.approx(after - before, abs=rounding)


def test_the_trained_model_too() -> None:
    model = HookedLlava.tiny()
    from llava_lens.tiny import questions, render_scene

    scene = render_scene(70_001)
    inputs = model.prepare(questions(scene)[0].text, scene.image)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    t = inputs.roles_of().last
    for by in ALL:
        for scale in ("final", "own"):
            token = log_prob_increase(cache, scale=scale).method["answer_id"]
            wanted = brute(cache, 0, t, token, by, scale)
            close(log_prob_increase(cache, by=by, scale=scale, exact=True).values, wanted, 5e-6)
            found = log_prob_increase(cache, by=by, scale=scale)
            assert (found.values - wanted).abs().max() <= 1e-4 + 1e-5


def test_bounds_hold_and_the_tight_one_is_near() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(5000, 32, generator=generator, dtype=torch.float64)
    for temperature in (0.01, 1.0, 6.0):
        x = torch.randn(32, generator=generator, dtype=torch.float64) * temperature / 32**0.5
        readout = Readout(rows, torch.ones(32).double(), torch.ones(32).double(), 0.0)
        base = Base.of(Vocabulary(rows), readout, x, 7, own=False)
        for size in (1e-4, 1e-2, 0.3, 3.0, 30.0):
            y = torch.randn(20, 32, generator=generator, dtype=torch.float64) * size
            square, mean = y.square().sum(-1), y @ base.mean
            delta = y @ rows.T - mean[:, None]
            missed = torch.logsumexp(base.log_p + delta, -1) if size > 1 else (delta.expm1() @ base.p).log1p()
            cheap = cheap_bound(square, base.reach)
            tight = tight_bound(((y @ base.second) * y).sum(-1), mean, square, base.reach, base.second_error)
            assert (missed <= tight * (1 + 1e-9) + 1e-12).all() and (tight <= cheap).all()
            spread = delta.amax(-1) - delta.amin(-1)
            assert (spread <= 2 * base.reach * square.sqrt()).all() and (missed <= spread.square() / 8).all()
            if size < 1e-3 and temperature < 1:
                assert (tight < 1.2 * missed).all() and (cheap > 5 * missed).all()
            assert torch.linalg.eigvalsh(base.second - (rows.T * base.p) @ rows).min() > -1e-9
    torch.testing.assert_close(Vocabulary(rows).gram, rows.T @ rows)


def test_far_moves_neither_overflow_nor_lose_what_was_improbable() -> None:
    log_p = torch.full((50,), -120.0)
    log_p[0] = 0.0
    delta = torch.zeros(3, 50)
    delta[0, 5], delta[1, 5], delta[2] = 119.0, 200.0, 1e4
    wanted = torch.stack([(log_p + row).double().log_softmax(-1)[5] + 120 for row in delta])
    torch.testing.assert_close(shift(delta.clone(), log_p, 5).double(), wanted, atol=1e-4, rtol=1e-6)


def test_a_vector_that_takes_its_stream_back_to_nothing_leaves_uniform_words() -> None:
    generator = torch.Generator().manual_seed(4)
    rows, x = torch.randn(200, 16, generator=generator), torch.randn(16, generator=generator)
    base = Base.of(Vocabulary(rows), Readout(rows, torch.ones(16), x, 1e-5), x, 9, own=True)
    y = torch.stack([-x, 1e-4 * x, -x + 1e-3 * rows[9]])
    after = ((x + y).double() / ((x + y).double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()) @ rows.double().T
    found = base.increase(base.moved(y)).double()
    wanted = after.log_softmax(-1)[:, 9] - base.log_p.double()[9]
    torch.testing.assert_close(found[:2], wanted[:2], atol=1e-5, rtol=1e-5)
    assert torch.isfinite(found).all()


def test_a_sum_shares_its_tolerance_and_leaves_as_many_cells_as_it_can() -> None:
    bound = torch.tensor([[[1.0, 4.0], [2.0, 0.1]], [[3.0, 0.2], [0.5, float("nan")]]])
    candidates = torch.ones_like(bound, dtype=torch.bool)
    assert to_settle(bound, candidates, 3.0, summed=False).sum() == 2  # 4, and what is no number
    left = ~to_settle(bound, candidates, 3.5, summed=True)
    assert left[..., 0].flatten().tolist() == [True, True, False, True]  # 0.5 + 1 + 2
    assert left[..., 1].flatten().tolist() == [False, True, True, False]
    candidates[0, 1, 0] = False
    assert doubt(bound.nan_to_num(9), ~left & candidates, candidates).sum((0, 1)).max() == 1.5
    assert largest(bound.nan_to_num(9), candidates, 2).nonzero().tolist() == [[0, 0, 1], [1, 1, 1]]
    assert parted([1, 2, 3], 2) == [[1, 2], [3]]


def test_a_token_lost_in_rounding_does_not_break_the_bound() -> None:
    """Nearly all probability is one token's; a vector away from it raises another from next to nothing."""
    generator = torch.Generator().manual_seed(11)
    rows = torch.randn(300, 24, generator=generator)
    rows -= rows.mean(0)
    for large in (1.0, 1.3):
        base = Base.of(
            Vocabulary(rows), Readout(rows, torch.ones(24), torch.ones(24), 0.0), large * rows[0], 7, own=False
        )
        mean = base.mean / base.mean.norm()
        y = rows[1:] - (rows[1:] @ mean)[:, None] * mean
        y = y / y.norm(dim=-1, keepdim=True) * (49 / base.reach)
        square, second = y.square().sum(-1), ((y @ base.second) * y).sum(-1)
        bound = tight_bound(second, y @ base.mean, square, base.reach, base.second_error)
        wide, x = rows.double(), (base.x * base.factor).double()
        log_p, delta = (wide @ x).log_softmax(-1), y.double() @ wide.T
        missed = torch.logsumexp(log_p + delta, -1) - delta @ log_p.exp()
        assert missed.max() > 0.1 and (missed <= bound + 1e-4).all()


def test_the_highest_positions_are_certain_where_no_doubt_can_change_their_order() -> None:
    values = torch.tensor([[1.0, 9.0], [5.0, 4.5]])
    assert certain(values, torch.zeros(2, 2)) == 4
    assert certain(values, torch.tensor([[0.0, 3.0], [1.0, 0.0]])) == 1  # 5 may be 4, below 4.5
    assert certain(values, torch.tensor([[0.0, 5.0], [0.0, 0.0]])) == 0
    _, cache = run("grouped")
    exact = log_prob_increase(cache, 17, "position", row=0, exact=True)
    found = log_prob_increase(cache, 17, "position", row=0, tolerance=1e-3)
    n = found.method["certain"]
    assert exact.method["certain"] == exact.values.numel() >= n > 0
    assert [e.place for e in found.top(n)] == [e.place for e in exact.top(n)]


@pytest.mark.parametrize("by, part", [("head", "attn.o_proj"), ("position", "attn.o_proj"), ("neuron", "mlp.out_proj")])
def test_weights_changed_after_the_run_are_noticed(by: Any, part: str) -> None:
    model, cache = run("grouped")
    changed: Any = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[1].get_submodule(part).weight.mul_(1.05)
    other = LlavaCache(cache.cache_dict, changed, inputs=cache.inputs)
    with pytest.raises(LensError, match=r"of layer 1 do not sum .*by='layer'.*weights changed"):
        log_prob_increase(other, 17, by)
    log_prob_increase(other, 17)
    with torch.no_grad():
        changed.ln_final.w.mul_(torch.linspace(0.5, 1.5, len(changed.ln_final.w)))
    with pytest.raises(
        LensError, match=r"hook_logits at position .* are not those of the final stream.*weights changed"
    ):
        log_prob_increase(other, 17)


@pytest.mark.parametrize("own", [False, True])
def test_few_cells_of_a_head_and_many_come_out_alike(own: bool) -> None:
    hf = hf_llava("wide_grouped_heads")
    model, n = HookedLlava.from_hf(hf), 60
    with torch.no_grad():
        _, cache = model.run_with_cache(**example(hf, (1,), text=n - 11))
    query = Query.asking(cache, 0, -1, 17, model.unembed.weight)
    screen = Screen.of(query, Vocabulary.of(model), ("head", "position"), own, 1.0)
    wanted = brute(cache, 0, -1, 17, ("head", "position"), "own" if own else "final")
    assert wanted.shape == (3, 4, n)
    chosen = torch.zeros(wanted.shape, dtype=torch.bool)
    counts = torch.tensor([[5, n, 0, 1], [45, n, n, 3], [2, 1, 7, 0]])  # a table pays from 39 cells of a head on
    for layer, head in itertools.product(range(3), range(4)):
        some = torch.randperm(n, generator=torch.Generator().manual_seed(head))[: counts[layer, head]]
        chosen[layer, head, some] = True
    found = screen.exactly(chosen)
    close(found[chosen], wanted[chosen], EXACT)
    assert torch.equal(found[~chosen], screen.linear[~chosen])


def test_the_largest_cells_are_exact_and_the_others_within_what_is_said() -> None:
    _, cache = run("wide_grouped_heads")
    whole = log_prob_increase(cache, 3, ("head", "position"), row=0, exact=True)
    for k in (1, 7, 40):
        some = log_prob_increase(cache, 3, ("head", "position"), row=0, top_k=k)
        assert some.method["exact"] == k and "tolerance" not in some.method
        off = some.values - whole.values
        assert int((off.abs() < 1e-6).sum()) >= k and off.max() <= some.method["certified"] + 1e-6


def test_first_order_settles_small_cells() -> None:
    hf = hf_llava("plain")
    model: Any = copy.deepcopy(HookedLlava.from_hf(hf))
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o_proj.weight.mul_(0.02)
        _, cache = model.run_with_cache(**example(hf, (1,)))
    found = log_prob_increase(cache, by=("head", "position"))
    assert found.method["exact"] < found.method["of"] / 10


def test_the_benchmarks_dense_way_is_the_definition() -> None:
    model, cache = run("mlp_bias")
    cells = [(0, 1, 3), (0, 3, 17), (1, 0, 0), (2, 2, 9)]
    wanted = brute(cache, 0, -1, 17, ("head", "position"), "final")
    assert model.cfg.n_layers == 3
    for dtype, error in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        close(dense(cache, cells, 17, dtype), torch.stack([wanted[cell] for cell in cells]), error)


# ---- answers of several tokens


@cache
def tiny() -> tuple[HookedLlava, Any]:
    from llava_lens.tiny import questions, render_scene

    model, scene = HookedLlava.tiny(), render_scene(70_002)
    return model, (questions(scene)[0].text, scene.image)


def test_tokens_of_an_answer_are_scored_where_each_is_predicted_and_added_up() -> None:
    model, (question, image) = tiny()
    inputs, word = model.prepare(question, image, answer="The color"), "The color of"
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    last, ids = inputs.roles_of().last, model.tokenizer(word, add_special_tokens=False)["input_ids"]
    assert len(ids) == 3 and inputs.tokens[0, last - 1 : last + 1].tolist() == ids[:2]
    for by in ALL:
        for scale in ("final", "own"):
            found = log_prob_increase(cache, word, by, several="all", scale=scale, exact=True)
            each = [
                log_prob_increase(cache, token, by, position, scale=scale, exact=True)
                for position, token in zip((last - 2, last - 1, last), ids, strict=True)
            ]
            torch.testing.assert_close(found.values, sum(scores.values for scores in each))
            assert found.axes == each[0].axes and found.method["query"] == [last - 2, last - 1, last]
            assert found.method["answer_id"] == ids and "scored" not in found.method
            assert found.method["of"] == 3 * each[0].method["of"]
            loose = log_prob_increase(cache, word, by, several="all", scale=scale, tolerance=1e-2)
            assert (loose.values - found.values).abs().max() <= loose.method["certified"] + 1e-5 <= 1e-2 + 1e-5
    first = log_prob_increase(cache, word, "head", last - 2, several="first")
    assert first.method["scored"] == "the first of 3 tokens" and first.method["answer_id"] == ids[0]
    torch.testing.assert_close(first.values, log_prob_increase(cache, ids[0], "head", last - 2).values)
    with pytest.raises(LensError, match=r"is 3 tokens .*several='first' scores"):
        log_prob_increase(cache, word)
    with pytest.raises(LensError, match="needs the answer's start in the prompt"):
        log_prob_increase(cache, word, position=last - 1, several="all")


# ---- what is refused


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"by": "neurons"}, "by='neurons'; expected 'layer', 'head', .*'neuron'; nearest: 'neuron'"),
        ({"by": "attention"}, "by='attention'; expected 'layer'"),
        ({"scale": "finall"}, "scale='finall'; expected 'final' or 'own'; nearest: 'final'"),
        ({"tolerance": 0.0}, "tolerance=0.0; expected nats above 0"),
        ({"tolerance": -1e-3}, "tolerance=-0.001; expected nats above 0"),
        ({"tolerance": float("nan")}, "tolerance=nan; expected nats above 0"),
        ({"answer": 97}, "answer 97; expected a token id, 0 … 96"),
        ({"position": 99}, "position 99; expected -18 … 17"),
    ],
)
def test_what_has_no_answer_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, cache = run("attention_bias")
    with pytest.raises(LensError, match=message):
        log_prob_increase(cache, **{"answer": 5, **arguments})


def test_neurons_say_what_they_need() -> None:
    model, cache = run("attention_bias")
    kept = {name: cache[name] for name in names_for(model, "head")}
    with pytest.raises(LensError, match=r"lacks blocks\.0\.mlp\.hook_post.*names_for\(model, 'neuron'\)"):
        log_prob_increase(LlavaCache(kept, model, inputs=cache.inputs), by="neuron")


@pytest.mark.parametrize("by", ALL)
def test_a_cache_of_another_model_is_refused(by: Any) -> None:
    _, cache = run("attention_bias")
    other, _ = run("wide_grouped_heads")
    entries = dict(cache.cache_dict)
    entries["blocks.1.hook_resid_pre"] = entries["blocks.1.hook_resid_pre"][..., :-1]
    with pytest.raises(LensError, match=r"'blocks\.1\.hook_resid_pre' is \[1, 18, 63\]; .* 64\]: it is another model"):
        log_prob_increase(LlavaCache(entries, cache.model, inputs=cache.inputs), by=by)
    if by not in ("layer", "neuron"):
        with pytest.raises(LensError, match=r"'blocks.*it is another model's cache"):
            log_prob_increase(LlavaCache(dict(cache.cache_dict), other, inputs=cache.inputs), by=by)
