"""Qwen2.5-VL: its own tower over pictures of any size, a merger of 2 × 2 patches, a Qwen2 that counts in three ways.

Unusual: `Inputs.pixels` are pictures, `[picture, channel, height, width]`, not the flattened patches of Hugging Face's
processor: one is an exact permutation of the other. A picture's grid follows from its size, and positions from that, so
nothing else is carried along; all pictures of a batch have one size. Videos are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from llava_lens.config import DECODERS, LlavaConfig
from llava_lens.errors import LensError
from llava_lens.facts import is_whole
from llava_lens.inputs import Inputs
from llava_lens.model import HookedLlava
from llava_lens.models.qwen2_5_inputs import QwenProcessor, flattened, pictures_of
from llava_lens.models.qwen2_5_vision import Merger, QwenVision, QwenVisionConfig
from llava_lens.pictures import Layout, Picture
from llava_lens.rename import LLAMA_TABLE, Fold, Row, Unused
from llava_lens.rotary import Angles, Rotary

SCALINGS = ("default", "linear", "yarn", "llama3")
"""Rotary scalings that do not depend on the length of the text."""


def _decoder(hf: Any) -> dict[str, Any]:
    rope = dict(hf.rope_parameters or {})
    sections = tuple(rope.pop("mrope_section", (16, 24, 24)))
    half = hf.hidden_size // hf.num_attention_heads // 2
    if len(sections) != 3 or sum(sections) != half:
        raise ValueError(f"mrope_section {list(sections)}; expected three numbers that sum to {half}, half a head")
    if rope.get("type") == "mrope":
        del rope["type"]
    if rope.get("rope_type", "default") not in SCALINGS:
        raise ValueError(f"rope_type {rope['rope_type']!r}; expected {' or '.join(map(repr, SCALINGS))}")
    return DECODERS["qwen2"](hf) | {"rope": rope, "sections": sections}


@dataclass(frozen=True, kw_only=True)
class QwenConfig(LlavaConfig):
    """`sections`: how many of a head's frequencies turn with time, with the row, and with the column."""

    families = ("qwen2_5_vl",)
    architecture = "Qwen2_5_VLForConditionalGeneration"
    decoders: ClassVar[Mapping[str, Callable[[Any], dict[str, Any]]]] = {"qwen2_5_vl_text": _decoder}

    sections: tuple[int, ...]

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        vision = QwenVisionConfig.from_hf(hf.vision_config)
        if hf.vision_config.out_hidden_size != hf.text_config.hidden_size:
            given = hf.vision_config.out_hidden_size
            raise ValueError(f"out_hidden_size {given}; expected {hf.text_config.hidden_size}, the decoder's width")
        return dict(
            vision=vision,
            image_token_id=hf.image_token_id,
            original_architecture=cls.architecture,
            tie_word_embeddings=hf.tie_word_embeddings,
            model_name=getattr(hf, "_name_or_path", "") or "",
        )

    def seeing(self, pixels: Tensor | None) -> QwenConfig:
        return self if pixels is None else self.sized(int(pixels.shape[-2]), int(pixels.shape[-1]))

    def sized(self, height: int, width: int) -> QwenConfig:
        """Itself for pixel values of this size; raises `LensError` for sides that are no whole tokens."""
        assert isinstance(self.vision, QwenVisionConfig)
        return replace(self, vision=self.vision.at(height, width))

    @property
    def tokens_per_image(self) -> int:  # type: ignore[override]
        """Stream positions that a picture of the size at hand takes; 0 where none is known."""
        known = isinstance(self.vision, QwenVisionConfig) and self.vision.size is not None
        return self.layout().n_tokens if known else 0

    def layout(self, size: tuple[int, int] | None = None) -> Layout:
        """How a picture whose pixel values have this width and height (those at hand for None) stands in a prompt."""
        vision = (self if size is None else self.sized(size[1], size[0])).vision
        assert vision is not None
        picture = Picture(vision.token_grid)
        return Layout(picture.n_tokens, (picture,))

    def check_pixels(self, shape: tuple[int, ...]) -> None:
        assert self.vision is not None
        if shape[1] != self.vision.n_channels:
            expected = f"[picture, {self.vision.n_channels}, height, width]"
            raise LensError(f"pixel values of shape {shape}; expected {expected}")
        self.sized(shape[2], shape[3])


class QwenRotary(Rotary):
    """Angles of positions `[axis, batch, pos]`: time, row and column, each for its section of the frequencies."""

    cfg: QwenConfig

    def forward(self, positions: Int[Tensor, "*axes batch pos"], dtype: torch.dtype) -> Angles:
        """Angles of given positions; of plain ones `[batch, pos]` all three axes are the same."""
        if positions.ndim == 2:
            return super().forward(positions, dtype)
        turn = super().forward
        each = [turn(axis, dtype) for axis in positions]
        sections = self.cfg.sections * 2
        cos, sin = (
            torch.cat([axes[i % 3].split(sections, -1)[i] for i in range(len(sections))], -1)
            for axes in zip(*each, strict=True)
        )
        return Angles(cos, sin)


class HookedQwen(HookedLlava):
    """Qwen2.5-VL with every activation named, readable and editable; pictures, no videos.

    The tower's positions are patches in reading order. `pixel_values` may be Hugging Face's flattened ones (with
    `image_grid_thw`) or pictures `[picture, channel, height, width]`, all of one size.
    """

    Config = QwenConfig
    Processor = QwenProcessor
    Vision = QwenVision
    Projector = Merger
    Rotary = QwenRotary
    extra_inputs = ("image_grid_thw", "mm_token_type_ids")
    weight_table = (
        *LLAMA_TABLE,
        Fold("model.language_model.", "text:"),
        Fold("language_model.", "text:"),  # a bare Qwen2_5_VLModel
        Fold("visual.", "tower:"),  # hub files, and what transformers saves
        Fold("model.visual.", "tower:"),  # in memory
        Row("tower:patch_embed.proj.weight", "vision.patch_embed.weight"),
        Row("tower:blocks.{l}.norm1.weight", "vision.blocks.{l}.ln1.weight"),
        Row("tower:blocks.{l}.attn.qkv.{p}", "vision.blocks.{l}.attn.qkv_proj.{p}"),
        Row("tower:blocks.{l}.attn.proj.{p}", "vision.blocks.{l}.attn.o_proj.{p}"),
        Row("tower:blocks.{l}.norm2.weight", "vision.blocks.{l}.ln2.weight"),
        Row("tower:blocks.{l}.mlp.gate_proj.{p}", "vision.blocks.{l}.mlp.gate_proj.{p}"),
        Row("tower:blocks.{l}.mlp.up_proj.{p}", "vision.blocks.{l}.mlp.in_proj.{p}"),
        Row("tower:blocks.{l}.mlp.down_proj.{p}", "vision.blocks.{l}.mlp.out_proj.{p}"),
        Row("tower:merger.ln_q.weight", "vision.ln_post.weight"),
        Row("tower:merger.mlp.0.{p}", "projector.linear_1.{p}"),
        Row("tower:merger.mlp.2.{p}", "projector.linear_2.{p}"),
        Unused("tower:rotary_pos_emb.inv_freq"),
    )
    cfg: QwenConfig

    def from_hf_layout(self, pixels: Any, extras: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Pictures instead of flattened patches; what they and the tokens say already is not kept beside them."""
        kinds, grids = extras.get("mm_token_type_ids"), extras.get("image_grid_thw")
        if kinds is not None and bool((kinds > 1).any()):
            raise LensError("mm_token_type_ids that speak of a video, which is not supported; expected 0 and 1")
        if isinstance(pixels, Tensor) and pixels.ndim == 2:
            if grids is None:
                raise LensError(
                    f"pixel values {tuple(pixels.shape)}, patches by row; expected image_grid_thw beside them"
                )
            pixels = pictures_of(pixels, grids, self.cfg.vision)  # type: ignore[arg-type]
        elif isinstance(pixels, Tensor) and grids is not None and grids.tolist() != self._grids(pixels):
            raise LensError(f"image_grid_thw {grids.tolist()} beside pictures of {self._grids(pixels)}")
        return pixels, {name: extra for name, extra in extras.items() if name not in self.extra_inputs}

    def _grids(self, pixels: Tensor) -> list[list[int]]:
        """`image_grid_thw` of pictures."""
        return [[1, *self.cfg.seeing(pixels).vision.grid]] * len(pixels)  # type: ignore[union-attr]

    def for_hf(self, inputs: Inputs) -> dict[str, Tensor]:
        found = super().for_hf(inputs)
        if inputs.pixels is None:
            return found
        device = inputs.tokens.device
        grids = torch.tensor(self._grids(inputs.pixels), device=device)
        kinds = (inputs.tokens == self.cfg.image_token_id).int()
        pixels = flattened(inputs.pixels, self.cfg.vision)  # type: ignore[arg-type]
        return found | {"pixel_values": pixels, "image_grid_thw": grids, "mm_token_type_ids": kinds}

    def project(
        self, features: Float[Tensor, "image feature d_features"], pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image token d_model"]:
        return self.projector(features, self.cfg.seeing(pixels).vision.grid[1])  # type: ignore[union-attr]

    def positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch total"] | None = None, beyond: int = 0
    ) -> Int[Tensor, "*axes batch total"] | None:
        """Positions `[axis, batch, total]`: text counts on all three axes alike, a picture's tokens by row and column.

        What follows a picture goes on behind its longer side; padding is not counted. Without a picture as every
        decoder counts.
        """
        if inputs.pixels is None:
            return super().positions(inputs, mask, beyond)
        if mask is None and inputs.attention_mask is not None and not is_whole(inputs.attention_mask):
            mask = F.pad(inputs.attention_mask, (0, beyond), value=1)
        slots = F.pad(inputs.slots(self.cfg), (0, beyond))
        keep = torch.ones_like(slots) if mask is None else mask.bool()
        grid = self.cfg.seeing(inputs.pixels).vision.token_grid  # type: ignore[union-attr]
        found = torch.zeros(3, *slots.shape, dtype=torch.long, device=slots.device)
        for row in range(len(slots)):
            found[:, row, keep[row]] = positions_of(slots[row, keep[row]].tolist(), grid).to(slots.device)
        return found


def positions_of(slots: list[bool], grid: tuple[int, int]) -> Int[Tensor, "3 pos"]:
    """Time, row and column of every token of one prompt, where `slots` says which show pictures of this grid.

    >>> positions_of([False, True, True, False], (1, 2)).tolist()
    [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]
    """
    n, rows, cols = len(slots), *grid
    picture = torch.stack(torch.meshgrid(torch.arange(1), *map(torch.arange, grid), indexing="ij")).flatten(1)
    parts, at, following = [], 0, 0
    while at < n:
        start = at + next((i for i, slot in enumerate(slots[at:]) if slot), n - at)
        parts.append(following + torch.arange(start - at).expand(3, -1))
        following += start - at
        at = start
        if at < n:
            if not all(slots[at : at + rows * cols]) or at + rows * cols > n:
                raise LensError(f"image tokens {at} … do not follow one another; expected {rows * cols} in a row")
            parts.append(following + picture)
            following, at = following + max(rows, cols), at + rows * cols
    return torch.cat(parts, 1)
