"""Hugging Face's model in other guises over the same weights: eager attention, compiled, with liger-kernel's kernels.

Unusual: a twin's parameters are views, so a model of real size is in memory once, whatever is compared on it.
"""

from __future__ import annotations

import copy
import signal
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
from llava_lens import Inputs

Forward = Callable[[Inputs], Tensor]
"""From inputs to the last position's logits."""
PATIENCE = 60
"""Seconds that compiling may take on a CPU."""


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
def within(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in a block that takes longer; 0 waits for ever."""

    def give_up(*_: Any) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def compiled(hf: Any, inputs: Inputs, quick: bool) -> Forward | str:
    """The decoder under `torch.compile`, ready for inputs of this shape, or why not."""
    if quick:
        return "compiling takes longer than the rest of a quick run"
    twin = sharing(hf)
    twin.model.language_model = torch.compile(twin.model.language_model, dynamic=False)
    try:
        with within(0 if hf.device.type == "cuda" else PATIENCE), torch.inference_mode():
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
