"""SmolVLM and Idefics3: images cut into tiles, SigLIP's tower at bucketed positions, patches merged before one matrix.

Unusual: each tile and the view of the whole image behind them is a picture of its own, with marks of text between; on
Hugging Face's side pictures are padded with black ones, which here are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from llava_lens.config import LlavaConfig, VisionConfig
from llava_lens.errors import LensError
from llava_lens.hooks import Hook
from llava_lens.images import ImageProcessor, check_size
from llava_lens.inputs import Inputs
from llava_lens.model import HookedLlava
from llava_lens.norms import LayerNorm
from llava_lens.pictures import Axis, Layout, PixelMap
from llava_lens.prompt import Processor, Prompt
from llava_lens.rename import CLIP_TABLE, LLAMA_TABLE, Fold, Row
from llava_lens.vision import SiglipVision

MASK = "pixel_attention_mask"
VIDEO = "<video>"


@dataclass(frozen=True, kw_only=True)
class Idefics3Config(LlavaConfig):
    """A Llama behind a tower whose patches are merged, `scale_factor` in each direction."""

    families = ("idefics3", "smolvlm")
    architecture = "Idefics3ForConditionalGeneration"

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        """Raises `ValueError` for a grid of patches that cannot be merged evenly.

        What files of the hub call the tower says nothing: transformers has one for all of them.
        """
        how: dict[str, Any] = {"merge": hf.scale_factor, "family": "siglip_vision_model"}
        vision = VisionConfig.from_hf(hf.vision_config, -1, "full", **how)
        if vision.merge < 1 or vision.grid[0] % vision.merge:
            raise ValueError(f"a grid of {vision.grid[0]} × {vision.grid[1]} patches and scale_factor {vision.merge}")
        name = type(hf).__name__.removesuffix("Config") + "ForConditionalGeneration"
        return dict(
            vision=vision,
            image_token_id=hf.image_token_id,
            projector_bias=False,
            original_architecture=name,
            tie_word_embeddings=hf.tie_word_embeddings,
            model_name=getattr(hf, "_name_or_path", "") or "",
        )


class Idefics3Vision(SiglipVision):
    """SigLIP's tower with a norm behind its last block; positions come by the share of the picture in front of them."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg)
        self.ln_post = LayerNorm(cfg)

    def add_positions(self, x: Float[Tensor, "image pos d_model"]) -> Float[Tensor, "image pos d_model"]:
        positions = self.pos_embed(self.buckets(x.device))[None]
        if self.hook_pos_embed.live:
            positions = self.hook_pos_embed(positions.expand(len(x), -1, -1))
        return x + positions

    def buckets(self, device: torch.device) -> Int[Tensor, " pos"]:
        """The number of each patch's position; rounded as published, so that some share one with their neighbour."""
        side = self.cfg.grid[0]
        boundaries = torch.arange(1 / side, 1.0, 1 / side, device=device)
        share = torch.arange(side, device=device, dtype=torch.float32) * (1.0 / torch.full((), side, device=device))
        bucket = torch.bucketize(share.clamp(max=1.0 - 1e-6), boundaries, right=True)
        return (bucket[:, None] * side + bucket).flatten()

    def select(self, streams: list[Tensor]) -> Float[Tensor, "image feature d_features"]:
        return self.ln_post(streams[-1])


class PixelShuffle(nn.Module):
    """Neighbouring patches side by side in one vector, and one matrix to the decoder's width."""

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        assert cfg.vision is not None
        self.merge, self.columns = cfg.vision.merge, cfg.vision.token_grid[1]
        self.hook_in = Hook("batch feature d_features")
        self.proj = nn.Linear(cfg.vision.d_merged, cfg.d_model, bias=False)
        self.hook_out = Hook("batch feature d_model")

    def forward(self, features: Float[Tensor, "image patch d"]) -> Float[Tensor, "image feature d_model"]:
        merged = rearrange(
            features, "image (row down col across) d -> image (row col) (down across d)",
            down=self.merge, across=self.merge, col=self.columns,
        )  # fmt: skip
        return self.hook_out(self.proj(self.hook_in(merged)))


@dataclass(frozen=True)
class Tiled(Layout):
    """An image as `rows × columns` tiles and the whole behind them; (0, 0) where there is only the whole."""

    tiles: tuple[int, int] = (0, 0)


class Idefics3Images(ImageProcessor):
    """Resizes an image to whole tiles, cuts it, and puts the whole image, as small as one tile, behind them."""

    classes = ("Idefics3ImageProcessorPil", "SmolVLMImageProcessorPil")

    def pixels(self, images: Sequence[Image.Image]) -> Float[np.ndarray, "picture 3 y x"]:
        made = self.hf(self.in_color(images), return_tensors="np")
        return np.asarray(made["pixel_values"][0], np.float32)

    def layout(self, size: tuple[int, int], cfg: Any) -> Layout:
        """The image's tiles in reading order, then the whole. Raises `LensError` for tiles of another size."""
        (picture,) = cfg.layout(size).pictures
        rows, cols = self.tiles(*size)
        maps = [self.tile(size, (rows, cols), (row, col)) for row in range(rows) for col in range(cols)]
        pictures = tuple(replace(picture, map=each) for each in (*maps, self.map(*size)))
        return Tiled(len(pictures) * picture.n_tokens, pictures, (rows, cols))

    def map(self, width: int, height: int) -> PixelMap:
        """The map of the whole image, as small as one tile."""
        return self.tile((width, height), (1, 1), (0, 0))

    def tile(self, size: tuple[int, int], tiles: tuple[int, int], at: tuple[int, int]) -> PixelMap:
        """The map of one tile of an image resized to so many."""
        side, n = self.image_size, self.image_size // self.patch_size
        axes = [
            Axis(length, 0, length, count * side, nth * side, n, self.patch_size)
            for length, count, nth in zip(size, tiles[::-1], at[::-1], strict=True)
        ]
        return PixelMap(*axes)

    def tiles(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of tiles that an image of this size is cut into; (0, 0) for one that is not cut."""
        side = self.hf.max_image_size["longest_edge"]
        if side != self.image_size:
            raise LensError(f"the image processor makes tiles of {side}×{side}; expected {self.image_size}")
        if self.hf.do_resize:
            width, height = self.resized(width, height)
        check_size(width, height, "the picture, resized for the model,")
        if not self.hf.do_image_splitting:
            return 0, 0
        ratio = width / height
        if width >= height:
            cols = math.ceil(width / side)
            rows = math.ceil(int(cols * side / ratio) / side)
        else:
            rows = math.ceil(height / side)
            cols = math.ceil(int(rows * side * ratio) / side)
        return (0, 0) if rows == cols == 1 else (rows, cols)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after the first resize."""
        from transformers.models.idefics3.image_processing_pil_idefics3 import get_resize_output_image_size

        size = self.hf.size
        if not size.longest_edge:
            return size.width, size.height
        new = get_resize_output_image_size(np.broadcast_to(np.uint8(0), (3, height, width)), size.longest_edge)
        return new[1], new[0]


class Idefics3Processor(Processor):
    """Prompts in which each picture's tokens stand behind a mark that names the tile."""

    Images = Idefics3Images

    @classmethod
    def image_processor(cls, settings: Any, cfg: LlavaConfig) -> ImageProcessor | None:
        if cfg.vision is None:
            return None
        side = cfg.vision.image_size
        if not settings or isinstance(settings, dict):
            defaults = {"size": {"longest_edge": 4 * side}, "max_image_size": {"longest_edge": side}}
            settings = defaults | (settings or {})
        return cls.Images(settings, side, cfg.vision.patch_size * cfg.vision.merge)

    def expansion(self, layout: Layout) -> str:
        """Marks and image tokens of every tile, a line for each row of them, and of the whole."""
        assert isinstance(layout, Tiled)
        around = getattr(self.tokenizer, "fake_image_token", None) or "<fake_token_around_image>"
        whole = getattr(self.tokenizer, "global_image_token", None) or "<global-img>"
        words, (rows, cols) = self.image_token * layout.pictures[0].n_tokens, layout.tiles
        lines = [
            "".join(f"{around}<row_{row + 1}_col_{col + 1}>{words}" for col in range(cols)) + "\n"
            for row in range(rows)
        ]
        return "".join(lines) + "\n" * bool(lines) + f"{around}{whole}{words}{around}"

    def render(self, question: str, n_images: int, answer: str = "", template: bool = True) -> Prompt:
        """Raises `LensError` as `llava_lens.prompt.render` does, and for a video."""
        if VIDEO in question:
            raise LensError(f"{VIDEO} in {question!r}: videos are not read; expected images")
        return super().render(question, n_images, answer, template)

    def knows_image_token(self, cfg: LlavaConfig) -> bool:
        """Raises `LensError` for a tokenizer that has no word for an image, whose marks it would not know either."""
        if cfg.vision is not None and not super().knows_image_token(cfg):
            raise LensError(f"the tokenizer has no word {self.image_token}; expected the checkpoint's own tokenizer")
        return True


class HookedIdefics3(HookedLlava):
    """SmolVLM, SmolVLM2 (images alone) and Idefics3; logits are bit-equal to Hugging Face's."""

    Config = Idefics3Config
    Processor = Idefics3Processor
    Vision = Idefics3Vision
    Projector = PixelShuffle
    extra_inputs = (MASK,)
    weight_table = (
        Row("tower:post_layernorm.{p}", "vision.ln_post.{p}"),
        *LLAMA_TABLE,
        *CLIP_TABLE,
        Fold("model.text_model.", "text:"),
        Fold("model.vision_model.", "tower:"),
        Fold("model.connector.", "projector:"),
        Row("projector:modality_projection.proj.weight", "projector.proj.weight"),
    )

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """`[row, n, channel, height, width]`, where black pictures fill up the rows, as the pictures there are.

        Raises `LensError` for pictures with padding inside, which the processors of transformers never make.
        """
        mask = extras.get(MASK)
        extras = {name: extra for name, extra in extras.items() if name != MASK}
        if pixels is None:
            return pixels, extras
        if pixels.ndim == 5:
            real = (pixels != 0).flatten(2).any(-1)
            pixels, mask = pixels[real], None if mask is None else mask[real]
        if mask is not None and not bool(mask.all()):
            raise LensError(f"{MASK} leaves out parts of a picture; expected pictures that are filled wholly")
        return (pixels if len(pixels) else None), extras

    def for_hf(self, inputs: Inputs) -> dict[str, Tensor]:
        found = super().for_hf(inputs)
        if inputs.pixels is not None:
            found["pixel_values"] = inputs.pixels[None]
        return found
