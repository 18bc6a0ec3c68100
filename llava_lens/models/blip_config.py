"""What a BLIP for question answering is made of, read from Hugging Face's configuration.

Unusual: one configuration describes both texts, the question encoder and the answer decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llava_lens.config import CPU, LlavaConfig, TowerConfig, VisionConfig
from llava_lens.errors import LensError

STACKS = ("vision", "encoder", "decoder")
"""The three stacks of blocks, in the order in which they run; each is the prefix of its hooks' names."""


@dataclass(frozen=True, kw_only=True)
class BlipTextConfig(TowerConfig):
    """The question encoder and the answer decoder, which have one shape and weights of their own."""

    d_vocab: int


@dataclass(frozen=True, kw_only=True)
class BlipConfig:
    """BLIP for question answering. Answers start with `bos_token_id` and end with `sep_token_id`."""

    vision: VisionConfig
    text: BlipTextConfig
    bos_token_id: int
    sep_token_id: int
    pad_token_id: int
    model_name: str = ""
    device: torch.device = CPU
    dtype: torch.dtype = torch.float32

    fingerprint = LlavaConfig.fingerprint

    @property
    def d_vocab(self) -> int:
        return self.text.d_vocab

    @classmethod
    def from_hf(cls, hf: Any, **changes: Any) -> BlipConfig:
        """Read a `BlipConfig` of transformers. Raises `LensError` for another family and for untied or unjoined parts.

        The stacks must have one width, as question answering in transformers needs; the answer's unembedding is tied.
        """
        if hf.model_type != "blip":
            raise LensError(f"a {hf.model_type!r} checkpoint; expected 'blip'")
        text, vision = hf.text_config, hf.vision_config
        if not (hf.tie_word_embeddings and text.tie_word_embeddings):
            raise LensError("tie_word_embeddings is off; expected a BLIP whose answers are read out by its embeddings")
        if not text.is_decoder:
            raise LensError("text_config.is_decoder is off, so nothing looks at the picture; expected it on")
        if text.hidden_size != vision.hidden_size:
            raise LensError(f"a text of width {text.hidden_size} for a picture of {vision.hidden_size}; expected one")
        fields = dict(
            vision=vision_config(vision),
            text=BlipTextConfig(
                **_shape(text), n_ctx=text.max_position_embeddings, act_fn=text.hidden_act, d_vocab=text.vocab_size
            ),
            bos_token_id=text.bos_token_id,
            sep_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id,
            model_name=getattr(hf, "_name_or_path", "") or "",
        )
        return cls(**{**fields, **changes})


def vision_config(hf: Any) -> VisionConfig:
    """Read a `BlipVisionConfig`: all layers run, all positions are kept. Raises `LensError` for oblong pictures."""
    if not isinstance(hf.image_size, int) or not isinstance(hf.patch_size, int):
        raise LensError(f"image_size {hf.image_size!r} and patch_size {hf.patch_size!r}; expected one integer each")
    return VisionConfig(
        **_shape(hf),
        n_ctx=(hf.image_size // hf.patch_size) ** 2 + 1,
        act_fn=hf.hidden_act,
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        n_layers_total=hf.num_hidden_layers,
        feature_layers=(hf.num_hidden_layers,),
        keep_class_token=True,
    )


def _shape(hf: Any) -> dict[str, Any]:
    """What both kinds of stack say in the same words."""
    return dict(
        n_layers=hf.num_hidden_layers,
        d_model=hf.hidden_size,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_attention_heads,
        d_head=hf.hidden_size // hf.num_attention_heads,
        d_mlp=hf.intermediate_size,
        eps=hf.layer_norm_eps,
        normalization_type="LN",
        attn_bias=True,
        mlp_bias=True,
    )
