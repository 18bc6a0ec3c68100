"""Hugging Face's model in other guises over the same weights: eager attention, compiled, with liger-kernel's kernels.

Unusual: a twin's parameters are views, so a model of real size is in memory once, whatever is compared on it.
"""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from benchmarks.baselines import last_logits
from benchmarks.compare import Settings
from llava_lens import Inputs

Forward = Callable[[Inputs], Tensor]
"""From inputs to the last position's logits."""
PATIENCE = 90
"""Seconds that compiling may take."""


def sharing(hf: Any, attention: Literal["sdpa", "eager"] | None = None) -> Any:
    """A copy whose modules can be rewired while its weights stay those of `hf`, in the same memory."""
    views = {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in hf.parameters()}
    twin = copy.deepcopy(hf, views)
    if attention is not None:
        twin.set_attn_implementation(attention)
    return twin


def plain(hf: Any) -> Forward:
    """As it is."""
    return torch.inference_mode()(lambda inputs: last_logits(hf, inputs))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in a block that takes longer; a clock that ran outside goes on behind it."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before, start = signal.signal(signal.SIGALRM, give_up), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.01) if left else 0)


def compiled(hf: Any, inputs: Inputs, settings: Settings) -> Forward | str:
    """The decoder under `torch.compile` (with CUDA graphs on CUDA), ready for inputs of this shape, or why not."""
    if settings.quick:
        return "compiling takes longer than the rest of a quick run"
    twin, mode = sharing(hf), "reduce-overhead" if settings.cuda else "default"
    twin.model.language_model = torch.compile(twin.model.language_model, dynamic=False, mode=mode)
    try:
        with within(PATIENCE), torch.inference_mode():
            last_logits(twin, inputs)
    except Exception as error:  # whatever a compiler raises is the reason that the row is missing
        return f"torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return plain(twin)


def liger(hf: Any) -> Forward | str:
    """The decoder with liger-kernel's norms, rotation and MLP, or why not."""
    if hf.device.type != "cuda":
        return "liger-kernel's kernels run on CUDA only"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers import apply_liger_kernel_to_llama  # pyright: ignore[reportMissingImports]

    return patched(hf, partial(apply_liger_kernel_to_llama, cross_entropy=False, fused_linear_cross_entropy=False))


def patched(hf: Any, patch: Callable[..., Any]) -> Forward:
    """A twin whose decoder `patch(model=…)` has changed; the names it replaces for every Llama are replaced for this
    twin's own forwards alone."""
    twin = sharing(hf)
    with mock.patch.dict(vars(modeling_llama)):
        patch(model=twin.model.language_model)
        rotate = modeling_llama.apply_rotary_pos_emb

    @torch.inference_mode()
    def forward(inputs: Inputs) -> Tensor:
        with mock.patch.object(modeling_llama, "apply_rotary_pos_emb", rotate):
            return last_logits(twin, inputs)

    return forward
