"""Pixels to patch features: the vision towers of LLaVA, up to the last layer that it reads.

Unusual: `hook_embed` is the output of the pre-norm, because the stream starts there; so the sums of an
`ActivationCache` close in the tower as they do in the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.config import VisionConfig
from llava_lens.hooks import Hook
from llava_lens.layers import MLP, Attention, Block, Embedding, Mask, accumulated_bias
from llava_lens.norms import LayerNorm
from llava_lens.regions import Region
from llava_lens.rotary import Angles


class Patches(nn.Conv2d):
    """What each patch adds to the stream. Patches do not overlap, so the fused way on a CPU is one product."""

    def __init__(self, cfg: VisionConfig, bias: bool = False):
        super().__init__(cfg.n_channels, cfg.d_model, cfg.patch_size, stride=cfg.patch_size, bias=bias)
        self.product = Region()

    def forward(self, input: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image d_model row col"]:
        if not (input.is_cpu and self.product.open(input, self.weight)):
            return super().forward(input)
        down, across = self.kernel_size
        patches = input.unfold(2, down, down).unfold(3, across, across)
        rows = rearrange(patches, "image channel row col down across -> image row col (channel down across)")
        return rearrange(F.linear(rows, self.weight.flatten(1), self.bias), "image row col d -> image d row col")


class Vision(nn.Module):
    """CLIP's tower. Position 0 is the class token; patch `(row, col)` is at position `1 + row * columns + col`.

    A subclass names its parts as class attributes and overrides the steps that differ: `start`, `embed`, `select`.
    """

    Block = Block
    Norm = LayerNorm
    Mlp = MLP
    Attention = Attention
    patch_bias = False

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_pixels = Hook("batch channel height width")
        self.patch_embed = Patches(cfg, self.patch_bias)
        self.hook_patch_embed = Hook("batch patch d_model")
        self.make_embeddings()
        self.hook_embed = Hook("batch pos d_model")
        self.blocks = nn.ModuleList(
            self.Block(cfg, layer, self.Norm, self.Mlp, self.Attention) for layer in range(cfg.n_layers)
        )
        self.hook_features = Hook("batch feature d_features")

    def make_embeddings(self) -> None:
        """What is added to the patches, and the norm in front of the stream."""
        self.class_embed = nn.Parameter(torch.zeros(self.cfg.d_model))
        self.pos_embed = Embedding(self.cfg.n_ctx, self.cfg.d_model)
        self.hook_class_embed = Hook("batch 1 d_model")
        self.hook_pos_embed = Hook("batch pos d_model")
        self.ln_pre = LayerNorm(self.cfg)

    def forward(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image feature d_features"]:
        """Features of every patch for the projector; several feature layers are laid side by side."""
        x = self.start(pixels)
        streams, angles = [x], self.angles(pixels)
        for layer, block in enumerate(self.blocks):
            x = block(x, self.mask(layer, pixels), angles)
            streams.append(x)
        return self.hook_features(self.select(streams))

    def start(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """The stream before the first block."""
        return self.hook_embed(self.ln_pre(self.embed(self.hook_pixels(pixels))))

    def embed(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """Class token and patches with their positions added, before the pre-norm."""
        patches = self.patches(pixels)
        class_token = self.hook_class_embed(self.class_embed.expand(len(pixels), 1, -1))
        return self.add_positions(torch.cat((class_token, patches), dim=1))

    def patches(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image patch d_model"]:
        """Each patch as a vector."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        return self.hook_patch_embed(rearrange(patches, "image d row col -> image (row col) d"))

    def add_positions(self, x: Float[Tensor, "image pos d_model"]) -> Float[Tensor, "image pos d_model"]:
        """The learned vectors of all positions added."""
        positions = self.pos_embed.weight[None]
        if self.hook_pos_embed.live:
            positions = self.hook_pos_embed(positions.expand(len(x), -1, -1))
        return x + positions

    def mask(self, layer: int, pixels: Float[Tensor, "image channel height width"]) -> Mask:
        """What the positions of a picture see of one another in a layer: all of them."""
        return Mask()

    def angles(self, pixels: Float[Tensor, "image channel height width"]) -> Angles | None:
        """How far queries and keys are turned, in a tower with rotary positions."""
        return None

    def select(self, streams: list[Tensor]) -> Float[Tensor, "image feature d_features"]:
        """The layers that the checkpoint reads, without the class token unless it keeps it."""
        start = int(self.cfg.class_token and not self.cfg.keep_class_token)
        if self.cfg.joined_whole and self.cfg.feature_layers_listed:
            return torch.cat([streams[layer] for layer in self.cfg.feature_layers], dim=-1)[:, start:]
        chosen = [streams[layer][:, start:] for layer in self.cfg.feature_layers]
        return torch.cat(chosen, dim=-1) if self.cfg.feature_layers_listed else chosen[0]

    @property
    def features_are_a_stream(self) -> bool:
        """Whether the features lie in the memory of a stream; not where they are joined, or made by a subclass."""
        return type(self).select is Vision.select and not self.cfg.feature_layers_listed

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases in the stream before `layer` (before its MLP with `mlp_input`)."""
        return accumulated_bias(self.blocks, layer, mlp_input, include_mlp_biases)


class SiglipVision(Vision):
    """SigLIP's tower: no class token, no norm in front; patch `(row, col)` is at position `row * columns + col`."""

    patch_bias = True

    def make_embeddings(self) -> None:
        self.pos_embed = Embedding(self.cfg.n_ctx, self.cfg.d_model)
        self.hook_pos_embed = Hook("batch pos d_model")

    def start(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        return self.hook_embed(self.embed(self.hook_pixels(pixels)))

    def embed(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """Patches with their positions added."""
        return self.add_positions(self.patches(pixels))


TOWERS: dict[str, type[Vision]] = {"clip_vision_model": Vision, "siglip_vision_model": SiglipVision}
"""The towers that a LLaVA may have, by `model_type`."""


def tower(cfg: VisionConfig) -> Vision:
    """The tower that a config describes."""
    return TOWERS[cfg.family](cfg)
