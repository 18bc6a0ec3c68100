"""Reference operations in plain torch: the same operations, in the same order, as Hugging Face runs them.

Unusual: float64 stays float64 throughout (Hugging Face drops to float32 inside norms and rotary embeddings), so that
the same code serves as a precise oracle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

Queries = Float[Tensor, "batch head query d_head"]
Keys = Float[Tensor, "batch kv_head key d_head"]
Allowed = Bool[Tensor, "#batch 1 query key"]
MAX_GQA_WIDTH = 256
"""Above this head width torch's grouped-query attention falls back to the slow path, so the heads are repeated."""


def upcast(x: Tensor) -> Tensor:
    """At least float32."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm_parts(x: Float[Tensor, "*rows d"], eps: float) -> tuple[Tensor, Tensor]:
    """`x / rms(x)` in the precision it was computed in, and the mean square plus `eps` (shape `[*rows, 1]`)."""
    x = upcast(x)
    mean_square = x.pow(2).mean(-1, keepdim=True) + eps
    return x * torch.rsqrt(mean_square), mean_square


def layer_norm_parts(x: Float[Tensor, "*rows d"], eps: float) -> tuple[Tensor, Tensor]:
    """`x` minus its mean, and the standard deviation it is divided by (shape `[*rows, 1]`)."""
    x = upcast(x)
    centered = x - x.mean(-1, keepdim=True)
    return centered, (centered.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def _half_turn(x: Tensor) -> Tensor:
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-second, first), dim=-1)


def rotate(x: Queries, cos: Float[Tensor, "#batch 1 query d_head"], sin: Tensor) -> Queries:
    """Rotary position embedding of queries or keys; wider angles are rounded only at the end."""
    return ((x * cos) + (_half_turn(x) * sin)).to(x.dtype)


def repeat_heads(x: Keys, n: int) -> Tensor:
    """Every key/value head `n` times in a row, so that each query head has its own."""
    if n == 1:
        return x
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, n, length, width).reshape(batch, heads * n, length, width)


def attention(q: Queries, k: Keys, v: Keys, scale: float, allowed: Allowed | None, causal: bool) -> Queries:
    """Softmax attention by torch's fused kernel. `allowed` None means all keys, or all earlier ones if `causal`.

    A query that may look at nothing gets zeros.
    """
    share = q.shape[1] // k.shape[1]
    length = q.shape[2]
    options = {}
    if share > 1:
        if allowed is None and k.shape[-1] <= MAX_GQA_WIDTH:
            options["enable_gqa"] = True
        elif length == 1:  # one query: its heads become the rows of their key/value head, nothing is repeated
            q = q.reshape(q.shape[0], k.shape[1], share, q.shape[-1])
        else:
            k, v = repeat_heads(k, share), repeat_heads(v, share)
    causal = causal and allowed is None and length > 1
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, is_causal=causal, **options)
    return z.reshape(z.shape[0], -1, length, z.shape[-1])


def attention_scores(
    q: Queries, k: Keys, scale: float, allowed: Allowed | None, causal: bool, uniform_dead_rows: bool = False
) -> Float[Tensor, "batch head query key"]:
    """Scaled dot products before the softmax; what a query may not see is -inf.

    With `uniform_dead_rows` a query that may see nothing scores every key alike, as Hugging Face's eager attention
    does; otherwise its row is all -inf.
    """
    scores = torch.matmul(q, repeat_heads(k, q.shape[1] // k.shape[1]).transpose(2, 3)) * scale
    if allowed is None and causal:
        query, key = scores.shape[-2:]
        allowed = torch.ones(query, key, dtype=torch.bool, device=q.device).tril(key - query)[None, None]
    if allowed is None:
        return scores
    scores = scores.masked_fill(~allowed, -torch.inf)
    if uniform_dead_rows:
        scores = scores.masked_fill(~allowed.any(-1, keepdim=True), torch.finfo(scores.dtype).min)
    return scores


def attention_pattern(scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Softmax over keys, computed in float32 or better; a row of nothing but -inf becomes zeros."""
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    pattern = torch.softmax(scores.masked_fill(dead, 0.0), dim=-1, dtype=wide).to(scores.dtype)
    return pattern.masked_fill(dead, 0.0)  # filled on both sides of the softmax, so that no gradient is NaN


def mix_values(pattern: Float[Tensor, "batch head query key"], v: Keys) -> Queries:
    """Values averaged with the pattern's weights."""
    return torch.matmul(pattern, repeat_heads(v, pattern.shape[1] // v.shape[1]))
