"""CUDA graphs on a device: the same logits and tokens as without them, and no waiting between steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import example, hf_llava

from llava_lens import HookedLlava, Inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def pair(odd: str = "grouped", dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """Two models on the device with equal weights; only the second one records."""
    hf = hf_llava(odd, "sdpa", dtype)
    plain, recording = (HookedLlava.from_hf(hf).to("cuda") for _ in range(2))
    plain.graphs.enabled, recording.graphs.enabled = False, True
    return hf, plain, recording


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Kernels that the library picks may differ with masked places: 1e-5 of the largest value in float32, else 2e-2."""
    tolerance = 1e-5 if expected.dtype == torch.float32 else 2e-2
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pad", [None, "left", "right"])
def test_a_replayed_forward_is_the_plain_one(pad: str | None, dtype: torch.dtype) -> None:
    hf, plain, model = pair(dtype=dtype)
    for seed in (1, 2, 3):
        inputs = example(hf, images=(1, 1), pad=pad, seed=seed)
        for keep in (0, 1):
            close(model(**inputs, logits_to_keep=keep), plain(**inputs, logits_to_keep=keep))
    assert len(model.graphs.recordings) == 3


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("count", [1, 4])
def test_replayed_steps_write_the_same_tokens(pad: str | None, count: int) -> None:
    hf, plain, model = pair()
    for seed in (1, 2):
        inputs = example(hf, images=(1,) * count, pad=pad, seed=seed)
        expected = plain.generate(**inputs, max_new_tokens=20, stop_tokens=())
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, max_new_tokens=20, stop_tokens=()), expected)
    assert len(model.graphs.steps) == 1


def test_hooks_and_edits_of_weights_take_effect() -> None:
    hf, plain, model = pair()
    inputs = example(hf, images=(1,))
    hooks: Any = [("blocks.1.hook_attn_out", lambda act, hook: torch.zeros_like(act))]
    with torch.no_grad():
        before, _ = model(**inputs), model(**inputs)
        close(model.run_with_hooks(**inputs, fwd_hooks=hooks), plain.run_with_hooks(**inputs, fwd_hooks=hooks))
        for each in (plain, model):
            each.blocks[0].mlp.out_proj.weight.mul_(3)
        close(model(**inputs), plain(**inputs))
        assert not torch.allclose(model(**inputs), before)
    longer = example(hf, images=(1,), text=60)
    expected = plain.generate(**longer, max_new_tokens=9, stop_tokens=())
    assert torch.equal(model.generate(**longer, max_new_tokens=9, stop_tokens=()), expected)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("pad", [None, "left"])
def test_the_host_waits_for_nothing(pad: str | None, recorded: bool) -> None:
    hf, plain, model = pair()
    model = model if recorded else plain
    raw = example(hf, images=(1, 1), pad=pad)
    inputs = Inputs(raw["input_ids"], raw["pixel_values"], raw["attention_mask"]).to("cuda")

    def strict(_: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")

    with torch.no_grad():
        for _ in range(2):
            model(inputs)
            model.generate(inputs, 8, stop_tokens=())
        try:
            torch.cuda.set_sync_debug_mode("error")
            model(inputs)
            torch.cuda.set_sync_debug_mode("default")
            model.generate(inputs, 8, stop_tokens=(), on_step=strict)
        finally:
            torch.cuda.set_sync_debug_mode("default")
