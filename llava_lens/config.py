"""What a model is made of, as frozen facts with TransformerLens's names; each config reads itself from Hugging Face's.

Unusual: `vision.n_layers` counts the tower layers that *run*. LLaVA reads an inner layer (23 of CLIP's 24), so the
layers above it are neither built nor loaded. What takes transformers long to import is asked for only where it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

if TYPE_CHECKING:
    from transformers import LlamaConfig

CPU = torch.device("cpu")
NOT_ARCHITECTURE = ("model_name", "tokenizer_name", "device", "dtype", "eos_token_ids", "pad_token_id")


def quick_gelu(x: Tensor) -> Tensor:
    """CLIP's GELU, approximated by a sigmoid."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""Activation functions of published checkpoints; `activation` finds the rest in transformers."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function that a checkpoint's config means by this name. Raises `ValueError` for an unknown one."""
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(sorted(ACT2FN))}")
    return ACT2FN[name]


@dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """What the vision tower and the decoder have in common: a stack of pre-norm transformer blocks."""

    n_layers: int
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    act_fn: str
    eps: float
    normalization_type: str
    n_key_value_heads: int
    n_ctx: int
    attn_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = False
    attn_only: bool = False
    final_rms: bool = False

    def __post_init__(self) -> None:
        if self.n_heads % self.n_key_value_heads:
            raise ValueError(f"{self.n_heads} heads cannot share {self.n_key_value_heads} key/value heads evenly")
        activation(self.act_fn)


@dataclass(frozen=True, kw_only=True)
class VisionConfig(TowerConfig):
    """A CLIP vision tower: square images cut into square patches, one class token in front."""

    image_size: int
    patch_size: int
    n_channels: int = 3
    n_layers_total: int = 0
    feature_layers: tuple[int, ...] = ()
    feature_layers_listed: bool = False  # a list, even of one, is joined: a copy whose layout decides bf16's last bit
    keep_class_token: bool = False

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per image as (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def n_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def n_features(self) -> int:
        """Vectors that one image sends to the projector: its patches, and the class token where it is kept."""
        return self.n_patches + self.keep_class_token

    @classmethod
    def from_hf(
        cls, hf: Any, feature_layer: int | Sequence[int] = -1, select: str = "default", **changes: Any
    ) -> VisionConfig:
        """Read a `CLIPVisionConfig`; `feature_layer` counts as Hugging Face does (0 = after the pre-norm)."""
        if not isinstance(hf.image_size, int) or not isinstance(hf.patch_size, int):
            raise ValueError(
                f"image_size {hf.image_size!r} and patch_size {hf.patch_size!r}: expected one integer each"
            )
        if select not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy {select!r}: expected 'default' or 'full'")
        total = hf.num_hidden_layers
        asked = (feature_layer,) if isinstance(feature_layer, int) else tuple(feature_layer)
        bad = [layer for layer in asked if not -total - 1 <= layer <= total]
        if bad or not asked:
            raise ValueError(f"vision_feature_layer {feature_layer!r}: expected {-total - 1} … {total}")
        layers = tuple(layer if layer >= 0 else total + 1 + layer for layer in asked)
        fields = dict(
            n_layers=max(layers),
            n_layers_total=total,
            feature_layers=layers,
            feature_layers_listed=not isinstance(feature_layer, int),
            keep_class_token=select == "full",
            d_model=hf.hidden_size,
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_attention_heads,
            d_head=hf.hidden_size // hf.num_attention_heads,
            d_mlp=hf.intermediate_size,
            act_fn=hf.hidden_act,
            eps=hf.layer_norm_eps,
            normalization_type="LN",
            n_ctx=(hf.image_size // hf.patch_size) ** 2 + 1,
            attn_bias=True,
            mlp_bias=True,
            image_size=hf.image_size,
            patch_size=hf.patch_size,
            n_channels=hf.num_channels,
        )
        return cls(**{**fields, **changes})


def ending_tokens(facts: Mapping[str, Any]) -> dict[str, Any]:
    """`eos_token_ids` and `pad_token_id` as far as a config.json or generation_config.json states them.

    >>> ending_tokens({"eos_token_id": 2, "pad_token_id": None})
    {'eos_token_ids': (2,)}
    """
    eos, pad = facts.get("eos_token_id"), facts.get("pad_token_id")
    ids = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    stated = {"eos_token_ids": tuple(i for i in ids if i >= 0), "pad_token_id": None if pad is None or pad < 0 else pad}
    return {name: value for name, value in stated.items() if value not in ((), None)}


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(TowerConfig):
    """A Llama-family decoder. `rope` is Hugging Face's `rope_parameters` (type, theta, factors)."""

    d_vocab: int
    rope: Mapping[str, Any] = field(default_factory=dict)
    tie_word_embeddings: bool = False
    model_name: str = ""
    tokenizer_name: str = ""
    default_prepend_bos: bool = True
    positional_embedding_type: str = "rotary"
    original_architecture: str = "LlamaForCausalLM"
    vision: VisionConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> DecoderConfig:
        """Read a `LlamaConfig` (Vicuna's too)."""
        fields = dict(
            n_layers=hf.num_hidden_layers,
            d_model=hf.hidden_size,
            n_heads=hf.num_attention_heads,
            n_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
            d_head=hf.head_dim or hf.hidden_size // hf.num_attention_heads,
            d_mlp=hf.intermediate_size,
            act_fn=hf.hidden_act,
            eps=hf.rms_norm_eps,
            normalization_type="RMS",
            final_rms=True,
            n_ctx=hf.max_position_embeddings,
            attn_bias=hf.attention_bias,
            mlp_bias=hf.mlp_bias,
            gated_mlp=True,
            d_vocab=hf.vocab_size,
            rope=dict(hf.rope_parameters or {}),
            tie_word_embeddings=hf.tie_word_embeddings,
            model_name=getattr(hf, "_name_or_path", "") or "",
            **ending_tokens(hf.to_dict()),
        )
        return cls(**{**fields, **changes})

    @property
    def max_positions(self) -> int | None:
        """Positions that a text may take; None where the rotary scaling stretches with the text."""
        return None if self.rope.get("rope_type") == "dynamic" else self.n_ctx

    def rope_frequencies(self, seq_len: int | None = None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[d_head / 2]` in fp32 and the factor on cos and sin, for a sequence of `seq_len`.

        Only the scalings that depend on the length ("dynamic", "longrope") look at `seq_len`.
        """
        kind = self.rope.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, self.d_head, 2, dtype=torch.float) / self.d_head
            return 1.0 / (self.rope.get("rope_theta", 10000.0) ** exponents), 1.0
        if kind not in ROPE_INIT_FUNCTIONS:
            raise ValueError(f"unknown rope scaling {kind!r}; known: default, {', '.join(ROPE_INIT_FUNCTIONS)}")
        inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[kind](self._as_llama(), torch.device("cpu"), seq_len=seq_len)
        return inv_freq.float(), attention_factor

    def rope_length(self, seq_len: int) -> int | None:
        """The length that the frequencies depend on: None while every sequence shares one set of frequencies."""
        kind = self.rope.get("rope_type", "default")
        if "dynamic" in kind:
            return seq_len if seq_len > self.n_ctx else None
        if kind == "longrope":
            original = self.rope["original_max_position_embeddings"]
            return original + 1 if seq_len > original else None
        return None

    def _as_llama(self) -> LlamaConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            hidden_size=self.d_model,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_key_value_heads,
            head_dim=self.d_head,
            max_position_embeddings=self.n_ctx,
            rope_parameters=dict(self.rope),
        )


@dataclass(frozen=True, kw_only=True)
class LlavaConfig(DecoderConfig):
    """A decoder with a CLIP tower and a two-layer projector in front; `vision` is None for a plain Llama/Vicuna."""

    image_token_id: int | None = None
    projector_act_fn: str = "gelu"
    projector_bias: bool = True

    @property
    def tokens_per_image(self) -> int:
        """Stream positions that one image takes; 0 for a model without a tower."""
        return self.vision.n_features if self.vision else 0

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that name this architecture; two models with equal configs share them."""
        facts = {name: value for name, value in asdict(self).items() if name not in NOT_ARCHITECTURE}
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> LlavaConfig:
        """Read a `LlavaConfig` of transformers, or a plain `LlamaConfig` (a decoder without a tower).

        Raises `ValueError` for any other family, naming what was given.
        """
        if hf.model_type == "llama":
            return super().from_hf(hf, **changes)  # type: ignore[return-value]
        if hf.model_type != "llava":
            raise ValueError(f"a {hf.model_type!r} checkpoint; expected 'llava' (CLIP + Llama) or 'llama'")
        if hf.text_config.model_type != "llama" or hf.vision_config.model_type != "clip_vision_model":
            raise ValueError(
                f"a LLaVA of {hf.vision_config.model_type!r} and {hf.text_config.model_type!r}; "
                "expected 'clip_vision_model' and 'llama'"
            )
        fields = dict(
            vision=VisionConfig.from_hf(hf.vision_config, hf.vision_feature_layer, hf.vision_feature_select_strategy),
            image_token_id=hf.image_token_index,
            projector_act_fn=hf.projector_hidden_act,
            projector_bias=hf.multimodal_projector_bias,
            original_architecture="LlavaForConditionalGeneration",
            tie_word_embeddings=hf.tie_word_embeddings or hf.text_config.tie_word_embeddings,
            model_name=getattr(hf, "_name_or_path", "") or "",
        )
        return super().from_hf(hf.text_config, **{**fields, **changes})  # type: ignore[return-value]
