"""How tensors reach a kernel: checked, seen as rows with one stride, and launched.

Unusual: every launch goes through `launch`, so that a test can see what would be compiled without a GPU.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from llava_lens.errors import LensError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 65536
"""Channels of a row that one program holds at once."""


def launch(kernel: Any, grid: tuple[int, ...], *given: Any, warps: int, **constants: Any) -> None:
    """Run a kernel over a grid; a grid without programs is not run."""
    if all(grid):
        kernel[grid](*given, num_warps=warps, enable_fp_fusion=True, **constants)


@triton.jit
@no_type_check
def _nothing():
    pass


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which is decided where they are defined."""
    return not isinstance(_nothing, triton.JITFunction)


def check(name: str, *tensors: Tensor | None) -> None:
    """All of a dtype that the kernels compute with, on one device; else a `LensError`."""
    given = [tensor for tensor in tensors if tensor is not None]
    if wrong := [tensor.dtype for tensor in given if tensor.dtype not in DTYPES]:
        raise LensError(
            f"{name} has no kernel for {wrong[0]}; it takes {', '.join(map(str, DTYPES))}: "
            "convert, or run inside `kernels.pinned('fast')`"
        )
    if len(devices := {tensor.device for tensor in given}) > 1:
        raise LensError(
            f"{name} was given tensors on {' and '.join(sorted(map(str, devices)))}; move them to one device"
        )


def alike(name: str, one: Tensor, other: Tensor) -> None:
    """Same shape and dtype, else a `LensError`."""
    if one.shape != other.shape or one.dtype != other.dtype:
        shapes = " and ".join(f"{list(x.shape)} {x.dtype}" for x in (one, other))
        raise LensError(f"{name} was given {shapes}; both must have one shape and dtype")


def rows(x: Float[Tensor, "*rows d"]) -> Float[Tensor, "row d"]:
    """A tensor as rows of adjacent channels; a view where one stride can say it, else a copy."""
    width = x.shape[-1]
    if not 0 < width <= WIDEST:
        raise LensError(f"rows of {width} channels; kernels take 1 to {WIDEST}")
    flat = x.reshape(-1, width)
    return flat if flat.stride(1) == 1 or width == 1 else flat.contiguous()


def fresh(x: Tensor) -> Tensor:
    """Room for a contiguous result like `x`."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
