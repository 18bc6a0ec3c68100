"""Activation functions by the names that checkpoints give them.

Unusual: those of published checkpoints are listed here, so that transformers' own list is imported only for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's GELU, approximated by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""Activation functions of published checkpoints; `activation` finds the rest in transformers."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a checkpoint's config means by this name. Raises `ValueError` for an unknown one."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]
