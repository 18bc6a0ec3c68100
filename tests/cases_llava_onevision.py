"""LLaVA-OneVision: images alone, cut and made smaller where they are large, and several together, not cut."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from cases_llava import DECODERS, SIGLIP
from model_battery import Case, random_model
from random_models import IMAGE, TEXT
from torch import Tensor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, SiglipVisionConfig

from llava_lens.models.llava_onevision import LlavaOnevisionConfig as OurConfig

PINPOINTS = [[24 * rows, 24 * cols] for rows in range(1, 5) for cols in range(1, 5)]
SIZES = [[(31, 62)], [(50, 50), (90, 31)], [(70, 71)]]
"""Images of each row, (height, width): one that is cut, two together, one whose tiles are made smaller."""


def config(decoder: str = "qwen2", **changes: Any) -> LlavaOnevisionConfig:
    text = DECODERS[decoder](**{**TEXT, "num_key_value_heads": 2, "max_position_embeddings": 512})
    facts: dict[str, Any] = dict(
        image_token_index=IMAGE,
        video_token_index=91,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_4",
    )
    return LlavaOnevisionConfig(text_config=text, vision_config=SiglipVisionConfig(**SIGLIP), **{**facts, **changes})


def inputs(hf: Any, sizes: Any = SIZES, pad: str = "left", seed: int = 1) -> dict[str, Tensor]:
    """Random inputs for rows with images of these sizes, their tiles padded to the most, as a processor gives them."""
    cfg, generator = OurConfig.from_hf(hf.config), torch.Generator().manual_seed(seed)
    rows, counts = [], []
    for i, images in enumerate(sizes):
        words = torch.randint(3, IMAGE, (7 + 3 * i,), generator=generator).tolist()
        layouts = [cfg.uncut if len(images) > 1 else cfg.layout((width, height)) for height, width in images]
        counts += [len(layout.pictures) for layout in layouts]
        rows.append(words[:1] + [t for each in layouts for t in [IMAGE] * each.n_tokens + words[1:3]] + words[1:])
    longest, left = max(map(len, rows)), pad == "left"
    pairs = [(row, longest - len(row)) for row in rows]
    tokens = torch.tensor([[0] * gap + row if left else row + [0] * gap for row, gap in pairs])
    mask = torch.tensor([[0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap for row, gap in pairs])
    side = hf.config.vision_config.image_size
    pixels = torch.zeros(len(counts), max(counts), 3, side, side)
    for image, n in zip(pixels, counts, strict=True):
        image[:n] = torch.randn(n, 3, side, side, generator=generator)
    given = {"input_ids": tokens, "attention_mask": mask, "pixel_values": pixels}
    given["image_sizes"] = torch.tensor([size for images in sizes for size in images])
    return given | {"batch_num_images": torch.tensor([len(images) for images in sizes])}


def case(name: str, parts: str, decoder: str) -> Case:
    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(LlavaOnevisionForConditionalGeneration, config(decoder), attention, dtype)

    return Case(name, "LLaVA-OneVision", parts, hf, inputs)


CASES = [case("llava-onevision", "SigLIP, Qwen2", "qwen2"), case("llava-onevision-llama", "SigLIP, Llama", "llama")]
