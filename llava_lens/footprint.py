"""How many bytes a cache will hold, told without running: what lies under several names is counted once.

Unusual: it follows the forward's own bookkeeping (which hooks show the same memory, what is kept as a recipe and from
which tensors), so it is exact for a run in which no hook of the user's edits anything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch

from llava_lens.errors import LensError
from llava_lens.hooks import Hook
from llava_lens.inputs import Inputs
from llava_lens.record import BY_IMAGE, SHARED, TOWER, Cuts

Sizes = Mapping[str, Mapping[str, int]]
LAZY = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_result", ".hook_scale", ".hook_normalized")
"""Hooks whose values a run keeps as recipes."""


class Piece(NamedTuple):
    """Some memory: what it is called, whether and how it was cut or converted, and its bytes."""

    key: tuple[Any, ...]
    nbytes: int


class Footprint:
    """The memory of one run's cache: `total` bytes for the hooks asked for."""

    def __init__(self, model: Any, inputs: Inputs, sizes: Sizes, cuts: Cuts, dtype: torch.dtype | None):
        self.model, self.inputs, self.sizes, self.cuts, self.dtype = model, inputs, sizes, cuts, dtype
        self.added_inside = dict(added_inside(model))

    def total(self, asked: Iterable[Hook]) -> int:
        """Bytes of all the memory, each piece once, for hooks in the order in which they fire."""
        pieces: dict[tuple[Any, ...], int] = {}
        for hook in asked:
            pieces |= dict(self._recipe(hook, pieces) if self._is_lazy(hook) else [self._entry(hook)])
        return sum(pieces.values())

    def with_gradients(self, asked: Iterable[Hook]) -> int:
        """Bytes with a gradient beside every entry, all values formed: at most so many."""
        hooks = list(asked)
        pieces = dict(self._entry(hook) for hook in hooks)
        return sum(pieces.values()) + sum(self._entry(h).nbytes for h in hooks if h.name != "vision.hook_pixels")

    def _entry(self, hook: Hook) -> Piece:
        return self._piece(hook, self._axis(hook), self.dtype)

    def _axis(self, hook: Hook) -> int | None:
        _, cut = self.cuts.of(hook)
        return None if cut.mode == "identity" else self.cuts.axis(hook)

    def _piece(self, hook: Hook, axis: int | None, dtype: torch.dtype | None) -> Piece:
        """The memory that an entry lies in, or a source along one axis of which positions were cut."""
        own = own_dtype(hook, self.model.cfg.dtype, self.inputs)
        dtype = own if dtype is None else dtype
        name = memory_of(self.model, hook.name or "", self.inputs)
        if axis is None and dtype == own:
            return Piece((name,), kept_numel(self.model.hook(name), self.sizes, None) * own.itemsize)
        vision: Any = self.model.cfg.vision
        shared = SHARED[:1] if getattr(vision, "merge", 1) > 1 else SHARED
        if hook.name in shared and vision.keep_class_token < vision.class_token:
            name = SHARED[0]  # a part of the stream, which is converted by itself
        size = kept_numel(hook, self.sizes, self.cuts if axis is not None else None)
        which = None if axis is None else self.cuts.of(hook)[0]
        return Piece((name, which, axis, dtype), size * dtype.itemsize)

    def _recipe(self, hook: Hook, held: Mapping[tuple[Any, ...], int]) -> list[Piece]:
        """The sources of a recipe, or the value where that is smaller than what is not held already."""
        formed = self._entry(hook)
        sources = list(self._sources(hook)) if formed.nbytes else []
        own = sum(piece.nbytes for piece in sources if piece.key not in held)
        return [formed] if own > formed.nbytes else sources

    def _is_lazy(self, hook: Hook) -> bool:
        return (hook.name or "").endswith(LAZY) or hook.name in self.added_inside

    def _sources(self, hook: Hook) -> Iterator[Piece]:
        name, axis = hook.name or "", self._axis(hook)
        prefix = name[: name.rindex("hook_")]
        cut = None if axis is None else 1
        if name in self.added_inside:
            yield self._piece(self.model.hook(self.added_inside[name]), cut, None)
        elif name.endswith(("hook_scale", "hook_normalized")):
            yield self._stream(hook, name, cut)
        elif name.endswith("hook_result"):
            yield self._piece(self.model.hook(f"{prefix}hook_z"), cut, None)
        else:
            rot = "rot_" if f"{prefix}hook_rot_q" in self.model.hook_dict else ""
            yield self._piece(self.model.hook(f"{prefix}hook_{rot}q"), cut, None)
            yield self._piece(self.model.hook(f"{prefix}hook_{rot}k"), None, None)
            if name.startswith(TOWER):
                yield from self._tower_mask(hook, axis)
            elif self._has_mask:
                lengths, n = self.sizes[""], self.inputs.n_pos
                rows = n if axis is None else self.cuts.count(hook, n)
                yield Piece(("mask",), lengths["batch"] * rows * n)

    def _tower_mask(self, hook: Hook, axis: int | None) -> Iterator[Piece]:
        """What a tower's positions see of one another, for all pictures alike where nothing is cut."""
        layer, pixels = re.search(r"\d+", hook.name or ""), self.inputs.pixels
        if layer is None or pixels is None:
            return
        allowed = self.model.vision.mask(int(layer[0]), pixels).allowed
        if allowed is not None:
            images, n = len(pixels), allowed.shape[-1]
            cut = None if axis is None else self.cuts.of(hook)[0]
            yield Piece(("mask", TOWER, cut), n * n if cut is None else images * self.cuts.count(hook, n) * n)

    @cached_property
    def _has_mask(self) -> bool:
        """Whether the decoder's attention holds a tensor that says what each place sees."""
        inputs = self.inputs
        return self.model.mask(inputs.attention_mask, 0, inputs.tokens[..., None], inputs).allowed is not None

    def _stream(self, hook: Hook, name: str, cut: int | None) -> Piece:
        """What a norm reads."""
        beside = {"ln1.": "hook_attn_in", "ln2.": "hook_mlp_in", "projector.norm.": "projector.hook_in"}
        for norm, source in beside.items():
            if norm in name:
                return self._piece(self.model.hook(name[: name.index(norm)] + source), cut, None)
        for norm, prefix in {"ln_final.": "", f"{TOWER}ln_post.": TOWER}.items():
            if name.startswith(norm):
                end = len((self.model.vision if prefix else self.model).blocks)
                return self._piece(self.model.hook(_before(self.model, prefix, end)), cut, None)
        stream = self.model.hook(name.replace("hook_scale", "hook_normalized"))
        return self._piece(stream, cut, None)._replace(key=(name.rpartition(".")[0], cut))


def added_inside(model: Any) -> Iterator[tuple[str, str]]:
    """Hooks of sums that are made inside a matrix product now, each with the hook of what is multiplied."""
    stacks = {"": model.blocks} | ({TOWER: model.vision.blocks} if model.cfg.vision is not None else {})
    for prefix, blocks in stacks.items():
        for i, block in enumerate(blocks):
            if block.heads_sum.open() and not block.adds_in_norm():
                yield f"{prefix}blocks.{i}.hook_attn_out", f"{prefix}blocks.{i}.attn.hook_z"
            if block.mlp_sum.open():
                yield f"{prefix}blocks.{i}.hook_mlp_out", f"{prefix}blocks.{i}.mlp.hook_post"


def _before(model: Any, prefix: str, layer: int) -> str:
    """The hook that shows the stream before a layer."""
    return f"{prefix}blocks.{layer - 1}.hook_resid_post" if layer else f"{prefix}hook_embed"


def memory_of(model: Any, name: str, inputs: Inputs) -> str:
    """The first hook that shows the memory that a hook shows."""
    block = re.fullmatch(r"(vision\.|)blocks\.(\d+)\.hook_(resid_pre|attn_in|mlp_in)", name)
    if block and block[3] == "mlp_in":
        return name.replace("hook_mlp_in", "hook_resid_mid")
    if block:
        return memory_of(model, _before(model, block[1], int(block[2])), inputs)
    if name == "hook_embed" and inputs.pixels is None:
        return "hook_text_embed"
    if name == "projector.hook_in" and model.cfg.vision.merge == 1:
        return memory_of(model, "vision.hook_features", inputs)
    if name == "vision.hook_features" and model.vision.features_are_a_stream:
        return _before(model, TOWER, range(model.cfg.vision.n_layers + 1)[model.cfg.vision.feature_layers[0]])
    return name


def own_dtype(hook: Hook, model: torch.dtype, inputs: Inputs) -> torch.dtype:
    """The dtype an activation has in a model of that dtype: norm scales are float32 or wider, pixels as given."""
    name = hook.name or ""
    if name.endswith("hook_pixels") and inputs.pixels is not None:
        return inputs.pixels.dtype
    return torch.float32 if name.endswith("hook_scale") and model != torch.float64 else model


def kept_numel(hook: Hook, sizes: Sizes, cuts: Cuts | None) -> int:
    """Numbers in one activation after the cut; 0 for a hook of a tower that the run does not enter."""
    name, axes = hook.name or "", hook.axes.split()
    lengths = sizes.get(next((prefix for prefix in BY_IMAGE if name.startswith(prefix)), ""))
    if lengths is None:
        return 0
    unknown = [axis for axis in axes if axis not in lengths]
    if unknown:
        raise LensError(f"the axis {unknown[0]!r} of {name!r} has no known length; give it in axis_sizes")
    shape = [lengths[axis] for axis in axes]
    cut = None if cuts is None else cuts.axis(hook)
    if cuts is not None and cut is not None:
        shape[cut] = cuts.count(hook, shape[cut])
    return math.prod(shape)


def axis_sizes(cfg: Any, inputs: Inputs) -> dict[str, dict[str, int]]:
    """How long each axis is in a run of `inputs`, by the prefix of the hooks (`""` for the decoder)."""
    tokens = inputs.n_pos
    sizes = {"": _stack_sizes(cfg, inputs.batch_size, tokens) | {"d_vocab": cfg.d_vocab}}
    if cfg.vision is not None and inputs.pixels is not None:
        cfg, (images, channel, height, width) = cfg.seeing(inputs.pixels), inputs.pixels.shape
        features = {"feature": cfg.vision.n_features, "d_features": cfg.vision.d_model * len(cfg.vision.feature_layers)}
        picture = {"patch": cfg.vision.n_patches, "channel": channel, "height": height, "width": width}
        sizes[TOWER] = _stack_sizes(cfg.vision, images, cfg.vision.n_ctx) | features | picture
        merged = {"feature": cfg.vision.n_merged, "d_features": cfg.vision.d_merged}
        sizes["projector."] = {"batch": images, "d_model": cfg.d_model, "1": 1} | merged
    return sizes


def _stack_sizes(cfg: Any, batch: int, pos: int) -> dict[str, int]:
    heads = {"head": cfg.n_heads, "kv_head": cfg.n_key_value_heads, "d_head": cfg.d_head}
    widths = {"d_model": cfg.d_model, "d_mlp": cfg.d_mlp}
    return {"batch": batch, "pos": pos, "query": pos, "key": pos, "1": 1} | heads | widths
