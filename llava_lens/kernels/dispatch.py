"""Who serves an operation: the library's own Triton kernels on CUDA, plain torch everywhere else.

The choice is made in every call, by device and dtype, and `pinned` overrides it. Without Triton plain torch serves; a
Triton that is there but does not work raises, with its reason. Unusual: every operation is also a custom op of torch
(`torch.ops.llava_lens`), for compilers and for tensors without data, but an ordinary call goes round it: an op costs
more than a small kernel. No operation has a gradient; asking for one raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from llava_lens.errors import LensError, nearest
from llava_lens.kernels import fast

CHOICES = ("fast", "triton")
OWN = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels compute with; float64 is plain torch's on every device."""
_pin: ContextVar[str | None] = ContextVar("pin", default=None)
Operation = TypeVar("Operation", bound=Callable[..., Any])


@contextmanager
def pinned(choice: str) -> Iterator[None]:
    """Have every operation served by `"fast"` (plain torch) or by `"triton"`, on whatever device.

    A call that the chosen one cannot serve raises `LensError`: Triton without a GPU (unless its interpreter is on,
    `TRITON_INTERPRET=1`), and float64.
    """
    if choice not in CHOICES:
        raise LensError(f"no kernels called {choice!r}; choose 'fast' or 'triton'{nearest(choice, CHOICES)}")
    before = _pin.set(choice)
    try:
        yield
    finally:
        _pin.reset(before)


@cache
def own_kernels() -> ModuleType | None:
    """The Triton kernels; None where Triton is not installed, `LensError` where it cannot be imported."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingImports]

        from llava_lens.kernels import triton as own
    except ModuleNotFoundError as missing:
        if missing.name == "triton":
            return None
        raise LensError(_broken("could not be imported", missing)) from missing
    except Exception as error:
        raise LensError(_broken("could not be imported", error)) from error
    return own


def _broken(what: str, error: Exception) -> str:
    return (
        f"Triton is installed but {what}: {type(error).__name__}: {error}. Repair it, remove it, "
        "or run inside `kernels.pinned('fast')`"
    )


def chosen(x: Tensor) -> ModuleType:
    """The module whose functions serve tensors like `x`."""
    pin = _pin.get()
    if pin == "fast":
        return fast
    if pin is None:
        fits = x.is_cuda and x.dtype in OWN and torch.version.hip is None
        return (fits and own_kernels()) or fast
    own = own_kernels()
    if own is None:
        raise LensError("kernels are pinned to 'triton', which is not installed; install triton or pin 'fast'")
    if not (x.is_cuda or own.interpreted()):
        raise LensError(
            f"kernels are pinned to 'triton' and the tensors are on {x.device}; move them to a GPU, "
            "set TRITON_INTERPRET=1 before Triton is imported, or pin 'fast'"
        )
    return own


def serve(name: str, *given: Any, **options: Any) -> Any:
    """Run one operation on tensors that have data; its first argument decides who serves it."""
    x = (*given, *options.values())[0]
    module = chosen(x)
    run = getattr(module, name)
    if module is fast:
        return _settled(run(*given, **options))
    try:
        with _on(x):
            return run(*given, **options)
    except (LensError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LensError(_broken(f"its kernel {name} failed on {list(x.shape)} {x.dtype}", error)) from error


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on the current GPU, which need not be the one that holds the tensors."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(x.device)


def _settled(made: Any) -> Any:
    """Results laid out contiguously, so that an op without data can say where its elements will be."""
    if isinstance(made, tuple):
        return tuple(x.contiguous() for x in made)
    return made if made is None else made.contiguous()


def _plain(tensors: tuple[Any, ...]) -> bool:
    """Whether a call may go round the custom op: ordinary tensors that nobody traces or differentiates."""
    given = [x for x in tensors if isinstance(x, Tensor)]
    if torch.compiler.is_compiling() or not all(type(x) in (Tensor, Parameter) for x in given):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in given))


def _simple(x: Any) -> bool:
    """Whether plain torch serves beyond doubt; asking more costs as much as a small operation on a CPU."""
    on_cpu = type(x) is Tensor and x.is_cpu and not torch.is_grad_enabled()
    return on_cpu and _pin.get() is None and not torch.compiler.is_compiling()


def offered(
    operation: Operation, schema: str, mutates: tuple[str, ...] = (), fake: Callable[..., Any] | None = None
) -> Operation:
    """An operation of `fast.py` as it is called: the same name and signature, served by whom `chosen` names."""
    name = operation.__name__
    shapes = fake or operation

    def serves(*given: Any, **options: Any) -> Any:
        return serve(name, *given, **options)

    op = torch.library.custom_op(f"llava_lens::{name}", serves, mutates_args=mutates, schema=schema)
    op.register_fake(lambda *given, **options: _settled(shapes(*given, **options)))

    @wraps(operation)
    def call(*given: Any, **options: Any) -> Any:
        if given and _simple(given[0]):
            return _settled(getattr(fast, name)(*given, **options))
        plain = _plain((*given, *options.values()))
        return serves(*given, **options) if plain else op(*given, **options)

    return cast(Operation, call)


_NORMED = "Tensor weight, float eps, Tensor(a!)? normalized=None"
rms_norm = offered(fast.rms_norm, f"(Tensor x, {_NORMED}) -> (Tensor, Tensor)", ("normalized",))
add_rms_norm = offered(
    fast.add_rms_norm, f"(Tensor x, Tensor branch, {_NORMED}) -> (Tensor, Tensor, Tensor)", ("normalized",)
)
layer_norm = offered(fast.layer_norm, "(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor")
add_layer_norm = offered(
    fast.add_layer_norm, "(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor)"
)
rotate_ = offered(fast.rotate_, "(Tensor(a!) x, Tensor cos, Tensor sin) -> ()", ("x",))
swiglu = offered(fast.swiglu, "(Tensor gate, Tensor up) -> Tensor")
quick_gelu = offered(fast.quick_gelu, "(Tensor x) -> Tensor")
last_row_pattern = offered(
    fast.last_row_pattern,
    "(Tensor q, Tensor k, float scale, Tensor? seen) -> Tensor",
    fake=lambda q, k, *_, **__: q.new_empty((*q.shape[:2], k.shape[2])),
)
increase_from_table = offered(
    fast.increase_from_table,
    "(Tensor coefficients, Tensor table, Tensor log_p, int token, Tensor p) -> Tensor",
    fake=lambda coefficients, *_, **__: coefficients.new_empty(len(coefficients)),
)
