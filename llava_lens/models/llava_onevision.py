"""LLaVA-OneVision: LLaVA-NeXT's tiles behind SigLIP, made fewer tokens where an image is large, and Qwen2.

Unusual: where the grid of tiles is made smaller, each token is interpolated between patches: roles then give it the
share of the image that it stands for, and what needs a patch's own token is refused. Of several images in one prompt
none is cut: each is padded to a square and seen once. Videos are not read.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.facts import fact
from llava_lens.images import check_size
from llava_lens.inputs import Inputs
from llava_lens.models.llava_next import (
    HookedLlavaNext,
    Line,
    LlavaNextConfig,
    LlavaNextImages,
    LlavaNextProcessor,
    Size,
    Tiled,
)
from llava_lens.pictures import Axis, Layout, Picture, PixelMap
from llava_lens.prompt import Prompt

TOGETHER = "batch_num_images"
"""Of each image, how many stand in its prompt; transformers counts them once a prompt."""
SMALLEST = 1.1
"""A grid is made smaller where its side is more than so many times what it may be."""


@dataclass(frozen=True, kw_only=True)
class LlavaOnevisionConfig(LlavaNextConfig):
    """LLaVA-OneVision's facts; an image's tiles get about as many tokens as `max_tiles` have, or fewer."""

    families = ("llava_onevision",)
    architecture = "LlavaOnevisionForConditionalGeneration"

    max_tiles: int

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        """Raises `ValueError` as LLaVA-NeXT's does, and for another way to cut images."""
        said = re.fullmatch(r"anyres_max_([1-9]\d*)", hf.vision_aspect_ratio)
        if said is None:
            raise ValueError(f"vision_aspect_ratio {hf.vision_aspect_ratio!r}; expected 'anyres_max_9', say")
        return super().facts_of(hf) | {"max_tiles": int(said[1])}

    def lines(self, size: Size) -> tuple[Line, Line]:
        """As LLaVA-NeXT's, with fewer tokens than patches where there are too many."""
        down, across = super().lines(size)
        ratio = math.sqrt(down.shown * across.shown / (self.max_tiles * down.n**2))
        if ratio <= SMALLEST:
            return down, across
        fewer = [int(line.shown // ratio) for line in (down, across)]
        if 0 in fewer:
            raise LensError(f"an image of {size[0]}×{size[1]} leaves {fewer[0]} × {fewer[1]} tokens of its tiles")
        return replace(down, tokens=fewer[0]), replace(across, tokens=fewer[1])

    def layouts(self, extras: Mapping[str, Tensor]) -> Iterator[Layout] | None:
        """By `image_sizes`, and by `batch_num_images`, where an image has others beside it."""
        found, counts = super().layouts(extras), extras.get(TOGETHER)
        if found is None or counts is None:
            return found
        counted = fact(counts, "counts", lambda counts: counts.tolist())
        return (layout if n == 1 else self.uncut for layout, n in zip(found, counted, strict=True))

    @property
    def uncut(self) -> Layout:
        """How each of several images stands in a prompt."""
        assert self.vision is not None
        return _uncut(self.vision.grid[0])


@lru_cache
def _uncut(n: int) -> Layout:
    return Layout(n * n + 1, (Picture((n, n), ranks=tuple(range(n * n))),))


class LlavaOnevisionImages(LlavaNextImages):
    """Cuts one image alone as LLaVA-NeXT does; several are padded to squares, each in the mean colour."""

    classes = ("LlavaOnevisionImageProcessorPil",)

    def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "picture 3 y x"]:
        """Those of the images of one prompt."""
        made = self.hf([self.in_color(images)], do_pad=False)["pixel_values"]
        return np.concatenate([np.asarray(each, np.float32) for each in made])

    def squared(self, size: Size, cfg: LlavaOnevisionConfig) -> Layout:
        """How one of several images stands in a prompt."""
        n, longest, whole = self.image_size // self.patch_size, max(size), self.map(*size)
        check_size(longest, longest, f"the picture of {size[0]}×{size[1]}, padded to a square,")
        axes = (
            Axis(length, (longest - length) // 2, longest, axis.resized, 0, n, self.patch_size)
            for length, axis in zip(size, (whole.x, whole.y), strict=True)
        )
        layout = cfg.uncut
        return replace(layout, pictures=(replace(layout.pictures[0], map=PixelMap(*axes)),))


class LlavaOnevisionProcessor(LlavaNextProcessor):
    """Prompts of one image, or of several that are then not cut."""

    Images = LlavaOnevisionImages

    def layouts(self, images: Sequence[Image.Image], cfg: LlavaConfig) -> list[Layout]:
        if len(images) < 2:
            return super().layouts(images, cfg)
        assert isinstance(self.image, LlavaOnevisionImages) and isinstance(cfg, LlavaOnevisionConfig)
        return [self.image.squared(image.size, cfg) for image in images]

    def pixels(self, rows: Sequence[Sequence[Image.Image]]) -> Float[np.ndarray, "picture channel y x"]:
        assert self.image is not None
        return np.concatenate([self.image.pixels(images) for images in rows if images])

    def extras(self, images: Sequence[Image.Image], inputs: Inputs, cfg: LlavaConfig) -> dict[str, Tensor]:
        """The images' sizes, (height, width), and how many stand in the prompt of each."""
        if not images:
            return {}
        counts = [roles.n_sources for roles in inputs.roles or () for _ in range(roles.n_sources)]
        return {**super().extras(images, inputs, cfg), TOGETHER: torch.tensor(counts)}

    def render(self, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
        """Raises `LensError` as `llava_lens.prompt.render` does, and for a video."""
        if "<video>" in question:
            raise LensError(f"<video> in {question!r}: videos are not read; expected images")
        return super().render(question, n_images, answer, template)


class HookedLlavaOnevision(HookedLlavaNext):
    """LLaVA-OneVision for images; logits are bit-equal to Hugging Face's."""

    Config = LlavaOnevisionConfig
    Processor = LlavaOnevisionProcessor
    extra_inputs = ("image_sizes", TOGETHER)

    def _refuse_unknown(self, extras: Mapping[str, Any]) -> None:
        videos = next((name for name, value in extras.items() if "video" in name and value is not None), None)
        if videos is not None:
            raise LensError(f"{videos}: videos are not read; expected images")
        super()._refuse_unknown(extras)

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """As LLaVA-NeXT's; `batch_num_images`, one number for each prompt with images, becomes one for each image."""
        sizes, counts = extras.get("image_sizes"), extras.get(TOGETHER)
        if sizes is not None and counts is not None and len(counts) != len(sizes):
            if int(counts.sum()) != len(sizes):
                raise LensError(
                    f"{TOGETHER} {counts.tolist()}; expected a sum of {len(sizes)}, as image_sizes has rows"
                )
            extras = extras | {TOGETHER: counts.repeat_interleave(counts)}
        return super().from_hf_layout(pixels, extras)

    def for_hf(self, inputs: Inputs) -> dict[str, Tensor]:
        found = super().for_hf(inputs)
        if TOGETHER in found:
            counts, at = found[TOGETHER].tolist(), 0
            prompts = []
            while at < len(counts):
                prompts.append(counts[at])
                at += counts[at]
            found[TOGETHER] = found[TOGETHER].new_tensor(prompts)
        return found

    def pack(self, image: Float[Tensor, "picture feature d_model"], layout: Layout) -> Float[Tensor, "token d_model"]:
        """The tokens of one image; the grid of its tiles made smaller where it is too large."""
        if not isinstance(layout, Tiled) or not layout.pictures[-1].mixed:
            return super().pack(image, layout)
        down, across = layout.down, layout.across
        grid = rearrange(
            image[1:], "(down across) (row col) d -> d (down row) (across col)", down=down.tiles, row=down.n
        ).contiguous()
        grid = grid[:, down.cut : down.cut + down.shown, across.cut : across.cut + across.shown]
        grid = F.interpolate(grid[None], [down.tokens, across.tokens], mode="bilinear")[0]
        ends = self.image_newline[:, None, None].expand(-1, down.tokens, 1).to(grid.dtype)
        lines = rearrange(torch.cat((grid, ends), -1), "d row col -> (row col) d")
        return torch.cat((image[0], lines))
