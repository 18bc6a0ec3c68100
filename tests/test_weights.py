"""Every published spelling and layout loads exactly; everything else raises and says what was wrong."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from published import (
    SPELLINGS,
    old_buffers,
    original_config,
    ours,
    small_llava,
    spelt,
    write,
    write_original,
    write_tower,
)
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from llava_lens.config import LlavaConfig
from llava_lens.rename import published
from llava_lens.weights import (
    LLAVA_TABLE,
    CheckpointError,
    CorruptFile,
    Fold,
    MissingWeights,
    NotLlava,
    Row,
    UnknownWeights,
    UnsafeFile,
    WrongWeights,
    assign_state_dict,
    load_weights,
    open_checkpoint,
    rename,
)


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


def stand_in(cfg: LlavaConfig) -> Any:
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
    model = stand_in(LlavaConfig.from_hf(checkpoint.config))
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


# Spellings and layouts


@pytest.fixture(scope="module")
def hf() -> Any:
    return small_llava()


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("shards", "suffix"), [(1, "safetensors"), (3, "safetensors"), (1, "bin"), (2, "bin")])
def test_every_spelling(tmp_path: Path, hf: Any, spelling: str, shards: int, suffix: str) -> None:
    write(tmp_path, hf.config, spelt(hf.state_dict(), spelling), shards, suffix)
    assert_same(load(tmp_path), hf)


def test_what_transformers_saves_now(tmp_path: Path, hf: Any) -> None:
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same(load(tmp_path), hf)
    assert_same(load(str(tmp_path)), hf)


def test_a_bare_llava_model(tmp_path: Path) -> None:
    hf = small_llava(tie_word_embeddings=True)
    hf.model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), hf)


def test_buffers_of_2023_are_left_out(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, {**spelt(hf.state_dict(), "hub 2023"), **old_buffers(hf.config)})
    assert_same(load(tmp_path), hf)


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases(tmp_path: Path, bias: str) -> None:
    hf = small_llava(**{bias: True})
    write(tmp_path, hf.config, spelt(hf.state_dict(), "hub 2023"))
    assert_same(load(tmp_path), hf)


@pytest.mark.parametrize("layer", [-1, -3, [-2, 1], 4])
def test_feature_layers_decide_what_is_built(tmp_path: Path, layer: Any) -> None:
    hf = small_llava(vision_feature_layer=layer, multimodal_projector_bias=False)
    hf.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert len(model.vision.blocks) == {-1: 4, -3: 2, 4: 4}.get(layer if isinstance(layer, int) else 0, 3)
    assert_same(model, hf)


@pytest.mark.parametrize("held", ["both", "embed", "head"])
def test_tied(tmp_path: Path, held: str) -> None:
    hf = small_llava(tie_word_embeddings=True)
    left_out = {"both": (), "embed": ("lm_head.weight",), "head": ("model.language_model.embed_tokens.weight",)}[held]
    write(tmp_path, hf.config, {key: t for key, t in hf.state_dict().items() if key not in left_out})
    assert_same(load(tmp_path), hf)


def test_tied_weights_must_agree(tmp_path: Path) -> None:
    hf = small_llava(tie_word_embeddings=True)
    write(tmp_path, hf.config, {**hf.state_dict(), "lm_head.weight": torch.zeros(37, 24)})
    with pytest.raises(WrongWeights, match=r"embed\.weight and unembed\.weight differ"):
        load(tmp_path)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, stored: torch.dtype, asked: torch.dtype | None) -> None:
    hf: Any = small_llava()
    hf.to(stored)
    hf.save_pretrained(tmp_path)
    assert_same(load(tmp_path, asked), hf, asked or stored)


def test_the_config_names_the_dtype_else_most_tensors_do(tmp_path: Path, hf: Any) -> None:
    facts = {**hf.config.to_dict(), "dtype": None, "torch_dtype": "bfloat16"}
    write(tmp_path / "named", facts, hf.state_dict())
    assert_same(load(tmp_path / "named"), hf, torch.bfloat16)
    halves = {key: t if "vision" in key else t.half() for key, t in hf.state_dict().items()}
    write(tmp_path / "unnamed", {**facts, "torch_dtype": None}, halves)
    assert open_checkpoint(tmp_path / "unnamed").dtype == torch.float16


def test_plain_llama(tmp_path: Path) -> None:
    text = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=19)
    hf = LlamaForCausalLM(text)
    hf.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.cfg.vision is None
    assert_same(model, hf)


def test_a_state_dict_is_shared_not_copied(hf: Any) -> None:
    model = stand_in(LlavaConfig.from_hf(hf.config))
    assign_state_dict(model, hf.state_dict())
    assert_same(model, hf)
    assert model.embed.weight.data_ptr() == hf.model.language_model.embed_tokens.weight.data_ptr()


def test_editing_a_loaded_weight_leaves_the_file_alone(tmp_path: Path, hf: Any) -> None:
    hf.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    model = load(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert_same(load(tmp_path), hf)


def test_safetensors_are_preferred(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, hf.state_dict())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(load(tmp_path), hf)


def test_bin_older_than_torch_1_6(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, {}, suffix="bin")
    torch.save(dict(hf.state_dict()), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), hf)


# The original release


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_original_release(tmp_path: Path, hf: Any, whole: bool, suffix: str) -> None:
    tower = write_tower(tmp_path / "clip", hf, whole, suffix=suffix)
    write_original(tmp_path / "llava", hf, tower)
    model = load(tmp_path / "llava")
    assert_same(model, hf)
    assert model.cfg.image_token_id == hf.config.text_config.vocab_size
    expected = LlavaConfig.from_hf(hf.config, image_token_id=37)
    assert model.cfg.fingerprint == expected.fingerprint


def test_original_release_with_another_tower(tmp_path: Path, hf: Any) -> None:
    write_original(tmp_path / "llava", hf, "nowhere/to-be-found")
    tower = write_tower(tmp_path / "clip", hf)
    assert_same(load(tmp_path / "llava", vision_tower=tower), hf)


def test_original_release_with_a_tuned_tower(tmp_path: Path, hf: Any) -> None:
    tower = write_tower(tmp_path / "clip", small_llava(seed=1))
    write(tmp_path / "llava", original_config(hf.config, tower), spelt(hf.state_dict(), "original"))
    assert_same(load(tmp_path / "llava"), hf)


def test_a_tower_saved_by_clip_model(tmp_path: Path, hf: Any) -> None:
    vision = hf.config.vision_config.to_dict()
    text = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    text |= dict(bos_token_id=1, eos_token_id=2)
    clip: Any = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=8))
    clip.vision_model.load_state_dict(hf.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    write_original(tmp_path / "llava", hf, tmp_path / "clip")
    assert_same(load(tmp_path / "llava"), hf)


def test_original_class_token_and_layer(tmp_path: Path, hf: Any) -> None:
    tower = write_tower(tmp_path / "clip", hf)
    write_original(tmp_path / "a", hf, tower, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-3)
    cfg = load(tmp_path / "a").cfg
    assert (cfg.vision.keep_class_token, cfg.vision.n_layers, cfg.tokens_per_image) == (True, 2, 10)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("mm_projector_type", "linear", "mm_projector_type 'linear'; expected 'mlp2x_gelu'"),
        ("mm_use_im_start_end", True, "mm_use_im_start_end True; expected False"),
        ("mm_vision_select_feature", "cls", "mm_vision_select_feature 'cls'; expected 'patch' or 'cls_patch'"),
        ("image_aspect_ratio", "anyres", "'anyres'; expected 'pad' or 'square'.*LLaVA-NeXT"),
        ("mm_patch_merge_type", "spatial_unpad", "'spatial_unpad'; expected 'flat'"),
        ("mm_resampler_type", "spatial_pool", "mm_resampler_type 'spatial_pool'; expected none"),
        ("mm_hidden_size", 13, "width 12; expected 13"),
        ("mm_vision_tower", "/no/such/tower", "vision tower of .*/no/such/tower.*vision_tower= names another"),
        ("mm_vision_tower", None, "vision tower of .*: no checkpoint is named.*vision_tower= names another"),
        ("model_type", "llava_mistral", "'llava_mistral' checkpoint; expected 'llava' or 'llama'"),
    ],
)
def test_original_variants_that_are_refused(tmp_path: Path, hf: Any, key: str, value: Any, message: str) -> None:
    tower = write_tower(tmp_path / "clip", hf)
    write_original(tmp_path / "llava", hf, tower, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "llava")


def test_a_tower_that_is_no_clip(tmp_path: Path, hf: Any) -> None:
    write(tmp_path / "siglip", {"model_type": "siglip"}, {})
    write_original(tmp_path / "llava", hf, tmp_path / "siglip")
    with pytest.raises(NotLlava, match=r"the vision tower of .*'siglip' checkpoint; expected 'clip'"):
        open_checkpoint(tmp_path / "llava")


# Weights that do not fit


def changed(folder: Path, hf: Any, **edits: Any) -> Path:
    """A 2023 checkpoint with some tensors replaced, added or (None) taken away; `__` stands for a dot."""
    tensors = spelt(hf.state_dict(), "hub 2023")
    tensors |= {key.replace("__", "."): value for key, value in edits.items()}
    return write(folder, hf.config, {key: t for key, t in tensors.items() if t is not None})


def test_a_missing_weight_names_itself_twice(tmp_path: Path, hf: Any) -> None:
    changed(tmp_path, hf, language_model__model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(MissingWeights) as error:
        load(tmp_path)
    assert "blocks.1.mlp.in_proj.weight" in str(error.value)
    assert "language_model.model.layers.1.mlp.up_proj.weight" in str(error.value)


@pytest.mark.parametrize("key", ["lm_head.weight", "model.mm_projector.2.bias", "model.layers.0.mlp.up_proj.weight"])
def test_a_missing_weight_in_the_original_spelling(tmp_path: Path, hf: Any, key: str) -> None:
    tensors = spelt(hf.state_dict(), "original")
    del tensors[key]
    tower = write_tower(tmp_path / "clip", hf)
    write(tmp_path / "llava", original_config(hf.config, tower), tensors)
    with pytest.raises(MissingWeights, match=rf"published as {key}\)"):
        load(tmp_path / "llava")


def test_many_missing_weights_are_counted(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, {})
    with pytest.raises(MissingWeights, match=r"^\d\d weights are missing: .*and \d\d more$"):
        load(tmp_path)


def test_an_unknown_weight_names_itself_and_the_nearest(tmp_path: Path, hf: Any) -> None:
    changed(tmp_path, hf, language_model__model__layers__1__mlp__upp_proj__weight=torch.ones(2))
    with pytest.raises(UnknownWeights) as error:
        load(tmp_path)
    assert "'language_model.model.layers.1.mlp.upp_proj.weight'" in str(error.value)
    assert "nearest: 'language_model.model.layers.1.mlp.up_proj.weight'" in str(error.value)


@pytest.mark.parametrize(
    "key",
    [
        "language_model.model.layers.2.mlp.up_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "vision_tower.vision_model.encoder.layers.4.mlp.fc1.bias",
        "model.image_newline",
    ],
)
def test_a_weight_without_a_place_raises(tmp_path: Path, hf: Any, key: str) -> None:
    changed(tmp_path, hf, **{key: torch.ones(2)})
    with pytest.raises(UnknownWeights, match=f"'{key}'"):
        load(tmp_path)


def test_a_wrong_shape_names_both(tmp_path: Path, hf: Any) -> None:
    changed(tmp_path, hf, multi_modal_projector__linear_1__weight=torch.ones(12, 24))
    expected = (
        r"'multi_modal_projector.linear_1.weight' has shape \(12, 24\); expected \(24, 12\) for projector.linear_1"
    )
    with pytest.raises(WrongWeights, match=expected):
        load(tmp_path)


def test_a_weight_in_two_spellings_raises(tmp_path: Path, hf: Any) -> None:
    changed(tmp_path, hf, **{"lm_head.weight": torch.ones(37, 24)})
    with pytest.raises(WrongWeights, match=r"'language_model.lm_head.weight' .* both unembed.weight"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_weights_that_are_not_plain_floats_raise(tmp_path: Path, hf: Any, dtype: torch.dtype) -> None:
    changed(tmp_path, hf, language_model__model__norm__weight=torch.ones(24).to(dtype))
    with pytest.raises(WrongWeights, match=rf"norm.weight' is stored as {dtype}; expected"):
        load(tmp_path)


def test_a_failed_load_leaves_the_model_untouched(tmp_path: Path, hf: Any) -> None:
    checkpoint = open_checkpoint(changed(tmp_path, hf))
    model = stand_in(LlavaConfig.from_hf(checkpoint.config))
    size = (tmp_path / "model.safetensors").stat().st_size
    os.truncate(tmp_path / "model.safetensors", size // 2)
    with pytest.raises(CorruptFile):
        load_weights(model, checkpoint)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_buffer_that_no_checkpoint_holds_raises(hf: Any) -> None:
    model = stand_in(LlavaConfig.from_hf(hf.config))
    model.register_buffer("inv_freq", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(MissingWeights, match="inv_freq"):
        assign_state_dict(model, hf.state_dict())


# Files that are not what they should be


def test_a_truncated_safetensors_file(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, hf.state_dict(), shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    for size in (shard.stat().st_size - 1, 100, 4, 0):
        os.truncate(shard, size)
        with pytest.raises(CorruptFile, match=r"model-00002-of-00002.safetensors: expected a whole safetensors file"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"[]", b"version https://git-lfs"])
def test_a_corrupt_safetensors_header(tmp_path: Path, hf: Any, content: bytes) -> None:
    write(tmp_path, hf.config, {})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=r"model.safetensors: expected a whole safetensors file"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_names_itself(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, hf.state_dict(), shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CorruptFile, match=r"names 'model-00002-of-00003.safetensors' \(\d+ tensors\), which is not"):
        open_checkpoint(tmp_path)


def test_an_index_that_promises_too_much(tmp_path: Path, hf: Any) -> None:
    extra = {"language_model.model.norm.bias": "model-00001-of-00002.safetensors"}
    write(tmp_path, hf.config, hf.state_dict(), shards=2, index=extra)
    with pytest.raises(CorruptFile, match=r"puts 'language_model.model.norm.bias' in .*does not hold it"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/../../b", "..\\b", "C:\\b", ""])
def test_an_index_that_leads_outside(tmp_path: Path, hf: Any, name: str) -> None:
    save_file({"lm_head.weight": torch.ones(37, 24)}, tmp_path / "secret.safetensors")
    write(tmp_path / "llava", hf.config, hf.state_dict(), shards=2, index={"lm_head.weight": name})
    with pytest.raises(UnsafeFile, match=r"puts 'lm_head.weight' in .*expected a file inside"):
        open_checkpoint(tmp_path / "llava")


@pytest.mark.parametrize("content", ["[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path: Path, hf: Any, content: str) -> None:
    write(tmp_path, hf.config, hf.state_dict(), shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"model.safetensors.index.json: expected a"):
        open_checkpoint(tmp_path)


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("how", ["plain", "zip", "legacy"])
def test_a_pickle_never_runs(tmp_path: Path, hf: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, hf.config, {}, suffix="bin") / "pytorch_model.bin"
    if how == "plain":
        file.write_bytes(pickle.dumps({"lm_head.weight": Payload()}))
    else:
        torch.save({"lm_head.weight": Payload()}, file, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(UnsafeFile, match=r"pytorch_model.bin: expected a pickle of plain tensors"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, {3: torch.ones(2)}])
def test_a_bin_that_holds_something_else(tmp_path: Path, hf: Any, content: Any) -> None:
    torch.save(content, write(tmp_path, hf.config, {}, suffix="bin") / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match=r"pytorch_model.bin: expected a dictionary of tensors, found"):
        open_checkpoint(tmp_path)


def test_a_truncated_bin(tmp_path: Path, hf: Any) -> None:
    file = write(tmp_path, hf.config, hf.state_dict(), suffix="bin") / "pytorch_model.bin"
    for size in (file.stat().st_size // 2, 10, 0):
        os.truncate(file, size)
        with pytest.raises(CheckpointError, match=r"pytorch_model.bin: expected a"):
            open_checkpoint(tmp_path)


# Folders that are not what they should be


def test_what_is_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint: expected config.json; found notes.txt"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"notes.txt is a file; expected its folder"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"'.*/missing' is neither a folder nor"):
        open_checkpoint(tmp_path / "missing")


def test_a_config_without_weights(tmp_path: Path, hf: Any) -> None:
    hf.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no weights: expected one of .*; found config.json"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"model_type": "bert"}, "is a 'bert' checkpoint; expected 'llava' or 'llama'"),
        ({"model_type": "llava_next"}, "'llava_next' checkpoint; expected 'llava' or 'llama'; nearest: 'llava'"),
        ({"architectures": []}, "config.json names no model_type; expected 'llava' or 'llama'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "config.json describes no 'llama'"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, r"quantised weights \(fp8\)"),
        ({"model_type": "llava", "text_config": {"quantization_config": {"bits": 4}}}, "quantised weights"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, facts: dict[str, Any], message: str) -> None:
    write(tmp_path, facts, {})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_a_config_that_is_not_json(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, {})
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(CorruptFile, match=r"config.json: expected a JSON object"):
        open_checkpoint(tmp_path)


# Tables


def test_a_subclass_adds_rows() -> None:
    table = (*LLAVA_TABLE, Fold("model.image_newline", "image_newline"), Row("image_newline", "newline"))
    assert rename("model.image_newline", table) == rename("image_newline", table) == "newline"
    assert rename("language_model.lm_head.weight", table) == "unembed.weight"


def test_rename_raises_with_the_nearest_key() -> None:
    with pytest.raises(UnknownWeights, match=r"nearest: 'vision_tower.vision_model.pre_layrnorm.weight'"):
        rename("vision_tower.vision_model.pre_layernorm.weight")
    assert rename("vision_tower.vision_model.post_layernorm.weight") is None


# The hub


class Hub:
    """Stands in for `snapshot_download`: repositories are folders, and what is fetched is copied and noted."""

    def __init__(self, root: Path, **repos: Path):
        self.root, self.repos, self.fetched = root, repos, []

    def __call__(
        self, repo: str, *, allow_patterns: Any, ignore_patterns: Any, revision: Any = None, **rest: Any
    ) -> str:
        assert rest == {"token": None, "cache_dir": None, "local_files_only": False}
        source = self.repos[repo.partition("/")[2]]
        snapshot = self.root / "snapshots" / source.name / "c0ffee"
        assert revision in (None, "main", "c0ffee")
        for path in filter_repo_objects(
            [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
        ):
            self.fetched.append(path)
            (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / path, snapshot / path)
        return str(snapshot)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_hub_sends_no_more_than_is_read(
    tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch, shards: int, suffix: str
) -> None:
    folder = write(tmp_path / "llava", hf.config, hf.state_dict(), shards, suffix)
    weights = {path.name for path in folder.glob(f"*.{suffix}")}
    (folder / "original").mkdir()
    unread = ["consolidated.safetensors", "original/model.safetensors", "training_args.bin", "tf_model.h5"]
    unread += ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"] if suffix == "safetensors" else []
    for name in unread:
        (folder / name).write_bytes(b"not read")
    (folder / "tokenizer.json").write_text("{}")
    hub = Hub(tmp_path, llava=folder)
    monkeypatch.setattr("llava_lens.checkpoint.snapshot_download", hub)
    assert_same(load("someone/llava", revision="main"), hf)
    assert weights | {"config.json", "tokenizer.json"} <= set(hub.fetched)
    assert not set(hub.fetched) & set(unread)


def test_the_hub_sends_the_tower_too(tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = write_tower(tmp_path / "clip", hf, suffix="bin")
    folder = write_original(tmp_path / "llava", hf, "openai/clip")
    monkeypatch.setattr("llava_lens.checkpoint.snapshot_download", Hub(tmp_path, llava=folder, clip=tower))
    assert_same(load("someone/llava"), hf)


def test_a_tuned_tower_needs_only_the_tower_s_config(tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = write_tower(tmp_path / "clip", small_llava(seed=1))
    hub = Hub(tmp_path, clip=tower)
    monkeypatch.setattr("llava_lens.checkpoint.snapshot_download", hub)
    write(tmp_path / "llava", original_config(hf.config, "openai/clip"), spelt(hf.state_dict(), "original"))
    assert_same(load(tmp_path / "llava"), hf)
    assert hub.fetched == ["config.json"]


# Memory


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads resident memory from /proc")
@pytest.mark.parametrize(
    ("stored", "suffix"), [("float16", "safetensors"), ("float32", "safetensors"), ("float16", "bin")]
)
def test_peak_memory(tmp_path: Path, stored: str, suffix: str) -> None:
    """At most 1.1 times the weights in fp32, all of them touched, cast or not, in one file of 150 to 300 MB."""
    hf: Any = small_llava().config
    hf.text_config.update(dict(hidden_size=512, intermediate_size=1376, num_hidden_layers=32, vocab_size=4000))
    shapes = stand_in(LlavaConfig.from_hf(hf)).state_dict()
    tensors = {
        key: torch.ones(t.shape, dtype=getattr(torch, stored)) for name, t in shapes.items() if (key := name_of(name))
    }
    write(tmp_path, hf, tensors, suffix=suffix)
    script = f"""
        import re, sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch
        from test_weights import load

        def kilobytes(field):  # of this process alone; getrusage's peak starts at the parent's
            return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

        before = kilobytes("VmRSS")
        model = load({str(tmp_path)!r}, torch.float32)
        assert all(parameter.detach().mean() == 1 for parameter in model.parameters())
        total = sum(parameter.nbytes for parameter in model.parameters())
        print((kilobytes("VmHWM") - before) * 1024 / total, total)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    ratio, total = map(float, done.stdout.split())
    assert total > 280e6
    print(f"peak / weights = {ratio:.3f}")
    assert 0.9 < ratio <= 1.1


def name_of(name: str) -> str:
    """Our name in the spelling of 2023."""
    return (
        published(name, ["language_model.model.", "vision_tower.vision_model.", "multi_modal_projector."], LLAVA_TABLE)
        or ""
    )
