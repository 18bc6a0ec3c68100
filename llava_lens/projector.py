"""Patch features to vectors as wide as the decoder's stream."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.config import LlavaConfig, VisionConfig, activation
from llava_lens.hooks import Hook


class Projector(nn.Module):
    """LLaVA-1.5's two-layer perceptron; `hook_out` is what takes the place of the `<image>` tokens."""

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        assert cfg.vision is not None
        d_in = cfg.vision.d_model * len(cfg.vision.feature_layers)
        self.hook_in = Hook("batch feature d_features")
        self.linear_1 = nn.Linear(d_in, cfg.d_model, bias=cfg.projector_bias)
        self.hook_pre = Hook("batch feature d_model")
        self.act = activation(cfg.projector_act_fn)
        self.hook_post = Hook("batch feature d_model")
        self.linear_2 = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.projector_bias)
        self.hook_out = Hook("batch feature d_model")

    def forward(self, features: Float[Tensor, "image feature d_features"]) -> Float[Tensor, "image feature d_model"]:
        pre = self.hook_pre(self.linear_1(self.hook_in(features)))
        return self.hook_out(self.linear_2(self.hook_post(self.act(pre))))


def merged(
    features: Float[Tensor, "image feature d_features"], vision: VisionConfig
) -> Float[Tensor, "image token d_merged"]:
    """Each square of `merge` × `merge` patches side by side in one vector, in reading order (a pixel shuffle)."""
    side, (rows, cols) = vision.merge, vision.token_grid
    return rearrange(features, "image (row y col x) d -> image (row col) (y x d)", row=rows, y=side, col=cols, x=side)
