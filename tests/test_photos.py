"""Photos through LLaVA-1.5's own numbers (336 pixels, patches of 14): pixel, patch and token lead to each other."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_models import IMAGE
from test_images import photo
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaImageProcessorPil
from transformers import LlavaConfig as HfLlavaConfig
from word_tokenizer import word_tokenizer

from llava_lens.config import LlavaConfig
from llava_lens.images import ImageProcessor
from llava_lens.preparation import prepare
from llava_lens.prompt import Processor
from llava_lens.roles import Roles

SIDE, PATCH, GRID = 336, 14, 24
SQUARE: dict[str, Any] = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
RELEASES = {
    "llava-hf": CLIPImageProcessorPil(**SQUARE),
    "original": LlavaImageProcessorPil(do_pad=True, **SQUARE),
}
"""The one crops to the middle square, the other pads to a square."""
EVERY_PHOTO = pytest.mark.parametrize("name", ["chelsea", "coffee"])
EVERY_WAY = pytest.mark.parametrize("release, upright", [(r, u) for r in RELEASES for u in (True, False)])


@cache
def shown(name: str, release: str, upright: bool) -> tuple[Image.Image, torch.Tensor, Roles]:
    """A photo, or the same lying on its side, and what `prepare` makes of it."""
    picture = photo(name) if upright else photo(name).rotate(90, expand=True)
    text = LlamaConfig(vocab_size=97, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, hidden_size=8, num_attention_heads=1)
    cfg = LlavaConfig.from_hf(HfLlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE))
    processor = Processor(word_tokenizer(), ImageProcessor(RELEASES[release], SIDE, PATCH))
    inputs = prepare(processor, cfg, "w5 <image> w6", picture, template=False)
    return picture, inputs["pixel_values"], inputs.roles_of()


@EVERY_PHOTO
@EVERY_WAY
def test_boxes_tile_what_the_model_sees(name: str, release: str, upright: bool) -> None:
    picture, pixels, roles = shown(name, release, upright)
    assert np.array_equal(pixels, RELEASES[release](picture, return_tensors="np")["pixel_values"])
    boxes = np.array([[roles.box_of_patch(row, col) for col in range(GRID)] for row in range(GRID)])
    left, top, right, bottom = np.moveaxis(boxes, -1, 0)
    assert (left[:, 1:] == right[:, :-1]).all() and (top[1:] == bottom[:-1]).all()
    assert (left < right).all() and (top < bottom).all()
    assert (left == left[0]).all() and (top == top[:, :1]).all()
    assert (left[0, 0], top[0, 0], right[-1, -1], bottom[-1, -1]) == roles.region()
    short, long = sorted(picture.size)
    x0, y0, x1, y1 = roles.region()
    side = long if release == "original" else short
    assert x1 - x0 == pytest.approx(side, rel=1e-2) and y1 - y0 == pytest.approx(side, rel=1e-2)
    assert (x0 + x1, y0 + y1) == pytest.approx(picture.size, abs=2)  # the middle, up to one pixel
    if release == "original":
        assert x0 <= 0 and y0 <= 0 and x1 >= picture.width and y1 >= picture.height


@EVERY_PHOTO
@EVERY_WAY
def test_pixel_patch_token_and_back(name: str, release: str, upright: bool) -> None:
    """Every seventh pixel both ways; a patch's tokens follow `<s> w5` in reading order."""
    picture, _, roles = shown(name, release, upright)
    numbers = np.arange(GRID * GRID).reshape(GRID, GRID)
    assert torch.equal(roles.patch_positions(), torch.from_numpy(2 + numbers))
    assert [roles.patch_of(token) for token in range(2, 2 + numbers.size)] == [(0, *p) for p in np.ndindex(GRID, GRID)]
    laid, pixel_map = roles.to_original(numbers.astype(float)), roles.map()
    x0, y0, x1, y1 = roles.region()
    for x, y in itertools.product(range(0, picture.width, 7), range(0, picture.height, 7)):
        patch = pixel_map.patch_of_pixel(x, y)
        assert (patch is not None) == (x0 <= x + 0.5 < x1 and y0 <= y + 0.5 < y1)
        if patch is None:
            assert np.isnan(laid[y, x])
            continue
        left, top, right, bottom = pixel_map.box_of_patch(*patch)
        assert left <= x + 0.5 < right and top <= y + 0.5 < bottom and laid[y, x] == numbers[patch]
    if release == "llava-hf":  # the other pads, with patches that show no pixel
        assert set(laid[~np.isnan(laid)]) == set(numbers.flat)
