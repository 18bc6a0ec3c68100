"""From an answer back through the decoder to one picture's features: the direction that each is read along.

Unusual: nothing is differentiated. With patterns, norm scales and gates held at what the run observed the decoder is
linear, and its transpose is applied to the answer's direction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.account import Asked
from llava_lens.analysis.attribution.direct import Rest
from llava_lens.analysis.attribution.needs import CHANGED, slack, whole
from llava_lens.analysis.attribution.query import Place
from llava_lens.analysis.attribution.rebuild import beside
from llava_lens.cache import LlavaCache
from llava_lens.config import VisionConfig
from llava_lens.errors import LensError
from llava_lens.inputs import standing
from llava_lens.kernels import upcast
from llava_lens.layers import bias_of
from llava_lens.record import TOWER

Features = Float[Tensor, "answer feature _"]
"""A direction at every feature, in the stream of the decoder, of the projector or of the tower."""


@dataclass(frozen=True)
class Picture:
    """One picture of one row: where its features stand in the prompt, and its entries in tower and projector.

    `shown` are the features that stand there, `slots` their positions; only they are accounted for, as no other reaches
    the decoder. `others` are the image positions of other pictures and of none.
    """

    cache: LlavaCache
    row: int
    number: int
    index: int
    slots: tuple[int, ...]
    others: tuple[int, ...]
    shown: tuple[int, ...]
    grid: tuple[int, int]

    @classmethod
    def of(cls, cache: LlavaCache, row: int, image: int) -> Picture:
        """Raises `LensError` for a picture that the row does not have, or of which no single patch has a token."""
        assert cache.inputs is not None
        cfg = cache.model.cfg.seeing(cache.inputs.pixels)
        pictures = standing(cache.inputs, row, cfg) if cfg.vision is not None else []
        if not pictures:
            raise LensError(f"image {image!r} of row {row}; expected none: the prompt has no picture")
        image = whole(f"row {row}: image", image, 0, len(pictures) - 1)
        before = sum(len(layout.pictures) for layouts in cache.inputs.layouts(cfg)[:row] for layout in layouts)
        own, picture = pictures[image]
        every, mine = cache.inputs.slots(cfg)[row].nonzero()[:, 0].tolist(), set(own)
        others, columns = tuple(at for at in every if at not in mine), cfg.vision.token_grid[1]  # type: ignore[union-attr]
        return cls(
            cache, row, image, before + image, tuple(own), others, tuple(picture.features(columns)), picture.grid
        )

    @property
    def model(self) -> Any:
        return self.cache.model

    @property
    def cfg(self) -> VisionConfig:
        return self.cache.model.cfg.seeing(self.cache.inputs.pixels).vision  # type: ignore[union-attr]

    @property
    def read(self) -> list[int]:
        """The tower's positions whose features stand in the prompt."""
        start = int(self.cfg.class_token and not self.cfg.keep_class_token)
        return [start + number for number in self.shown]

    def projected(self, name: str) -> Float[Tensor, "feature width"]:
        """One of the projector's entries, in float32 or better."""
        act = self.cache[f"projector.{name}"]
        return upcast(act[self.index] if self.cache.has_image_dim else act)[list(self.shown)]

    def tower(self, name: str, layer: int | None = None) -> Tensor:
        """One of the tower's entries, in float32 or better; raises `LensError` where positions were cut away."""
        full = f"{TOWER}{name}" if layer is None else f"{TOWER}blocks.{layer}.{name}"
        act = self.cache[full]
        act = upcast(act[self.index] if self.cache.has_image_dim else act)
        held, n = act.shape[-2 if name.endswith("hook_pattern") else 0], self.cfg.n_ctx
        if held != n:
            raise LensError(f"{full!r} holds {held} of {n} positions; expected all: run without vision_pos_slice")
        return act

    def dtype(self, name: str) -> torch.dtype:
        """The precision of what was cached."""
        return self.cache[name].dtype


def same_stream(picture: Picture, place: Place) -> None:
    """Raise `LensError` where the decoder did not get what the projector gave."""
    seen, out = at_positions(place, "blocks.0.hook_resid_pre", picture.slots), picture.projected("hook_out")
    if bool(((seen - out).norm(dim=-1) > 1e-2 * out.norm(dim=-1)).any()):
        raise LensError(
            "the stream at the image's positions is not the projector's output: a hook edited one of them, so that "
            "what the tower wrote is not what the decoder read"
        )


def at_positions(place: Place, name: str, positions: tuple[int, ...]) -> Float[Tensor, "position width"]:
    """Some of a row's positions in an entry; raises `LensError` where the cache cut them away."""
    act, kept = place.entry(name), place.cache.kept
    where = {at: i for i, at in enumerate(range(len(act)) if kept is None else kept)}
    missing = [at for at in positions if at not in where]
    if missing or len(where) != len(act):
        raise LensError(
            f"{name!r} does not hold the positions {missing[:3]} …; the way from the picture needs them: run without "
            "pos_slice"
        )
    return upcast(act[[where[at] for at in positions]])


def directly(picture: Picture, asked: Asked) -> tuple[Features, Rest]:
    """Where a feature's own path through one head's value and output matrices reads it, and the query's own place."""
    slots, blocks = list(picture.slots), picture.model.blocks
    first = asked.terms[0][1]
    total = first.new_zeros(len(first), len(slots), first.shape[-1])
    for place, directions in asked.terms:
        for layer, block in enumerate(blocks):
            heads = from_values(block, read_by_heads(block, directions))
            seen = einsum(place.pattern(layer)[:, slots], heads, "head feature, answer head d -> answer feature d")
            total += seen * normed(place, block, "ln1", layer, picture.slots)
        if place.in_prompt in slots:
            total[:, slots.index(place.in_prompt)] += directions
    return total, {}


def by_all_paths(picture: Picture, asked: Asked) -> tuple[Features, Rest]:
    """Every path through the decoder, and what does not come from this picture: one pass back over all positions."""
    place, model = asked.place, picture.model
    everywhere = tuple(range(picture.cache.inputs.n_pos))  # type: ignore[union-attr]
    embedded = at_positions(place, "blocks.0.hook_resid_pre", everywhere)
    first = asked.terms[0][1]
    stream = first.new_zeros(len(first), len(everywhere), first.shape[-1])
    for there, directions in asked.terms:
        stream[:, there.in_prompt] += directions
    biases = first.new_zeros(len(first))
    for layer, block in reversed(list(enumerate(model.blocks))):
        pre = at_positions(place, f"blocks.{layer}.mlp.hook_pre", everywhere)
        hidden = (stream @ beside(block.mlp.out_proj.weight, pre)) * block.mlp.act(pre)
        biases += (stream @ beside(block.mlp.b_out, pre) + hidden @ beside(block.mlp.b_in, pre)).sum(1)
        read = hidden @ beside(block.mlp.in_proj.weight, pre)
        stream = stream + read * normed(place, block, "ln2", layer, everywhere)
        pattern = upcast(place.entry(f"blocks.{layer}.attn.hook_pattern"))
        mixed = einsum(
            pattern, read_by_heads(block, stream), "head query key, answer query head d -> answer key head d"
        )
        biases += (stream @ beside(block.attn.b_O, pre)).sum(1)
        share = model.cfg.n_heads // model.cfg.n_key_value_heads
        values = reduce(mixed, "answer key (kv share) d -> answer key (kv d)", "sum", share=share)
        biases += (values @ beside(bias_of(block.attn.v_proj), pre)).sum(1)
        read = values @ beside(block.attn.v_proj.weight, pre)
        stream = stream + read * normed(place, block, "ln1", layer, everywhere)
    said = einsum(stream, embedded, "answer pos d, pos d -> answer pos")
    images = set(picture.slots) | set(picture.others)
    text = [at for at in everywhere if at not in images]
    elsewhere = {"text": said[:, text].sum(1), "decoder biases": biases}
    if picture.others:
        elsewhere["other images"] = said[:, list(picture.others)].sum(1)
    missed = (said.sum(1) + biases - asked.logit).abs()
    if bool((missed > slack(picture.dtype("blocks.0.hook_resid_pre")) * (said.abs().sum(1) + biases.abs())).any()):
        raise LensError(f"what every path through the decoder adds does not sum to the logit: {CHANGED}")
    return stream[:, list(picture.slots)], elsewhere


def read_by_heads(block: Any, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows head d_head"]:
    """Directions in the stream as each head's output matrix reads them."""
    out = x @ beside(block.attn.o_proj.weight, x)
    return rearrange(out, "... (head d_head) -> ... head d_head", d_head=block.attn.cfg.d_head)


def from_values(block: Any, x: Float[Tensor, "answer head d_head"]) -> Float[Tensor, "answer head d_model"]:
    """Directions at each head's values as the value matrix reads them from the normed stream."""
    W_V = beside(block.attn.W_V, x)
    grouped = rearrange(x, "answer (kv share) d_head -> answer kv share d_head", kv=len(W_V))
    read = einsum(grouped, W_V, "answer kv share d_head, kv d_model d_head -> answer kv share d_model")
    return rearrange(read, "answer kv share d_model -> answer (kv share) d_model")


def normed(place: Place, block: Any, ln: str, layer: int, positions: tuple[int, ...]) -> Float[Tensor, "pos d_model"]:
    """What a norm multiplied every number of the stream with."""
    scale = at_positions(place, f"blocks.{layer}.{ln}.hook_scale", positions)
    return beside(getattr(block, ln).w, scale) / scale
