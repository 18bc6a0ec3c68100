"""A random LLaVA on disk with the embedded model's words, processor and layout, for what needs a whole checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from random_models import shake
from transformers import LlavaForConditionalGeneration

from llava_lens.tiny import layout as tiny


def write_checkpoint(folder: Path, **text: Any) -> Path:
    """Two layers of random weights in `folder`; `text` changes the decoder's configuration."""
    decoder = tiny.text_config(n_layers=2, width=64)
    for name, value in text.items():
        setattr(decoder, name, value)
    config = tiny.llava_config(decoder, tiny.vision_config(n_layers=2, width=32))
    model = LlavaForConditionalGeneration._from_config(config, dtype=torch.float32)
    shake(model)
    model.generation_config = tiny.generation_config()
    model.save_pretrained(folder)
    tiny.build_processor().save_pretrained(folder)
    return folder
