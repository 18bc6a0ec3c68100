"""Published spellings of weights as tables: which key of which release is which of our parameters.

Unusual: every spelling folds to one by the longest prefix that fits (`Fold`), then one `Row` gives our name; what is
left out is named by an `Unused` row too, so that a key which no rule names is an error and not a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from llava_lens.errors import nearest
from llava_lens.shards import CheckpointError


class Fold(NamedTuple):
    """A prefix that some release puts before its keys, and the part of the model it stands for."""

    published: str
    part: str


class Row(NamedTuple):
    """A key, after folding, and our name for it; `{l}` a layer, `{p}` weight or bias, `{qkv}` one of three letters."""

    published: str
    ours: str


class Unused(NamedTuple):
    """A key, after folding, that is left out on purpose; `{any}` stands for any rest."""

    published: str


Table = tuple[Fold | Row | Unused, ...]
UNKNOWN = "?"
PLACEHOLDERS = {"l": r"0|[1-9]\d*", "p": "weight|bias", "qkv": "q|k|v", "any": ".+"}

LLAMA_TABLE: Table = (
    Fold("model.", "text:"),
    Row("text:embed_tokens.weight", "embed.weight"),
    Row("text:layers.{l}.input_layernorm.weight", "blocks.{l}.ln1.weight"),
    Row("text:layers.{l}.self_attn.{qkv}_proj.{p}", "blocks.{l}.attn.{qkv}_proj.{p}"),
    Row("text:layers.{l}.self_attn.o_proj.{p}", "blocks.{l}.attn.o_proj.{p}"),
    Row("text:layers.{l}.post_attention_layernorm.weight", "blocks.{l}.ln2.weight"),
    Row("text:layers.{l}.mlp.gate_proj.{p}", "blocks.{l}.mlp.gate_proj.{p}"),
    Row("text:layers.{l}.mlp.up_proj.{p}", "blocks.{l}.mlp.in_proj.{p}"),
    Row("text:layers.{l}.mlp.down_proj.{p}", "blocks.{l}.mlp.out_proj.{p}"),
    Row("text:norm.weight", "ln_final.weight"),
    Row("lm_head.weight", "unembed.weight"),
    Unused("text:rotary_emb.inv_freq"),
    Unused("text:layers.{l}.self_attn.rotary_emb.inv_freq"),
)
"""Llama and Vicuna."""

CLIP_TABLE: Table = (
    Fold("vision_model.", "tower:"),
    Fold("embeddings.", "tower:embeddings."),
    Fold("pre_layrnorm.", "tower:pre_layrnorm."),
    Fold("encoder.", "tower:encoder."),
    Fold("post_layernorm.", "tower:post_layernorm."),
    Row("tower:embeddings.class_embedding", "vision.class_embed"),
    Row("tower:embeddings.patch_embedding.{p}", "vision.patch_embed.{p}"),
    Row("tower:embeddings.position_embedding.weight", "vision.pos_embed.weight"),
    Row("tower:pre_layrnorm.{p}", "vision.ln_pre.{p}"),
    Row("tower:encoder.layers.{l}.layer_norm1.{p}", "vision.blocks.{l}.ln1.{p}"),
    Row("tower:encoder.layers.{l}.self_attn.{qkv}_proj.{p}", "vision.blocks.{l}.attn.{qkv}_proj.{p}"),
    Row("tower:encoder.layers.{l}.self_attn.out_proj.{p}", "vision.blocks.{l}.attn.o_proj.{p}"),
    Row("tower:encoder.layers.{l}.layer_norm2.{p}", "vision.blocks.{l}.ln2.{p}"),
    Row("tower:encoder.layers.{l}.mlp.fc1.{p}", "vision.blocks.{l}.mlp.in_proj.{p}"),
    Row("tower:encoder.layers.{l}.mlp.fc2.{p}", "vision.blocks.{l}.mlp.out_proj.{p}"),
    Unused("tower:embeddings.position_ids"),
    Unused("tower:post_layernorm.{p}"),
    Unused("tower:head.{any}"),
)
"""CLIP's vision tower, and SigLIP's."""

LLAVA_TABLE: Table = (
    *LLAMA_TABLE,
    *CLIP_TABLE,
    Fold("language_model.model.", "text:"),  # hub files of 2023, and what transformers 4 and 5 save
    Fold("language_model.lm_head.", "lm_head."),
    Fold("model.language_model.", "text:"),  # in memory since transformers 4.52
    Fold("language_model.", "text:"),  # a bare LlavaModel
    Fold("vision_tower.vision_model.", "tower:"),
    Fold("vision_tower.", "tower:"),  # saved by transformers 5
    Fold("model.vision_tower.vision_model.", "tower:"),
    Fold("model.vision_tower.", "tower:"),
    Fold("model.vision_tower.vision_tower.vision_model.", "tower:"),  # the original release, with a tuned tower
    Fold("model.vision_tower.vision_tower.", "tower:"),
    Fold("multi_modal_projector.", "projector:"),
    Fold("model.multi_modal_projector.", "projector:"),
    Fold("model.mm_projector.0.", "projector:linear_1."),  # the original release
    Fold("model.mm_projector.2.", "projector:linear_2."),
    Row("projector:linear_1.{p}", "projector.linear_1.{p}"),
    Row("projector:linear_2.{p}", "projector.linear_2.{p}"),
)
"""LLaVA-1.5 in every published spelling. Another model adds its rows: `weight_table = (*LLAVA_TABLE, Row(…), …)`."""


class UnknownWeights(CheckpointError):
    """The checkpoint holds weights that no rule names, or for which the model has no place."""


def rename(key: str, table: Table = LLAVA_TABLE) -> str | None:
    """Our name for a published key, None for one that is left out on purpose.

    Raises `UnknownWeights` with the nearest known key.

    >>> rename("language_model.model.layers.3.mlp.up_proj.weight")
    'blocks.3.mlp.in_proj.weight'
    """
    name = look_up(key, table)
    if name == UNKNOWN:
        raise UnknownWeights(f"no rule names {key!r}{nearest_key(key, table)}")
    return name


def look_up(key: str, table: Table) -> str | None:
    """Our name, None for a key left out on purpose, `UNKNOWN` where no rule fits."""
    folded = _fold(key, table)
    for pattern, rule in _patterns(table):
        if match := pattern.fullmatch(folded):
            return rule.ours.format(**match.groupdict()) if isinstance(rule, Row) else None
    return UNKNOWN


def nearest_key(key: str, table: Table) -> str:
    """A clause with the known key most like this one, for a message; empty when none is close."""
    layers = re.findall(r"(?<=layers\.)\d+", key)
    near = nearest(re.sub(r"(?<=layers\.)\d+", "{l}", key), _spellings(table), n=1)
    return near.replace("{l}", layers[0] if layers else "0")


def published(name: str, seen: Sequence[str], table: Table) -> str | None:
    """The key that our `name` would have in a checkpoint with the keys `seen`; None where no rule leads to it."""
    for rule in table:
        match = _pattern(rule.ours).fullmatch(name) if isinstance(rule, Row) else None
        if match and isinstance(rule, Row):
            return _unfold(rule.published.format(**match.groupdict()), seen, table)
    return None


def _unfold(key: str, seen: Sequence[str], table: Table) -> str:
    """A folded key in the spelling that begins most like the other keys."""
    folds = [rule for rule in table if isinstance(rule, Fold) and key.startswith(rule.part)]
    spellings = [fold.published + key.removeprefix(fold.part) for fold in folds]
    spellings += [] if ":" in key and spellings else [key]
    alike = {spelling: max((_shared(spelling, other) for other in seen), default=0) for spelling in spellings}
    return max(spellings, key=lambda spelling: (alike[spelling], -len(spelling)))


def _shared(a: str, b: str) -> int:
    """How many first characters two keys have in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@lru_cache
def _patterns(table: Table) -> tuple[tuple[re.Pattern[str], Row | Unused], ...]:
    return tuple((_pattern(rule.published), rule) for rule in table if not isinstance(rule, Fold))


def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)\}", text)
    literals, names = map(re.escape, parts[::2]), parts[1::2]
    groups = [*(f"(?P<{name}>{PLACEHOLDERS[name]})" for name in names), ""]
    return re.compile("".join(literal + group for literal, group in zip(literals, groups, strict=True)))


def _fold(key: str, table: Table) -> str:
    folds = [rule for rule in table if isinstance(rule, Fold) and key.startswith(rule.published)]
    if not folds:
        return key
    longest = max(folds, key=lambda fold: len(fold.published))
    return longest.part + key.removeprefix(longest.published)


@lru_cache
def _spellings(table: Table) -> tuple[str, ...]:
    """Every known key, placeholders unfilled but for weight and bias."""
    folds = [rule for rule in table if isinstance(rule, Fold)]
    rows = [rule.published for rule in table if isinstance(rule, Row)]
    keys = [fold.published + row.removeprefix(fold.part) for row in rows for fold in folds if row.startswith(fold.part)]
    keys += [row for row in rows if ":" not in row]
    keys = [key.replace("{qkv}", letter) for key in keys for letter in ("qkv" if "{qkv}" in key else "q")]
    return tuple(key.replace("{p}", p) for key in keys for p in (("weight", "bias") if "{p}" in key else ("",)))
