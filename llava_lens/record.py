"""Recording a run: what a cache keeps of it, cut to positions, moved, with gradients; and how many bytes that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.utilities import Slice

from llava_lens.errors import LensError
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs

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

    def __call__(self, act: Tensor, hook: Hook) -> Tensor:
        """An activation's kept positions, as a copy where anything is cut."""
        axis = self.axis(hook)
        _, cut = self.of(hook)
        if axis is None or cut.mode == "identity":
            return act
        self.count(hook, act.shape[axis])
        return cut.apply(act, dim=axis).clone()


HANDED_ON = ("vision.hook_pixels", "hook_logits")
"""Hooks whose tensors are the caller's, before or after the run: a cache holds copies of them."""


class Recorder:
    """A hook function that only reads: it files activations under their names; a second firing raises `LensError`.

    A tensor that passes several hooks in a row (`resid_post`, then the next `resid_pre`) is cut and moved once.
    `owned` are storages that outlive the run, the weights': what lies in them is copied.
    """

    only_reads = True

    def __init__(
        self,
        cuts: Cuts,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
        owned: Iterable[Tensor] = (),
    ):
        self.cuts, self.device, self.dtype, self.wants_grad = cuts, device, dtype, incl_bwd
        self.owned = {tensor.untyped_storage().data_ptr() for tensor in owned}
        self.stored: dict[str, Tensor] = {}
        self._sources: dict[str, tuple[Tensor, Hook]] = {}
        self._last: tuple[Tensor, Hook, Tensor] | None = None

    def __call__(self, act: Tensor, hook: Any) -> None:
        if hook.name in self.stored:
            raise LensError(f"{hook.name!r} fired twice in one run; a cache keeps one forward pass")
        self.stored[hook.name] = self._kept(act.detach(), hook)
        if self.wants_grad and act.requires_grad:
            self._sources[hook.name] = (act, hook)

    def _kept(self, act: Tensor, hook: Hook) -> Tensor:
        if self._last is not None:
            source, before, kept = self._last
            tower = hook.name.startswith(TOWER) == before.name.startswith(TOWER)  # type: ignore[union-attr]
            if same_tensor(source, act) and hook.axes == before.axes and tower:
                return kept
        kept = self.cuts(act, hook).to(device=self.device, dtype=self.dtype)
        if hook.name in HANDED_ON or kept.untyped_storage().data_ptr() in self.owned:
            kept = kept.clone(memory_format=torch.contiguous_format)
        self._last = (act, hook, kept)
        return kept

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
                self.stored[name + "_grad"] = self.cuts(grad, hook).to(device=self.device, dtype=self.dtype)
        self._sources.clear()


def identity(act: Tensor) -> tuple[Any, ...]:
    """What two live tensors share exactly if they are one: device, address, shape, strides and dtype."""
    return act.device, act.data_ptr(), tuple(act.shape), act.stride(), act.dtype


def same_tensor(one: Tensor, other: Tensor) -> bool:
    """True when both are the same numbers in the same memory."""
    return identity(one) == identity(other)


def axis_sizes(cfg: Any, inputs: Inputs) -> dict[str, dict[str, int]]:
    """How long each axis is in a run of `inputs`, by the prefix of the hooks (`""` for the decoder)."""
    tokens = inputs.n_pos
    sizes = {"": _stack_sizes(cfg, inputs.batch_size, tokens) | {"d_vocab": cfg.d_vocab}}
    if cfg.vision is not None and inputs.pixels is not None:
        images, channel, height, width = inputs.pixels.shape
        features = {"feature": cfg.vision.n_features, "d_features": cfg.vision.d_model * len(cfg.vision.feature_layers)}
        picture = {"patch": cfg.vision.n_patches, "channel": channel, "height": height, "width": width}
        sizes[TOWER] = _stack_sizes(cfg.vision, images, cfg.vision.n_ctx) | features | picture
        sizes["projector."] = {"batch": images, "d_model": cfg.d_model} | features
    return sizes


def _stack_sizes(cfg: Any, batch: int, pos: int) -> dict[str, int]:
    heads = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "d_head": cfg.d_head}
    widths = {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp}
    return {"batch": batch, "pos": pos, "query": pos, "key": pos, "1": 1} | heads | widths


def kept_numel(hook: Hook, sizes: Mapping[str, Mapping[str, int]], cuts: Cuts) -> int:
    """Numbers in one activation after the cut; 0 for a hook of a tower that the run does not enter."""
    name, axes = hook.name or "", hook.axes.split()
    lengths = sizes.get(next((prefix for prefix in BY_IMAGE if name.startswith(prefix)), ""))
    if lengths is None:
        return 0
    unknown = [axis for axis in axes if axis not in lengths]
    if unknown:
        raise LensError(f"the axis {unknown[0]!r} of {name!r} has no known length; give it in axis_sizes")
    shape = [lengths[axis] for axis in axes]
    cut = cuts.axis(hook)
    if cut is not None:
        shape[cut] = cuts.count(hook, shape[cut])
    return math.prod(shape)


def kept_dtype(hook: Hook, model: torch.dtype, inputs: Inputs) -> torch.dtype:
    """The dtype an activation has in a model of that dtype: norm scales are float32 or wider, pixels as given."""
    name = hook.name or ""
    if name.endswith("hook_pixels") and inputs.pixels is not None:
        return inputs.pixels.dtype
    return torch.float32 if name.endswith("hook_scale") and model != torch.float64 else model
