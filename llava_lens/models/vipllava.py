"""ViP-LLaVA: LLaVA that reads several layers of its tower and norms them, side by side, before its projector.

Unusual: the tower's class token is always cut off, and without a chat template its own prompt is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llava_lens.config import LlavaConfig, VisionConfig
from llava_lens.model import HookedLlava
from llava_lens.projector import FeatureNorm, Projector
from llava_lens.prompt import Processor
from llava_lens.rename import LLAVA_TABLE, Row

TEMPLATE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
    "{% for message in messages %}###{{ 'Human' if message['role'] == 'user' else 'Assistant' }}: "
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}###Assistant:{% endif %}"
)
"""The prompt that the model was trained with."""


@dataclass(frozen=True, kw_only=True)
class VipLlavaConfig(LlavaConfig):
    """ViP-LLaVA's facts; `projector_eps` is of the norm in front of the projector."""

    families = ("vipllava",)
    architecture = "VipLlavaForConditionalGeneration"

    projector_eps: float = 1e-5

    @classmethod
    def facts_of(cls, hf: Any) -> dict[str, Any]:
        """Raises `ValueError` as the tower's config does, and for a tower without a class token."""
        vision = VisionConfig.from_hf(hf.vision_config, hf.vision_feature_layer, "default")
        own = {"projector_eps": hf.projector_layernorm_eps, "tie_word_embeddings": hf.tie_word_embeddings}
        return super().facts_of(hf) | {"vision": vision, "projector_bias": True} | own


class VipLlavaProjector(Projector):
    """A norm and LLaVA's two layers."""

    def make_norm(self, cfg: LlavaConfig, width: int) -> FeatureNorm:
        assert isinstance(cfg, VipLlavaConfig) and cfg.vision is not None
        return FeatureNorm(cfg.vision, width, cfg.projector_eps)


class VipLlavaProcessor(Processor):
    """LLaVA's processor with ViP-LLaVA's prompt where the checkpoint brings none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template is None:
            object.__setattr__(self, "chat_template", TEMPLATE)


class HookedVipLlava(HookedLlava):
    """ViP-LLaVA; logits are bit-equal to Hugging Face's."""

    Config = VipLlavaConfig
    Processor = VipLlavaProcessor
    Projector = VipLlavaProjector
    weight_table = (*LLAVA_TABLE, Row("projector:projector_layernorm.{p}", "projector.norm.{p}"))
