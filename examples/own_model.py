"""Another multimodal model from outside the package: DeepSeek-VL (SigLIP, two linear layers, Llama) names what differs.

    python examples/own_model.py [FOLDER]

Without a checkpoint's folder a small random model stands in. `docs/extending.md` builds this file step by step.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration, LlamaConfig, SiglipVisionConfig

from llava_lens import HookedLlava, HookedMLLM, Inputs, LlavaConfig, check_parity
from llava_lens.models import register
from llava_lens.norms import LayerNorm
from llava_lens.rename import LLAVA_TABLE, Fold, Row
from llava_lens.vision import SiglipVision


@dataclass(frozen=True, kw_only=True)
class DeepseekConfig(LlavaConfig):
    families = ("deepseek_vl",)
    architecture = "DeepseekVLForConditionalGeneration"


class DeepseekTower(SiglipVision):
    """SigLIP with a norm behind its last block."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.ln_post = LayerNorm(cfg)

    def select(self, streams):
        return self.ln_post(streams[-1])


class HookedDeepseek(HookedLlava):
    Config = DeepseekConfig
    Vision = DeepseekTower
    weight_table = (
        Fold("model.vision_model.", "tower:"),
        Fold("model.aligner.linear1.", "projector:linear_1."),
        Fold("model.aligner.linear2.", "projector:linear_2."),
        Row("tower:post_layernorm.{p}", "vision.ln_post.{p}"),
        *LLAVA_TABLE,
    )


register("deepseek_vl", HookedDeepseek)


def stand_in() -> DeepseekVLForConditionalGeneration:
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    text, vision = LlamaConfig(vocab_size=60, **sizes), SiglipVisionConfig(image_size=32, patch_size=8, **sizes)
    config = DeepseekVLConfig(text_config=text, vision_config=vision, image_token_id=59)
    return DeepseekVLForConditionalGeneration(config).eval()


def main(folder: str | None = None) -> None:
    hf = stand_in() if folder is None else DeepseekVLForConditionalGeneration.from_pretrained(folder).eval()
    model = HookedMLLM.from_hf(hf)
    image, side = [model.cfg.image_token_id] * model.cfg.tokens_per_image, model.cfg.vision.image_size
    inputs = Inputs.from_tokens(torch.tensor([[1, *image, 7, 8, 9]]), model.cfg, torch.rand(1, 3, side, side))
    print(check_parity(model, hf, inputs))


if __name__ == "__main__":
    main(*sys.argv[1:2])
