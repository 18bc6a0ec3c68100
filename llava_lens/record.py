"""Recording a run: what a cache keeps of it, cut to positions, moved, with gradients; and how many bytes that takes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from llava_lens.derived import Derived, identity
from llava_lens.entries import Entries
from llava_lens.errors import LensError
from llava_lens.hooks import Hook

TOWER = "vision."
BY_IMAGE = (TOWER, "projector.")
"""Prefixes of the hooks whose first axis counts images instead of prompts."""


class Cuts:
    """The positions to keep: one slice for the decoder, another for the tower."""

    def __init__(self, pos_slice: Any = None, vision_pos_slice: Any = None):
        self.slices = {"pos_slice": Slice.unwrap(pos_slice), "vision_pos_slice": Slice.unwrap(vision_pos_slice)}

    def axis(self, hook: Hook) -> int | None:
        """The axis that is cut: `pos`, or the queries of scores and patterns."""
        axes = hook.axes.split()
        return axes.index("pos") if "pos" in axes else axes.index("query") if "query" in axes else None

    def of(self, hook: Hook) -> tuple[str, Slice]:
        """The slice of the hook's tower, with the name of its argument."""
        which = "vision_pos_slice" if (hook.name or "").startswith(TOWER) else "pos_slice"
        return which, self.slices[which]

    def positions(self, length: int) -> tuple[int, ...] | None:
        """The decoder positions that stay, None for all."""
        cut = self.slices["pos_slice"]
        return None if cut.mode == "identity" else tuple(int(i) % length for i in np.ravel(cut.indices(length)))

    def count(self, hook: Hook, length: int) -> int:
        """How many of `length` positions stay; raises `LensError` for none, or one that is not there."""
        which, cut = self.of(hook)
        try:
            count = np.size(cut.indices(length))
        except IndexError:
            count = 0
        if not count:
            raise LensError(f"{which} {cut.slice} selects nothing there is: {hook.name!r} has {length} positions")
        return count

    def along(self, act: Tensor, axis: int | None, hook: Hook) -> Tensor:
        """The kept positions of a tensor, which lie on `axis`, as a copy; the tensor itself where nothing is cut."""
        _, cut = self.of(hook)
        if axis is None or cut.mode == "identity":
            return act
        self.count(hook, act.shape[axis])
        return cut.apply(act, dim=axis).clone()


HANDED_ON = ("vision.hook_pixels", "hook_logits", "vision.hook_class_embed", "vision.hook_pos_embed")
"""Hooks whose tensors are the caller's before or after the run, or the weights': a cache holds copies of them."""


SHARED = ("vision.hook_features", "projector.hook_in")
"""Hooks whose tensors lie in the memory of another entry."""


def part_of_more(act: Tensor, hook: Hook) -> bool:
    """Whether a tensor is a part of a larger product, which would be held whole for its sake."""
    return act.dtype != torch.bool and act.nbytes < act.untyped_storage().nbytes() and hook.name not in SHARED


class Recorder:
    """A hook function that only reads: it files activations under their names; a second firing raises `LensError`.

    What the forward did not form is filed as a recipe, or formed at once where that takes less memory than the sources
    that are not filed already. A tensor that passes several hooks of a block (`resid_post`, then the next `resid_pre`)
    is cut and moved once.
    """

    only_reads = True

    def __init__(
        self,
        cuts: Cuts,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
    ):
        self.cuts, self.device, self.dtype, self.wants_grad = cuts, device, dtype, incl_bwd
        self.takes_recipes = not incl_bwd
        self.stored = Entries()
        self._filed: set[int] = set()
        self._lent: set[int] = set()
        self._sources: dict[str, tuple[Tensor, Hook]] = {}
        self._moves = device is not None or dtype is not None
        self._block = ""
        self._recent: dict[Any, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, tuple[Tensor, Tensor]] = {}

    def __call__(self, act: Tensor | Derived, hook: Any) -> None:
        if hook.name in self.stored:
            raise LensError(f"{hook.name!r} fired twice in one run; a cache keeps one forward pass")
        if isinstance(act, Derived):
            self.stored[hook.name] = self._recipe(act, hook)  # type: ignore[assignment]
            return
        axis = self.cuts.axis(hook)
        kept = self._kept(act.detach() if act.requires_grad else act, hook, axis)
        self.stored[hook.name] = kept
        self._filed.add(kept.data_ptr())
        if kept is not act and self.dtype is None and (axis is None or self.cuts.of(hook)[1].mode == "identity"):
            self._lent.add(act.data_ptr())  # filed on another device, or in memory of its own
        if self.wants_grad and act.requires_grad:
            self._sources[hook.name] = (act, hook)

    def _recipe(self, recipe: Derived, hook: Hook) -> Derived | Tensor:
        """The recipe of the kept positions on the device asked for, or what it says."""
        _, cut = self.cuts.of(hook)
        if cut.mode != "identity" and (axis := self.cuts.axis(hook)) is not None:
            length = recipe.shape[axis]
            self.cuts.count(hook, length)
            rows = np.ravel(cut.indices(length)).tolist()
            recipe = recipe.cut(lambda source, axis: self._kept(source, hook, axis, source.dtype), rows)
        recipe = recipe if self.dtype is None else replace(recipe, dtype=self.dtype)
        filed = self._filed | self._lent
        own = [source for source in recipe.sources.values() if source.data_ptr() not in filed]
        if own and sum(source.nbytes for source in own) > recipe.nbytes:
            return recipe.form(hook.name or "").to(device=self.device)
        self._filed.update(source.data_ptr() for source in own)
        if self.device is None and not any(part_of_more(source, hook) for source in recipe.sources.values()):
            return recipe
        return recipe.map(lambda source: self._kept(source, hook, None, source.dtype))

    def _kept(self, act: Tensor, hook: Hook, axis: int | None, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor cut along an axis (None where nothing is cut), moved and converted, once for all who ask."""
        which, cut = self.cuts.of(hook)
        axis = None if cut.mode == "identity" else axis
        if hook.name in HANDED_ON:
            kept = self.cuts.along(act, axis, hook).to(device=self.device, dtype=self.dtype)
            return kept.clone(memory_format=torch.contiguous_format)
        if axis is None and not self._moves and not part_of_more(act, hook):
            return act
        dtype = dtype or self.dtype or act.dtype
        memo, key = self._memo(act, hook), (identity(act), None if axis is None else (which, axis), dtype)
        if key not in memo:
            kept = self.cuts.along(act, axis, hook).to(device=self.device, dtype=dtype)
            memo[key] = act, kept.clone(memory_format=torch.contiguous_format) if part_of_more(kept, hook) else kept
        return memo[key][1]

    def _memo(self, act: Tensor, hook: Hook) -> dict[Any, tuple[Tensor, Tensor]]:
        """What was cut or moved in this block, and the last thing before it; masks are the whole run's."""
        if act.dtype == torch.bool:
            return self._masks
        match = re.match(r"(\w+\.)?blocks\.\d+", hook.name or "")
        block = match[0] if match else ""
        if block != self._block:
            self._block, self._recent = block, dict(list(self._recent.items())[-1:])
            self._lent &= {source.data_ptr() for source, _ in self._recent.values()}
        return self._recent

    def differentiate(self, value: Any) -> None:
        """File the gradients of a scalar under `name + "_grad"`; no weight's `.grad` is touched."""
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise LensError(f"incl_bwd needs a scalar, got {got}: ask for return_type='loss' or give metric=")
        if not value.requires_grad or not self._sources:
            raise LensError("incl_bwd found nothing to differentiate: gradients are off, or no weight requires one")
        sources = [act for act, _ in self._sources.values()]
        grads = torch.autograd.grad(value.sum(), sources, allow_unused=True)
        for (name, (_, hook)), grad in zip(self._sources.items(), grads, strict=True):
            if grad is not None:
                self.stored[name + "_grad"] = self.cuts.along(grad, self.cuts.axis(hook), hook).to(
                    device=self.device, dtype=self.dtype
                )
        self._sources.clear()
