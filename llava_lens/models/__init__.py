"""Models beside LLaVA-1.5, each in a file of its own that says what differs; and from a checkpoint to its class.

Unusual: a model's file is imported only when a checkpoint asks for it, so that a longer list makes no start slower.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from llava_lens.checkpoint import model_type_of
from llava_lens.errors import LensError, nearest

MODELS: dict[str, type | str] = {
    "llava": "llava_lens.model:HookedLlava",
    "llama": "llava_lens.model:HookedLlava",
    "paligemma": "llava_lens.models.paligemma:HookedPaliGemma",
    "mistral": "llava_lens.model:HookedLlava",
    "qwen2": "llava_lens.model:HookedLlava",
    "qwen2_5_vl": "llava_lens.models.qwen2_5_vl:HookedQwen",
    "llava_next": "llava_lens.models.llava_next:HookedLlavaNext",
    "llava_onevision": "llava_lens.models.llava_onevision:HookedLlavaOnevision",
    "vipllava": "llava_lens.models.vipllava:HookedVipLlava",
    "idefics3": "llava_lens.models.idefics3:HookedIdefics3",
    "smolvlm": "llava_lens.models.idefics3:HookedIdefics3",
    "internvl": "llava_lens.models.internvl:HookedInternVL",
    "blip": "llava_lens.models.blip:HookedBlip",
}
"""`model_type` of a checkpoint → where its class is. `register` adds one."""


def register(model_type: str, kind: type | str) -> None:
    """Let `HookedMLLM` find the class of a checkpoint with this `model_type`: the class, or `"module:Class"`."""
    MODELS[model_type] = kind


def class_of(model_type: str) -> Any:
    """The class that reads checkpoints of this `model_type`. Raises `LensError` with the nearest one for an unknown."""
    if model_type not in MODELS:
        raise LensError(
            f"no class for a {model_type!r} checkpoint{nearest(model_type, MODELS)}; known: {', '.join(MODELS)}"
        )
    kind = MODELS[model_type]
    if not isinstance(kind, str):
        return kind
    module, _, name = kind.partition(":")
    return getattr(import_module(module), name)


class HookedMLLM:
    """Loads any supported model: the class is picked by the checkpoint's own config."""

    @staticmethod
    def from_pretrained(id_or_dir: str | Path, **how: Any) -> Any:
        """The model of a folder or hub id; everything else as in `HookedLlava.from_pretrained`, errors too."""
        hub = {name: how[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in how}
        return class_of(model_type_of(id_or_dir, **hub)).from_pretrained(str(id_or_dir), **how)

    @staticmethod
    def from_hf(hf_model: nn.Module, processor: Any = None) -> Any:
        """Wrap a Hugging Face model that is in memory; the weights are shared, not copied."""
        config: Any = hf_model.config
        return class_of(config.model_type).from_hf(hf_model, processor)
