"""Weights of several projections side by side in one memory, so that one matrix product does for all of them.

Unusual: nothing is held twice. The projections' own weights become views of the joint one, under their own names; where
they lie apart again (moved, replaced, loaded anew), or a projection is no plain one (exchanged, hooked, parametrised),
nothing is joined and the projections run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens import kernels

Joint = tuple[Tensor, Tensor | None]
"""Weight and bias of several projections as one."""
WORTH_BLOCKING = 2**17
"""Below so many numbers in a weight the call to oneDNN costs more than its order saves."""
WORTH_ONEDNN = 2**24
"""From so many multiplications on, oneDNN's product of float32 on a CPU takes about a tenth less time than torch's own
choice, and one for all projections no longer than one for each; a small product takes longer."""
Hooks = tuple[dict[int, Any], dict[int, Any], dict[int, Any], dict[int, Any]]
Layout = tuple[int, torch.Size | None, tuple[int, ...]]
Held = tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None, int, torch.Size | None, tuple[int, ...]]
"""Where a weight or a bias is kept, under which name, which it was, and how it lay in memory."""


class Packed:
    """Projections of one input that can run as one product; asks each time whether their weights still lie together.

    They are those that stand under `names` in `owner` at the time.
    """

    def __init__(self, owner: nn.Module, *names: str):
        self.places, self.names = owner._modules, names  # not the owner: it holds this, and would outlive its last user
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"places": self.places, "names": self.names}  # a copy holds no weight of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.forget()

    @property
    def linears(self) -> list[Any]:
        """The projections that stand there now, of whatever kind."""
        return [self.places[name] for name in self.names]

    @property
    def usual(self) -> bool:
        """Whether all are plain linear layers, so that their weights say all that they do."""
        return all(is_called_plainly(linear) and _is_linear(linear) for linear in self.linears)

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows joint"]:
        """All projections of `x` side by side; to be called where the weights lie `together`."""
        assert self._joint is not None
        weight, bias = self._joint
        if self._blocked is not None and self._versions != self.versions:
            self._blocked = None  # an edited weight is run as it is now
        large = self._blocked is not None or x.numel() * self._onednn_rows >= WORTH_ONEDNN
        followed = torch.is_grad_enabled() and x.requires_grad  # oneDNN's would drop the gradient without a word
        if large and not followed and x.dtype == weight.dtype and torch._C._get_mkldnn_enabled():
            held = weight if self._blocked is None else self._blocked
            return torch.ops.mkldnn._linear_pointwise(x, held, bias, "none", [], "")
        return F.linear(x, weight, bias)

    def add(self, x: Float[Tensor, "*rows d"], values: Float[Tensor, "*rows k"], spend: bool = False) -> Tensor:
        """`x` plus the projection of `values`; with `spend` it may be written over `x`."""
        if x.is_cpu:  # where a product that adds is no faster than one that does not
            return self(values).add_(x)
        assert self._joint is not None
        return kernels.add_linear(x, values, *self._joint, spend)

    @torch.inference_mode(False)  # what is made there could never again be trained
    @torch.no_grad()
    def pack(self) -> None:
        """Move the weights, and the biases, next to each other; done already, it does nothing."""
        if self._blocked is not None and self.together is not None:
            return
        self.forget()
        if not all(map(_is_linear, self.linears)):
            return
        for name in ("weight", "bias"):
            parts = [part for linear in self.linears if (part := linear._parameters[name]) is not None]
            if len(parts) < len(self.linears) or parts[0].is_meta or joined(parts) is not None:
                continue
            if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
                continue
            whole = torch.cat([part.data for part in parts])
            for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = rows

    def block(self, rows: int) -> None:
        """Hold a second copy of a large weight in oneDNN's own order, chosen for inputs of so many rows."""
        if self.together is not None and self.together[0].numel() >= WORTH_BLOCKING:
            self._blocked = torch.ops.mkldnn._reorder_linear_weight(self.together[0], rows)
            self._versions = self.versions

    @property
    def versions(self) -> list[int]:
        """Counters that every edit in place of a weight raises (one through `.data` does not)."""
        return [linear.weight._version for linear in self.linears]

    def forget(self) -> None:
        """Hold on to no memory that the weights may have left."""
        self._of: list[tuple[str, Any, dict[str, Any], Hooks]] = []
        self._seen: list[Held] = []
        self._joint: Joint | None = None
        self._onednn_rows = 0
        self._blocked: Tensor | None = None
        self._versions: list[int] = []

    @property
    def together(self) -> Joint | None:
        """Weight and bias as one, without a gradient; None where they lie apart."""
        for name, linear, own, hooks in self._of:  # as `is_called_plainly`, with its dictionaries looked up before
            if self.places[name] is not linear:
                return self._look()
            if hooks[0] or hooks[1] or hooks[2] or hooks[3] or "forward" in own:
                return None
        for parameters, name, part, address, shape, strides in self._seen:
            if parameters.get(name) is not part:
                return self._look()
            if part is not None and (part.data_ptr() != address or part.shape != shape or part.stride() != strides):
                return self._look()
        return self._joint if self._of else self._look()

    def _look(self) -> Joint | None:
        self._of, self._blocked, self._onednn_rows = (
            [],
            None,
            0,
        )  # first, so that no other thread takes the old joint weight for new
        if not self.usual:
            self.forget()
            return None
        linears = self.linears
        held = [(linear._parameters, name) for linear in linears for name in ("weight", "bias")]
        parts = [(parameters, name, parameters[name]) for parameters, name in held]
        self._seen = [(*each, *_layout(each[2])) for each in parts]
        self._joint = joint(linears)
        self._onednn_rows = len(self._joint[0]) if self._joint is not None and onednn_takes(self._joint[0]) else 0
        self._of = [(name, each, vars(each), hooks_of(each)) for name, each in zip(self.names, linears, strict=True)]
        return self._joint

    @property
    def parts(self) -> list[Tensor]:
        """Weights and biases that were joined."""
        return [part for _, _, part, *_ in self._seen if part is not None]


def is_called_plainly(module: nn.Module) -> bool:
    """Whether calling a module is its class's `forward` and nothing else: no hook of torch, no `forward` over it."""
    return not any(hooks_of(module)) and "forward" not in vars(module)


def hooks_of(module: nn.Module) -> Hooks:
    """The dictionaries that hold a module's hooks of torch."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is torch's linear layer with ordinary weights (none parametrised, none quantised)."""
    if type(module).forward is not nn.Linear.forward or not {"weight", "bias"} <= module._parameters.keys():
        return False
    return all(type(part) is nn.Parameter for part in module._parameters.values() if part is not None)


def onednn_takes(weight: Tensor) -> bool:
    """Whether oneDNN's own products are there, and for weights like this one."""
    known = hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return weight.is_cpu and weight.dtype == torch.float32 and known and torch.backends.mkldnn.is_available()


def _layout(part: Tensor | None) -> Layout:
    return (0, None, ()) if part is None else (part.data_ptr(), part.shape, part.stride())


@torch.no_grad()
def joint(linears: Sequence[nn.Linear]) -> Joint | None:
    """Weight and bias of several projections as one; None where they lie apart."""
    weight = joined([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = joined(biases) if len(biases) == len(linears) else None
    if weight is None or (biases and bias is None):
        return None
    return weight, bias


@torch.no_grad()
def joined(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie behind one another in one memory, as one tensor; None where they do not."""
    first = parts[0]
    end, storage = first.storage_offset(), first.untyped_storage().data_ptr()
    for part in parts:
        apart = part.untyped_storage().data_ptr() != storage or part.storage_offset() != end
        if apart or part.dtype != first.dtype or part.shape[1:] != first.shape[1:] or not part.is_contiguous():
            return None
        end += part.numel()
    shape = (sum(map(len, parts)), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())
