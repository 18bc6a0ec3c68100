"""Small random BLIPs from Hugging Face's own classes, with a tokenizer of few words, over odd configurations."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from random_models import shake
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessorPil,
    BlipProcessor,
    PreTrainedTokenizerFast,
)

WORDS = [
    "what",
    "color",
    "is",
    "the",
    "dog",
    "cat",
    "?",
    "red",
    "blue",
    "green",
    "ball",
    "on",
    "left",
    "of",
    "a",
    "small",
    "##ish",
]
MARKS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
START = 40
"""The id that answers start with; the tokenizer does not have it, as in the published checkpoints."""
TEXT: dict[str, Any] = dict(
    vocab_size=43,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=24,
    bos_token_id=START,
    sep_token_id=3,
    pad_token_id=0,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=3, image_size=24, patch_size=8
)
ODD: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer": {"text": {"num_hidden_layers": 1}, "vision": {"num_hidden_layers": 1}},
    "other_heads": {"text": {"num_attention_heads": 2}, "vision": {"num_attention_heads": 6}},
    "eps": {"text": {"layer_norm_eps": 1e-6}, "vision": {"layer_norm_eps": 1e-6}},
    "relu": {"text": {"hidden_act": "relu"}, "vision": {"hidden_act": "quick_gelu"}},
    "odd_widths": {"text": {"intermediate_size": 37}, "vision": {"patch_size": 6, "intermediate_size": 41}},
}
"""Name → what differs from `TEXT` and `VISION`."""


def hf_blip(odd: str = "plain", dtype: torch.dtype = torch.float32) -> Any:
    """A random `BlipForQuestionAnswering`, one per choice; in low precision it is created in it, as loading would."""
    return _made(odd, dtype)


def blip_config(odd: str = "plain") -> BlipConfig:
    changes = ODD[odd]
    return BlipConfig(
        text_config={**TEXT, **changes.get("text", {})}, vision_config={**VISION, **changes.get("vision", {})}
    )


@cache
def _made(odd: str, dtype: torch.dtype) -> Any:
    model = BlipForQuestionAnswering._from_config(blip_config(odd), dtype=dtype)
    shake(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                weight.add_(1.0)  # which `shake`, by its name, takes for a bias
    model.tie_weights()
    return model.eval()


def blip_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate((*MARKS, *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def blip_processor(side: int = VISION["image_size"]) -> BlipProcessor:
    return BlipProcessor(BlipImageProcessorPil(size={"height": side, "width": side}), blip_tokenizer())


def blip_example(hf: Any, padded: bool = True, answer: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    """Two random questions and pictures, the first padded on the right, with the start of an answer."""
    generator = torch.Generator().manual_seed(seed)
    config, size = hf.config, hf.config.vision_config.image_size
    tokens = torch.randint(4, 40, (2, 7), generator=generator)
    mask = torch.ones_like(tokens)
    if padded:
        tokens[0, 4:], mask[0, 4:] = 0, 0
    answers = torch.randint(4, 40, (2, answer), generator=generator)
    answers[:, 0] = config.text_config.bos_token_id
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "decoder_input_ids": answers,
    }
