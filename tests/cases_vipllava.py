"""ViP-LLaVA: several layers of CLIP's tower, normed together."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from random_models import IMAGE, TEXT, VISION, example
from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig, VipLlavaForConditionalGeneration


def config(**changes: Any) -> VipLlavaConfig:
    facts: dict[str, Any] = dict(vision_feature_layer=[-2, -3, 1], image_token_index=IMAGE, image_seq_length=9)
    text = LlamaConfig(**{**TEXT, "num_key_value_heads": 2})
    return VipLlavaConfig(text_config=text, vision_config=CLIPVisionConfig(**VISION), **{**facts, **changes})


def case(name: str, parts: str, **changes: Any) -> Case:
    @cache
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_model(VipLlavaForConditionalGeneration, config(**changes), attention, dtype)

    return Case(name, "ViP-LLaVA", parts, hf, lambda hf: example(hf, images=(1, 2), pad="left"))


CASES = [
    case("vipllava", "CLIP, Llama / Vicuna"),
    case("vipllava-one-layer", "CLIP (one layer), Llama", vision_feature_layer=-2, projector_layernorm_eps=1e-3),
]
