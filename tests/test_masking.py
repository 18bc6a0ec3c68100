"""Masked runs against hand-made ones: pixels painted over, embeddings and scores edited by plain hooks, one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.errors import LensError
from llava_lens.maps import OPERATORS, Case, Masking

TOKEN, OTHER = 11, 42
SETUPS = [("plain", (1,), None), ("grouped", (1, 2), "left"), ("full", (2, 1), "right"), ("wide_grouped_heads", (1,), None)]  # fmt: skip # noqa: E501


def case_of(odd: str, images: tuple[int, ...], pad: str | None, **how: Any) -> tuple[HookedLlava, Case]:
    model = hooked(odd)
    row = len(images) - 1
    how = {"row": row, "image": images[row] - 1, **how}
    return model, Case.of(model, inputs_of(model, odd, images, pad), TOKEN, **how)


def subsets(n: int = 4) -> Tensor:
    return torch.rand(n, 9, generator=torch.Generator().manual_seed(5)) < 0.5


def by_hand(model: HookedLlava, case: Case, operator: str, kept: list[bool]) -> Tensor:
    """Logits at the end of one full run with some patches taken out."""
    gone = [i for i, stays in enumerate(kept) if not stays]
    start = int(case.inputs.slots(model.cfg)[0].nonzero()[0])
    each, kept_class = model.cfg.tokens_per_image, model.cfg.tokens_per_image == 10
    slots = case.inputs.slots(model.cfg)[0].nonzero()[:, 0].tolist()
    mine = slots[case.image * each : (case.image + 1) * each][int(kept_class) :]
    assert len(mine) == 9 and start == slots[0]
    inputs: Any = case.inputs
    hooks: Any = []
    if operator == "pixel":
        pixels = inputs.pixels.clone()
        for i in gone:
            for channel in range(3):
                row, col = 8 * (i // 3), 8 * (i % 3)
                mean = inputs.pixels[case.image, channel].mean()
                pixels[case.image, channel, row : row + 8, col : col + 8] = mean
        inputs = replace(inputs, pixels=pixels)
    elif operator == "embedding":

        def edit(act: Tensor, hook: Any) -> Tensor:
            mean = sum(act[0, at] for at in mine) / 9
            for i in gone:
                act[0, mine[i]] = mean
            return act

        hooks = [("hook_embed", edit)]
    else:

        def block(act: Tensor, hook: Any) -> Tensor:
            for i in gone:
                act[..., mine[i]] = -torch.inf
            return act

        hooks = [(f"blocks.{layer}.attn.hook_attn_scores", block) for layer in range(3)]
    with torch.no_grad():
        return model.run_with_hooks(inputs, fwd_hooks=hooks)[0, -1]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("odd", "images", "pad"), SETUPS)
def test_every_operator_equals_a_run_by_hand(odd: str, images: tuple[int, ...], pad: str | None, operator: str) -> None:
    model, case = case_of(odd, images, pad)
    kept = subsets()
    runs = Masking(case, operator).run(kept)
    for i, each in enumerate(kept.tolist()):
        logits = by_hand(model, case, operator, each)
        assert float(runs.score[i]) == pytest.approx(float(logits.log_softmax(-1)[TOKEN]), abs=1e-10)
        assert float(runs.prob[i]) == pytest.approx(float(logits.softmax(-1)[TOKEN]), abs=1e-10)
        assert int(runs.choice[i]) == int(logits.argmax())
    assert case.passes == {"forward": 4, "backward": 0}
    assert float((runs.score - runs.score[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("operator", OPERATORS)
def test_with_all_patches_kept_it_is_the_plain_run(operator: str) -> None:
    model, case = case_of("grouped", (1, 2), "left", versus=OTHER)
    with torch.no_grad():
        logits = model(case.inputs)[0, -1]
    for runs in (Masking(case, operator).run(case.all_kept()), case.whole):
        assert float(runs.score[0]) == pytest.approx(float(logits[TOKEN] - logits[OTHER]), abs=1e-10)
    batch = inputs_of(model, "grouped", (1, 2), "left")
    with torch.no_grad():
        padded = model(batch)[1, -1]
    assert float(case.whole.score[0]) == pytest.approx(float(padded[TOKEN] - padded[OTHER]), abs=1e-10)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_budget_changes_nothing(operator: str) -> None:
    _, case = case_of("plain", (1,), None)
    kept = subsets(7)
    one, many = (Masking(case, operator, max_bytes=budget).run(kept) for budget in (1, 2**30))
    torch.testing.assert_close(one.score, many.score, rtol=1e-12, atol=1e-12)
    assert case.runs_at_once(max_bytes=1) == 1 and case.runs_at_once(max_bytes=2**30) > 7


@pytest.mark.parametrize("operator", OPERATORS)
def test_hooks_of_the_user_take_effect(operator: str) -> None:
    model, case = case_of("plain", (1,), None)
    kept = subsets(3)
    before = Masking(case, operator).run(kept)

    def edit(act: Tensor, hook: Any) -> Tensor:
        return act * 0.5

    for name in ("blocks.1.hook_mlp_out", "projector.hook_out", "hook_embed"):
        with model.hooks(fwd_hooks=[(name, edit)]):
            _, held = case_of("plain", (1,), None)
            found = Masking(held, operator).run(kept)
            if operator != "embedding" or name != "hook_embed":  # whose edit by hand is a second hook, behind this one
                expected = [by_hand(model, held, operator, each) for each in kept.tolist()]
                scores = torch.stack([logits.log_softmax(-1)[TOKEN] for logits in expected])
                torch.testing.assert_close(found.score, scores, rtol=1e-10, atol=1e-10)
        assert float((found.score - before.score).abs().max()) > 1e-3


def test_a_picture_that_the_model_holds_is_not_in_the_way() -> None:
    model, case = case_of("grouped", (1, 2), "left")
    kept = subsets(2)
    expected = {operator: Masking(case, operator).run(kept).score for operator in OPERATORS}
    other = inputs_of(model, "grouped", (1, 2), "left", seed=7)  # as long as this row, its first row padded
    assert other.n_pos == case.inputs.n_pos
    with model.looking_at(other):
        _, held = case_of("grouped", (1, 2), "left")
        for operator, scores in expected.items():
            torch.testing.assert_close(Masking(held, operator).run(kept).score, scores, rtol=1e-12, atol=1e-12)


def test_what_does_not_fit_is_refused() -> None:
    model, case = case_of("plain", (1,), None)
    with pytest.raises(LensError, match=r"operator 'pixels'; nearest: 'pixel'; expected pixel, embedding, attention"):
        Masking(case, "pixels")
    with pytest.raises(LensError, match=r"kept \[1, 8\] of torch.bool; expected booleans \[run, 9\]"):
        Masking(case).run(torch.ones(1, 8, dtype=torch.bool))
    assert len(Masking(case).run(torch.ones(0, 9, dtype=torch.bool)).score) == 0
    text = Inputs.from_tokens(torch.tensor([[1, 2, 3]]), model.cfg)
    with pytest.raises(LensError, match="no picture: a map scores patches"):
        Case.of(model, text)
    batch = inputs_of(model, "plain", (1, 1), None)
    with pytest.raises(LensError, match=r"a batch of 2; expected one row, or row= that says which"):
        Case.of(model, batch)
    with pytest.raises(LensError, match="image 1; expected 0 … 0"):
        Case.of(model, batch, row=0, image=1)
