"""What every implementation of the kernels' operations must equal, on any device: float64 by the reference's steps.

Unusual: run as a script it checks the Triton kernels in Triton's interpreter, which has to be chosen before Triton is
imported, and prints what failed as JSON.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llava_lens import kernels
from llava_lens.errors import LensError
from llava_lens.kernels import reference

Check = Callable[[torch.device, torch.dtype], None]
CHECKS: dict[str, Check] = {}
EPS = 1e-5
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
"""Of the largest value: some units in the last place, since a result goes through several steps or sums."""
ROWS = {
    "plain": lambda x: x(2, 3, 96),
    "wide": lambda x: x(1, 5, 130),
    "one": lambda x: x(1, 1, 80),
    "flat": lambda x: x(4, 64),
    "empty": lambda x: x(0, 3, 64),
    "no_positions": lambda x: x(2, 0, 64),
    "half": lambda x: x(2, 3, 160)[..., 80:],
    "every_other": lambda x: x(2, 6, 24)[:, ::2],
    "expanded": lambda x: x(1, 1, 24).expand(2, 3, 24),
    "transposed": lambda x: x(2, 40, 6).transpose(1, 2),
}
"""Layout → rows of channels made from fresh random numbers."""


def maker(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Random numbers that only depend on how many were drawn before."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype, lost: float = 0.0) -> None:
    """Equal up to rounding, and to what the float64 truth itself lost."""
    assert got.shape == wanted.shape and got.device == wanted.device
    assert got.is_contiguous()
    if wanted.numel():
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=ROUNDING[dtype] * scale + lost, check_dtype=False)


def check(function: Check) -> Check:
    CHECKS[function.__name__] = function
    return function


def over(layouts: dict[str, Callable[[Callable[..., Tensor]], Tensor]]) -> Callable[..., None]:
    """One check for each layout, named after both."""

    def named(function: Callable[[Callable[..., Tensor], Tensor, torch.dtype], None]) -> None:
        for name, layout in layouts.items():

            def run(device: torch.device, dtype: torch.dtype, layout=layout) -> None:
                x = maker(device, dtype)
                function(x, layout(x), dtype)

            CHECKS[f"{function.__name__}-{name}"] = run

    return named


@over(ROWS)
def rms_norm(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    weight, room = make(x.shape[-1]), torch.empty(x.shape, dtype=dtype, device=x.device)
    wanted, mean_square = reference.rms_norm_parts(x.double(), EPS)
    out, scale = kernels.rms_norm(x, weight, EPS)
    close(out, wanted * weight.double(), dtype)
    close(scale, mean_square.sqrt(), dtype)
    emitted = kernels.rms_norm(x, weight, EPS, normalized=room)
    close(room, wanted, dtype)
    assert out.dtype == dtype and torch.equal(emitted[0], out) and torch.equal(emitted[1], scale)


@over(ROWS)
def add_rms_norm(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    branch, weight = make(*x.shape), make(x.shape[-1])
    room = torch.empty(x.shape, dtype=dtype, device=x.device)
    total, out, scale = kernels.add_rms_norm(x, branch, weight, EPS)
    assert torch.equal(total, x + branch)
    wanted, mean_square = reference.rms_norm_parts(total.double(), EPS)
    close(out, wanted * weight.double(), dtype)
    close(scale, mean_square.sqrt(), dtype)
    emitted = kernels.add_rms_norm(x, branch, weight, EPS, room)
    close(room, wanted, dtype)
    assert all(torch.equal(one, other) for one, other in zip(emitted, (total, out, scale), strict=True))


@over(ROWS)
def layer_norm(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    weight, bias = make(x.shape[-1]), make(x.shape[-1])
    centered, scale = reference.layer_norm_parts(x.double(), EPS)
    close(kernels.layer_norm(x, weight, bias, EPS), centered / scale * weight.double() + bias.double(), dtype)


@over(ROWS)
def add_layer_norm(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    branch, weight, bias = make(*x.shape), make(x.shape[-1]), make(x.shape[-1])
    total, out = kernels.add_layer_norm(x, branch, weight, bias, EPS)
    assert torch.equal(total, x + branch)
    centered, scale = reference.layer_norm_parts(total.double(), EPS)
    close(out, centered / scale * weight.double() + bias.double(), dtype)


@over(ROWS)
def swiglu(make: Callable[..., Tensor], gate: Tensor, dtype: torch.dtype) -> None:
    up = make(*gate.shape)
    close(kernels.swiglu(gate, up), gate.double() * gate.double().sigmoid() * up.double(), dtype)


@over(ROWS)
def quick_gelu(make: Callable[..., Tensor], x: Tensor, dtype: torch.dtype) -> None:
    close(kernels.quick_gelu(x), x.double() * (1.702 * x.double()).sigmoid(), dtype)


@check
def swiglu_of_halves(device: torch.device, dtype: torch.dtype) -> None:
    both = 4 * maker(device, dtype)(2, 3, 2 * 1100)
    gate, up = both[..., :1100], both[..., 1100:]
    close(kernels.swiglu(gate, up), gate.double() * gate.double().sigmoid() * up.double(), dtype)


def rotated(batch: int, positions: int, heads: int, width: int, angles: int, whole: bool = False) -> Check:
    """Queries that lie in one product with keys and values, which must stay as they are."""

    def run(device: torch.device, dtype: torch.dtype) -> None:
        make = maker(device, dtype)
        product = make(batch, positions, (heads if whole else heads + 3) * width)
        before, angle = product.clone(), make(angles, 1, positions, width)
        cos, sin = angle.cos(), angle.sin()
        q = product[..., : heads * width].unflatten(-1, (heads, width))
        wanted = reference.rotate(q.double().transpose(1, 2), cos.double(), sin.double()).transpose(1, 2)
        assert kernels.rotate_(q, cos, sin) is None
        close(q.contiguous(), wanted.contiguous(), dtype)
        assert torch.equal(product[..., heads * width :], before[..., heads * width :])

    return run


for _width in (24, 64, 80, 96, 128):
    CHECKS[f"rotate_-width_{_width}"] = rotated(2, 3, 5, _width, 1)
CHECKS["rotate_-angles_of_each_row"] = rotated(2, 3, 4, 24, 2)
CHECKS["rotate_-many_heads"] = rotated(1, 2, 70, 64, 1)
CHECKS["rotate_-one_head"] = rotated(1, 1, 1, 8, 1, whole=True)
CHECKS["rotate_-empty"] = rotated(0, 3, 4, 24, 1)
CHECKS["rotate_-no_positions"] = rotated(2, 0, 4, 24, 1)


@check
def rotate_heads_before_positions(device: torch.device, dtype: torch.dtype) -> None:
    make = maker(device, dtype)
    q, angle = make(2, 4, 5, 24).transpose(1, 2), make(2, 1, 5, 24)
    wanted = reference.rotate(q.double().transpose(1, 2), angle.cos().double(), angle.sin().double()).transpose(1, 2)
    kernels.rotate_(q, angle.cos(), angle.sin())
    close(q.contiguous(), wanted.contiguous(), dtype)


def pattern(batch: int, heads: int, kv_heads: int, keys: int, width: int, mask: str | None = None) -> Check:
    """Keys in a cache whose positions lie before its heads; with `mask` some are padding, or all of them in one row."""

    def run(device: torch.device, dtype: torch.dtype) -> None:
        make = maker(device, dtype)
        q, k = make(batch, heads, width), make(batch, keys, kv_heads, width).transpose(1, 2)
        seen = None if mask is None else torch.ones(batch, keys, dtype=torch.bool, device=device)
        if seen is not None:
            seen[:, : keys // 3] = False
            seen[0] = mask != "blind"
        allowed = None if seen is None else seen[:, None, None]
        scores = reference.attention_scores(q.double()[:, :, None], k.double(), width**-0.5, allowed, False)
        got = kernels.last_row_pattern(q, k, width**-0.5, seen)
        close(got, reference.attention_pattern(scores)[:, :, 0], dtype)
        if mask == "blind":
            assert not got[0].any()

    return run


for _width in (24, 64, 80, 96, 128):
    CHECKS[f"last_row_pattern-width_{_width}"] = pattern(1, 2, 2, 37, _width)
CHECKS["last_row_pattern-grouped"] = pattern(2, 6, 2, 70, 24)
CHECKS["last_row_pattern-one_kv_head"] = pattern(2, 4, 1, 33, 24)
CHECKS["last_row_pattern-padded"] = pattern(3, 4, 2, 97, 24, "padded")
CHECKS["last_row_pattern-blind"] = pattern(2, 4, 4, 40, 24, "blind")
CHECKS["last_row_pattern-one_key"] = pattern(1, 2, 2, 1, 24)
CHECKS["last_row_pattern-empty"] = pattern(0, 2, 2, 9, 24)


def increase(cells: int, depth: int, tokens: int, size: float, sure: float = 3.0, adjacent: bool = False) -> Check:
    """Vectors that move logits by about `size`; a probability near one where `sure` is large."""

    def run(device: torch.device, dtype: torch.dtype) -> None:
        make = maker(device, dtype)
        coefficients, table = make(cells, depth) * (size / depth**0.5), make(depth, tokens)
        if adjacent:
            table = table.T.contiguous().T
        log_p = (sure * make(tokens).double()).log_softmax(-1)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        token = int(log_p.argmax())
        delta = coefficients.double() @ table.double()
        moved = (log_p + delta).log_softmax(-1)
        given = coefficients, table, log_p.to(wide), token, log_p.exp().to(wide)
        got = kernels.increase_from_table(*given)
        close(got, moved[:, token] - log_p[token], wide, lost=1e-14)  # the difference of two logarithms

    return run


CHECKS["increase-small"] = increase(5, 24, 97, 1e-3)
CHECKS["increase-middling"] = increase(70, 33, 300, 0.3)
CHECKS["increase-large"] = increase(9, 129, 130, 3.0)
CHECKS["increase-barely_far"] = increase(9, 40, 200, 13.0)
CHECKS["increase-far"] = increase(9, 40, 200, 60.0)
CHECKS["increase-sure"] = increase(6, 16, 90, 0.5, sure=12.0)
CHECKS["increase-adjacent"] = increase(66, 20, 64, 0.5, adjacent=True)
CHECKS["increase-one"] = increase(1, 1, 2, 1.0)
CHECKS["increase-empty"] = increase(0, 8, 70, 1.0)


OWN: dict[str, Check] = {}
"""What only the Triton kernels are asked: to refuse what they cannot do, and to share one sum in other ways."""


def refused(message: str, call: Callable[[Callable[..., Tensor]], object]) -> Check:
    def run(device: torch.device, dtype: torch.dtype) -> None:
        with pytest.raises(LensError, match=message):
            call(maker(device, dtype))

    return run


OWN["float64"] = refused("no kernel for torch.float64", lambda x: kernels.quick_gelu(x(3).double()))
OWN["odd_heads"] = refused("d_head must be even", lambda x: kernels.rotate_(x(1, 2, 3, 5), *[x(1, 1, 2, 5)] * 2))
OWN["expanded_heads"] = refused(
    "rotate before expanding", lambda x: kernels.rotate_(x(1, 2, 1, 6).expand(1, 2, 3, 6), *[x(1, 1, 2, 6)] * 2)
)
OWN["other_angles"] = refused(
    r"cos has shape \[1, 1, 3, 6\]; expected", lambda x: kernels.rotate_(x(1, 2, 1, 6), *[x(1, 1, 3, 6)] * 2)
)
OWN["two_shapes"] = refused("one shape and dtype", lambda x: kernels.swiglu(x(2, 4), x(2, 5)))
OWN["no_channels"] = refused("rows of 0 channels", lambda x: kernels.rms_norm(x(2, 0), x(0), EPS))
OWN["other_weights"] = refused(r"weights \[3\]", lambda x: kernels.rms_norm(x(2, 4), x(3), EPS))
OWN["strided_room"] = refused(
    "contiguous room", lambda x: kernels.rms_norm(x(2, 4), x(4), EPS, normalized=x(2, 8)[:, ::2])
)
OWN["other_heads"] = refused("do not fit", lambda x: kernels.last_row_pattern(x(1, 3, 8), x(1, 2, 4, 8), 1.0, None))
OWN["other_mask"] = refused(
    "expected .1, 4. torch.bool", lambda x: kernels.last_row_pattern(x(1, 2, 8), x(1, 2, 4, 8), 1.0, x(1, 4))
)


def in_one_program(run: Check) -> Check:
    """A whole vocabulary summed tile after tile, as where there are many cells."""

    def alone(device: torch.device, dtype: torch.dtype) -> None:
        from llava_lens.kernels.triton import increase as own

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(own, "PROGRAMS", 1)
            run(device, dtype)

    return alone


OWN["increase-many_tiles"] = in_one_program(increase(3, 24, 1000, 1.0))
OWN["increase-far_in_many_tiles"] = in_one_program(increase(9, 24, 700, 60.0))


def failures(dtype: torch.dtype) -> dict[str, str]:
    """Every check on the CPU, pinned to Triton: name → what went wrong."""
    found = {}
    with kernels.pinned("triton"), torch.no_grad():
        for name, run in (CHECKS | OWN).items():
            try:
                run(torch.device("cpu"), dtype)
            except (Exception, pytest.fail.Exception):
                found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({str(dtype): failures(dtype) for dtype in (torch.float32, torch.float16)}))
