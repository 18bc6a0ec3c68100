"""A saved cache comes back whole, for its own model only, and a write that is cut off leaves the old file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import example, hf_llava
from safetensors import safe_open
from safetensors.torch import save_file

from llava_lens import HookedLlava, LlavaCache
from llava_lens.cache_file import MANIFEST, weights_digest, write_whole
from llava_lens.errors import LensError, UnknownHook
from llava_lens.inputs import Inputs


def run(odd: str = "plain", images: tuple[int, ...] = (1, 1), dtype: torch.dtype = torch.float32, **how) -> Any:
    model = HookedLlava.from_hf(hf_llava(odd, dtype=dtype))
    raw = example(hf_llava(odd), images=images, pad="left")
    inputs = Inputs.from_tokens(raw["input_ids"], model.cfg, raw.get("pixel_values"), raw["attention_mask"])
    with torch.no_grad():
        return model, model.run_with_cache(inputs, **how)[1]


def load(*args: Any, **how: Any) -> Any:
    loaded = LlavaCache.load(*args, **how)
    assert type(loaded) is LlavaCache
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("odd", ["grouped", "first_layer", "layer_list_full"])
def test_everything_comes_back(odd, dtype, tmp_path):
    model, cache = run(odd, dtype=dtype)
    cache.save(tmp_path / "cache.safetensors")
    loaded = load(tmp_path / "cache.safetensors", model)
    assert list(loaded) != [] and set(loaded) == set(cache)
    for name, act in cache.items():
        assert torch.equal(loaded[name], act) and loaded[name].dtype == act.dtype, name
    assert loaded.inputs.roles == cache.inputs.roles and loaded.asked == cache.asked
    for key in ("input_ids", "pixel_values", "attention_mask"):
        assert torch.equal(loaded.inputs[key], cache.inputs[key])
    assert torch.equal(loaded.decompose_resid(), cache.decompose_resid())
    assert torch.equal(loaded.vision.decompose_resid(), cache.vision.decompose_resid())
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]


@pytest.mark.parametrize("images", [(1,), (1, 1)])  # of one image, the features are a contiguous part of the stream
def test_shared_memory_is_stored_once_and_shared_again(images, tmp_path):
    model, cache = run(images=images)
    cache.save(tmp_path / "cache")
    loaded = load(tmp_path / "cache", model)
    assert loaded["resid_pre", 1].data_ptr() == loaded["resid_post", 0].data_ptr()
    assert loaded.vision["mlp_in", 1].data_ptr() == loaded.vision["resid_mid", 1].data_ptr()
    with safe_open(tmp_path / "cache", "pt") as file:
        stored, header = set(file.keys()), len(json.dumps(file.metadata()))
    assert {"blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"} - stored
    bare = sum(cache[name].nbytes for name in stored if name in cache)
    assert bare < 0.9 * sum(act.nbytes for act in cache.values())
    assert (tmp_path / "cache").stat().st_size < bare + 20_000 + 2 * header


def test_shape_and_place_come_back(tmp_path):
    model, cache = run(images=(2,), incl_bwd=False, pos_slice=-1)
    cache.remove_batch_dim().save(tmp_path / "cache")
    loaded = load(tmp_path / "cache", model)
    assert not loaded.has_batch_dim and loaded.has_image_dim and loaded.vision.has_batch_dim
    assert loaded["q", 0].ndim == 3 and loaded.vision["q", 0].ndim == 4
    part = load(tmp_path / "cache", model, names_filter=["hook_embed", "blocks.1.hook_resid_pre"])
    assert set(part) == {"hook_embed", "blocks.1.hook_resid_pre"}
    with pytest.raises(UnknownHook, match="exists but was not kept"):
        part["q", 0]
    with pytest.raises(UnknownHook, match="nearest"):
        LlavaCache.load(tmp_path / "cache", model, names_filter="hook_embd")
    assert LlavaCache.load(tmp_path / "cache", model, device="meta")["q", 0].is_meta


def test_another_model_is_refused(tmp_path):
    model, cache = run()
    path = tmp_path / "cache"
    cache.save(path)
    grouped = HookedLlava.from_hf(hf_llava("grouped"))
    with pytest.raises(
        LensError, match=f"architecture {model.cfg.fingerprint}.*the model is .*{grouped.cfg.fingerprint}"
    ):
        LlavaCache.load(path, grouped)
    with torch.no_grad():
        model.blocks[1].mlp.out_proj.weight.mul_(1.1)
    try:
        with pytest.raises(LensError, match=r"weights [0-9a-f]{16}.*any_weights=True"):
            LlavaCache.load(path, model)
        assert len(LlavaCache.load(path, model, any_weights=True)) == len(cache)
        with pytest.raises(LensError, match="architecture"):
            LlavaCache.load(path, grouped, any_weights=True)
    finally:
        with torch.no_grad():
            model.blocks[1].mlp.out_proj.weight.div_(1.1)


def test_the_digest_is_of_the_weights_not_of_their_precision():
    wide = HookedLlava.from_hf(hf_llava())
    narrow = HookedLlava(wide.cfg)
    narrow.load_state_dict(wide.state_dict())
    assert weights_digest(narrow) == weights_digest(wide)
    assert weights_digest(narrow.to(torch.bfloat16)) == weights_digest(wide)


def test_files_that_are_no_caches_are_refused(tmp_path):
    model, cache = run()
    path = tmp_path / "cache"
    cache.save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(LensError, match="not a safetensors file, or was cut off"):
            LlavaCache.load(path, model)
    path.write_bytes(b"{}" * 1000)
    with pytest.raises(LensError, match="not a safetensors file, or was cut off"):
        LlavaCache.load(path, model)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(LensError, match=r"no cache: LlavaCache.save did not write it"):
        LlavaCache.load(path, model)
    save_file({"x": torch.zeros(2)}, path, {MANIFEST: json.dumps({"version": 99})})
    with pytest.raises(LensError, match="cache format 99; this release reads 1"):
        LlavaCache.load(path, model)
    with pytest.raises(FileNotFoundError):
        LlavaCache.load(tmp_path / "nowhere", model)


def test_a_cache_without_its_model_is_not_saved(tmp_path):
    _, cache = run()
    lost = LlavaCache(dict(cache.items()), None)
    with pytest.raises(LensError, match="lost its model"):
        lost.save(tmp_path / "cache")
    assert torch.equal(lost["hook_embed"], cache["hook_embed"])


@pytest.mark.parametrize("broken", ["os.replace", "os.fsync", "llava_lens.cache_file.save_file"])
def test_an_interrupted_write_leaves_the_old_file(broken, tmp_path, monkeypatch):
    _, cache = run()
    path = tmp_path / "cache"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(broken, fail)
    with pytest.raises(KeyboardInterrupt):
        cache.save(path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    code = """
        import os, signal, sys, torch
        from pathlib import Path
        from llava_lens import cache_file
        os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
        cache_file.write_whole({"x": torch.zeros(4_000_000)}, {}, Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == b"old", done.stderr
    write_whole({"x": torch.zeros(3)}, {}, path)
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.zeros(3))


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "cache"
    path.write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*the file that was there is untouched"):
            write_whole({"x": torch.zeros(4_000_000)}, {}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
