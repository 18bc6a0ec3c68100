"""InternVL: layer scale, merged patches, tiles; its tower with each of its norms, and both decoders."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from random_models import IMAGE, TEXT, example
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    Qwen2Config,
)

TOWER: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=3, image_size=32, patch_size=8
)
DECODERS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def config(decoder: str = "qwen2", text: dict[str, Any] | None = None, **changes: Any) -> InternVLConfig:
    """A small config; what is no field of the whole belongs to the tower."""
    own = {name: changes.pop(name) for name in tuple(changes) if hasattr(InternVLConfig(), name)}
    words = DECODERS[decoder](**{**TEXT, "num_key_value_heads": 2, **(text or {})})
    tower = InternVLVisionConfig(**{**TOWER, **changes})
    merge = round(1 / own.get("downsample_ratio", 0.5))
    each = (tower.image_size[0] // tower.patch_size[0] // merge) ** 2  # type: ignore[index]
    own = {"tie_word_embeddings": False, **own}
    return InternVLConfig(text_config=words, vision_config=tower, image_token_id=IMAGE, image_seq_length=each, **own)


def inputs(hf: Any, images: tuple[int, ...] = (1, 2), pad: str | None = "left") -> dict[str, Any]:
    """Random inputs; the battery's own take a square's side as one number."""

    class Plain:
        class config:
            image_seq_length = hf.config.image_seq_length

            class vision_config:
                image_size = hf.config.vision_config.image_size[0]

    return example(Plain, images=images, pad=pad)


@cache
def random_internvl(attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random InternVL, cached by what is changed."""
    return random_model(InternVLForConditionalGeneration, config(**changes), attention, dtype)


def case(name: str, parts: str, **changes: Any) -> Case:
    def hf(attention: str, dtype: torch.dtype) -> Any:
        return random_internvl(attention, dtype, **changes)

    return Case(name, "InternVL", parts, hf, inputs)


CASES = [
    case("internvl-qwen2", "InternViT, Qwen2"),
    case("internvl-rms-llama", "InternViT with RMS and QK norms, Llama", decoder="llama", norm_type="rms_norm",
         use_qk_norm=True, attention_bias=True),
]  # fmt: skip
