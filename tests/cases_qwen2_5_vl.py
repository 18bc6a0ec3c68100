"""Qwen2.5-VL: windows that do and do not divide the picture, one window, tied words, grouped heads."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

IMAGE, START, END = 90, 91, 92
TEXT: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
)
VISION: dict[str, Any] = dict(
    depth=2,
    hidden_size=48,
    intermediate_size=80,
    num_heads=3,
    patch_size=4,
    window_size=16,
    out_hidden_size=64,
    fullatt_block_indexes=[1],
)


def config(text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A small config; `text` and `vision` change its parts."""
    return Qwen2_5_VLConfig(
        text_config={**TEXT, **(text or {})},
        vision_config={**VISION, **(vision or {})},
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=START,
        vision_end_token_id=END,
        **changes,
    )


def inputs(
    hf: Any,
    images: tuple[int, ...] = (1, 2),
    grid: tuple[int, int] = (6, 6),
    pad: str | None = "left",
    text: int = 5,
    seed: int = 1,
) -> dict[str, Tensor]:
    """Random inputs as the processor lays them out: `images[i]` pictures of a grid of patches in row i."""
    generator = torch.Generator().manual_seed(seed)
    vision = hf.config.vision_config
    each = grid[0] * grid[1] // vision.spatial_merge_size**2
    rows = []
    for i, count in enumerate(images):
        words = torch.randint(3, IMAGE, (text + 2 * i,), generator=generator).tolist()
        rows.append(words[:2] + [t for _ in range(count) for t in [START, *[IMAGE] * each, END]] + words[2:])
    longest = max(map(len, rows))
    gaps = [[0] * (longest - len(row)) for row in rows]
    left = pad == "left"
    tokens = torch.tensor([gap + row if left else row + gap for row, gap in zip(rows, gaps, strict=True)])
    keep = [[1] * len(row) for row in rows]
    mask = torch.tensor([gap + one if left else one + gap for one, gap in zip(keep, gaps, strict=True)])
    found = {"input_ids": tokens, "attention_mask": mask}
    if sum(images):
        side, n = vision.patch_size, sum(images)
        patches = torch.randn(n * grid[0] * grid[1], 3, 1, side * side, generator=generator)
        found["pixel_values"] = patches.expand(-1, -1, vision.temporal_patch_size, -1).reshape(len(patches), -1)
        found["image_grid_thw"] = torch.tensor([[1, *grid]] * n)
        found["mm_token_type_ids"] = (tokens == IMAGE).int()
    return found


def case(name: str, parts: str, grid: tuple[int, int], **changes: Any) -> Case:
    """One configuration, with pictures of a grid of patches."""

    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(Qwen2_5_VLForConditionalGeneration, config(**changes), attention, dtype)

    return Case(f"qwen2_5_vl-{name}", "Qwen2.5-VL", parts, hf, lambda hf: inputs(hf, grid=grid))


CASES = [
    case("uneven-windows", "its own tower with windows, merger, Qwen2 with three rotary axes", (6, 6)),
    case("even-windows", "the same, tied", (8, 4), tie_word_embeddings=True),
    case(
        "mostly-whole",
        "the same, one window, one key head",
        (2, 4),
        vision={"fullatt_block_indexes": [0]},
        text={"num_key_value_heads": 1},
    ),
]
