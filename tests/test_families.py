"""Configs read here and by transformers: the same model, the same refusals, the same tokenizer."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoTokenizer, PreTrainedConfig

from llava_lens.config import DecoderConfig, LlavaConfig, VisionConfig
from llava_lens.families import FAMILIES, family
from llava_lens.prompt import Processor
from llava_lens.tiny import CHECKPOINT

VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "vocab_size": 32064}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
DECODERS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "grouped heads": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 96},
    "wide heads": {"num_attention_heads": 4, "hidden_size": 64, "head_dim": 32, "mlp_bias": True},
    "old linear scaling": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    "dynamic scaling": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama 3": {"rope_scaling": LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": True, "eos_token_id": [1, 2]},
    "new rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "ids": {"eos_token_id": None, "pad_token_id": 0, "attention_bias": True, "use_cache": False, "pretraining_tp": 2},
    "older dtype": {"torch_dtype": "bfloat16", "attention_dropout": 0, "_name_or_path": "somewhere"},
}
LLAVAS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "as published": {"text_config": VICUNA, "image_token_index": 32000, "torch_dtype": "float16"},
    "a tower of CLIP's defaults": {"vision_config": {}},
    "parts without a type": {"text_config": {"vocab_size": 100}, "vision_config": {"image_size": 28, "patch_size": 7}},
    "several layers": {"vision_feature_layer": [-2, 3], "vision_feature_select_strategy": "full"},
    "tied in the text": {"text_config": {"tie_word_embeddings": True}, "multimodal_projector_bias": False},
    "scaled": {"text_config": DECODERS["llama 3"], "projector_hidden_act": "relu", "tie_word_embeddings": True},
    "the newer name": {"image_token_id": 7},
}
CLIPS: dict[str, dict[str, Any]] = {
    "nothing said": {},
    "a tower": {"vision_config": {"hidden_size": 1024, "num_attention_heads": 16}, "text_config": {"hidden_size": 64}},
    "in the older form": {"vision_config_dict": {"image_size": 336}, "vision_config": {"patch_size": 14}},
}
REFUSED: dict[str, dict[str, Any]] = {
    "a width in words": {"model_type": "llama", "hidden_size": "wide"},
    "heads that do not divide": {"model_type": "llama", "hidden_size": 30, "num_attention_heads": 4},
    "a tower's width": {"model_type": "clip_vision_model", "hidden_size": 30, "num_attention_heads": 4},
    "a strategy": {"model_type": "llava", "vision_feature_select_strategy": "half"},
    "a part": {"model_type": "llava", "text_config": {"model_type": "llama", "num_hidden_layers": 2.5}},
    "an unknown part": {"model_type": "llava", "text_config": {"model_type": "no such family"}},
    "an unknown family": {"model_type": "no such family"},
    "a dtype": {"model_type": "llama", "torch_dtype": "float31"},
}


def both(facts: dict[str, Any]) -> tuple[PreTrainedConfig, PreTrainedConfig]:
    """Ours and Hugging Face's; each gets its own copy."""
    kind = facts["model_type"]
    return family(kind).from_dict(deepcopy(facts)), CONFIG_MAPPING[kind].from_dict(deepcopy(facts))


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_missing_fact_is_transformers_own_default(kind: str) -> None:
    ours, theirs = ({f.name: f.default for f in fields(cls)} for cls in (FAMILIES[kind], CONFIG_MAPPING[kind]))
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("case", DECODERS)
def test_a_decoder(case: str) -> None:
    ours, theirs = both({"model_type": "llama", **DECODERS[case]})
    assert DecoderConfig.from_hf(ours) == DecoderConfig.from_hf(theirs)
    assert ours.dtype == theirs.dtype


@pytest.mark.parametrize("case", LLAVAS)
def test_a_llava(case: str) -> None:
    ours, theirs = both({"model_type": "llava", **LLAVAS[case]})
    assert LlavaConfig.from_hf(ours) == LlavaConfig.from_hf(theirs)
    assert ours.dtype == theirs.dtype
    assert ours.get_text_config().dtype == theirs.get_text_config().dtype


@pytest.mark.parametrize("case", CLIPS)
def test_a_tower(case: str) -> None:
    ours, theirs = (config.vision_config for config in both({"model_type": "clip", **CLIPS[case]}))
    assert VisionConfig.from_hf(ours) == VisionConfig.from_hf(theirs)


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_refuses(case: str) -> None:
    facts = REFUSED[case]
    for find in (family, CONFIG_MAPPING.__getitem__):
        with pytest.raises((KeyError, TypeError, ValueError, AttributeError, StrictDataclassError)):
            find(facts["model_type"]).from_dict(deepcopy(facts))


def test_another_family_is_transformers_own() -> None:
    config = family("llava").from_dict({"text_config": {"model_type": "mistral"}})
    assert type(config.text_config) is CONFIG_MAPPING["mistral"]
    with pytest.raises(ValueError, match="a LLaVA of 'clip_vision_model' and 'mistral'"):
        LlavaConfig.from_hf(config)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Unheard", None])
@pytest.mark.parametrize("model", ["llava", "llama", "llava_llama"])
def test_the_tokenizer_is_the_one_of_auto_tokenizer(tmp_path: Path, kind: str | None, model: str) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(CHECKPOINT / name, tmp_path)
    stated = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in stated.items() if v is not None}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model}))
    cfg = LlavaConfig.from_hf(family("llama")())
    ours, theirs = Processor.from_pretrained(tmp_path, cfg).tokenizer, AutoTokenizer.from_pretrained(tmp_path)
    text = "what color is the circle ? <image> unheard"
    assert type(ours) is type(theirs)
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
