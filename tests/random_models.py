"""Small random LLaVAs from Hugging Face's own classes, over the odd configurations that checkpoints have."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 90
"""Token id of `<image>` in every random model here."""

TEXT: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
)
VISION: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=24,
    patch_size=8,
    projection_dim=16,
)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + 0.3 * i for i in range(8)],
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "theta": {"rope_type": "default", "rope_theta": 500000.0},
}
ODD: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"text": {"num_key_value_heads": 2}},
    "one_kv_head": {"text": {"num_key_value_heads": 1}},
    "wide_heads": {"text": {"head_dim": 24}},
    "wide_grouped_heads": {"text": {"head_dim": 24, "num_key_value_heads": 2}},
    "tied": {"text": {"tie_word_embeddings": True}},
    "attention_bias": {"text": {"attention_bias": True}},
    "mlp_bias": {"text": {"mlp_bias": True}},
    "eps_1e-6": {"text": {"rms_norm_eps": 1e-6}},
    "gelu_decoder": {"text": {"hidden_act": "gelu"}},
    "full": {"vision_feature_select_strategy": "full"},
    "last_layer": {"vision_feature_layer": -1},
    "first_layer": {"vision_feature_layer": [0]},
    "one_layer_list": {"vision_feature_layer": [-2]},
    "positive_layer": {"vision_feature_layer": 2},
    "layer_list": {"vision_feature_layer": [-2, 1]},
    "layer_list_full": {"vision_feature_layer": [3, -4, -1], "vision_feature_select_strategy": "full"},
    "bare_projector": {"multimodal_projector_bias": False},
    "gelu_tower": {"vision": {"hidden_act": "gelu"}, "projector_hidden_act": "relu"},
    "shallow": {"text": {"num_key_value_heads": 2, "num_hidden_layers": 2}, "vision": {"num_hidden_layers": 3}},
    **{f"rope_{name}": {"text": {"rope_parameters": rope}} for name, rope in ROPES.items()},
}
"""Name → what differs from `TEXT`, `VISION` and LLaVA's defaults."""


def llava_config(odd: str = "plain") -> LlavaConfig:
    changes = dict(ODD[odd])
    text = LlamaConfig(**{**TEXT, **changes.pop("text", {})})
    vision = CLIPVisionConfig(**{**VISION, **changes.pop("vision", {})})
    patches = (vision.image_size // vision.patch_size) ** 2  # type: ignore[operator]
    full = changes.get("vision_feature_select_strategy") == "full"
    return LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, image_seq_length=patches + full, **changes
    )


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that every part matters, biases and gains included."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        gain = "norm" in name and name.endswith("weight")
        weight.copy_(1 + 0.2 * noise if gain else noise * (0.1 if weight.ndim == 1 else 1.2 / weight.shape[-1] ** 0.5))


@cache
def hf_llava(odd: str = "plain", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random `LlavaForConditionalGeneration`; in low precision it is created in it, as loading would."""
    config = llava_config(odd)
    config._attn_implementation = attention
    model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    shake(model)
    model.tie_weights()
    return model.eval()


@cache
def hf_llama(odd: str = "plain", attention: str = "sdpa") -> Any:
    """A random `LlamaForCausalLM`."""
    config = LlamaConfig(**{**TEXT, **ODD[odd].get("text", {})})
    model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    shake(model)
    model.tie_weights()
    return model.eval()


def example(hf: Any, images: tuple[int, ...] = (1, 1), pad: str | None = None, text: int = 7, seed: int = 1) -> dict:
    """Random inputs: `images[i]` pictures in row i; `pad` "left"/"right" makes the rows ragged."""
    generator = torch.Generator().manual_seed(seed)
    config = hf.config
    each, size = config.image_seq_length, config.vision_config.image_size
    rows = []
    for i, count in enumerate(images):
        words = torch.randint(3, IMAGE, (text + 3 * i if pad else text,), generator=generator).tolist()
        rows.append(words[:1] + [t for _ in range(count) for t in [IMAGE] * each + words[1:3]] + words[1:])
    longest = max(map(len, rows))
    assert pad or all(len(row) == longest for row in rows)
    left = pad == "left"
    tokens = torch.tensor([[0] * (longest - len(r)) + r if left else r + [0] * (longest - len(r)) for r in rows])
    keep = [[1] * len(r) for r in rows]
    mask = torch.tensor([[0] * (longest - len(k)) + k if left else k + [0] * (longest - len(k)) for k in keep])
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if sum(images):
        pixels = torch.randn(sum(images), 3, size, size, generator=generator)
        inputs["pixel_values"] = pixels
    return inputs
