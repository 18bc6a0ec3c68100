"""The same arithmetic in fewer steps: what the fused path runs where no kernel of its own does it.

Unusual: results are equal to the reference's up to rounding, not to the bit, and gradients are not its business: the
plan takes the reference path where they are asked for. Half precision is widened to float32 inside.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llava_lens.kernels.reference import Queries, attention_pattern, attention_scores, upcast


def rms_norm(x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float) -> tuple[Tensor, Tensor]:
    """`weight ∘ x / rms(x)`, and the root mean square `[*rows, 1]` in float32 or better."""
    wide = upcast(x)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(constant(eps, wide.dtype, wide.device), length, length, value=1 / x.shape[-1]).sqrt_()
    return (wide / scale).mul_(weight).to(x.dtype), scale


@lru_cache(maxsize=64)
def constant(value: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, ""]:
    """A number as a tensor, made once."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def add_rms_norm(
    x: Float[Tensor, "*rows d"], branch: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum `x + branch`, its RMS norm times the gain, and the root mean square."""
    total = x + branch
    return total, *rms_norm(total, weight, eps)


def layer_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, " d"], bias: Float[Tensor, " d"], eps: float
) -> Float[Tensor, "*rows d"]:
    """`weight ∘ (x − mean) / std + bias`."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Float[Tensor, "*rows d"],
    branch: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    bias: Float[Tensor, " d"],
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The sum `x + branch`, and its layer norm."""
    total = x + branch
    return total, layer_norm(total, weight, bias, eps)


def rotate_(x: Float[Tensor, "batch pos head d_head"], cos: Float[Tensor, "#batch 1 pos d_head"], sin: Tensor) -> None:
    """Rotary position embedding of queries or keys, in place; cosines and sines as `reference.rotate` takes them."""
    half = x.shape[-1] // 2
    turned = x.roll(half, -1)
    turned[..., :half].neg_()
    x.mul_(cos.transpose(1, 2)).addcmul_(turned, sin.transpose(1, 2))


def swiglu(gate: Float[Tensor, "*rows d"], up: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """`silu(gate) ∘ up`."""
    return F.silu(gate).mul_(up)


def quick_gelu(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """`x · sigmoid(1.702 x)`, CLIP's activation."""
    return torch.sigmoid(1.702 * x).mul_(x)


def add_linear(
    x: Float[Tensor, "*rows d"],
    z: Float[Tensor, "*rows k"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    spend: bool = False,
) -> Float[Tensor, "*rows d"]:
    """`x + z Wᵀ + bias`, the sum inside the matrix product; with `spend` it may be written over `x`.

    On a CPU a product that adds is no faster than one that does not, and with a bias it has its addend.
    """
    if not x.is_cuda or bias is not None:
        return F.linear(z, weight, bias).add_(x)
    flat, rows = x.flatten(0, -2), z.flatten(0, -2)
    total = flat.addmm_(rows, weight.T) if spend else torch.addmm(flat, rows, weight.T)
    return total.view(x.shape)


def last_row_pattern(
    q: Float[Tensor, "batch head d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    seen: Tensor | None,
) -> Float[Tensor, "batch head key"]:
    """What one query per row attends to; `seen [batch, key]` None means every key. A blind query gets zeros."""
    allowed = None if seen is None else seen[:, None, None]
    query: Queries = q[:, :, None]
    return attention_pattern(attention_scores(query, k, scale, allowed, False))[:, :, 0]
