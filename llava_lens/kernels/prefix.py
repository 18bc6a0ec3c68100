"""Attention of many runs that share their first positions: one prefix of keys and values, not one copy per run.

Unusual: with few queries per run the queries of all runs meet the shared prefix in one matrix product, so nothing is
copied; with many, the copy is small beside the rest, and torch's fused kernel takes over.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens.kernels.reference import Queries, attention, attention_scores

OwnKeys = Float[Tensor, "batch kv_head own d_head"]
SharedKeys = Float[Tensor, "kv_head prefix d_head"]
Visible = Bool[Tensor, "query own"]
FEW_QUERIES = 16
"""Up to this many queries per run the scores are formed against the prefix without copying it."""


def attention_after(
    q: Queries, prefix_k: SharedKeys, prefix_v: SharedKeys, k: OwnKeys, v: OwnKeys, scale: float, visible: Visible
) -> Queries:
    """Softmax attention on a prefix that all runs share, seen whole, and on the run's own keys where `visible`."""
    if prefix_k.shape[1] == 0:
        return attention(q, k, v, scale, visible[None, None].expand(len(q), -1, -1, -1), False)
    if q.shape[2] > FEW_QUERIES:
        everything = visible.new_ones(len(visible), prefix_k.shape[1])
        allowed = torch.cat((everything, visible), -1)[None, None].expand(len(q), -1, -1, -1)
        return attention(q, behind(prefix_k, k), behind(prefix_v, v), scale, allowed, False)
    scores = scores_after(q, prefix_k, k, scale, visible)
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    return mix_after(torch.softmax(scores, -1, dtype=wide).to(scores.dtype), prefix_v, v)


def behind(prefix: SharedKeys, own: OwnKeys) -> Float[Tensor, "batch kv_head key d_head"]:
    """The prefix copied in front of each run's own keys or values."""
    return torch.cat((prefix[None].expand(len(own), -1, -1, -1), own), dim=2)


def scores_after(
    q: Queries, prefix_k: SharedKeys, k: OwnKeys, scale: float, visible: Visible
) -> Float[Tensor, "batch head query key"]:
    """Scaled dot products with the prefix, then with the run's own keys; -inf where those are not visible."""
    batch, heads, length, width = q.shape
    kv_heads, prefix, rows = k.shape[1], prefix_k.shape[1], heads // k.shape[1] * length
    shared = q.reshape(batch, kv_heads, rows, width).transpose(0, 1).reshape(kv_heads, batch * rows, width)
    ahead = torch.matmul(shared, prefix_k.transpose(1, 2)).reshape(kv_heads, batch, rows, prefix)
    ahead = ahead.transpose(0, 1).reshape(batch, heads, length, prefix) * scale
    own = attention_scores(q, k, scale, visible[None, None], False)
    return torch.cat((ahead, own), -1)


def mix_after(pattern: Float[Tensor, "batch head query key"], prefix_v: SharedKeys, v: OwnKeys) -> Queries:
    """Values of the prefix and of the run averaged with the pattern's weights."""
    batch, heads, length, _ = pattern.shape
    kv_heads, prefix, width = prefix_v.shape
    rows = heads // kv_heads * length
    grouped = pattern.reshape(batch, kv_heads, rows, pattern.shape[-1])
    ahead = grouped[..., :prefix].transpose(0, 1).reshape(kv_heads, batch * rows, prefix)
    ahead = torch.matmul(ahead, prefix_v).reshape(kv_heads, batch, rows, width).transpose(0, 1)
    return (ahead + torch.matmul(grouped[..., prefix:], v)).reshape(batch, heads, length, width)
