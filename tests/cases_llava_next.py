"""LLaVA-NeXT with its decoders: images of several shapes, each seen whole and in tiles, padding cut off."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases_llava import DECODERS, SIGLIP
from model_battery import Case, random_model
from random_models import IMAGE, TEXT, VISION
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaNextConfig, LlavaNextForConditionalGeneration, SiglipVisionConfig

from llava_lens.models.llava_next import LlavaNextConfig as OurConfig

PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
SIZES = [[(30, 61)], [(50, 50), (90, 31)]]
"""Images of each row, (height, width)."""


def config(decoder: str = "llama", tower: str = "clip", text: dict[str, Any] | None = None, **changes: Any) -> Any:
    small = {**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 512}
    vision = CLIPVisionConfig(**VISION) if tower == "clip" else SiglipVisionConfig(**SIGLIP)
    select, layer = ("default", -2) if tower == "clip" else ("full", -1)
    facts = dict(
        image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy=select,
        vision_feature_layer=layer,
    )  # fmt: skip
    return LlavaNextConfig(
        text_config=DECODERS[decoder](**{**small, **(text or {})}), vision_config=vision, **{**facts, **changes}
    )


def inputs(hf: Any, sizes: Any = SIZES, pad: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """Random inputs for rows with images of these sizes, their tiles padded to the most, as a processor gives them."""
    cfg, generator = OurConfig.from_hf(hf.config), torch.Generator().manual_seed(seed)
    rows, counts = [], []
    for i, images in enumerate(sizes):
        words = torch.randint(3, IMAGE, (7 + 3 * i,), generator=generator).tolist()
        layouts = [cfg.layout((width, height)) for height, width in images]
        counts += [len(layout.pictures) for layout in layouts]
        rows.append(words[:1] + [t for each in layouts for t in [IMAGE] * each.n_tokens + words[1:3]] + words[1:])
    longest, left = max(map(len, rows)), pad == "left"
    gaps = [longest - len(row) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    tokens = torch.tensor([[0] * gap + row if left else row + [0] * gap for row, gap in pairs])
    mask = torch.tensor([[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in pairs])
    side = hf.config.vision_config.image_size
    pixels = torch.zeros(len(counts), max(counts), 3, side, side)
    for image, n in zip(pixels, counts, strict=True):
        image[:n] = torch.randn(n, 3, side, side, generator=generator)
    every = torch.tensor([size for images in sizes for size in images])
    return {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels, "image_sizes": every}


def case(decoder: str, tower: str, model: str, parts: str) -> Case:
    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(LlavaNextForConditionalGeneration, config(decoder, tower), attention, dtype)

    return Case(f"llava-next-{tower}-{decoder}", model, parts, hf, inputs)


CASES = [
    case("llama", "clip", "LLaVA-NeXT", "CLIP, Llama / Vicuna"),
    case("mistral", "clip", "LLaVA-NeXT with Mistral", "CLIP, Mistral"),
    case("qwen2", "siglip", "LLaVA-NeXT with SigLIP", "SigLIP, Qwen2"),
]
