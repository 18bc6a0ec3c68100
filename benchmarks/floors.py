"""The least time that some work can take: its operations and its bytes, counted from shapes, under measured ceilings.

Unusual: what is counted is too little on purpose. Activations between layers move no bytes, and norms, softmaxes and
other elementwise steps are free, so a floor lies below what any implementation reaches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from benchmarks.measure import settled_heap, timed
from benchmarks.models import Size

FLOOR = (
    "floor: max(operations / best rate of a square matmul, bytes / rate of a copy), rates measured in the same run; "
    "counted are matrix products, attention (causal pairs only), weights and cached keys and values read once, and "
    "what is kept written once, every position through every layer; of floor: floor / seconds, above 1 where a "
    "ceiling was measured too low or a cache held what was read."
)
"""The formula, in words."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes that cannot be avoided."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


@dataclass(frozen=True)
class Ceilings:
    """What the machine does at most, per second."""

    flops: float
    bytes: float
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.flops / 1e9:.0f} GFLOP/s {str(self.dtype).removeprefix('torch.')}, {self.bytes / 1e9:.1f} GB/s"


def floor(work: Work, limits: Ceilings) -> float:
    """Seconds, as if arithmetic and memory overlapped entirely: `max(flops / flops_per_s, bytes / bytes_per_s)`."""
    return max(work.flops / limits.flops, work.bytes / limits.bytes)


@lru_cache
def ceilings(device: str, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """The best of five square matmuls of each of three sizes, and of five copies, on the threads that torch has."""
    large = device.startswith("cuda")
    sides = (128, 256, 512) if quick else (2048, 4096, 8192) if large else (512, 1024, 2048)
    source = torch.zeros((16 if quick else 1024 if large else 256) * 2**20, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    with settled_heap():
        rates = [multiply(n, device, dtype) for n in sides for _ in range(5)]
        copy = min(timed(lambda: target.copy_(source), device)[0] for _ in range(5))
    return Ceilings(max(rates), 2 * len(source) / copy, dtype)


def multiply(n: int, device: str, dtype: torch.dtype) -> float:
    """Operations per second of one product of `n × n` matrices."""
    square = torch.randn(n, n, device=device).to(dtype)
    product = torch.empty_like(square)
    return 2 * n**3 / timed(lambda: torch.matmul(square, square, out=product), device)[0]


def tower(size: Size, images: int, itemsize: int) -> Work:
    """The layers of the tower whose output is read (all but the last), and the projector."""
    width, patches = size.tower_d_model, size.grid**2
    layers = size.tower_layers - 1
    in_layers, at_patches = 12 * layers * width**2, 3 * 8 * 8 * width + width * size.d_model + size.d_model**2
    products = 2 * ((patches + 1) * in_layers + patches * at_patches)
    attention = 4 * layers * width * (patches + 1) ** 2
    return Work(images * (products + attention), itemsize * (in_layers + at_patches))


def decoder(size: Size, batch: int, new: int, itemsize: int, seen: int = 0) -> Work:
    """`new` positions of each row through every layer, behind `seen` cached ones, and logits of the last."""
    d_head = size.d_model // size.heads
    layer = size.d_model * (2 * d_head * (size.heads + size.kv_heads) + 3 * size.d_mlp)
    unembed = size.d_model * size.vocab
    pairs = new * seen + new * (new + 1) / 2
    products = 2 * (new * size.layers * layer + unembed)
    attention = 4 * size.layers * size.d_model * pairs
    cached = 2 * size.layers * size.kv_heads * d_head * batch * seen
    return Work(batch * (products + attention), itemsize * (size.layers * layer + unembed + cached))


def prefill(size: Size, batch: int, itemsize: int) -> Work:
    """Pictures and prompts to the last position's logits."""
    return tower(size, batch * size.images, itemsize) + decoder(size, batch, size.positions, itemsize)


def rerun(size: Size, layer: int, rows: int, from_middle: bool = False) -> Work:
    """The last `rows` positions through the layers from `layer` on, behind cached ones, to the last one's logits.

    In the last layer only keys and values are needed of the rows before the last. `from_middle` begins behind the
    attention of `layer`. Weights are read once for many such runs, and no bytes are counted.
    """
    d_head, last = size.d_model // size.heads, size.layers - 1
    keys = 2 * size.d_model * d_head * size.kv_heads
    attention, mlp = 2 * size.d_model**2, 3 * size.d_model * size.d_mlp
    pairs = rows * (size.positions - rows) + rows * (rows + 1) / 2
    whole = 2 * rows * (keys + attention + mlp) + 4 * size.d_model * pairs
    ending = 2 * (rows * keys + attention + mlp) + 4 * size.d_model * size.positions
    logits = 2 * size.d_model * size.vocab
    if from_middle and layer == last:
        return Work(2 * mlp + logits)
    if from_middle:
        return Work(2 * rows * mlp) + rerun(size, layer + 1, rows)
    return Work((last - layer) * whole + ending + logits)


def sweep(size: Size, itemsize: int, runs: Iterable[Work], pictures: int = 2) -> Work:
    """A clean and a corrupt run with as many pictures between them, and what every cell adds."""
    both = tower(size, pictures * size.images, itemsize) + decoder(size, 2, size.positions, itemsize)
    return sum(runs, both)
