"""Pixels to patch features: CLIP's vision tower up to the last layer that LLaVA reads.

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
from llava_lens.layers import MLP, Block, Embedding, Mask, accumulated_bias
from llava_lens.norms import LayerNorm
from llava_lens.regions import Region


class Patches(nn.Conv2d):
    """What each patch adds to the stream. Patches do not overlap, so the fused way is a product of matrices."""

    def __init__(self, cfg: VisionConfig):
        super().__init__(cfg.n_channels, cfg.d_model, cfg.patch_size, stride=cfg.patch_size, bias=False)
        self.product = Region()

    def forward(self, input: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image d_model row col"]:
        if not self.product.open(input, self.weight):
            return super().forward(input)
        down, across = self.kernel_size
        patches = input.unfold(2, down, down).unfold(3, across, across)
        rows = rearrange(patches, "image channel row col down across -> image row col (channel down across)")
        return rearrange(F.linear(rows, self.weight.flatten(1)), "image row col d -> image d row col")


class Vision(nn.Module):
    """CLIP's tower. Position 0 is the class token; patch `(row, col)` is at position `1 + row * columns + col`."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.hook_pixels = Hook("batch channel height width")
        self.patch_embed = Patches(cfg)
        self.class_embed = nn.Parameter(torch.zeros(cfg.d_model))
        self.pos_embed = Embedding(cfg.n_ctx, cfg.d_model)
        self.hook_patch_embed = Hook("batch patch d_model")
        self.hook_class_embed = Hook("batch 1 d_model")
        self.hook_pos_embed = Hook("batch pos d_model")
        self.ln_pre = LayerNorm(cfg)
        self.hook_embed = Hook("batch pos d_model")
        self.blocks = nn.ModuleList(Block(cfg, layer, LayerNorm, MLP) for layer in range(cfg.n_layers))
        self.hook_features = Hook("batch feature d_features")

    def forward(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image feature d_features"]:
        """Features of every patch for the projector; several feature layers are laid side by side."""
        x = self.start(pixels)
        streams = [x]
        for block in self.blocks:
            x = block(x, Mask())
            streams.append(x)
        return self.hook_features(self.select(streams))

    def start(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """The stream before the first block."""
        return self.hook_embed(self.ln_pre(self.embed(self.hook_pixels(pixels))))

    def embed(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        """Class token and patches with their positions added, before the pre-norm."""
        patches = self.patch_embed(pixels.to(self.patch_embed.weight.dtype))
        patches = self.hook_patch_embed(rearrange(patches, "image d row col -> image (row col) d"))
        class_token = self.hook_class_embed(self.class_embed.expand(len(pixels), 1, -1))
        x = torch.cat((class_token, patches), dim=1)
        positions = self.pos_embed.weight[None]
        if self.hook_pos_embed.live:
            positions = self.hook_pos_embed(positions.expand(len(pixels), -1, -1))
        return x + positions

    def select(self, streams: list[Tensor]) -> Float[Tensor, "image feature d_features"]:
        """The layers that the checkpoint reads, without the class token unless it keeps it."""
        start = 0 if self.cfg.keep_class_token else 1
        chosen = [streams[layer][:, start:] for layer in self.cfg.feature_layers]
        return torch.cat(chosen, dim=-1) if self.cfg.feature_layers_listed else chosen[0]

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the output biases in the stream before `layer` (before its MLP with `mlp_input`)."""
        return accumulated_bias(self.blocks, layer, mlp_input, include_mlp_biases)
