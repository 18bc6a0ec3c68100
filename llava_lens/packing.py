"""Weights of several projections side by side in one memory, so that one matrix product does for all of them.

Unusual: nothing is held twice. The projections' own weights become views of the joint one, under their own names; where
they lie apart again (moved, replaced, loaded anew) nothing is joined and the projections run one by one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens import kernels

Joint = tuple[Tensor, Tensor | None]
"""Weight and bias of several projections as one."""
WORTH_BLOCKING = 2**17
"""Below so many numbers in a weight the call to oneDNN costs more than its order saves."""
Held = tuple[dict[str, nn.Parameter | None], str, nn.Parameter | None, int]
"""Where a weight or a bias is kept, under which name, which it was, and where it lay."""


class Packed:
    """Projections of one input that can run as one product; asks each time whether their weights still lie together."""

    def __init__(self, *linears: nn.Linear):
        self.linears = linears
        self.forget()

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows joint"]:
        """All projections of `x` side by side; to be called where the weights lie `together`."""
        assert self._joint is not None
        if self._blocked is not None:
            if self._versions == self.versions:
                return torch.ops.mkldnn._linear_pointwise(x, self._blocked, self._joint[1], "none", [], "")
            self._blocked = None  # an edited weight is run as it is now
        return F.linear(x, *self._joint)

    def add(self, x: Float[Tensor, "*rows d"], values: Float[Tensor, "*rows k"], spend: bool = False) -> Tensor:
        """`x` plus the projection of `values`; with `spend` it may be written over `x`."""
        if self._blocked is not None:
            return self(values).add_(x)
        assert self._joint is not None
        return kernels.add_linear(x, values, *self._joint, spend)

    def pack(self) -> None:
        """Move the weights, and the biases, next to each other; done already, it does nothing."""
        for name in ("weight", "bias"):
            parts = [part for linear in self.linears if (part := linear._parameters[name]) is not None]
            if len(parts) < len(self.linears) or parts[0].is_meta or joined(parts) is not None:
                continue
            if len({(part.dtype, part.device, part.shape[1:]) for part in parts}) > 1:
                continue
            whole = torch.cat([part.data for part in parts])
            for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = rows
        self.forget()

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
        self._seen: list[Held] = []
        self._joint: Joint | None = None
        self._blocked: Tensor | None = None
        self._versions: list[int] = []

    @property
    def together(self) -> Joint | None:
        """Weight and bias as one, without a gradient; None where they lie apart."""
        for parameters, name, part, address in self._seen:
            if parameters[name] is not part or (part is not None and part.data_ptr() != address):
                break
        else:
            if self._seen:
                return self._joint
        held = [(linear._parameters, name) for linear in self.linears for name in ("weight", "bias")]
        parts = [(parameters, name, parameters[name]) for parameters, name in held]
        self._seen = [(p, name, part, 0 if part is None else part.data_ptr()) for p, name, part in parts]
        self._joint, self._blocked = joint(self.linears), None
        return self._joint


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
