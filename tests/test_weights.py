"""Every published spelling loads exactly; weights that do not fit raise and name themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from published import (
    SPELLINGS,
    assert_same,
    load,
    old_buffers,
    original_config,
    small_llava,
    spelt,
    stand_in,
    write,
    write_tower,
)
from transformers import LlamaConfig, LlamaForCausalLM

from llava_lens.config import LlavaConfig
from llava_lens.model import HookedLlava
from llava_lens.rename import published
from llava_lens.weights import (
    LLAVA_TABLE,
    CorruptFile,
    Fold,
    MissingWeights,
    Row,
    UnknownWeights,
    WrongWeights,
    assign_state_dict,
    load_weights,
    open_checkpoint,
    rename,
)

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


def test_the_real_model(tmp_path: Path, hf: Any) -> None:
    checkpoint = open_checkpoint(write(tmp_path, hf.config, spelt(hf.state_dict(), "hub 2023")))
    with torch.device("meta"):
        model = HookedLlava(LlavaConfig.from_hf(checkpoint.config))
    load_weights(model, checkpoint, HookedLlava.weight_table)
    assert_same(model, hf)


def test_safetensors_are_preferred(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, hf.state_dict())
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert_same(load(tmp_path), hf)


def test_bin_older_than_torch_1_6(tmp_path: Path, hf: Any) -> None:
    write(tmp_path, hf.config, {}, suffix="bin")
    torch.save(dict(hf.state_dict()), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), hf)


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


# Tables


def test_a_subclass_adds_rows() -> None:
    table = (*LLAVA_TABLE, Fold("model.image_newline", "image_newline"), Row("image_newline", "newline"))
    assert rename("model.image_newline", table) == rename("image_newline", table) == "newline"
    assert rename("language_model.lm_head.weight", table) == "unembed.weight"


def test_rename_raises_with_the_nearest_key() -> None:
    with pytest.raises(UnknownWeights, match=r"nearest: 'vision_tower.vision_model.pre_layrnorm.weight'"):
        rename("vision_tower.vision_model.pre_layernorm.weight")
    assert rename("vision_tower.vision_model.post_layernorm.weight") is None


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
        from published import load

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


@pytest.mark.parametrize("key", ["text_model.encoder.layers.0.mlp.fc1.weight", "logit_scale"])
def test_clips_text_half_has_no_place_in_a_llava(key: str) -> None:
    """Only a separate tower's checkpoint may hold it."""
    with pytest.raises(UnknownWeights, match=re.escape(key)):
        rename(key)
