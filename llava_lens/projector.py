"""Patch features to vectors as wide as the decoder's stream."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.activations import activation
from llava_lens.config import LlavaConfig, TowerConfig
from llava_lens.hooks import Hook
from llava_lens.norms import LayerNorm
from llava_lens.regions import Region


class FeatureNorm(LayerNorm):
    """A layer norm of the features that enter a projector."""

    def __init__(self, cfg: TowerConfig, width: int, eps: float):
        super().__init__(replace(cfg, d_model=width, eps=eps))
        self.hook_scale = Hook("batch feature 1")
        self.hook_normalized = Hook("batch feature d_features")
        self.norm = Region(self.hook_scale, self.hook_normalized)


class Projector(nn.Module):
    """LLaVA-1.5's two-layer perceptron; `hook_out` is what takes the place of the `<image>` tokens.

    A subclass that norms its input first says so in `make_norm`.
    """

    def __init__(self, cfg: LlavaConfig):
        super().__init__()
        assert cfg.vision is not None
        d_in = cfg.vision.d_merged
        self.hook_in = Hook("batch feature d_features")
        self.norm = self.make_norm(cfg, d_in)
        self.linear_1 = nn.Linear(d_in, cfg.d_model, bias=cfg.projector_bias)
        self.hook_pre = Hook("batch feature d_model")
        self.act = activation(cfg.projector_act_fn)
        self.hook_post = Hook("batch feature d_model")
        self.linear_2 = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.projector_bias)
        self.hook_out = Hook("batch feature d_model")

    def make_norm(self, cfg: LlavaConfig, width: int) -> FeatureNorm | None:
        """The norm of the input; none here."""
        return None

    def forward(self, features: Float[Tensor, "image feature d_features"]) -> Float[Tensor, "image feature d_model"]:
        x = self.hook_in(features)
        pre = self.hook_pre(self.linear_1(x if self.norm is None else self.norm(x)))
        return self.hook_out(self.linear_2(self.hook_post(self.act(pre))))
