"""RMS norm and layer norm, each with or without the sum that comes before it.

Unusual: one program holds one row in registers, so a row is read once however many results it has. What is emitted
besides the normed row only adds stores: the normed row's bits are the same.
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
from llava_lens.kernels.triton.layout import alike, check, fresh, launch, rows

Rows = Float[Tensor, "*rows d"]
Channels = Float[Tensor, " d"]


@triton.jit
@no_type_check
def _summed(x, branch, total, row, x_row, branch_row, column, width):
    """One row of the stream in float32: as it is, or with the branch added, rounded and stored."""
    inside = column < width
    value = tl.load(x + row * x_row + column, mask=inside, other=0.0)
    if branch is not None:
        added = tl.load(branch + row * branch_row + column, mask=inside, other=0.0)
        value = (value.to(tl.float32) + added.to(tl.float32)).to(total.dtype.element_ty)
        tl.store(total + row * width + column, value, mask=inside)
    return value.to(tl.float32)


@triton.jit
@no_type_check
def rms_norm_kernel(
    x, branch, weight, total, out, scale, normalized, x_row, branch_row, normalized_row, width, eps, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = _summed(x, branch, total, row, x_row, branch_row, column, width)
    length = tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    tl.store(scale + row, length)
    wide = wide / length
    if normalized is not None:
        tl.store(normalized + row * normalized_row + column, wide, mask=inside)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, wide * gain, mask=inside)


@triton.jit
@no_type_check
def layer_norm_kernel(x, branch, weight, bias, total, out, x_row, branch_row, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    wide = _summed(x, branch, total, row, x_row, branch_row, column, width)
    centered = tl.where(inside, wide - tl.sum(wide, 0) / width, 0.0)
    centered = centered / tl.sqrt(tl.sum(centered * centered, 0) / width + eps)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, centered * gain + offset, mask=inside)


def _shape(width: int) -> dict[str, int]:
    """Registers for one row, and 512 channels to a warp."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "warps": min(16, max(1, block // 512))}


def _gain(name: str, weight: Channels, width: int) -> Channels:
    if weight.shape != (width,):
        raise LensError(f"{name} was given weights {list(weight.shape)} for rows of {width} channels")
    return weight.contiguous()


def _rms_norm(
    x: Rows, branch: Rows | None, weight: Channels, eps: float, normalized: Rows | None
) -> tuple[Tensor, ...]:
    check("rms_norm", x, branch, weight, normalized)
    given, added = rows(x), None if branch is None else rows(branch)
    width = given.shape[1]
    out, total = fresh(x), None if added is None else fresh(x)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if normalized is not None:
        if normalized.shape != x.shape or not normalized.is_contiguous():
            raise LensError(f"normalized rows of {list(x.shape)} need contiguous room of that shape to be written to")
        normalized = normalized.view(given.shape)
    strides = [0 if rows is None else rows.stride(0) for rows in (given, added, normalized)]
    tensors = given, added, _gain("rms_norm", weight, width), total, out, scale, normalized
    launch(rms_norm_kernel, (len(given),), *tensors, *strides, width, eps, **_shape(width))
    return (out, scale) if total is None else (total, out, scale)


def rms_norm(x: Rows, weight: Channels, eps: float, normalized: Rows | None = None) -> tuple[Tensor, Tensor]:
    """As `fast.rms_norm`."""
    out, scale = _rms_norm(x, None, weight, eps, normalized)
    return out, scale


def add_rms_norm(
    x: Rows, branch: Rows, weight: Channels, eps: float, normalized: Rows | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `fast.add_rms_norm`."""
    alike("add_rms_norm", x, branch)
    total, out, scale = _rms_norm(x, branch, weight, eps, normalized)
    return total, out, scale


def _layer_norm(x: Rows, branch: Rows | None, weight: Channels, bias: Channels, eps: float) -> tuple[Tensor, ...]:
    check("layer_norm", x, branch, weight, bias)
    given, added = rows(x), None if branch is None else rows(branch)
    width = given.shape[1]
    out, total = fresh(x), None if added is None else fresh(x)
    strides = [0 if rows is None else rows.stride(0) for rows in (given, added)]
    tensors = given, added, _gain("layer_norm", weight, width), _gain("layer_norm", bias, width), total, out
    launch(layer_norm_kernel, (len(given),), *tensors, *strides, width, eps, **_shape(width))
    return (out,) if total is None else (total, out)


def layer_norm(x: Rows, weight: Channels, bias: Channels, eps: float) -> Rows:
    """As `fast.layer_norm`."""
    (out,) = _layer_norm(x, None, weight, bias, eps)
    return out


def add_layer_norm(x: Rows, branch: Rows, weight: Channels, bias: Channels, eps: float) -> tuple[Tensor, Tensor]:
    """As `fast.add_layer_norm`."""
    alike("add_layer_norm", x, branch)
    total, out = _layer_norm(x, branch, weight, bias, eps)
    return total, out
