"""Small random models that cut images into tiles, their processors, and one prompt of each with its cache."""

from __future__ import annotations

from functools import cache
from typing import Any

import cases_llava_next as next_cases
import cases_llava_onevision as one_cases
import cases_vipllava as vip_cases
import numpy as np
import torch
from model_battery import random_model
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    VipLlavaForConditionalGeneration,
)
from word_tokenizer import word_tokenizer

from llava_lens import HookedMLLM, Inputs

SIDE, PATCH, TOKEN = 24, 8, 5
TEXT = "w5 w6 <image> w7 w8 w9"


class WithoutVideo(LlavaOnevisionProcessor):
    """The processor where torchvision is missing, which its part for videos is made of."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type | tuple[type, ...]:
        return object


@cache
def both(family: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Hugging Face's model and ours, with a processor."""
    kinds: dict[str, tuple[Any, Any]] = {
        "next": (LlavaNextForConditionalGeneration, next_cases.config()),
        "one": (LlavaOnevisionForConditionalGeneration, one_cases.config()),
        "vip": (VipLlavaForConditionalGeneration, vip_cases.config()),
    }
    hf = random_model(*kinds[family], "sdpa", dtype)
    return hf, HookedMLLM.from_hf(hf, processor(family))


def processor(family: str, **how: Any) -> Any:
    """The processor of transformers that fits the random model."""
    square = {"height": SIDE, "width": SIDE}
    tokenizer = word_tokenizer()
    if family == "one":
        image = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=one_cases.PINPOINTS, **how)
        return WithoutVideo(
            image, tokenizer, video_processor=None, num_image_tokens=9, vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        )  # fmt: skip
    sizes: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": square}
    if family == "vip":
        return LlavaProcessor(
            CLIPImageProcessorPil(**sizes), tokenizer, PATCH, "default", num_additional_image_tokens=1
        )
    image = LlavaNextImageProcessorPil(**sizes, image_grid_pinpoints=next_cases.PINPOINTS, **how)
    return LlavaNextProcessor(image, tokenizer, PATCH, "default", num_additional_image_tokens=1)


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng((height, width, seed))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@cache
def alone(family: str = "next", size: tuple[int, int] = (30, 61)) -> tuple[Any, Any, Any]:
    """Our model in float64, one prompt with an image of this height and width, and its cache."""
    _, model = both(family, torch.float64)
    inputs = model.prepare(TEXT, photo(*size), template=False)
    inputs = Inputs(inputs.tokens, inputs.pixels.double(), None, inputs.roles, inputs.extras)
    with torch.no_grad():
        return model, inputs, model.run_with_cache(inputs)[1]
