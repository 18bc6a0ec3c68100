"""One query position in one row of a cache: what stood there, and how to read it.

Unusual: everything is read from cached entries, in float32 or better, whatever the model computes in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.attribution.needs import CHANGED, slack, whole
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.cache import LlavaCache
from llava_lens.errors import LensError
from llava_lens.kernels import repeat_heads, upcast
from llava_lens.roles import Roles

By = str | tuple[str, ...]

PER_POSITION = ("blocks.0.hook_resid_pre", "blocks.0.attn.hook_pattern")
"""Entries whose last axis but one counts query positions; each question needs one of them."""


@dataclass(frozen=True)
class Place:
    """One row of a cache and one query position in it."""

    cache: LlavaCache
    row: int
    query: int

    @classmethod
    def of(cls, cache: LlavaCache, row: int, position: SupportsIndex) -> Place:
        """Resolve a position: -1 is the last that is not padding, other negative ones count from the row's end.

        Positions are the prompt's, also where the cache kept only some of them.
        """
        place = cls(cache, row, 0)
        held, roles = cache.shape(next(name for name in PER_POSITION if name in cache))[-2], place.roles
        n = held if roles is None else len(roles)
        position = whole("position", position, -n, n - 1)
        query = roles.last if roles is not None and position == -1 else position % n
        if roles is not None and roles.labels[query] == "padding":
            raise LensError(f"position {position} of row {row} is padding")
        kept = tuple(range(held)) if cache.kept is None else cache.kept
        if len(kept) != held or (cache.kept is None and held != n) or query not in kept:
            raise LensError(f"position {query} is not among the {held} of {n} that the cache kept: widen its pos_slice")
        return cls(cache, row, kept.index(query))

    @property
    def in_prompt(self) -> int:
        """The query's position in the prompt."""
        return self.query if self.cache.kept is None else self.cache.kept[self.query]

    @property
    def n_layers(self) -> int:
        return self.cache.model.cfg.n_layers

    @property
    def roles(self) -> Roles | None:
        """The row's roles, None where the inputs carried none."""
        inputs = self.cache.inputs
        return None if inputs is None or inputs.roles is None else inputs.roles[self.row]

    @property
    def roles_or_none(self) -> tuple[Roles, ...] | None:
        return None if self.roles is None else (self.roles,)

    @property
    def labels(self) -> dict[str, tuple[int | str, ...]]:
        """What each position is called: its patch, else its token."""
        return {} if self.roles is None else {"position": names_of(self.roles)}

    def same_logit(self, token: int) -> None:
        """Raise `LensError` where a token's logit, read from the final stream, is not the cached one."""
        cache, model = self.cache, self.cache.model
        if "hook_logits" not in cache or cache["hook_logits"].shape[-2] != cache.shape(PER_POSITION[0])[-2]:
            return
        final, held = self.at(self.n_layers - 1, "hook_resid_post"), self.entry("hook_logits")
        normed = final * (final.square().mean() + model.cfg.eps).rsqrt() * upcast(model.ln_final.w.detach()).to(final)
        word, seen = upcast(model.unembed.weight[token].detach()).to(final), upcast(held[self.query, token])
        typical = normed.norm() * word.norm() / len(word) ** 0.5 + seen.abs()
        if bool((word @ normed - seen).abs() > slack(held.dtype) * typical):
            raise LensError(f"hook_logits at position {self.in_prompt} are not those of the final stream: {CHANGED}")

    def entry(self, name: str) -> Tensor:
        """This row of a cached entry."""
        act = self.cache[name].detach()
        return act[self.row] if self.cache.has_batch_dim else act

    def at(self, layer: int, name: str) -> Float[Tensor, "*axes"]:
        """A block's entry at the query position, in float32 or better."""
        return upcast(self.entry(f"blocks.{layer}.{name}")[self.query])

    def pattern(self, layer: int) -> Float[Tensor, "head key"]:
        """The attention of the query in one layer."""
        row = self.row if self.cache.has_batch_dim else None
        return upcast(self.cache.pattern(layer, rows=row, queries=self.query).detach())

    def values(self, layer: int) -> Float[Tensor, "head key d_head"]:
        """The value vectors, those of a group repeated for each of its heads."""
        v = rearrange(self.entry(f"blocks.{layer}.attn.hook_v"), "key kv_head d_head -> 1 kv_head key d_head")
        share = self.cache.model.cfg.n_heads // self.cache.model.cfg.n_key_value_heads
        return upcast(repeat_heads(v, share)[0])


def names_of(roles: Roles) -> tuple[int | str, ...]:
    """`patch (row, col)` for a patch, the token's string for text, the number where that is unknown."""
    grids = [patch_names(roles, image) for image in range(roles.n_images)]
    known = {position: name for names in grids for position, name in names.items()}
    words = roles.tokens or ("",) * len(roles)
    return tuple(known.get(i) or word or i for i, word in enumerate(words))


def patch_names(roles: Roles, image: int) -> dict[int, str]:
    """Position → name, for every patch of one image."""
    which = f"image {image} " if roles.n_images > 1 else ""
    grid = roles.patch_positions(image).tolist()
    return {at: f"{which}patch ({r}, {c})" for r, line in enumerate(grid) for c, at in enumerate(line)}


def rows_of(cache: LlavaCache, row: int | None) -> list[int]:
    """The rows to score: the given one, or all."""
    name = next((name for name in cache.cache_dict if name.startswith("blocks.")), None)
    size = 1 if cache.inputs is None else cache.inputs.batch_size
    n = size if name is None else cache.shape(name)[0] if cache.has_batch_dim else 1
    return list(range(n)) if row is None else [whole("row", row, -n, n - 1) % n]


@dataclass(frozen=True)
class Query(Place):
    """A query position with the token asked about and the way to read the stream there."""

    readout: Readout
    token: int

    @classmethod
    def asking(cls, cache: LlavaCache, row: int, position: int, answer: int | None, unembed: Tensor) -> Query:
        """The query of one row; the token defaults to the model's own choice."""
        place = Place.of(cache, row, position)
        readout = Readout.of(cache.model, place.at(place.n_layers - 1, "hook_resid_post"), unembed)
        token = int(readout.logits(readout.final).argmax()) if answer is None else answer
        place.same_logit(token)
        return cls(cache, row, place.query, readout, token)

    def base(self, layer: int) -> Float[Tensor, " d_model"]:
        """The stream that a layer's attention is added to."""
        return self.at(layer, "hook_resid_pre")

    def mixtures(self, layer: int, by: By) -> Float[Tensor, "head source d_head"]:
        """What each head mixes before its output matrix: from every position, or all together as one source."""
        if by == "head":
            return rearrange(self.at(layer, "attn.hook_z"), "head d_head -> head 1 d_head")
        pattern, v = self.pattern(layer), self.values(layer)
        if pattern.shape[1] != v.shape[1]:
            raise LensError(
                f"values of {v.shape[1]} positions, attention to {pattern.shape[1]}: "
                "positions take a cache of the whole prompt in one run, without pos_slice"
            )
        return pattern[..., None] * v

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        return upcast(self.cache.model.blocks[layer].attn.W_O).detach()

    def neurons(self, layer: int) -> Float[Tensor, "neuron d_model"]:
        """What each neuron of a layer's MLP adds to the stream."""
        out = upcast(self.cache.model.blocks[layer].mlp.W_out).detach()
        return self.at(layer, "mlp.hook_post")[:, None] * out

    def added(self, layer: int, by: By) -> tuple[Float[Tensor, " d_model"], Float[Tensor, " d_model"]]:
        """What a layer's attention adds in all (its MLP by "neuron"), and the bias in it."""
        block = self.cache.model.blocks[layer]
        name, bias = ("hook_mlp_out", block.mlp.b_out) if by == "neuron" else ("hook_attn_out", block.attn.b_O)
        return self.at(layer, name), upcast(bias).detach()
