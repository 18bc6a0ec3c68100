"""Rotary position embedding in place, on queries or keys that may be slices of one wider product.

Unusual: every stride of what is rotated is the kernel's to follow, since a copy could not be rotated in place. Queries
and keys that lie side by side in one product can be rotated in one call, as heads of one tensor.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from llava_lens.errors import LensError
from llava_lens.kernels.triton.layout import check, launch

TILE = 2048
"""Pairs of channels that one program turns."""


@triton.jit
@no_type_check
def rotate_kernel(
    x, cos, sin, x_batch, x_position, x_head, x_channel, cos_batch, cos_position, sin_batch, sin_position, positions,
    heads, half, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, position = row // positions, row % positions
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    channel = tl.arange(0, HALF)
    pair = channel < half
    inside = (head < heads) & pair[None, :]

    cos += batch * cos_batch + position * cos_position + channel
    sin += batch * sin_batch + position * sin_position + channel
    first_cos = tl.load(cos, mask=pair, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin, mask=pair, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + half, mask=pair, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + half, mask=pair, other=0.0).to(tl.float32)[None, :]

    x += batch * x_batch + position * x_position + head * x_head + channel[None, :] * x_channel
    first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + half * x_channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(x, first * first_cos - second * first_sin, mask=inside)
    tl.store(x + half * x_channel, second * second_cos + first * second_sin, mask=inside)


def _angles(name: str, angles: Tensor, batch: int, positions: int, width: int) -> tuple[Tensor, int, int]:
    """Angles with adjacent channels, and their strides over the batch and positions."""
    if angles.ndim != 4 or angles.shape[0] not in (1, batch) or angles.shape[1:] != (1, positions, width):
        raise LensError(f"{name} has shape {list(angles.shape)}; expected [1 or {batch}, 1, {positions}, {width}]")
    angles = angles if angles.stride(3) == 1 else angles.contiguous()
    return angles, 0 if angles.shape[0] == 1 else angles.stride(0), angles.stride(2)


def rotate_(x: Float[Tensor, "batch pos head d_head"], cos: Float[Tensor, "#batch 1 pos d_head"], sin: Tensor) -> None:
    """As `fast.rotate_`."""
    check("rotate_", x, cos, sin)
    batch, positions, heads, width = x.shape
    if width % 2 or not width:
        raise LensError(f"heads of {width} channels have no pairs to rotate; d_head must be even")
    if any(size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise LensError("rotate_ writes in place, and an expanded tensor shares its elements; rotate before expanding")
    cos, *cos_strides = _angles("cos", cos, batch, positions, width)
    sin, *sin_strides = _angles("sin", sin, batch, positions, width)
    half = triton.next_power_of_2(width // 2)
    tile = max(1, min(triton.next_power_of_2(max(1, heads)), TILE // half))
    sizes = positions, heads, width // 2
    launch(
        rotate_kernel, (batch * positions, triton.cdiv(heads, tile)), x, cos, sin, *x.stride(), *cos_strides,
        *sin_strides, *sizes, warps=4, HEADS=tile, HALF=half,
    )  # fmt: skip
