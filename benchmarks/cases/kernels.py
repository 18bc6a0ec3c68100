"""Each operation of `llava_lens.kernels.fast`, and on CUDA its Triton kernel, beside the reference's steps and torch's.

Unusual: one run goes through several copies of the inputs, more than a cache holds, so that memory is what is measured;
what is compared is computed once more outside the time, on inputs that nothing has overwritten. A kernel stays in the
library only while this shows that it wins.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Found
from benchmarks.compare import Settings, Variant, compare
from benchmarks.floors import Work
from benchmarks.models import SIZES, Size
from benchmarks.rows import LeftOut
from llava_lens import kernels
from llava_lens.kernels import fast

EPS = 1e-5
AGAINST = "the reference's steps in float64, on the same inputs (outputs of the operation)"
Make = Callable[..., Tensor]
"""From lengths to random numbers on the device, in the dtype."""


@dataclass(frozen=True)
class Operation:
    """What `fast.<name>` does: its inputs by size and batch, the reference's steps, torch's own function if there is
    one, which of several results is compared, and how many elements are read and written at least."""

    name: str
    inputs: Callable[[Size, int, Make], list[Any]]
    reference: Callable[..., Tensor]
    torch: Callable[..., Tensor] | None
    moved: Callable[..., int]
    main: int = 0
    flops: Callable[..., float] = lambda *_: 0.0

    def run(self, function: Callable[..., Any], given: list[Any]) -> Tensor:
        """The result that is compared; an operation in place leaves it in its first argument."""
        found = function(*given)
        return given[0] if found is None else found[self.main] if isinstance(found, tuple) else found


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The reference path's steps."""
    return weight * kernels.rms_norm_parts(x, eps)[0].to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The reference path's."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def pattern(q: Tensor, k: Tensor, scale: float, _: None) -> Tensor:
    """The reference path's steps for one query."""
    return kernels.attention_pattern(kernels.attention_scores(q[:, :, None], k, scale, None, False))[:, :, 0]


def increase(coefficients: Tensor, table: Tensor, log_p: Tensor, token: int, _: Tensor) -> Tensor:
    """Two log-softmaxes and their difference."""
    moved = log_p + coefficients @ table
    return moved.log_softmax(-1)[:, token] - log_p.log_softmax(-1)[token]


def stream(size: Size, batch: int, make: Make, *, parts: int = 1, tower: bool = False) -> list[Tensor]:
    """As many streams of the decoder or the tower."""
    shape = (batch, size.grid**2 + 1, size.tower_d_model) if tower else (batch, size.positions, size.d_model)
    return [make(*shape) for _ in range(parts)]


def gains(width: int, make: Make, parts: int = 1) -> list[Any]:
    """Gain, or gain and bias, and epsilon."""
    return [*(make(width) for _ in range(parts)), EPS]


def angled(size: Size, batch: int, make: Make) -> list[Tensor]:
    """Queries of all heads, cosines and sines."""
    d_head = size.d_model // size.heads
    turns = make(1, 1, size.positions, d_head // 2).repeat(1, 1, 1, 2)
    return [make(batch, size.positions, size.heads, d_head), turns.cos(), turns.sin()]


def last_queries(size: Size, batch: int, make: Make) -> list[Any]:
    """The last position's queries, all keys, the scale, and no mask."""
    d_head = size.d_model // size.heads
    return [make(batch, size.heads, d_head), make(batch, size.kv_heads, size.positions, d_head), d_head**-0.5, None]


def tabled(size: Size, _: int, make: Make) -> list[Any]:
    """One head's vector at every position, its table, the log-probabilities of a base, a token, the probabilities."""
    d_head = size.d_model // size.heads
    wide = [kernels.upcast(make(*shape)) for shape in ((size.positions, d_head), (d_head, size.vocab), (size.vocab,))]
    log_p = wide.pop().log_softmax(-1)
    return [*wide, log_p, 3, log_p.exp()]


def summed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of a sum of two."""
    return lambda x, branch, *rest: function(x + branch, *rest)


def numel(*given: Any) -> int:
    """Elements of all tensors, to be read once."""
    return sum(each.numel() for each in given if isinstance(each, Tensor))


OPERATIONS = [
    Operation(
        "rms_norm",
        lambda s, b, make: [*stream(s, b, make), *gains(s.d_model, make)],
        rms_norm,
        lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
        lambda x, *rest: numel(x, *rest) + numel(x),
    ),
    Operation(
        "add_rms_norm",
        lambda s, b, make: [*stream(s, b, make, parts=2), *gains(s.d_model, make)],
        summed(rms_norm),
        summed(lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)),
        lambda x, *rest: numel(x, *rest) + 2 * numel(x),
        main=1,
    ),
    Operation(
        "layer_norm",
        lambda s, b, make: [*stream(s, b, make, tower=True), *gains(s.tower_d_model, make, 2)],
        layer_norm,
        None,
        lambda x, *rest: numel(x, *rest) + numel(x),
    ),
    Operation(
        "add_layer_norm",
        lambda s, b, make: [*stream(s, b, make, parts=2, tower=True), *gains(s.tower_d_model, make, 2)],
        summed(layer_norm),
        None,
        lambda x, *rest: numel(x, *rest) + 2 * numel(x),
        main=1,
    ),
    Operation(
        "rotate_",
        angled,
        lambda x, cos, sin: kernels.rotate(x.transpose(1, 2), cos, sin).transpose(1, 2),
        None,
        lambda x, *rest: numel(x, *rest) + numel(x),
    ),
    Operation(
        "swiglu",
        lambda s, b, make: [make(b, s.positions, s.d_mlp), make(b, s.positions, s.d_mlp)],
        lambda gate, up: F.silu(gate) * up,
        None,
        lambda gate, up: 3 * numel(gate),
    ),
    Operation(
        "quick_gelu",
        lambda s, b, make: [make(b, s.grid**2 + 1, 4 * s.tower_d_model)],
        lambda x: x * torch.sigmoid(1.702 * x),
        None,
        lambda x: 2 * numel(x),
    ),
    Operation(
        "add_linear",
        lambda s, b, make: [*stream(s, b, make, parts=2), make(s.d_model, s.d_model) / s.d_model**0.5],
        lambda x, z, weight: x + F.linear(z, weight),
        None,
        lambda x, z, weight: numel(x, z, weight) + numel(x),
        flops=lambda x, z, weight: 2.0 * z.numel() * len(weight),
    ),
    Operation(
        "last_row_pattern",
        last_queries,
        pattern,
        lambda q, k, scale, _: torch.softmax((q[:, :, None] @ fast_keys(q, k).mT)[:, :, 0] * scale, -1),
        lambda q, k, *_: numel(q, k) + q.shape[0] * q.shape[1] * k.shape[2],
    ),
    Operation(
        "increase_from_table",
        tabled,
        increase,
        None,
        lambda coefficients, table, *_: numel(coefficients, table) + len(coefficients),
        flops=lambda coefficients, table, *_: 2.0 * coefficients.numel() * table.shape[1],
    ),
]


def fast_keys(q: Tensor, k: Tensor) -> Tensor:
    """Keys with a head for each of the queries' heads."""
    return kernels.repeat_heads(k, q.shape[1] // k.shape[1])


def maker(settings: Settings, seed: int) -> Make:
    """Random numbers, the same for the same seed."""
    generator = torch.Generator(settings.device).manual_seed(seed)
    where = dict(generator=generator, device=settings.device)
    return lambda *shape: torch.randn(*shape, **where).to(settings.dtype)


def copies(given: list[Any], settings: Settings) -> int:
    """How many inputs are more than a cache holds (50 MB on a GPU, a core's share on a CPU), up to 32."""
    size = sum(each.nbytes for each in given if isinstance(each, Tensor))
    return 2 if settings.quick else min(32, max(2, (160 if settings.cuda else 64) * 2**20 // size))


def through(operation: Operation, function: Callable[..., Any], inside: Any, sets: list[list[Any]]) -> None:
    """Every copy of the inputs once."""
    with torch.inference_mode(), inside():
        for given in sets:
            operation.run(function, given)


def once(operation: Operation, given: list[Any], function: Callable[..., Any], inside: Any, _: None) -> Tensor:
    """What is compared, on fresh inputs."""
    with torch.inference_mode(), inside():
        return operation.run(function, copied(given)).clone()


def of(operation: Operation, settings: Settings) -> Found:
    """One operation at batch 8 of the size that is measured."""
    case, batch = f"kernels/{operation.name}", 2 if settings.quick else 8
    if not hasattr(fast, operation.name):
        yield LeftOut(case, "every variant", "this version has no such operation")
        return
    size = SIZES["toy" if settings.quick else "7b" if settings.cuda else "gemm"]
    first = operation.inputs(size, batch, maker(settings, 0))
    sets = [operation.inputs(size, batch, maker(settings, i)) for i in range(copies(first, settings))]
    functions: dict[str, tuple[Callable[..., Any], Any]] = {"reference": (operation.reference, nullcontext)}
    if operation.torch is not None:
        functions["torch"] = (operation.torch, nullcontext)
    functions["fast"] = (getattr(fast, operation.name), nullcontext)
    why = no_triton(operation.name, settings)
    if why is None:
        functions["triton"] = (getattr(kernels, operation.name), partial(pinned(), "triton"))
    work = Work(operation.flops(*first), operation.moved(*first) * first[0].itemsize) * len(sets)

    variants = [
        Variant(name, partial(through, operation, *how, sets), work=work, read=partial(once, operation, first, *how))
        for name, how in functions.items()
    ]
    exact = operation.reference(*copied(first, torch.float64))
    params = {"size": size.name, "batch": batch}
    yield from compare(case, size, params, len(sets), variants, exact, settings, AGAINST)
    if why:
        yield LeftOut(case, "triton", why)


def copied(given: list[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """Inputs that may be overwritten."""
    return [each.to(dtype or each.dtype, copy=True) if isinstance(each, Tensor) else each for each in given]


def pinned() -> Any:
    """The context in which a chosen library serves every operation."""
    return getattr(kernels, "pinned", None)


def no_triton(name: str, settings: Settings) -> str | None:
    """Why the Triton kernel of an operation is not measured, if it is not."""
    if not settings.cuda:
        return "Triton's kernels run on CUDA only"
    if find_spec("triton") is None:
        return "Triton is not installed"
    dispatched = pinned() is not None and getattr(kernels, name, None) not in (None, getattr(fast, name))
    return None if dispatched else "there is no such kernel"


CASES = [
    Case(f"kernels/{operation.name}", "against the reference's steps and torch's own", partial(of, operation))
    for operation in OPERATIONS
]
