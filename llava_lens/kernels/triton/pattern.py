"""The attention pattern of one query per row: scores and softmax in float32, nothing in between stored.

Unusual: scores are computed twice, once for their maximum and sum and once for the pattern. A head's keys are still in
the GPU's cache the second time, and room for float32 scores is not needed.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.kernels.triton.layout import check, launch

KEYS = 32
"""Keys that one program scores at a time."""


@triton.jit
@no_type_check
def _scores(query, k, seen, start, keys, k_key, seen_key, channel, inside, KEYS: tl.constexpr):
    """Scores of `KEYS` keys from `start` on; -inf for what is not there or not seen."""
    key = start + tl.arange(0, KEYS)
    there = key < keys
    tile = tl.load(k + key[:, None] * k_key + channel[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    score = tl.sum(tile.to(tl.float32) * query[None, :], 1)
    if seen is not None:
        there = there & (tl.load(seen + key * seen_key, mask=there, other=0) != 0)
    return tl.where(there, score, float("-inf"))


@triton.jit
@no_type_check
def last_row_kernel(
    q, k, seen, out, q_batch, q_head, k_batch, k_head, k_key, seen_batch, seen_key, heads, share, keys, width, scale,
    KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    query = tl.load(q + batch * q_batch + head * q_head + channel, mask=inside, other=0.0).to(tl.float32) * scale
    k += batch * k_batch + (head // share) * k_head
    if seen is not None:
        seen += batch * seen_batch

    top = float("-inf")
    total = 0.0
    for start in range(0, keys, KEYS):
        score = _scores(query, k, seen, start, keys, k_key, seen_key, channel, inside, KEYS)
        higher = tl.maximum(top, tl.max(score, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(score - base), 0)
        top = higher

    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)
    for start in range(0, keys, KEYS):
        score = _scores(query, k, seen, start, keys, k_key, seen_key, channel, inside, KEYS)
        key = start + tl.arange(0, KEYS)
        tl.store(out + row * keys + key, tl.exp(score - base) / total, mask=key < keys)


def last_row_pattern(
    q: Float[Tensor, "batch head d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    seen: Tensor | None,
) -> Float[Tensor, "batch head key"]:
    """As `fast.last_row_pattern`."""
    check("last_row_pattern", q, k)
    batch, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    if k.shape[0] != batch or k.shape[3] != width or not kv_heads or heads % kv_heads:
        raise LensError(
            f"last_row_pattern was given queries {list(q.shape)} and keys {list(k.shape)}, which do not fit"
        )
    if seen is not None and (seen.shape != (batch, keys) or seen.dtype != torch.bool):
        raise LensError(f"`seen` is {list(seen.shape)} {seen.dtype}; expected [{batch}, {keys}] torch.bool")
    q = q if q.stride(2) == 1 else q.contiguous()
    k = k if k.stride(3) == 1 else k.contiguous()
    out = torch.empty((batch, heads, keys), dtype=q.dtype, device=q.device)
    strides = *q.stride()[:2], *k.stride()[:3], *((0, 0) if seen is None else seen.stride())
    launch(
        last_row_kernel, (batch * heads,), q, k, seen, out, *strides, heads, heads // kv_heads, keys, width, scale,
        warps=4, KEYS=KEYS, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip
    return out
