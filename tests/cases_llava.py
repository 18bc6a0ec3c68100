"""LLaVA's own architecture with towers and decoders that other checkpoints of it have."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from random_models import IMAGE, TEXT, VISION, example
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

DECODERS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
SIGLIP = {name: value for name, value in VISION.items() if name != "projection_dim"}


def config(decoder: str, tower: str, **changes: Any) -> LlavaConfig:
    text = DECODERS[decoder](**{**TEXT, "num_key_value_heads": 2})
    vision = CLIPVisionConfig(**VISION) if tower == "clip" else SiglipVisionConfig(**SIGLIP)
    select, layer = ("default", -2) if tower == "clip" else ("full", -1)
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=9,
        vision_feature_select_strategy=select,
        vision_feature_layer=layer,
        **changes,
    )


def case(decoder: str, tower: str, model: str, parts: str) -> Case:
    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(LlavaForConditionalGeneration, config(decoder, tower), attention, dtype)

    return Case(
        f"llava-{tower}-{decoder}", model, parts, hf, lambda hf: example(hf, images=(1, 2), pad="left"),
        silent=(),
    )  # fmt: skip


CASES = [
    case("llama", "clip", "LLaVA-1.5", "CLIP, Llama / Vicuna"),
    case("mistral", "clip", "LLaVA with Mistral (BakLLaVA)", "CLIP, Mistral"),
    case("qwen2", "siglip", "LLaVA-Interleave", "SigLIP, Qwen2"),
]
