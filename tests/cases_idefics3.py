"""Idefics3 and SmolVLM: tiles with marks between them, grids merged by 2 and by 5, black pictures as padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from random_models import IMAGE, TEXT
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

KINDS = {
    "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
}
VISION: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
)  # fmt: skip
MARKS = (91, 92, 93)
"""Around pictures, before a tile, before the whole image."""


def config(kind: str, scale: int = 2, text: dict[str, Any] | None = None, **vision: Any) -> Any:
    settings = {"num_key_value_heads": 2} | (text or {})
    tied = settings.get("tie_word_embeddings", False)
    return KINDS[kind][0](
        text_config=LlamaConfig(**{**TEXT, "max_position_embeddings": 256, **settings}).to_dict(),
        vision_config={**VISION, **vision},
        image_token_id=IMAGE,
        scale_factor=scale,
        tie_word_embeddings=tied,
    )


def inputs(hf: Any, tiles: Sequence[Sequence[int]] = ((3, 1), (1,)), side: str = "left") -> dict[str, Tensor]:
    """Rows with images, cut into so many pictures each, as the processor lays them out: rows filled up with black."""
    config, generator = hf.config, torch.Generator().manual_seed(1)
    vision = config.vision_config
    each, size = (vision.image_size // vision.patch_size // config.scale_factor) ** 2, vision.image_size
    rows: list[list[int]] = []
    for i, row in enumerate(tiles):
        words = torch.randint(3, IMAGE, (5 + 2 * i,), generator=generator).tolist()
        seen = [t for n in row for j in range(n) for t in (91, 93 if j == n - 1 else 92, *[IMAGE] * each)]
        rows.append([words[0], *seen, 91, *words[1:]])
    longest, most = max(map(len, rows)), max(map(sum, tiles))
    gaps = [[0] * (longest - len(row)) for row in rows]
    ones = [[1] * len(row) for row in rows]
    whole = [a + b if side == "left" else b + a for a, b in zip(gaps + gaps, rows + ones, strict=True)]
    pixels = torch.randn(len(rows), most, 3, size, size, generator=generator)
    mask = torch.ones(len(rows), most, size, size, dtype=torch.long)
    for i, row in enumerate(tiles):
        pixels[i, sum(row) :], mask[i, sum(row) :] = 0, 0
    return {
        "input_ids": torch.tensor(whole[: len(rows)]),
        "attention_mask": torch.tensor(whole[len(rows) :]),
        "pixel_values": pixels,
        "pixel_attention_mask": mask,
    }


def case(name: str, kind: str, parts: str, given: Any = None, scale: int = 2, text: Any = None, **vision: int) -> Case:
    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(KINDS[kind][1], config(kind, scale, text, **vision), attention, dtype)

    model = "Idefics3" if kind == "idefics3" else "SmolVLM, SmolVLM2 (images)"
    return Case(name, model, parts, hf, lambda hf: inputs(hf, **(given or {})))


SHIFTED = {"image_size": 51, "patch_size": 2, "num_hidden_layers": 1}
"""A grid of 25 × 25: rounding puts some patches at their neighbour's position; and there are pixels outside of it."""
HEADS = {"num_key_value_heads": 4, "head_dim": 24}
CASES = [
    case("smolvlm", "smolvlm", "SigLIP, pixel shuffle, Llama"),
    case("idefics3", "idefics3", "SigLIP, pixel shuffle, Llama", text=HEADS),
    case("idefics3-shifted", "idefics3", "SigLIP at shared positions, pixel shuffle by 5, Llama with biases", scale=5,
         text={"attention_bias": True}, **SHIFTED),
    case("smolvlm-tied", "smolvlm", "SigLIP, nothing merged, tied Llama", {"tiles": ((1, 1), (2,))}, 1,
         {"tie_word_embeddings": True}),
]  # fmt: skip
