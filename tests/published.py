"""Small checkpoints in every format in which LLaVA has been published, and a model without a forward to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from llava_lens.config import LlavaConfig as OurConfig
from llava_lens.weights import load_weights, open_checkpoint

SPELLINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "transformers 5 in memory": (),
    "transformers 5 saved": (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    "transformers 4.52 in memory": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "hub 2023": (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    "original": (
        ("model.language_model.", "model."),
        ("model.vision_tower.", "model.vision_tower.vision_tower.vision_model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ),
}
"""For each release: how the keys of a transformers 5 state dict were spelt, as (prefix, its spelling)."""


def small_llava(seed: int = 0, **changes: Any) -> LlavaForConditionalGeneration:
    """A random LLaVA of odd sizes: grouped-query heads, head width apart from the stream's, tower of another width."""
    torch.manual_seed(seed)
    text = {key: changes.pop(key) for key in ("attention_bias", "mlp_bias", "tie_word_embeddings") if key in changes}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=12,
            intermediate_size=20,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=15,
            patch_size=5,
        ),
        text_config=LlamaConfig(
            hidden_size=24,
            intermediate_size=44,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=10,
            vocab_size=37,
            **text,
        ),
        image_token_index=36,
        **changes,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # also norms and biases, which start as ones and zeros
            parameter.copy_(torch.randn_like(parameter))
    return model


def spelt(tensors: Mapping[str, Tensor], spelling: str) -> dict[str, Tensor]:
    """A transformers 5 state dict under the keys of another release."""

    def respell(key: str) -> str:
        rules = [rule for rule in SPELLINGS[spelling] if key.startswith(rule[0])]
        return rules[0][1] + key.removeprefix(rules[0][0]) if rules else key

    return {respell(key): tensor for key, tensor in tensors.items()}


def old_buffers(config: Any) -> dict[str, Tensor]:
    """What files of 2023 held beside the weights, in that year's spelling."""
    layers = range(config.text_config.num_hidden_layers)
    rotary = {f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(5) for i in layers}
    return {"vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None], **rotary}


def write(
    folder: Path,
    config: Any,
    tensors: Mapping[str, Tensor],
    shards: int = 1,
    suffix: str = "safetensors",
    index: Mapping[str, str] | None = None,
) -> Path:
    """A checkpoint folder: config.json, and the tensors in one file or in `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = config if isinstance(config, dict) else config.to_dict()
    (folder / "config.json").write_text(json.dumps(facts, default=str), encoding="utf-8")
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names = [f"{stem}.{suffix}"]
    if shards > 1:
        names = [f"{stem}-{i + 1:05}-of-{shards:05}.{suffix}" for i in range(shards)]
    place = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        held = {key: tensor.detach().clone() for key, tensor in tensors.items() if place[key] == name}
        save_file(held, folder / name) if suffix == "safetensors" else torch.save(held, folder / name)
    if shards > 1:
        (folder / f"{stem}.{suffix}.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": {**place, **(index or {})}}), encoding="utf-8"
        )
    return folder


def original_config(config: Any, tower: Path | str, **changes: Any) -> dict[str, Any]:
    """config.json as the original release wrote it: a Llama's, with `mm_…` keys and the tower's place."""
    text = config.text_config
    kept = ("hidden_act", "hidden_size", "initializer_range", "intermediate_size", "max_position_embeddings")
    kept += (
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "vocab_size",
    )
    kept += ("tie_word_embeddings", "bos_token_id", "eos_token_id")
    return {
        **{key: getattr(text, key) for key in kept},
        "architectures": ["LlavaLlamaForCausalLM"],
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "max_length": 4096,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "model_type": "llava",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "use_mm_proj": True,
        **changes,
    }


def write_original(folder: Path, hf: LlavaForConditionalGeneration, tower: Path | str, **changes: Any) -> Path:
    """The original release: `.bin` shards without the tower, which lies in a folder of its own."""
    keys = spelt(hf.state_dict(), "original")
    held = {key: tensor for key, tensor in keys.items() if ".vision_tower." not in key}
    return write(folder, original_config(hf.config, tower, **changes), held, shards=2, suffix="bin")


def write_tower(folder: Path, hf: LlavaForConditionalGeneration, whole: bool = True, **layout: Any) -> Path:
    """The tower on its own: a whole CLIP with its text half, or a bare vision model as transformers 5 saves it."""
    vision: Any = hf.config.vision_config
    prefix = "model.vision_tower."
    held = {key.removeprefix(prefix): t for key, t in hf.state_dict().items() if key.startswith(prefix)}
    if not whole:
        return write(folder, vision, held, **layout)
    facts = {"model_type": "clip", "vision_config": vision.to_dict(), "text_config": {}, "torch_dtype": "float32"}
    extra = {"logit_scale": torch.ones(()), "visual_projection.weight": torch.ones(4, 12)}
    extra |= {"text_model.embeddings.position_ids": torch.arange(3), "text_projection.weight": torch.ones(4, 4)}
    extra |= {"vision_model.embeddings.position_ids": torch.arange(10)}
    return write(folder, facts, {**{f"vision_model.{key}": t for key, t in held.items()}, **extra}, **layout)


def ours(hf: Any, n_vision: int) -> dict[str, Tensor]:
    """What each of our names must hold, read off the Hugging Face model by attribute, not by key."""
    found: dict[str, Tensor] = {}

    def take(name: str, module: nn.Module) -> None:
        found.update({f"{name}.{leaf}": parameter.detach() for leaf, parameter in module.named_parameters()})

    decoder = getattr(hf.model, "language_model", hf.model)
    take("embed", decoder.embed_tokens)
    take("ln_final", decoder.norm)
    take("unembed", hf.lm_head)
    for i, block in enumerate(decoder.layers):
        take(f"blocks.{i}.ln1", block.input_layernorm)
        take(f"blocks.{i}.ln2", block.post_attention_layernorm)
        for ours, theirs in {"gate_proj": "gate_proj", "in_proj": "up_proj", "out_proj": "down_proj"}.items():
            take(f"blocks.{i}.mlp.{ours}", getattr(block.mlp, theirs))
        for letter in "qkvo":
            take(f"blocks.{i}.attn.{letter}_proj", getattr(block.self_attn, f"{letter}_proj"))
    if not hasattr(hf.model, "vision_tower"):
        return found
    tower = hf.model.vision_tower
    found["vision.class_embed"] = tower.embeddings.class_embedding.detach()
    take("vision.patch_embed", tower.embeddings.patch_embedding)
    take("vision.pos_embed", tower.embeddings.position_embedding)
    take("vision.ln_pre", tower.pre_layrnorm)
    for i, block in enumerate(tower.encoder.layers[:n_vision]):
        take(f"vision.blocks.{i}.ln1", block.layer_norm1)
        take(f"vision.blocks.{i}.ln2", block.layer_norm2)
        take(f"vision.blocks.{i}.mlp.in_proj", block.mlp.fc1)
        take(f"vision.blocks.{i}.mlp.out_proj", block.mlp.fc2)
        for ours, theirs in {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}.items():
            take(f"vision.blocks.{i}.attn.{ours}_proj", getattr(block.self_attn, theirs))
    take("projector.linear_1", hf.model.multi_modal_projector.linear_1)
    take("projector.linear_2", hf.model.multi_modal_projector.linear_2)
    return found


class Branch(nn.Module):
    """Weights and nothing else, under the names of the real model."""

    def __init__(self, cfg: Any = None, **parts: Any):
        super().__init__()
        if cfg is not None:
            self.cfg = cfg
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, torch.Tensor) else part)


def block(cfg: Any, norm: Any) -> Branch:
    wide, narrow = cfg.n_heads * cfg.d_head, cfg.n_key_value_heads * cfg.d_head
    attn = Branch(
        q_proj=nn.Linear(cfg.d_model, wide, cfg.attn_bias),
        k_proj=nn.Linear(cfg.d_model, narrow, cfg.attn_bias),
        v_proj=nn.Linear(cfg.d_model, narrow, cfg.attn_bias),
        o_proj=nn.Linear(wide, cfg.d_model, cfg.attn_bias),
    )
    names = ("gate_proj", "in_proj") if cfg.gated_mlp else ("in_proj",)
    mlp = Branch(
        **{name: nn.Linear(cfg.d_model, cfg.d_mlp, cfg.mlp_bias) for name in names},
        out_proj=nn.Linear(cfg.d_mlp, cfg.d_model, cfg.mlp_bias),
    )
    return Branch(ln1=norm(cfg.d_model), attn=attn, ln2=norm(cfg.d_model), mlp=mlp)


def stand_in(cfg: OurConfig) -> Any:
    """A model on "meta" with the weights that `cfg` describes."""
    with torch.device("meta"):
        parts: dict[str, Any] = dict(
            embed=nn.Embedding(cfg.d_vocab, cfg.d_model),
            blocks=nn.ModuleList(block(cfg, lambda d: Branch(weight=torch.empty(d))) for _ in range(cfg.n_layers)),
            ln_final=Branch(weight=torch.empty(cfg.d_model)),
            unembed=nn.Linear(cfg.d_model, cfg.d_vocab, bias=False),
        )
        if vision := cfg.vision:
            d, p = vision.d_model, vision.patch_size
            parts["vision"] = Branch(
                class_embed=torch.empty(d),
                patch_embed=nn.Conv2d(3, d, p, p, bias=False),
                pos_embed=nn.Embedding(vision.n_ctx, d),
                ln_pre=nn.LayerNorm(d),
                blocks=nn.ModuleList(block(vision, nn.LayerNorm) for _ in range(vision.n_layers)),
            )
            parts["projector"] = Branch(
                linear_1=nn.Linear(d * len(vision.feature_layers), cfg.d_model, cfg.projector_bias),
                linear_2=nn.Linear(cfg.d_model, cfg.d_model, cfg.projector_bias),
            )
        model: Any = Branch(cfg, **parts)
        if cfg.tie_word_embeddings:
            model.unembed.weight = model.embed.weight
    return model


def load(folder: Path | str, dtype: torch.dtype | None = None, **where: Any) -> Any:
    checkpoint = open_checkpoint(folder, **where)
    model = stand_in(OurConfig.from_hf(checkpoint.config))
    load_weights(model, checkpoint, dtype=dtype)
    return model


def assert_same(model: Any, hf: Any, dtype: torch.dtype | None = None) -> None:
    """Bit for bit, every weight of either side; `dtype` casts the reference first."""
    vision = model.cfg.vision
    expected = ours(hf, vision.n_layers if vision else 0)
    found = model.state_dict()
    if model.cfg.tie_word_embeddings:
        assert model.unembed.weight is model.embed.weight
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == (dtype or tensor.dtype), name
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name
    assert not [name for name, tensor in model.named_parameters() if tensor.is_meta or not tensor.requires_grad]
