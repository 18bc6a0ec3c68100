"""Relevancy against Hugging Face's own attention weights and torch's autograd, whole matrices, in plain loops.

Tolerance: Hugging Face's norms, rotations and softmax are in float32 whatever the model is in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from random_models import hf_llava
from torch import Tensor

from llava_lens import Inputs
from llava_lens.errors import LensError
from llava_lens.maps import importance_map

TOKEN, OTHER = 11, 42
ODD = ["plain", "grouped", "wide_grouped_heads", "attention_bias", "full", "layer_list", "layer_list_full",
       "first_layer", "positive_layer", "rope_linear"]  # fmt: skip


class Slow:
    """Patterns of both towers and the logit's gradients there, from one run of a whole padded batch."""

    def __init__(self, odd: str, images: tuple[int, ...] = (1,), pad: str | None = None, versus: int | None = None):
        self.hf = hf_llava(odd, "eager", torch.float64)
        self.model = hooked(odd)
        self.inputs = inputs_of(self.model, odd, images, pad)
        self.images, self.versus = images, versus

    def gradients(self, row: int) -> tuple[list[Tensor], list[Tensor]]:
        """`mean_h relu(∇A ∘ A)` of each layer of the tower `[image, …]` and of the decoder `[row, …]`."""
        seen: dict[str, list[Tensor]] = {"tower": [], "decoder": []}
        towers = {"tower": self.hf.model.vision_tower.encoder.layers, "decoder": self.hf.model.language_model.layers}
        handles = [
            layer.self_attn.register_forward_hook(lambda _, args, out, kept=seen[name]: kept.append(out[1]))
            for name, layers in towers.items()
            for layer in layers
        ]
        logits = self.hf(**self.inputs.for_hf()).logits
        for handle in handles:
            handle.remove()
        aim = logits[row, self.last(row), TOKEN]
        aim = aim - (0 if self.versus is None else logits[row, self.last(row), self.versus])
        weighted = []
        for kept in seen.values():
            grads = torch.autograd.grad(aim, kept, retain_graph=True, allow_unused=True)
            each = [
                (a * (torch.zeros_like(a) if g is None else g)).relu().mean(1) for a, g in zip(kept, grads, strict=True)
            ]
            weighted.append([w.detach().double() for w in each])
        return weighted[0], weighted[1]

    def last(self, row: int) -> int:
        mask = self.inputs.attention_mask
        return self.inputs.n_pos - 1 if mask is None else int(mask[row].nonzero().max())

    def maps(self, row: int, image: int) -> dict[str, Tensor]:
        tower, decoder = self.gradients(row)
        nth = sum(self.images[:row]) + image
        R = torch.eye(self.inputs.n_pos, dtype=torch.float64)
        for layer in decoder:
            R = R + layer[row] @ R
        last = R[self.last(row)]
        slots = (self.inputs.tokens[row] == self.model.cfg.image_token_id).nonzero()[:, 0]
        each = self.model.cfg.tokens_per_image
        tokens = last[slots[image * each : (image + 1) * each]]
        class_kept = self.hf.config.vision_feature_select_strategy == "full"
        V = torch.eye(10, dtype=torch.float64)
        after = [V]
        for layer in tower:
            V = V + layer[nth] @ V
            after.append(V)
        chosen = self.hf.config.vision_feature_layer
        chosen = chosen if isinstance(chosen, list) else [chosen]
        start = 0 if class_kept else 1
        V = torch.stack([after[layer][start:] for layer in chosen]).mean(0)
        return {"decoder": tokens[int(class_kept) :], "tower": V[:, 1:].mean(0), "both": (tokens @ V)[1:]}


def check(slow: Slow, inputs: Inputs | None = None, row: int | None = None, image: int = 0, at: int = 0) -> None:
    for through, expected in slow.maps(at, image).items():
        options: Any = {"through": through, "versus": slow.versus, "row": row, "image": image}
        found = importance_map(slow.model, inputs or slow.inputs, "relevancy", TOKEN, **options)
        assert found.values.shape == (3, 3) and found.values.dtype == torch.float64
        size = float(expected.abs().max())
        assert size > 1e-4
        torch.testing.assert_close(found.values.flatten(), expected, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("odd", ODD)
def test_relevancy_is_the_matrix_product_of_the_definition(odd: str) -> None:
    check(Slow(odd))


def test_a_row_padded_on_the_right_and_its_second_picture() -> None:
    slow = Slow("grouped", (1, 2, 1), "right")
    check(slow, row=1, image=1, at=1)
    check(slow, row=0, at=0)


def test_a_row_padded_on_the_left_is_as_alone() -> None:
    """Alone in Hugging Face too: the gradients of its rows that see nothing are not numbers."""
    slow = Slow("grouped", (1, 2, 1), "left")
    batch, slow.inputs, slow.images = slow.inputs, slow.inputs.with_roles(slow.model.cfg).row(0), (1,)
    assert batch.attention_mask is not None and not batch.attention_mask[0, 0]
    check(slow, batch, row=0)


def test_against_another_answer() -> None:
    check(Slow("plain", versus=OTHER))


def test_a_hook_of_the_users_takes_effect_and_stays() -> None:
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1,), None)
    plain = {t: importance_map(model, inputs, "relevancy", TOKEN, through=t).values for t in ("decoder", "tower")}

    def without_head(act: Tensor, hook: Any) -> Tensor:
        act[:, 1] = 0
        return act

    where = ("blocks.1.attn.hook_pattern", "vision.blocks.1.attn.hook_pattern")
    with model.hooks(fwd_hooks=[(name, without_head) for name in where]):
        found = {t: importance_map(model, inputs, "relevancy", TOKEN, through=t).values for t in plain}
        pattern: list[Tensor] = []
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]

        def keep(act: Tensor, hook: Any) -> Tensor:
            pattern.append(act)
            return act.view_as(act)

        with model.hooks(fwd_hooks=[(name, keep) for name in names]):
            aim = model(inputs)[0, -1, TOKEN]
        R = torch.eye(inputs.n_pos, dtype=torch.float64)
        for A, gradient in zip(pattern, torch.autograd.grad(aim, pattern), strict=True):
            R = R + (A * gradient)[0].relu().mean(0).detach() @ R
    slots = inputs.slots(model.cfg)[0]
    torch.testing.assert_close(found["decoder"].flatten(), R[-1, slots], rtol=1e-9, atol=1e-12)
    assert not bool(pattern[1][0, 1].any())
    for through, before in plain.items():
        assert not torch.allclose(found[through], before)
        again = importance_map(model, inputs, "relevancy", TOKEN, through=through).values
        torch.testing.assert_close(again, before, rtol=0, atol=0)


def test_no_weight_gathers_a_gradient_and_inference_mode_does_not_matter() -> None:
    model = hooked("grouped", torch.float32)
    model.requires_grad_(True)
    inputs = inputs_of(model, "grouped", (1,), None)
    expected = importance_map(model, inputs, "relevancy", TOKEN, through="both").values
    with torch.inference_mode():
        made = inputs_of(model, "grouped", (1,), None)
        found = importance_map(model, made, "relevancy", TOKEN, through="both").values
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(weight.grad is None for weight in model.parameters())
    model.requires_grad_(False)
    torch.testing.assert_close(importance_map(model, inputs, "relevancy", TOKEN, through="both").values, expected)


def test_low_precision_is_near() -> None:
    full, low = hooked("grouped", torch.float64), hooked("grouped", torch.bfloat16)
    for through in ("decoder", "both"):
        exact, near = (
            importance_map(model, inputs_of(model, "grouped", (1,), None), "relevancy", TOKEN, through=through)
            for model in (full, low)
        )
        assert near.values.dtype == torch.float32
        together = torch.stack((exact.values.flatten(), near.values.flatten().double()))
        assert float(torch.corrcoef(together)[0, 1]) > 0.98


def test_an_unknown_way_is_refused() -> None:
    model = hooked("plain")
    with pytest.raises(LensError, match="through='vision'; expected 'decoder', 'tower', 'both'"):
        importance_map(model, inputs_of(model, "plain", (1,), None), "relevancy", TOKEN, through="vision")
