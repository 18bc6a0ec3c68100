"""The same arithmetic in fewer steps, in plain torch: what the fused path runs where no kernel of its own does it.

Unusual: results are equal to the reference's up to rounding, not to the bit, and gradients are not its business: the
plan takes the reference path where they are asked for. Norms and softmax widen half precision to float32 inside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from llava_lens.kernels.reference import Queries, attention_pattern, attention_scores, upcast

CHUNK = {"cpu": 2**21, "cuda": 2**27}
"""How many logits are held at a time while increases are computed: what a processor's cache holds, or half a GiB."""
FULL = 256
"""Vectors at a time that a wide product needs to be fast, whatever a cache holds."""
FAR = 40.0
"""Logits that rise further than this above their mean are summed as logarithms: their exponentials may overflow."""


def rms_norm(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    eps: float,
    normalized: Float[Tensor, "*rows d"] | None = None,
) -> tuple[Tensor, Tensor]:
    """`weight ∘ x / rms(x)`, and the root mean square `[*rows, 1]` in float32 or better.

    `x / rms(x)` before the gain is written to `normalized`, where that is given.
    """
    wide = upcast(x)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).sqrt_()
    out = wide / scale
    if normalized is not None:
        normalized.copy_(out)
    return out.mul_(weight).to(x.dtype), scale


def add_rms_norm(
    x: Float[Tensor, "*rows d"],
    branch: Float[Tensor, "*rows d"],
    weight: Float[Tensor, " d"],
    eps: float,
    normalized: Float[Tensor, "*rows d"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum `x + branch`, its RMS norm times the gain, and the root mean square; `normalized` as in `rms_norm`."""
    total = x + branch
    return total, *rms_norm(total, weight, eps, normalized)


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


def increase_from_table(
    coefficients: Float[Tensor, "cell k"],
    table: Float[Tensor, "k d_vocab"],
    log_p: Float[Tensor, " d_vocab"],
    token: int,
    p: Float[Tensor, " d_vocab"],
) -> Float[Tensor, " cell"]:
    """What logits moved by `coefficients @ table` do to one token's log-probability, in nats."""
    coefficients, table = upcast(coefficients), upcast(table)
    held = CHUNK.get(table.device.type, CHUNK["cuda"]) // len(p)
    rows = min(len(coefficients), max(1, held, min(FULL, len(table) // 4)))
    logits = table.new_empty(rows, len(p))  # reused: fresh memory costs as much as the product
    parts = coefficients.split(max(1, rows))
    return torch.cat([shift(torch.mm(part, table, out=logits[: len(part)]), log_p, token, p) for part in parts])


def shift(
    delta: Float[Tensor, "cell d_vocab"],
    log_p: Float[Tensor, " d_vocab"],
    token: int,
    p: Float[Tensor, " d_vocab"] | None = None,
) -> Float[Tensor, " cell"]:
    """What logits moved by `delta` (overwritten) do to one token's log-probability: `δ_w − log Σ_v p_v exp(δ_v)`.

    Formed as first order less what it misses, `δ_w − E δ − log1p(Σ_v p_v expm1(δ_v − E δ))`, whose last sum is never
    negative (Jensen's inequality), so that nothing cancels.
    """
    p = log_p.exp() if p is None else p
    delta.sub_((delta @ p)[:, None])
    own = delta[:, token].clone()
    far = delta.amax(-1) > FAR
    beyond = torch.logsumexp(log_p + delta[far], -1)
    missed = torch.log1p(torch.mv(delta.expm1_(), p).clamp_(min=0))
    return own - missed.masked_scatter_(far, beyond)
