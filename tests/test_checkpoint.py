"""Every layout of a release opens; files and folders that are not what they should be raise and say why."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from published import (
    assert_same,
    load,
    original_config,
    small_llava,
    spelt,
    write,
    write_original,
    write_tower,
)
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from llava_lens.config import LlavaConfig
from llava_lens.weights import (
    CheckpointError,
    CorruptFile,
    NotLlava,
    UnsafeFile,
    open_checkpoint,
)


@pytest.fixture(scope="module")
def hf() -> Any:
    return small_llava()


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
    unread = ["consolidated.safetensors", "original/params.json", "training_args.bin", "tf_model.h5"]
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
