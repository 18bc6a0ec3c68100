"""SwiGLU of gates and values that may be halves of one product, and CLIP's QuickGELU.

Unusual: half precision is rounded once, at the end; plain torch rounds after each of its steps.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from llava_lens.kernels.triton.layout import alike, check, fresh, launch, rows

Rows = Float[Tensor, "*rows d"]
BLOCK = 1024
"""Elements of one program."""


@triton.jit
@no_type_check
def swiglu_kernel(gate, up, out, gate_row, up_row, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gated = tl.load(gate + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(up + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, gated / (1.0 + tl.exp(-gated)) * value, mask=inside)


@triton.jit
@no_type_check
def quick_gelu_kernel(x, out, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, value / (1.0 + tl.exp(-1.702 * value)), mask=inside)


def swiglu(gate: Rows, up: Rows) -> Rows:
    """As `fast.swiglu`."""
    check("swiglu", gate, up)
    alike("swiglu", gate, up)
    gates, values, out = rows(gate), rows(up), fresh(gate)
    count, width = gates.shape
    strides = gates.stride(0), values.stride(0)
    grid = count, triton.cdiv(width, BLOCK)
    launch(swiglu_kernel, grid, gates, values, out, *strides, width, warps=4, BLOCK=BLOCK)
    return out


def quick_gelu(x: Rows) -> Rows:
    """As `fast.quick_gelu`."""
    check("quick_gelu", x)
    out = fresh(x)
    launch(quick_gelu_kernel, (triton.cdiv(x.numel(), BLOCK),), x.contiguous(), out, x.numel(), warps=4, BLOCK=BLOCK)
    return out
