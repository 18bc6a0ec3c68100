"""Stretches of the forward that run as one while nobody may write inside them.

Unusual: a region is asked anew each time it is entered, which costs a few `if`s; so a plan is never stale. A hook that
only reads never closes a region: what it wants is shown from beside the fused way, whose result stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from llava_lens.hooks import Hook
from llava_lens.packing import Packed, is_called_plainly

Path = Literal["reference", "fused"]
PATHS: tuple[Path, ...] = ("reference", "fused")


class Region:
    """The hooks inside one stretch, and whether its fused way is wanted.

    `usual` is false where a subclass replaced the very method that the fused way stands for; `packed` are weights that
    it needs to lie side by side. `around` names parts of `owner` that it does not call, or whose inside it knows.
    """

    def __init__(
        self,
        *hooks: Hook,
        usual: bool = True,
        packed: Packed | None = None,
        owner: nn.Module | None = None,
        around: tuple[str, ...] = (),
    ):
        self.hooks = hooks
        self.usual = usual
        self.packed = packed
        self.places = owner._modules if owner is not None else {}
        self.around = {name: self.places[name] for name in around}
        self.fused = False

    def open(self, *tensors: Tensor) -> bool:
        """Whether the fused way may be taken with these inputs and weights."""
        if not (self.fused and self.usual):
            return False
        if any_gradient(*tensors) or transformed() or (self.live and self.writers):
            return False
        if self.around and self.changed:
            return False
        if self.packed is None or self.packed.together is None:
            return self.packed is None
        return not (torch.is_grad_enabled() and any_gradient(*self.packed.parts))

    @property
    def changed(self) -> str:
        """The name of a part that is another by now, or has a hook of torch or another `forward`; empty for none."""
        for name, part in self.around.items():
            if self.places[name] is not part or not is_called_plainly(part):  # type: ignore[arg-type]
                return name
        return ""

    @property
    def live(self) -> bool:
        """Whether anything listens inside."""
        for hook in self.hooks:
            if hook._forward_hooks or hook._backward_hooks or hook._forward_pre_hooks or hook.recorder is not None:
                return True
        return False

    @property
    def writers(self) -> list[Hook]:
        """Hooks with a listener that may edit what passes inside, or wants a gradient there."""
        return [hook for hook in self.hooks if hook.live and (hook.may_write or hook.wants_grad)]

    def why_closed(self, *tensors: Tensor) -> str:
        """The reason why the reference way is taken, empty where it is not."""
        if self.open(*tensors):
            return ""
        if not self.usual:
            return "a subclass has its own"
        if self.writers:
            return f"{str(self.writers[0].name).rpartition('.')[2]} may be written"
        if any_gradient(*tensors):
            return "gradients are on"
        if transformed():
            return "torch.compile, autocast, torch.func, forward derivatives or a hook on all modules is on"
        if self.changed:
            return f"{self.changed} was exchanged, or has a hook of torch"
        if self.fused and self.packed is not None and not self.packed.usual:
            return f"{', '.join(self.packed.names)}: not a plain nn.Linear, or with a hook of torch"
        return "its weights lie apart: use('fused') joins them" if self.fused else "the reference path is chosen"


def any_gradient(*tensors: Tensor) -> bool:
    """Whether autograd follows one of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def transformed() -> bool:
    """Whether somebody else decides how operations run: a compiler that traces, autocast, torch.func, hooks on all.

    And where derivatives are carried forward, which custom operations would drop.
    """
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active() or bool(_has_any_global_hook())


def regions_of(module: nn.Module) -> Iterator[tuple[str, Region]]:
    """Every region of a model, by its attribute path."""
    for prefix, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, Region):
                yield f"{prefix}.{name}" if prefix else name, value
