"""Qwen2.5-VL's pictures and prompts: from images to pixel values and tokens, and to Hugging Face's layout and back.

Unusual: Hugging Face's processor flattens pictures to a row for each patch, token by token, each picture shown twice as
if it were two frames of a video. The permutation is exact both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.images import ImageProcessor, check_size
from llava_lens.models.qwen2_5_vision import QwenVisionConfig
from llava_lens.pictures import Axis, Layout, PixelMap
from llava_lens.prompt import Processor, Prompt

PATCHES = "row col y x) (channel frame down across)"
PICTURE = "channel (row y down) (col x across)"
"""How Hugging Face's processor lays out pictures, behind "(picture ", and how one stands here."""
ONE_SIZE = "run them apart, or resize the images"


def flattened(
    pixels: Float[Tensor, "picture channel height width"], vision: QwenVisionConfig
) -> Float[Tensor, "patch values"]:
    """Pictures as Hugging Face's processor lays them out: a row for each patch, each picture shown as every frame."""
    return repeat(
        pixels, f"picture {PICTURE} -> (picture {PATCHES}", frame=vision.frames, down=vision.patch_size,
        across=vision.patch_size, y=vision.merge, x=vision.merge,
    )  # fmt: skip


def pictures_of(
    patches: Float[Tensor, "patch values"], grids: Int[Tensor, "picture 3"], vision: QwenVisionConfig
) -> Float[Tensor, "picture channel height width"]:
    """The pictures that a processor of transformers flattened; `grids` counts frames, rows and columns of each.

    Raises `LensError` for a video, for pictures of several sizes, and for patches that are not those of the grids.
    """
    sizes = sorted({tuple(grid) for grid in grids.tolist()})
    values = vision.n_channels * vision.frames * vision.patch_size**2
    if sum(t * rows * cols for t, rows, cols in grids.tolist()) != len(patches) or patches.shape[1] != values:
        raise LensError(
            f"pixel values {tuple(patches.shape)} for image_grid_thw {grids.tolist()}; expected a row of {values} "
            "values for each patch"
        )
    if any(size[0] != 1 for size in sizes):
        raise LensError(f"image_grid_thw {grids.tolist()} counts several frames; a video is not supported")
    if len(sizes) > 1:
        shown = ", ".join(f"{cols * vision.patch_size}×{rows * vision.patch_size}" for _, rows, cols in sizes)
        raise LensError(f"pictures of {shown} pixels in one batch; expected one size: {ONE_SIZE}")
    _, rows, cols = sizes[0]
    if rows % vision.merge or cols % vision.merge:
        raise LensError(f"a grid of {rows} × {cols} patches; expected multiples of {vision.merge}")
    frames = rearrange(
        patches, f"(picture {PATCHES} -> frame picture {PICTURE}", row=rows // vision.merge, col=cols // vision.merge,
        y=vision.merge, x=vision.merge, frame=vision.frames, down=vision.patch_size, across=vision.patch_size,
    )  # fmt: skip
    if any(not torch.equal(frame, frames[0]) for frame in frames[1:]):
        raise LensError("pixel values of frames that differ; a video is not supported")
    return frames[0].contiguous()


class QwenImages(ImageProcessor):
    """Qwen2-VL's image processor, which resizes to the nearest whole tokens within bounds on the number of pixels."""

    classes = ("Qwen2VLImageProcessorPil",)
    vision: QwenVisionConfig

    @property
    def pads_to_square(self) -> bool:
        return False

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Float[np.ndarray, "image 3 y x"], tuple[PixelMap, ...]]:
        made = self.hf(self.in_color(images), return_tensors="pt")
        pixels = pictures_of(made["pixel_values"], made["image_grid_thw"], self.vision)
        return pixels.numpy(), tuple(self.map(*image.size) for image in images)

    def layout(self, size: tuple[int, int], cfg: Any) -> Layout:
        """One picture, of the size that it is resized to."""
        where = self.map(*size)
        layout = cfg.layout((where.x.resized, where.y.resized))
        return replace(layout, pictures=(replace(layout.pictures[0], map=where),))

    def map(self, width: int, height: int) -> PixelMap:
        """The map of a picture of this size, without preparing it."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        resized, side = (height, width), self.patch_size
        check_size(width, height, "the picture")
        if self.hf.do_resize:
            resized = smart_resize(height, width, side, self.hf.size.shortest_edge, self.hf.size.longest_edge)
        check_size(resized[1], resized[0], f"the picture of {width}×{height}, resized for the model,")
        if resized[0] % side or resized[1] % side:
            raise LensError(f"a picture of {width}×{height} that is not resized; expected multiples of {side}")
        y, x = (
            Axis(size, 0, size, new, 0, new // side, side) for size, new in zip((height, width), resized, strict=True)
        )
        return PixelMap(x, y)


class QwenProcessor(Processor):
    """Qwen2's tokenizer; an image's words stand between two marks that the chat template writes."""

    Images = QwenImages
    image_token: str = "<|image_pad|>"

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        """Raises `LensError` for settings that cut pictures otherwise than the tower does."""
        vision = cfg.vision
        assert isinstance(vision, QwenVisionConfig)
        own = {"patch_size": vision.patch_size, "merge_size": vision.merge, "temporal_patch_size": vision.frames}
        if not settings or isinstance(settings, dict):
            settings = own | (settings or {})
        made = QwenImages(settings, 0, vision.patch_size * vision.merge)
        made.vision = vision
        for name, expected in own.items():
            given = settings[name] if isinstance(settings, dict) else getattr(settings, name)
            if given != expected:
                raise LensError(f"an image processor with {name} {given}; expected {expected}, the tower's")
        return made

    def render(self, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
        if template and self.chat_template is None:
            raise LensError("no chat template; give a processor that has one, or the whole prompt and template=False")
        return super().render(question, n_images, answer, template)
