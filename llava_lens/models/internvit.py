"""InternVL's vision tower: CLIP's plan without a norm in front, and a learned factor on every number that a layer adds.

Unusual: the factor belongs to the matrix before it (`Scaled`), whose `weight` and `bias` are multiplied already. So
`W_O`, `b_O` and `W_out` say what reaches the stream; heads, neurons and biases sum to it with no rule of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.config import TowerConfig, VisionConfig
from llava_lens.hooks import Hook
from llava_lens.layers import MLP, Attention, Stream
from llava_lens.norms import LayerNorm, RMSNorm
from llava_lens.rotary import Angles
from llava_lens.vision import Vision

NORMS = {"layer_norm": "LN", "rms_norm": "RMS"}
QK_EPS = 1e-6
"""That of the norms of queries and keys, which no config states."""


@dataclass(frozen=True, kw_only=True)
class InternVitConfig(VisionConfig):
    """`qk_norm`: queries and keys pass an RMSNorm over all heads together."""

    qk_norm: bool = False

    @classmethod
    def towers(cls) -> Mapping[str, Mapping[str, Any]]:
        return {"internvl_vision": {}}

    @classmethod
    def from_hf(cls, hf: Any, feature_layer: Any = -1, select: str = "default", **changes: Any) -> InternVitConfig:
        """Read an `InternVLVisionConfig`. Raises `ValueError` for what is not computed here, as CLIP's does."""
        if hf.model_type in cls.towers():
            _refuse(hf, feature_layer, select)
            own = dict(attn_bias=hf.attention_bias, attn_out_bias=True, qk_norm=hf.use_qk_norm)
            changes = own | dict(normalization_type=NORMS[hf.norm_type]) | changes
        return super().from_hf(hf, feature_layer, select, **changes)


def _refuse(hf: Any, feature_layer: Any, select: str) -> None:
    for name, given, expected in (
        ("norm_type", hf.norm_type, tuple(NORMS)),
        ("use_absolute_position_embeddings", hf.use_absolute_position_embeddings, (True,)),
        ("vision_feature_select_strategy", select, ("default",)),
    ):
        if given not in expected:
            raise ValueError(f"{name} {given!r}; expected {' or '.join(map(repr, expected))}")
    if not isinstance(feature_layer, int):
        raise ValueError(f"vision_feature_layer {feature_layer!r}; expected one number")
    if feature_layer == -1 and not hf.use_mean_pooling:
        raise ValueError("use_mean_pooling False, a norm behind the last layer; expected True, or an inner layer")


class Scaled(nn.Linear):
    """A linear layer whose outputs are multiplied by a learned factor each; `weight` and `bias` are the products."""

    def __init__(self, d_in: int, d_out: int):
        nn.Module.__init__(self)  # a linear layer to whoever reads its weights, which are no parameters of its own
        self.in_features, self.out_features = d_in, d_out
        self.linear = nn.Linear(d_in, d_out)
        self.factor = nn.Parameter(torch.ones(d_out))

    def forward(self, input: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        return self.factor * self.linear(input)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:  # type: ignore[override]
        return self.factor[:, None] * self.linear.weight

    @property
    def bias(self) -> Float[Tensor, " d_out"]:  # type: ignore[override]
        return self.factor * self.linear.bias


class ScaledMLP(MLP):
    """CLIP's, its output scaled."""

    def __init__(self, cfg: TowerConfig):
        super().__init__(cfg)
        self.out_proj: Any = Scaled(cfg.d_mlp, cfg.d_model)


class ScaledAttention(Attention):
    """CLIP's, its output scaled."""

    def __init__(self, cfg: TowerConfig, layer: int):
        super().__init__(cfg, layer)
        self.o_proj: Any = Scaled(cfg.n_heads * cfg.d_head, cfg.d_model)


class NormedAttention(ScaledAttention):
    """With a norm of queries and one of keys; `hook_q` and `hook_k` come behind them, as the dot products take them."""

    def __init__(self, cfg: TowerConfig, layer: int):
        super().__init__(cfg, layer)
        self.q_norm = RMSNorm(replace(cfg, eps=QK_EPS))
        self.k_norm = RMSNorm(replace(cfg, eps=QK_EPS))

    def project(self, x: Stream, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
        q = self.hook_q(self._split(self.q_norm(self.q_proj(x)))).transpose(1, 2)
        return q, *self.keys_and_values(x, angles)

    def keys_and_values(self, x: Stream, angles: Angles | None) -> tuple[Tensor, Tensor]:
        k = self.hook_k(self._split(self.k_norm(self.k_proj(x)))).transpose(1, 2)
        return k, self.hook_v(self._split(self.v_proj(x))).transpose(1, 2)


class Positions(nn.Module):
    """The learned vector of every position, in the checkpoint's shape."""

    def __init__(self, n: int, d_model: int):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(1, n, d_model))

    @property
    def weight(self) -> Float[Tensor, "pos d_model"]:
        return self.rows[0]


class InternVit(Vision):
    """InternViT. Position 0 is the class token; patch `(row, col)` is at position `1 + row * columns + col`."""

    Mlp = ScaledMLP
    patch_bias = True

    def __init__(self, cfg: InternVitConfig):
        self.Norm = RMSNorm if cfg.normalization_type == "RMS" else LayerNorm
        self.Attention = NormedAttention if cfg.qk_norm else ScaledAttention
        super().__init__(cfg)

    def make_embeddings(self) -> None:
        self.class_embed = nn.Parameter(torch.zeros(1, 1, self.cfg.d_model))
        self.pos_embed = Positions(self.cfg.n_ctx, self.cfg.d_model)
        self.hook_class_embed = Hook("batch 1 d_model")
        self.hook_pos_embed = Hook("batch pos d_model")

    def start(self, pixels: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image pos d_model"]:
        return self.hook_embed(self.embed(self.hook_pixels(pixels)))
