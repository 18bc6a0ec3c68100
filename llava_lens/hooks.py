"""Hook points that know their axes; unlike a plain `HookPoint`, an idle one costs one `if`.

A `Hook` hands every listener that may write a private copy, so an in-place edit changes what lies downstream and
never the tensors upstream of it (nor the entries a cache has already stored). Functions that promise to only read
carry `only_reads = True` (see `reader`) and are shown the tensor itself. Those that carry `takes_recipes = True` too
are handed a recipe (`llava_lens.derived`) in the place of a value that the forward need not form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from llava_lens.errors import LensError

Fn = TypeVar("Fn", bound=Callable[..., Any])


def reader(fn: Fn) -> Fn:
    """Mark a hook function as one that never edits, in place or by returning: it then sees the tensor uncopied.

    >>> @reader
    ... def norm(act, hook):
    ...     print(hook.name, act.norm())
    """
    fn.only_reads = True  # type: ignore[attr-defined]
    return fn


class Hook(HookPoint):
    """A named place in the forward pass where a tensor with known axes can be read or replaced.

    `axes` are the jaxtyping axis names of what passes through, `"batch pos d_model"` for instance.
    The name is the attribute path, set by `HookedRootModule.setup`. `recorder` listens last.
    """

    recorder: Any = None
    # what changes at every firing is written to `__dict__`, past nn.Module's slow bookkeeping

    def __init__(self, axes: str):
        super().__init__()
        self.axes = axes
        self.fired = 0
        self._shown: tuple[Tensor | None, int | None] = (None, None)

    @property
    def annotation(self) -> Any:
        """The jaxtyping type of the activation, `Float[Tensor, axes]`."""
        return Float[Tensor, self.axes]

    @property
    def live(self) -> bool:
        """True when anything listens, forward or backward."""
        heard = self._forward_hooks or self._backward_hooks or self._forward_pre_hooks
        return bool(heard) or self.recorder is not None

    @property
    def _heard(self) -> bool:
        return bool(self._forward_hooks or self._backward_hooks or self._forward_pre_hooks)

    @property
    def takes_recipes(self) -> bool:
        """True when every listener takes a recipe for a value: none of them edits, and none asks for a gradient."""
        if self._backward_hooks or self._forward_pre_hooks or len(self._forward_hooks) != len(self.fwd_hooks):
            return False
        return all(getattr(listener, "takes_recipes", False) for listener in self._listeners())

    @property
    def needs_value(self) -> bool:
        """True when somebody listens whom no recipe satisfies."""
        return self.live and not self.takes_recipes

    def _listeners(self) -> list[Any]:
        listeners = [handle.user_hook for handle in self.fwd_hooks]
        return listeners if self.recorder is None else [*listeners, self.recorder]

    @property
    def wants_grad(self) -> bool:
        """True when a listener asked for the gradient at this very place."""
        return bool(self._backward_hooks) or any(getattr(each, "wants_grad", False) for each in self._listeners())

    @property
    def may_write(self) -> bool:
        """True when a listener could edit what it is shown: any function that is not marked by `reader`."""
        foreign = len(self._forward_hooks) != len(self.fwd_hooks) or bool(self._forward_pre_hooks)
        return foreign or any(not getattr(handle.user_hook, "only_reads", False) for handle in self.fwd_hooks)

    def add_hook(self, hook: Any, dir: Any = "fwd", *args: Any, **kwargs: Any) -> Any:
        """Attach a function, as in TransformerLens; what it returns is its own, whoever edits in place after it."""
        return super().add_hook(self._guarded(hook) if dir == "fwd" else hook, dir, *args, **kwargs)

    def _guarded(self, fn: Fn) -> Fn:
        if getattr(fn, "only_reads", False):
            return fn

        @wraps(fn)
        def guarded(act: Tensor, hook: Any) -> Any:
            out = fn(act, hook=hook)
            shared = isinstance(out, Tensor) and out is not act and len(self._listeners()) > 1
            return out.clone() if shared else out  # a later in-place edit must not reach a tensor of the user's

        return guarded  # type: ignore[return-value]

    def record(self, recorder: Any) -> Any:
        """Let `recorder(act, hook)`, which only reads, listen last; returns the one it takes the place of.

        Not a hook of torch's: registering one at every place of a large model takes as long as a short forward.
        """
        before, self.__dict__["recorder"] = self.recorder, recorder
        return before

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        """Take functions off, as in TransformerLens."""
        if self._heard:
            super().remove_hooks(*args, **kwargs)

    def layer(self) -> int:
        """The block this hook sits in, in either tower; raises for a hook outside the blocks."""
        match = re.search(r"(?:^|\.)blocks\.(\d+)\.", self.name or "")
        if match is None:
            raise ValueError(f"{self.name!r} is not inside a block, so it has no layer")
        return int(match.group(1))

    def __call__(self, x: Tensor) -> Tensor:
        if not (self._forward_hooks or self._backward_hooks or self._forward_pre_hooks or self.recorder is not None):
            return x
        y = self._fire(x)
        self.__dict__["_shown"] = (None, None)
        return y

    def _fire(self, x: Tensor) -> Tensor:
        self.__dict__["fired"] += 1
        y = self._through_torch(x) if self._heard else x.view_as(x) if self.recorder.wants_grad else x
        if self.recorder is not None:
            self.recorder(y, hook=self)
        return y

    def _through_torch(self, x: Tensor) -> Tensor:
        y = super().__call__(x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise LensError(f"a function on {self.name!r} returned {got}; expected {tuple(x.shape)} ({self.axes})")
        if y.dtype != x.dtype:
            raise LensError(f"a function on {self.name!r} returned {y.dtype}; expected {x.dtype}")
        return y

    def forward(self, x: Tensor) -> Tensor:
        if not self.may_write:
            # a node of its own, so that the gradient here is this branch's and not the whole tensor's
            return x.view_as(x) if self.wants_grad else x
        copy = x.clone()
        self._shown = (copy, None if copy.is_inference() else copy._version)
        return copy

    def offer(self, recipe: Callable[[], Any]) -> None:
        """Hand the recipe of a value that is not formed to the listeners, who all must take recipes."""
        if self.live:
            self.__dict__["fired"] += 1
            made = recipe()
            for listener in self._listeners():
                listener(made, hook=self)

    def look(self, x: Tensor, recipe: Callable[[], Any] | None = None) -> tuple[Tensor, bool]:
        """Show a *derived* value, one that the fast path does not need: `(what came back, was it touched)`.

        Touched means that a listener returned another tensor, edited in place, or asked for the gradient here; then
        the forward must go on from what came back. Otherwise it must not, so that looking never changes a bit.
        Listeners who all take recipes get `recipe`, where there is one, in the value's place.
        """
        if recipe is not None and not self.needs_value:
            self.offer(recipe)
            return x, False
        if not self.live:
            return x, False
        y = self._fire(x)
        copy, version = self._shown
        self._shown = (None, None)
        if y is x:
            return y, False
        if copy is None or y is not copy:
            return y, True
        return y, version != (None if version is None else copy._version) or not torch.equal(copy, x)


def splice(fast: Tensor, slow: Tensor, before: Tensor, after: Tensor, over: int = 1) -> Tensor:
    """Rows of `slow` where an edit changed the derived value (`before` → `after`), rows of `fast` elsewhere.

    `over` trailing axes of the derived value make up one row. Rows that nobody changed keep the fast path's bits.
    Under autograd everything comes from `slow`, so that gradients flow through the edit.
    """
    if torch.is_grad_enabled() and (after.requires_grad or slow.requires_grad):
        return slow
    changed = (before != after).flatten(-over).any(-1, keepdim=True)
    return torch.where(changed, slow.to(fast.dtype), fast)


class HookRow(NamedTuple):
    """One line of the hook table: full name with `{layer}` for the block index, and axes."""

    name: str
    axes: str


def hook_table(model: nn.Module) -> list[HookRow]:
    """Every hook of a model in forward order of declaration, blocks folded to one `{layer}` row each."""
    rows = dict.fromkeys(
        HookRow(re.sub(r"blocks\.\d+\.", "blocks.{layer}.", name), module.axes)
        for name, module in model.named_modules()
        if isinstance(module, Hook)
    )
    return list(rows)
