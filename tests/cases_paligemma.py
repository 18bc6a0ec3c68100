"""PaliGemma over its odd configurations, for `test_models`."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from model_battery import Case, random_model
from random_models import IMAGE, TEXT, VISION
from torch import Tensor
from transformers import GemmaConfig, PaliGemmaConfig, PaliGemmaForConditionalGeneration, SiglipVisionConfig

NO_TYPES = "without token_type_ids Hugging Face's sdpa drops the mask, its eager attention is causal, as ours is"
GEMMA: dict[str, Any] = {name: value for name, value in TEXT.items() if name != "rms_norm_eps"}
GEMMA |= {"head_dim": 24, "num_key_value_heads": 1, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
SIGLIP: dict[str, Any] = {name: value for name, value in VISION.items() if name != "projection_dim"}
LINEAR = {"rope_type": "linear", "rope_theta": 5e4, "factor": 2.0}
ODD: dict[str, dict[str, Any]] = {
    "paligemma": {},
    "paligemma_grouped": {"text": {"num_key_value_heads": 2, "head_dim": 16}, "vision": {"vision_use_head": False}},
    "paligemma_wide_heads": {"text": {"head_dim": 256, "num_attention_heads": 2, "rms_norm_eps": 1e-5}},
    "paligemma_untied_biased_linear_rope": {
        "text": {"attention_bias": True, "num_key_value_heads": 4, "rope_parameters": LINEAR},
        "tie_word_embeddings": False,
    },
}
"""Name → what differs from `GEMMA`, `SIGLIP` and PaliGemma's defaults."""


def config(odd: str) -> PaliGemmaConfig:
    changes = dict(ODD[odd])
    text = GemmaConfig(**{**GEMMA, **changes.pop("text", {})})
    vision = SiglipVisionConfig(**{**SIGLIP, **changes.pop("vision", {})})
    width = int(text.hidden_size)
    whole = {"image_token_index": IMAGE, "projection_dim": width, "hidden_size": width, **changes}
    return PaliGemmaConfig(text_config=text, vision_config=vision, **whole)


@cache
def hf_paligemma(odd: str = "paligemma", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    """A random `PaliGemmaForConditionalGeneration`."""
    return random_model(PaliGemmaForConditionalGeneration, config(odd), attention, dtype)


def example(hf: Any, images: tuple[int, ...] = (1, 2), written: tuple[int, ...] = (2, 0), left: bool = True) -> dict:
    """Random prompts as its processor lays them out: pictures, `<bos>`, words; then some words of an answer."""
    generator = torch.Generator().manual_seed(1)
    vision = hf.config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2
    rows, types = [], []
    for i, (n, answer) in enumerate(zip(images, written, strict=True)):
        words = torch.randint(4, IMAGE, (5 + 3 * i + answer,), generator=generator).tolist()
        rows.append([IMAGE] * each * n + [2, *words])
        types.append([0] * (len(rows[-1]) - answer) + [1] * answer)
    longest = max(map(len, rows))

    def padded(values: list[list[int]], fill: int) -> Tensor:
        gaps = [[fill] * (longest - len(row)) for row in values]
        return torch.tensor([g + v if left else v + g for g, v in zip(gaps, values, strict=True)])

    pixels = torch.randn(sum(images), 3, vision.image_size, vision.image_size, generator=generator)
    given = {"input_ids": padded(rows, 0), "token_type_ids": padded(types, 0)}
    given["attention_mask"] = padded([[1] * len(row) for row in rows], 0)
    return given | ({"pixel_values": pixels} if sum(images) else {})


PARTS = {
    "paligemma": "SigLIP with its last norm, Gemma with one key/value head",
    "paligemma_grouped": "the same with grouped-query attention",
    "paligemma_wide_heads": "the same with heads of 256",
    "paligemma_untied_biased_linear_rope": "the same with biases, scaled positions and an unembedding of its own",
}


def case(odd: str) -> Case:
    return Case(
        name=odd,
        model="PaliGemma",
        parts=PARTS[odd],
        hf=lambda attention, dtype: hf_paligemma(odd, attention, dtype),
        inputs=example,
        skip={"text alone": NO_TYPES},
    )


CASES = [case(odd) for odd in ODD]
