"""InternVL (transformers' own layout, `…-hf`): InternViT, squares of patches merged to one token, Qwen2 or Llama.

Unusual: an image is cut into tiles, and each tile, with the whole image made small behind them, is a picture of its
own: its own grid, its own way back to the pixels of the original. They stand one after another in the prompt, so pixel
values are Hugging Face's as they are; where tokens come from outside, every tile counts as an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from llava_lens.config import LlavaConfig
from llava_lens.images import ImageProcessor
from llava_lens.model import HookedLlava
from llava_lens.models.internvit import InternVit, InternVitConfig
from llava_lens.pictures import Axis, Layout, PixelMap
from llava_lens.projector import FeatureNorm, Projector
from llava_lens.prompt import Processor
from llava_lens.rename import LLAVA_TABLE, Row, Unused


@dataclass(frozen=True, kw_only=True)
class InternVLConfig(LlavaConfig):
    """InternVL's facts; `vision.merge` patches in each direction become one token."""

    families = ("internvl",)
    architecture = "InternVLForConditionalGeneration"
    Tower = InternVitConfig

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        facts = super().facts_of(hf)
        side, ratio = facts["vision"].grid[0], hf.downsample_ratio
        merge = round(1 / ratio) if ratio > 0 else 0
        if merge < 2 or merge * ratio != 1 or side % merge:
            fits = " or ".join(f"1/{n}" for n in range(2, side + 1) if side % n == 0)
            raise ValueError(f"downsample_ratio {ratio!r} of {side} × {side} patches; expected {fits}")
        tied = hf.tie_word_embeddings and hf.text_config.tie_word_embeddings  # untied releases say so in one place
        return facts | {"vision": replace(facts["vision"], merge=merge), "tie_word_embeddings": tied}


class InternVLProjector(Projector):
    """Squares of patches side by side (`hook_in`), a norm, and LLaVA's two layers."""

    def __init__(self, cfg: LlavaConfig):
        super().__init__(cfg)
        assert cfg.vision is not None
        self.merge, self.columns = cfg.vision.merge, cfg.vision.token_grid[1]

    def make_norm(self, cfg: LlavaConfig, width: int) -> FeatureNorm:
        assert cfg.vision is not None
        return FeatureNorm(cfg.vision, width, 1e-5)

    def forward(self, features: Float[Tensor, "image patch d"]) -> Float[Tensor, "image feature d_model"]:
        merged = rearrange(
            features, "image (row down col across) d -> image (row col) (down across d)",
            down=self.merge, across=self.merge, col=self.columns,
        )  # fmt: skip
        return super().forward(merged)


class InternVLImages(ImageProcessor):
    """GOT-OCR2's image processor, always cutting into tiles, as InternVL's processor asks of it."""

    classes = ("GotOcr2ImageProcessorPil",)

    def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "picture 3 y x"]:
        made = self.hf(self.in_color(images), crop_to_patches=True, return_tensors="np")
        return made["pixel_values"].astype(np.float32)

    def layout(self, size: tuple[int, int], cfg: Any) -> Layout:
        """A picture for each tile in reading order, and behind several tiles one that shows the image whole."""
        whole, one = self.map(*size), cfg.layout()
        cols, rows = self.tiles(*size)
        cut = [self.tile(whole, row, col, rows, cols) for row in range(rows) for col in range(cols)]
        maps = [*cut, whole] if len(cut) > 1 else [whole]
        pictures = tuple(replace(one.pictures[0], map=each) for each in maps)
        return Layout(one.n_tokens * len(pictures), pictures)

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """How many tiles an image of this size is cut into, across and down."""
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

        hf, side = self.hf, (self.image_size, self.image_size)
        return get_optimal_tiled_canvas((height, width), side, hf.min_patches, hf.max_patches)

    def tile(self, whole: PixelMap, row: int, col: int, rows: int, cols: int) -> PixelMap:
        """The map of one of `rows` × `cols` tiles."""

        def part(axis: Axis, nth: int, n: int) -> Axis:
            return replace(axis, resized=axis.resized * n, crop=self.image_size * nth)

        return PixelMap(part(whole.x, col, cols), part(whole.y, row, rows))


class InternVLProcessor(Processor):
    """Qwen2's tokenizer, where an image's words stand between two marks."""

    Images = InternVLImages
    image_token: str = "<IMG_CONTEXT>"

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        if cfg.vision is not None and (not settings or isinstance(settings, dict)):
            side = cfg.vision.image_size
            settings = {"size": {"height": side, "width": side}} | (settings or {})
        return super().image_processor(settings, cfg)

    def expansion(self, layout: Layout) -> str:
        start = getattr(self.tokenizer, "start_image_token", None) or "<img>"
        end = getattr(self.tokenizer, "end_image_token", None) or "</img>"
        return f"{start}{super().expansion(layout)}{end}"


class HookedInternVL(HookedLlava):
    """InternVL with every activation named, readable and editable."""

    Config = InternVLConfig
    Processor = InternVLProcessor
    Vision = InternVit
    Projector = InternVLProjector
    weight_table = (
        Row("tower:embeddings.cls_token", "vision.class_embed"),
        Row("tower:embeddings.position_embeddings", "vision.pos_embed.rows"),
        Row("tower:embeddings.patch_embeddings.projection.{p}", "vision.patch_embed.{p}"),
        Row("tower:encoder.layer.{l}.layernorm_before.{p}", "vision.blocks.{l}.ln1.{p}"),
        Row("tower:encoder.layer.{l}.attention.{qkv}_proj.{p}", "vision.blocks.{l}.attn.{qkv}_proj.{p}"),
        Row("tower:encoder.layer.{l}.attention.q_norm.weight", "vision.blocks.{l}.attn.q_norm.weight"),
        Row("tower:encoder.layer.{l}.attention.k_norm.weight", "vision.blocks.{l}.attn.k_norm.weight"),
        Row("tower:encoder.layer.{l}.attention.projection_layer.{p}", "vision.blocks.{l}.attn.o_proj.linear.{p}"),
        Row("tower:encoder.layer.{l}.lambda_1", "vision.blocks.{l}.attn.o_proj.factor"),
        Row("tower:encoder.layer.{l}.layernorm_after.{p}", "vision.blocks.{l}.ln2.{p}"),
        Row("tower:encoder.layer.{l}.mlp.fc1.{p}", "vision.blocks.{l}.mlp.in_proj.{p}"),
        Row("tower:encoder.layer.{l}.mlp.fc2.{p}", "vision.blocks.{l}.mlp.out_proj.linear.{p}"),
        Row("tower:encoder.layer.{l}.lambda_2", "vision.blocks.{l}.mlp.out_proj.factor"),
        Row("projector:layer_norm.{p}", "projector.norm.{p}"),
        Unused("tower:embeddings.mask_token"),
        Unused("tower:layernorm.{p}"),
        *LLAVA_TABLE,
    )
