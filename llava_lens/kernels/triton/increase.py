"""What vectors do to one token's log-probability, from a table of logits, without storing the logits they make.

With `p` the probabilities, `δ` the change of the logits and `w` the token: `δ_w − E δ − log1p(Σ p (expm1(δ') − δ'))`,
`δ' = δ − E δ`. Unusual: `Σ p δ'` is zero, so it is left out; all that remains is positive, and what a matrix product
in low precision gets wrong reaches the result only through the second-order term. The first-order term is formed apart,
in float32. Logits that rise too far for their exponential are summed as logarithms, in tiles that have any; beside it
what is left out with them, `1 + δ'`, is nothing.
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
from llava_lens.kernels.fast import FAR
from llava_lens.kernels.reference import upcast
from llava_lens.kernels.triton.layout import alike, check, launch

PROGRAMS = 264
"""At least so many programs share the work where there are few cells: two for each processor of the largest GPUs."""
TILE = {"TOKENS": 64, "DEPTH": 32}
FEW = 64
"""Cells of a program; twice as many where there are more, so that the table is read half as often."""


@triton.jit
@no_type_check
def _beyond_first(x):
    """`expm1(x) − x`, without cancellation near zero."""
    series = x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    return tl.where(tl.abs(x) < 0.4, series, tl.exp(x) - 1.0 - x)


@triton.jit
@no_type_check
def _product(coefficients, table, cell, token, c_row, c_column, t_row, t_column, cells, depth, tokens,
             CELLS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One tile of `coefficients @ table` in float32."""
    made = tl.zeros((CELLS, TOKENS), tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = coefficients + cell[:, None] * c_row + k[None, :] * c_column
        right = table + k[:, None] * t_row + token[None, :] * t_column
        left = tl.load(left, mask=(cell < cells)[:, None] & (k < depth)[None, :], other=0.0)
        right = tl.load(right, mask=(k < depth)[:, None] & (token < tokens)[None, :], other=0.0)
        made = tl.dot(left, right, made, input_precision=PRECISION)
    return made


@triton.jit
@no_type_check
def increase_kernel(
    coefficients, table, log_p, p, mean, missed, peak, heap, c_row, c_column, t_row, t_column, cells, depth, tokens,
    tiles, FAR: tl.constexpr, CELLS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * CELLS + tl.arange(0, CELLS)
    part = tl.program_id(1)
    centre = tl.load(mean + cell, mask=cell < cells, other=0.0)
    near = tl.zeros((CELLS,), tl.float32)
    top = tl.full((CELLS,), float("-inf"), tl.float32)
    rest = tl.zeros((CELLS,), tl.float32)
    for tile in range(part * tiles, tl.minimum((part + 1) * tiles, tl.cdiv(tokens, TOKENS))):
        token = (tile * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        there = token < tokens
        delta = _product(coefficients, table, cell, token, c_row, c_column, t_row, t_column, cells, depth, tokens,
                         CELLS, TOKENS, DEPTH, PRECISION)  # fmt: skip
        delta -= centre[:, None]
        weight = tl.load(p + token, mask=there, other=0.0)[None, :]
        if tl.max(tl.max(delta, 1), 0) <= FAR:
            near += tl.sum(weight * _beyond_first(delta), 1)
        else:
            far = delta > FAR
            near += tl.sum(weight * tl.where(far, 0.0, _beyond_first(tl.minimum(delta, FAR))), 1)
            log_weight = tl.load(log_p + token, mask=there, other=float("-inf"))[None, :]
            risen = tl.where(far, delta + log_weight, float("-inf"))
            higher = tl.maximum(top, tl.max(risen, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            rest = rest * tl.exp(top - base) + tl.sum(tl.exp(risen - base[:, None]), 1)
            top = higher
    place = part.to(tl.int64) * cells + cell
    tl.store(missed + place, near, mask=cell < cells)
    tl.store(peak + place, top, mask=cell < cells)
    tl.store(heap + place, rest, mask=cell < cells)


def precision(dtype: torch.dtype) -> str:
    """How float32 tiles are multiplied: in three TF32 products, nearly exact, unless torch itself was allowed one."""
    exact = dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
    return "tf32x3" if exact else "tf32"


def increase_from_table(
    coefficients: Float[Tensor, "cell k"],
    table: Float[Tensor, "k d_vocab"],
    log_p: Float[Tensor, " d_vocab"],
    token: int,
    p: Float[Tensor, " d_vocab"],
) -> Float[Tensor, " cell"]:
    """As `fast.increase_from_table`. A table whose `k` lies adjacent in memory, `[d_vocab, k]`, suits TF32 best."""
    check("increase_from_table", coefficients, table, log_p, p)
    alike("increase_from_table", log_p, p)
    (cells, depth), (rows, tokens) = coefficients.shape, table.shape
    if rows != depth or len(p) != tokens or coefficients.dtype != table.dtype or p.dtype != torch.float32:
        given = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (coefficients, table, p))
        raise LensError(f"increase_from_table was given {given}; expected [cell, k] and [k, v] alike, [v] in float32")
    others = p.clone()
    others[token] = 0.0
    wide, own = upcast(table), upcast(table[:, token])
    direction = own * others.sum() - torch.mv(wide, others)  # `own - wide @ p`, the token's own terms cancelled
    first, mean = torch.mv(upcast(coefficients), direction), torch.mv(upcast(coefficients), own - direction)

    tile = FEW if cells <= FEW else 2 * FEW
    blocks, tiles = triton.cdiv(cells, tile), triton.cdiv(tokens, TILE["TOKENS"])
    each = triton.cdiv(tiles, min(tiles, triton.cdiv(PROGRAMS, max(1, blocks))))
    parts = triton.cdiv(tiles, each)
    missed, peak, heap = torch.empty((3, parts, cells), dtype=torch.float32, device=p.device)
    tensors = coefficients, table, log_p.contiguous(), p.contiguous(), mean, missed, peak, heap
    strides = *coefficients.stride(), *table.stride()
    launch(
        increase_kernel, (blocks, parts), *tensors, *strides, cells, depth, tokens, each, warps=tile // 16,
        FAR=FAR, CELLS=tile, PRECISION=precision(table.dtype), **TILE,
    )  # fmt: skip
    risen = (peak + heap.log()).logsumexp(0)
    return first - torch.logaddexp(missed.sum(0).log1p(), risen)
