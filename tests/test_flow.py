"""The value path against gradients carried back by hand, and flow on the embedded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from torch import Tensor

from llava_lens import HookedLlava
from llava_lens.errors import LensError
from llava_lens.maps import Case, importance_map
from llava_lens.maps.flow import aim, by_token, held, pull
from llava_lens.tiny import color_pairs

TOKEN, OTHER = 11, 42


def case_of(odd: str, versus: int | None = None) -> Case:
    model = hooked(odd)
    return Case.of(model, inputs_of(model, odd, (1,), None), TOKEN, versus)


def value_path(case: Case) -> Tensor:
    """Every position's part."""
    return by_token(pull(case, case.stream, lambda logits: aim(case, logits)), case.stream)


def dimmed(case: Case, share: float) -> Tensor:
    """The stream that enters the decoder, its image tokens moved towards their mean."""
    stream = case.stream.clone()
    own = stream[:, case.patches]
    stream[:, case.patches] = own.mean(1, keepdim=True) + share * (own - own.mean(1, keepdim=True))
    return stream


def by_hand(case: Case, stream: Tensor, along: Tensor, prob: bool = False) -> Tensor:
    """`<gradient, along>` of every position, from the top down without autograd: `[pos]`, float64."""
    model: Any = case.model
    with torch.no_grad():
        logits, cache = model.run_with_cache(stream, start_at_layer=0)
        direction = model.unembed.weight[case.token] - (0 if case.versus is None else model.unembed.weight[case.versus])
        if prob:
            p = logits[0, -1].softmax(-1)
            direction = p[case.token] * (direction - p @ model.unembed.weight)
        at = torch.zeros_like(cache["resid_pre", 0][0])
        at[-1] = direction * model.ln_final.weight / cache["ln_final.hook_scale"][0, -1]
        for layer in reversed(range(model.cfg.n_layers)):
            block, mlp = model.blocks[layer], model.blocks[layer].mlp
            pre, linear = cache["pre", layer][0], cache["pre_linear", layer][0]
            at_post = at @ mlp.W_out.T
            at_pre = at_post * linear * mlp.act(pre) / pre / 2
            into = at_pre @ mlp.W_gate.T + (at_post * mlp.act(pre) / 2) @ mlp.W_in.T
            at = at + into * block.ln2.weight / cache["scale", layer, "ln2"][0]
            pattern, share = cache["pattern", layer][0], model.cfg.n_heads // model.cfg.n_key_value_heads
            into = torch.zeros_like(at)
            for head in range(model.cfg.n_heads):
                at_v = pattern[head].T @ (at @ block.attn.W_O[head].T)
                into += at_v @ block.attn.W_V[head // share].T
            at = at + into * block.ln1.weight / cache["scale", layer, "ln1"][0]
        return (at * along[0]).sum(-1)


@pytest.mark.parametrize(
    "odd", ["plain", "grouped", "wide_grouped_heads", "attention_bias", "mlp_bias", "gelu_decoder"]
)
@pytest.mark.parametrize("versus", [None, OTHER])
def test_the_value_path_is_the_gradient_carried_back_by_hand(odd: str, versus: int | None):
    case = case_of(odd, versus)
    ours = value_path(case)
    torch.testing.assert_close(ours, by_hand(case, case.stream, case.stream), rtol=1e-9, atol=1e-10)
    found = importance_map(case.model, case.inputs, "value_path", TOKEN, versus)
    assert found.unit == "logits" and found.method["passes"] == {"forward": 1, "backward": 1}
    torch.testing.assert_close(found.values.flatten(), ours[case.patches], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("odd", ["plain", "wide_grouped_heads", "full"])
@pytest.mark.parametrize("versus", [None, OTHER])
def test_flow_is_the_mean_of_value_paths_of_dimmed_pictures(odd: str, versus: int | None):
    case = case_of(odd, versus)
    content = case.stream - dimmed(case, 0.0)
    each = [by_hand(case, dimmed(case, share), content, prob=versus is None) for share in (0.3, 0.6)]
    found = importance_map(case.model, case.inputs, "flow", TOKEN, versus)
    assert found.unit == ("probability" if versus is None else "logits")
    assert found.method["passes"] == {"forward": 2, "backward": 2}
    expected = ((each[0] + each[1]) / 2)[case.patches]
    torch.testing.assert_close(found.values.flatten(), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("odd", ["plain", "grouped", "wide_heads"])
def test_over_all_positions_it_adds_up_to_the_logit_where_there_are_no_biases(odd: str):
    case = case_of(odd)
    total = value_path(case).sum()
    logit = case.model(case.inputs)[0, -1, TOKEN]
    torch.testing.assert_close(total, logit, rtol=1e-9, atol=1e-10)


def test_what_is_held_changes_no_logit():
    case = case_of("grouped")
    with torch.no_grad(), case.model.hooks(fwd_hooks=held(case.model)):
        logits = case.model(case.inputs)
    torch.testing.assert_close(logits, case.model(case.inputs), rtol=1e-12, atol=1e-12)


def test_flow_finds_the_object_that_is_asked_about():
    model, landed = HookedLlava.tiny(), []
    for pair in color_pairs(12):
        inputs = model.prepare(pair.question.text, pair.clean.image)
        mask = inputs.roles_of().patches_of_mask(pair.clean.objects[pair.about].mask)
        landed.append(bool(mask[importance_map(model, inputs, "flow").top(1)[0].place]))
    assert sum(landed) >= 11


@pytest.mark.parametrize("dims", [(), (0.0,), (0.5, 1.5), (float("nan"),)])
def test_shares_outside_their_range_are_refused(dims: tuple[float, ...]):
    case = case_of("plain")
    with pytest.raises(LensError, match=r"dims=.*expected one share or more, each above 0 and up to 1"):
        importance_map(case.model, case.inputs, "flow", TOKEN, dims=dims)
