"""Qwen2.5-VL's vision tower: pictures of any size, patches that attend within windows in most layers, turned by place.

Unusual: the stream is in reading order, patch `(row, col)` at position `row * columns + col`, while Hugging Face's lies
window by window. Each layer's attention mixes in that order (`Windows`), because the order of a sum decides its last
bit; scores and patterns are shown over the whole picture, closed outside the window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from llava_lens import kernels
from llava_lens.activations import activation
from llava_lens.config import TowerConfig, VisionConfig
from llava_lens.errors import LensError
from llava_lens.hooks import Hook
from llava_lens.layers import Block, GatedMLP, Mask
from llava_lens.models.blip_parts import JointAttention
from llava_lens.norms import RMSNorm, Stream
from llava_lens.packing import Packed
from llava_lens.regions import Region
from llava_lens.rotary import Angles
from llava_lens.vision import Vision

EPS = 1e-6
"""That of the tower's norms, which no config states."""


@dataclass(frozen=True, kw_only=True)
class QwenVisionConfig(VisionConfig):
    """`window` is the side of a window in pixels; `whole_layers` see the whole picture.

    `frames` is how often a picture is shown to the patch embedding, `size` its pixels' height and width, None until
    they are known (`at`).
    """

    window: int
    whole_layers: tuple[int, ...]
    frames: int
    theta: float
    size: tuple[int, int] | None = None
    positional_embedding_type: str = "rotary"  # type: ignore[misc]

    @classmethod
    def from_hf(cls, hf: Any, feature_layer: Any = -1, select: str = "full", **changes: Any) -> QwenVisionConfig:
        """Read a `Qwen2_5_VLVisionConfig`. Raises `ValueError` for another, and for sides that do not fit."""
        if hf.model_type != "qwen2_5_vl_vision":
            raise ValueError(f"a tower of {hf.model_type!r}; expected 'qwen2_5_vl_vision'")
        patch, frames, merge = hf.patch_size, hf.temporal_patch_size, hf.spatial_merge_size
        if not isinstance(patch, int) or not isinstance(frames, int):
            raise ValueError(f"patch_size {patch!r} and temporal_patch_size {frames!r}: expected one integer each")
        d_head, uneven = divmod(hf.hidden_size, hf.num_heads)
        if uneven or d_head % 4:
            raise ValueError(f"{hf.num_heads} heads in a width of {hf.hidden_size}; expected heads of a multiple of 4")
        if hf.window_size < patch * merge:
            raise ValueError(f"window_size {hf.window_size}; expected {patch * merge} at least, the side of a token")
        rope = hf.rope_parameters or {}
        if rope.get("rope_type", "axial") != "axial":
            raise ValueError(f"rope_type {rope['rope_type']!r} in the tower; expected 'axial'")
        fields = dict(
            family=hf.model_type,
            n_layers=hf.depth,
            n_layers_total=hf.depth,
            feature_layers=(hf.depth,),
            d_model=hf.hidden_size,
            n_heads=hf.num_heads,
            n_key_value_heads=hf.num_heads,
            d_head=d_head,
            d_mlp=hf.intermediate_size,
            act_fn=hf.hidden_act,
            eps=EPS,
            normalization_type="RMS",
            n_ctx=0,
            attn_bias=True,
            mlp_bias=True,
            gated_mlp=True,
            image_size=0,
            patch_size=patch,
            n_channels=hf.in_channels,
            class_token=False,
            merge=merge,
            window=hf.window_size,
            whole_layers=tuple(hf.fullatt_block_indexes),
            frames=frames,
            theta=rope.get("rope_theta", 10000.0),
        )
        return cls(**{**fields, **changes})

    def at(self, height: int, width: int) -> QwenVisionConfig:
        """The tower as it sees pictures of this size. Raises `LensError` for sides that are no whole tokens."""
        side = self.patch_size * self.merge
        if height % side or width % side or not height or not width:
            raise LensError(f"pixel values of {width}×{height}; expected sides of whole tokens, multiples of {side}")
        return replace(self, size=(height, width), n_ctx=(height // self.patch_size) * (width // self.patch_size))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per picture as (rows, columns); raises `LensError` where no picture says how many."""
        if self.size is None:
            raise LensError("how many patches a picture has depends on its size; pass pixel_values, or a size")
        return self.size[0] // self.patch_size, self.size[1] // self.patch_size


class Windows(Mask):
    """What the patches of a picture see of each other, and the order that they are mixed in, group by group."""

    order: Int[Tensor, " patch"]
    back: Int[Tensor, " patch"]
    lengths: list[int]

    @classmethod
    def of(cls, allowed: Tensor | None, order: Tensor, lengths: list[int]) -> Windows:
        """`order` names the patches of one group after another, `lengths` are the groups'."""
        made = cls(allowed)
        made.order, made.back, made.lengths = order, order.argsort(), lengths
        return made


@lru_cache(16)
@torch.inference_mode(False)  # so that a later run with gradients may use them
def windows(grid: tuple[int, int], merge: int, side: int, device: torch.device) -> tuple[Windows, Windows]:
    """The masks of a layer that sees windows of `side` × `side` tokens, and of one that sees the whole picture."""
    rows, cols = grid
    numbers = torch.arange(rows * cols, device=device)
    tokens = rearrange(numbers, "(row y col x) -> row col (y x)", row=rows // merge, y=merge, x=merge)
    groups = [part.flatten() for band in tokens.split(side) for part in band.split(side, 1)]
    order, lengths = torch.cat(groups), [len(group) for group in groups]
    whole = Windows.of(None, order, [len(order)])
    if len(groups) == 1:
        return whole, whole
    number = torch.arange(len(groups), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    number = number[whole.back]
    return Windows.of((number[:, None] == number)[None, None], order, lengths), whole


class WindowAttention(JointAttention):
    """Attention of patches in windows; queries and keys are turned by row and column."""

    def __init__(self, cfg: TowerConfig, layer: int):
        super().__init__(cfg, layer)
        self.implementation = "sdpa"
        self.packed = Packed(self, "qkv_proj")
        self.qkv = Region(*self.qkv.hooks, usual=False, packed=self.packed)

    def project(self, x: Stream, angles: Angles | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Turned queries and keys, and values, `[batch, head, pos, d_head]` each."""
        q, k, v = super().project(x)
        if angles is not None:
            q = self.hook_rot_q(kernels.rotate(q, *angles).transpose(1, 2)).transpose(1, 2)
            k = self.hook_rot_k(kernels.rotate(k, *angles).transpose(1, 2)).transpose(1, 2)
        return q, k, v

    def at_once(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Float[Tensor, "batch head query d_head"]:
        """The mixtures, group by group where the mask has groups."""
        if not isinstance(mask, Windows):
            return self._mixed(q, k, v, mask)
        queries, keys, values = (each[:, :, mask.order].split(mask.lengths, 2) for each in (q, k, v))
        groups = zip(queries, keys, values, strict=True)
        return torch.cat([self._mixed(*group, Mask()) for group in groups], 2)[:, :, mask.back]

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        if self.implementation != "eager":
            return kernels.attention(q, k, v, self.scale, *mask)
        return kernels.mix_values(kernels.attention_pattern(kernels.attention_scores(q, k, self.scale, *mask)), v)


class QwenVision(Vision):
    """Patches in reading order; a norm behind the last block is part of the features, which the projector merges."""

    Norm = RMSNorm
    Mlp = GatedMLP
    Attention = WindowAttention
    cfg: QwenVisionConfig

    def __init__(self, cfg: QwenVisionConfig):
        nn.Module.__init__(self)
        self.cfg = cfg
        side = (cfg.frames, cfg.patch_size, cfg.patch_size)
        self.hook_pixels = Hook("batch channel height width")
        self.patch_embed = nn.Conv3d(cfg.n_channels, cfg.d_model, side, stride=side, bias=False)
        self.hook_embed = Hook("batch pos d_model")
        self.blocks = nn.ModuleList(Block(cfg, i, self.Norm, self.Mlp, self.Attention) for i in range(cfg.n_layers))
        self.ln_post = RMSNorm(cfg)
        self.hook_features = Hook("batch feature d_features")

    def mask(self, layer: int, pixels: Float[Tensor, "image channel height width"]) -> Mask:
        """The window of each patch, or the whole picture."""
        cfg = self.cfg.at(*pixels.shape[-2:])
        side = cfg.window // cfg.merge // cfg.patch_size
        some, whole = windows(cfg.grid, cfg.merge, side, pixels.device)
        return whole if layer in cfg.whole_layers else some

    def start(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image patch d_model"]:
        """The patches, to which nothing is added."""
        return self.hook_embed(self.patches(self.hook_pixels(pixels)))

    def patches(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image patch d_model"]:
        """Each patch as a vector; the same picture is every frame."""
        down = across = self.cfg.patch_size
        cut = repeat(
            pixels.to(self.patch_embed.weight.dtype),
            "image channel (row down) (col across) -> (image row col) channel frame down across",
            down=down, across=across, frame=self.cfg.frames,
        )  # fmt: skip
        return self.patch_embed(cut).view(len(pixels), -1, self.cfg.d_model)

    def angles(self, pixels: Float[Tensor, "image channel height width"]) -> Angles:
        """Half of each head is turned by a patch's row, half by its column; float32 in any narrower model."""
        weight, half = self.patch_embed.weight, self.cfg.d_head // 2
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        frequencies = 1.0 / (self.cfg.theta ** (torch.arange(0, half, 2, dtype=torch.float) / half))
        rows, cols = self.cfg.at(*pixels.shape[-2:]).grid
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).to(wide)
        turned = (places[..., None] * frequencies.to(wide)).flatten(1).repeat(1, 2)[None, None].to(weight.device)
        return Angles(turned.cos(), turned.sin())

    def select(self, streams: list[Tensor]) -> Float[Tensor, "image feature d_features"]:
        """The stream behind the last block, normed."""
        return self.ln_post(streams[-1])


class Merger(nn.Module):
    """Squares of patches side by side, and two layers; `hook_out` takes the place of the image tokens."""

    def __init__(self, cfg: Any):
        super().__init__()
        self.vision = cfg.vision
        width = cfg.vision.d_merged
        self.hook_in = Hook("batch feature d_features")
        self.linear_1 = nn.Linear(width, width)
        self.hook_pre = Hook("batch feature d_features")
        self.act = activation("gelu")
        self.hook_post = Hook("batch feature d_features")
        self.linear_2 = nn.Linear(width, cfg.d_model)
        self.hook_out = Hook("batch feature d_model")

    def forward(
        self, features: Float[Tensor, "image patch d_model"], columns: int
    ) -> Float[Tensor, "image token d_out"]:
        """`columns` are the grid's."""
        side = self.vision.merge
        merged = rearrange(
            features, "image (row y col x) d -> image (row col) (y x d)", col=columns // side, y=side, x=side
        )
        pre = self.hook_pre(self.linear_1(self.hook_in(merged)))
        return self.hook_out(self.linear_2(self.hook_post(self.act(pre))))
