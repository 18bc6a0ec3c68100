"""Entries that are kept as recipes: equal to the eager values, in parts, cut, moved, saved, and never stale."""

from __future__ import annotations

import gc
import json
import pickle
from functools import cache as once
from typing import Any

import pytest
import torch
import transformers
from random_models import example, hf_llava
from safetensors import safe_open
from safetensors.torch import save_file

from llava_lens import HookedLlava, Inputs, LlavaCache, derived
from llava_lens.cache_file import MANIFEST
from llava_lens.config import LlavaConfig
from llava_lens.derived import Derived
from llava_lens.entries import Entries
from llava_lens.errors import LensError
from llava_lens.hooks import reader

LAZY = ("hook_attn_scores", "hook_pattern", "hook_result", "hook_scale", "hook_normalized")
CASES = [
    ("plain", "sdpa", None, torch.float32),
    ("wide_grouped_heads", "sdpa", "left", torch.float32),
    ("grouped", "eager", "left", torch.float32),
    ("one_kv_head", "eager", "right", torch.float32),
    ("attention_bias", "sdpa", "right", torch.bfloat16),
    ("grouped", "eager", "left", torch.bfloat16),
]


@once
def case(odd: str, attention: str = "sdpa", pad: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A model, inputs, what a hook that reads saw (formed by the forward), and a fresh cache's maker."""
    model = HookedLlava.from_hf(hf_llava(odd, attention, dtype))
    inputs = model.read_inputs(**example(hf_llava(odd), images=(2, 1) if pad else (1, 1), pad=pad))
    seen: dict[str, torch.Tensor] = {}

    @reader
    def keep(act, hook):
        seen[hook.name] = act.clone()

    with torch.no_grad(), model.hooks(fwd_hooks=[(lambda name: True, keep)]):
        model(inputs)
    return model, inputs, seen


def run(odd: str = "grouped", *args: Any, **how: Any) -> LlavaCache:
    model, inputs, _ = case(odd, *args)
    with torch.no_grad():
        return model.run_with_cache(inputs, **how)[1]


def is_recipe(cache: Any, name: str) -> bool:
    return isinstance(cache.cache_dict.raw(name), Derived)


def lazy_names(cache: Any) -> list[str]:
    return [name for name in cache if is_recipe(cache, name)]


def near(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to a few units of rounding of the largest number, what is -inf exactly so."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert torch.equal(got == -torch.inf, expected == -torch.inf)
    got, expected = (torch.where(t == -torch.inf, 0, t).double() for t in (got, expected))
    unit = torch.finfo(torch.bfloat16 if got.numel() and got.dtype == torch.bfloat16 else torch.float32).eps
    assert (got - expected).abs().max() <= 16 * unit * expected.abs().max().clamp(min=1e-3)


# ---- equal to what the forward forms


@pytest.mark.parametrize("given", CASES)
def test_what_is_formed_is_what_the_forward_forms_to_the_bit(given):
    cache, seen = run(*given), case(*given)[2]
    assert set(cache) == set(seen)
    alone = {"vision.ln_pre.hook_scale"}  # no entry holds the stream that it comes from, and a column is smaller
    assert {n for n in cache if n.endswith(LAZY)} - alone == set(lazy_names(cache))
    for name, act in seen.items():
        assert torch.equal(cache[name], act) and cache[name].dtype == act.dtype, name
        assert cache.shape(name) == act.shape


@pytest.mark.parametrize("given", CASES)
def test_recording_does_not_move_a_bit(given):
    model, inputs, seen = case(*given)
    with torch.no_grad():
        logits = model(inputs)
        assert torch.equal(model.run_with_cache(inputs)[0], logits)
    assert torch.equal(seen["hook_logits"], logits)
    with torch.inference_mode():
        assert torch.equal(model.run_with_cache(inputs)[0], logits)


@pytest.mark.parametrize("given", CASES[:4])
@pytest.mark.parametrize("at_once", [derived.ROWS_AT_ONCE, 3])
def test_parts_are_parts_of_the_whole(given, at_once, monkeypatch):
    monkeypatch.setattr(derived, "ROWS_AT_ONCE", at_once)  # 3: columns go through the sums, in several chunks
    cache, seen = run(*given), case(*given)[2]
    for part, prefix in ((cache, ""), (cache.vision, "vision.")):
        pattern, scores, result = (
            seen[f"{prefix}blocks.1.attn.hook_{name}"] for name in ("pattern", "attn_scores", "result")
        )
        for whole, read in ((pattern, part.pattern), (scores, part.scores)):
            near(read(1), whole)
            near(read(1, rows=1, heads=-1, queries=-1), whole[1, -1, -1])
            near(read(-2, heads=[2, 0], keys=[0, 3, 5]), whole[:, [2, 0]][..., [0, 3, 5]])
            near(read(1, queries=[4, 2], keys=slice(1, 6)), whole[:, :, [4, 2], 1:6])
            near(read(1, rows=[1], keys=torch.tensor([2])), whole[[1]][..., [2]])
        near(part.result(1, rows=0, heads=2, positions=slice(-2, None)), result[0, -2:, 2])
        near(part.result(1, heads=[1]), result[:, :, [1]])
    assert cache.cache_dict._last is None  # nothing was formed whole


def test_columns_of_blind_and_of_uniform_rows():
    for attention in ("sdpa", "eager"):
        given = ("grouped", attention, "left")
        cache, seen = run(*given), case(*given)[2]
        whole = seen["blocks.0.attn.hook_pattern"]
        blind = whole[1, 0, 0]
        assert bool((blind == (0 if attention == "sdpa" else blind[0])).all())
        recipe: Any = cache.cache_dict.raw("blocks.0.attn.hook_pattern")
        peak, total = derived._divisors(recipe)
        scores = seen["blocks.0.attn.hook_attn_scores"].double()
        close = torch.where((scores == -torch.inf).all(-1, keepdim=True), 0, (scores - peak).exp() / total)
        near(close.float(), whole)


def test_parts_of_what_was_written_or_kept_as_a_tensor():
    model, inputs, _ = case("grouped")
    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", lambda act, hook: act * 0.5)]):
        cache = model.run_with_cache(inputs)[1]
    assert not is_recipe(cache, "blocks.1.attn.hook_pattern")
    assert torch.equal(cache.pattern(1, heads=2, queries=[3]), cache["pattern", 1][:, 2, [3]])
    single = cache.apply_slice_to_batch_dim(1)
    assert torch.equal(single.pattern(1, queries=-1), cache["pattern", 1][1, :, -1])
    with pytest.raises(LensError, match="no batch axis"):
        single.pattern(1, rows=0)
    with pytest.raises(LensError, match=r"query 99 of 'blocks.0.attn.hook_pattern'; expected -\d+ … \d+"):
        cache.pattern(0, queries=99)
    with pytest.raises(LensError, match="was not kept"):
        run(names_filter="hook_embed").pattern(0)


# ---- who listens


def hooks_of(model: Any, inputs: Any, fwd_hooks: Any, **how: Any) -> Any:
    with torch.no_grad(), model.hooks(fwd_hooks=fwd_hooks):
        return model.run_with_cache(inputs, **how)[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_knockout_travels_with_the_entry(attention):
    model, inputs, seen = case("grouped", attention)
    name = "blocks.1.attn.hook_attn_scores"

    def blind(act, hook):
        act[:, :, -1, 2] = -torch.inf

    for wanted in (None, ["blocks.1.attn.hook_pattern"], ["blocks.1.attn.hook_pattern", name]):
        cache = hooks_of(model, inputs, [(name, blind)], names_filter=wanted)
        assert not is_recipe(cache, "blocks.1.attn.hook_pattern") and (cache["pattern", 1][:, :, -1, 2] == 0).all()
        if wanted is None or name in wanted:
            assert not is_recipe(cache, name) and (cache["attn_scores", 1][:, :, -1, 2] == -torch.inf).all()
            assert torch.equal(cache["pattern", 1], cache["attn_scores", 1].softmax(-1))
        assert not torch.equal(cache["pattern", 1], seen["blocks.1.attn.hook_pattern"])
    assert is_recipe(hooks_of(model, inputs, [(name, blind)]), "blocks.0.attn.hook_pattern")


@pytest.mark.parametrize(
    "what", ["attn_scores", "pattern", "result", "ln1.scale", "ln2.normalized", "vision ln1.scale"]
)
def test_who_only_looks_changes_nothing_and_who_writes_is_stored(what):
    model, inputs, seen = case("plain", "sdpa", None)
    tower, _, short = what.rpartition(" ")
    norm, _, kind = short.rpartition(".")
    name = f"{'vision.' if tower else ''}blocks.1.{norm or 'attn'}.hook_{kind}"
    looked: list[torch.Tensor] = []

    @reader
    def look(act, hook):
        looked.append(act)

    cache = hooks_of(model, inputs, [(name, look)])
    assert torch.equal(looked[0], seen[name]) and all(torch.equal(cache[n], act) for n, act in seen.items())
    cache = hooks_of(model, inputs, [(name, lambda act, hook: act * 1.25)])
    assert torch.equal(cache[name], seen[name] * 1.25) and not is_recipe(cache, name)
    if kind == "scale":
        assert not torch.equal(cache[name.replace("scale", "normalized")], seen[name.replace("scale", "normalized")])


def test_gradients_take_the_values_themselves():
    model, inputs, _ = case("grouped")
    _, cache = model.run_with_cache(inputs, incl_bwd=True, return_type="loss")
    assert not lazy_names(cache) and ("pattern_grad", 1) in cache
    with model.hooks(bwd_hooks=[("blocks.0.attn.hook_pattern", lambda grad, hook: None)]):
        _, cache = model.run_with_cache(inputs)
    assert not is_recipe(cache, "blocks.0.attn.hook_pattern") and is_recipe(cache, "blocks.1.attn.hook_pattern")


# ---- stale or edited


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_edited_source_is_noticed(mode):
    model, inputs, seen = case("grouped")
    with mode():
        _, cache = model.run_with_cache(inputs)
        assert torch.equal(cache["result", 0], seen["blocks.0.attn.hook_result"])
        cache["z", 1][:, 0] = 0
        cache["rot_q", 2].mul_(2)
        for key, role in ((("result", 1), "z"), (("pattern", 2), "q"), (("attn_scores", 2), "q")):
            with pytest.raises(LensError, match=f"its {role} was edited in place after the run"):
                cache[key]
        with pytest.raises(LensError, match="its q was edited"):
            cache.pattern(2, queries=0)
        assert torch.equal(cache["pattern", 1], seen["blocks.1.attn.hook_pattern"])
        with pytest.raises(LensError, match="its z was edited"):
            cache.apply_slice_to_batch_dim(0)["result", 1]


def test_an_edited_weight_is_noticed_and_a_replaced_one_is_not_needed():
    model: Any = HookedLlava.from_hf(hf_llava("grouped"))
    inputs, seen = case("grouped")[1:]
    linear = model.blocks[1].attn.o_proj
    before = linear.weight.detach().clone()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        linear.weight.mul_(2)
        try:
            with pytest.raises(LensError, match=r"'blocks.1.attn.hook_result'.*the model's weight was edited in place"):
                cache["result", 1]
            with pytest.raises(LensError, match="edited in place"):
                cache.save("/nowhere")
            assert torch.equal(cache["result", 0], seen["blocks.0.attn.hook_result"])
        finally:
            linear.weight.copy_(before)
    own: Any = HookedLlava(model.cfg)
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        _, cache = own.run_with_cache(inputs)
        own.double()
        assert torch.equal(cache["result", 1], seen["blocks.1.attn.hook_result"])


def test_two_accesses_in_a_row_are_one_and_a_walk_holds_one():
    cache = run()
    before = cache.nbytes
    assert cache["pattern", 0] is cache["pattern", 0]
    held = cache["pattern", 0]
    for name in cache:
        cache[name]
    assert cache["pattern", 0] is held  # as long as somebody holds it
    largest = max(act.nbytes for act in cache.values())
    list(cache.items())
    assert cache.nbytes <= before + largest and lazy_names(cache) == lazy_names(run())
    del held
    gc.collect()
    assert torch.equal(cache["pattern", 0], run()["pattern", 0])


def test_an_edit_of_a_formed_entry_counts():
    cache = run()
    cache["pattern", 0][:, 1] = 0
    cache["pattern", 1]  # the first is let go of
    assert (cache["pattern", 0][:, 1] == 0).all() and not is_recipe(cache, "blocks.0.attn.hook_pattern")
    kept = cache["pattern", 1]
    cache["pattern", 2]
    kept.zero_()
    assert cache["pattern", 1].abs().max() == 0 and cache.pattern(1, queries=0).abs().max() == 0
    lost = cache["result", 1]
    cache["result", 2]
    lost.zero_()
    del lost
    with pytest.raises(LensError, match=r"'blocks.1.attn.hook_result' was edited in place and then let go of"):
        cache["result", 1]
    with pytest.raises(LensError, match="let go of"):
        cache.apply_slice_to_batch_dim(0)
    cache.cache_dict["blocks.1.attn.hook_result"] = torch.ones(3)
    assert cache["result", 1].shape == (3,)


# ---- a dict


def test_it_is_a_dict_of_tensors_to_everyone():
    entries, seen = run().cache_dict, case("grouped")[2]
    assert isinstance(entries, dict) and isinstance(entries, Entries)
    ways = [dict(entries), {**entries}, dict(entries.items()), dict(zip(entries, entries.values(), strict=True))]
    ways += [pickle.loads(pickle.dumps(entries)), {name: entries.get(name) for name in entries}]
    for way in ways:
        assert list(way) == list(entries) and all(torch.equal(way[name], act) for name, act in seen.items())
    assert entries.get("nothing") is None and entries.pop("nothing", 3) == 3
    copied = entries.copy()
    assert torch.equal(copied.pop("blocks.0.attn.hook_pattern"), seen["blocks.0.attn.hook_pattern"])
    assert "blocks.0.attn.hook_pattern" in entries and "blocks.0.attn.hook_pattern" not in copied
    joined = copied | {"more": torch.ones(2)}
    assert isinstance(joined.raw("blocks.1.attn.hook_pattern"), Derived) and joined["more"].sum() == 2
    with pytest.raises(KeyError):
        entries["nothing"]


# ---- cut, moved, sliced


@pytest.mark.parametrize("given", CASES[:4])
@pytest.mark.parametrize("pos_slice", [-1, (1, None, 2), [0, 3, 4]])
def test_a_cut_recipe_is_a_cut_value(given, pos_slice):
    cache, seen = run(*given, pos_slice=pos_slice, vision_pos_slice=[2, 0]), case(*given)[2]
    for name, act in seen.items():
        axes = cache.model.hook(name).axes.split()
        axis = axes.index("pos") if "pos" in axes else axes.index("query") if "query" in axes else None
        if axis is not None:
            places = torch.arange(act.shape[axis])
            rows = slice(*pos_slice) if isinstance(pos_slice, tuple) else [pos_slice] if pos_slice == -1 else pos_slice
            act = act.index_select(axis, torch.tensor([2, 0]) if name.startswith("vision.") else places[rows])
        near(cache[name], act)
    assert is_recipe(cache, "blocks.1.attn.hook_result") and "blocks.1.attn.hook_pattern" in cache


def test_a_single_row_of_patterns_holds_no_keys():
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    cache = run("wide_heads", names_filter=names, pos_slice=-1)
    assert not lazy_names(cache) and cache.nbytes == sum(cache[name].nbytes for name in names)


def test_rows_are_sliced_and_lose_their_axis():
    given = ("grouped", "sdpa", "left")
    seen = case(*given)[2]
    for rows in (1, [1, 0], slice(1, None)):
        part = run(*given).apply_slice_to_batch_dim(rows if not isinstance(rows, slice) else (1, None))
        for key in ("pattern", "result", "normalized"):
            key = (key, 1, "ln2") if key == "normalized" else (key, 1)
            near(part[key], seen[part.full_name(key)][rows])
        assert is_recipe(part, "blocks.1.attn.hook_pattern")
    single = run(*given).apply_slice_to_batch_dim(1)
    assert single.vision["pattern", 0].ndim == 3 and single["scale", 0, "ln1"].ndim == 2
    model, inputs = case("grouped")[0], case("grouped")[0].read_inputs(**example(hf_llava("grouped"), images=(1,)))
    with torch.no_grad():
        _, alone = model.run_with_cache(inputs, remove_batch_dim=True)
        whole = model.run_with_cache(inputs)[1]
    for name in whole:
        assert torch.equal(alone[name], whole[name][0])


def test_a_dtype_is_what_the_run_gave_turned_into_it():
    seen = case("grouped")[2]
    for cache in (run(dtype=torch.bfloat16), run().to(torch.bfloat16)):
        for name, act in seen.items():
            assert torch.equal(cache[name], act.bfloat16()), name
    moved = run().to("meta")
    assert moved["pattern", 0].is_meta and moved.pattern(0, queries=1).is_meta


# ---- on disk


@pytest.mark.parametrize("given", [CASES[1], CASES[2], CASES[4]])
def test_a_saved_recipe_comes_back_as_one(given, tmp_path):
    cache, seen = run(*given), case(*given)[2]
    bytes_held = cache.nbytes
    cache.save(tmp_path / "cache")
    loaded = LlavaCache.load(tmp_path / "cache", cache.model)
    assert lazy_names(loaded) == lazy_names(cache) and set(loaded) == set(cache)
    for name, act in seen.items():
        assert torch.equal(loaded[name], act), name
    loaded = LlavaCache.load(tmp_path / "cache", cache.model)
    assert loaded.nbytes <= bytes_held + seen["vision.hook_features"].nbytes  # no longer a part of the stream
    with safe_open(tmp_path / "cache", "pt") as file:
        extra = [name for name in file.keys() if ":" in name and not name.startswith("inputs:")]  # noqa: SIM118
    mask = ["blocks.0.attn.hook_attn_scores:allowed"] if given[2] else []
    assert [n for n in extra if "ln_pre" not in n] == mask  # every other source is an entry
    only = LlavaCache.load(tmp_path / "cache", cache.model, names_filter=["blocks.1.attn.hook_pattern"])
    assert list(only) == ["blocks.1.attn.hook_pattern"]
    assert torch.equal(only["pattern", 1], seen["blocks.1.attn.hook_pattern"])


def test_other_weights_cannot_stand_in(tmp_path):
    cache, seen = run(), case("grouped")[2]
    cache.save(tmp_path / "cache")
    other: Any = HookedLlava(cache.model.cfg)
    other.load_state_dict(cache.model.state_dict())
    with torch.no_grad():
        other.blocks[1].attn.o_proj.weight.mul_(1.5)
    loaded = LlavaCache.load(tmp_path / "cache", other, any_weights=True)
    with pytest.raises(LensError, match=r"blocks.1.attn.o_proj.weight is not the one of the run"):
        loaded["result", 1]
    assert torch.equal(loaded["result", 0], seen["blocks.0.attn.hook_result"])


def test_a_file_of_format_1_is_read(tmp_path):
    cache, seen = run(), case("grouped")[2]
    cache.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        facts = json.loads(file.metadata()[MANIFEST])
    facts = {key: value for key, value in facts.items() if key != "recipes"} | {"version": 1, "aliases": {}}
    tensors = {name: act.clone(memory_format=torch.contiguous_format) for name, act in cache.items()}
    save_file(tensors, tmp_path / "old", {MANIFEST: json.dumps(facts)})
    loaded = LlavaCache.load(tmp_path / "old", cache.model)
    assert not lazy_names(loaded) and all(torch.equal(loaded[name], act) for name, act in seen.items())


# ---- size


SIZES = ["grouped", "full", "first_layer", "layer_list_full"]
FILTERS = [
    None,
    lambda name: name.endswith("hook_pattern"),
    lambda name: not name.endswith("hook_result"),
    lambda name: name.endswith(("hook_scale", "hook_normalized", "resid_post")),
    ["vision.hook_features", "projector.hook_in", "hook_embed"],
]
HOW = [{}, {"dtype": torch.bfloat16}, {"pos_slice": -1}, {"pos_slice": (0, 20), "vision_pos_slice": (1, None)}]


@pytest.mark.parametrize("odd", SIZES)
def test_the_bytes_foretold_are_the_bytes_held(odd):
    model = HookedLlava.from_hf(hf_llava(odd))
    for images, pad in (((2, 1), "right"), ((1, 1), None)):
        inputs = example(hf_llava(odd), images=images, pad=pad)
        for i, names_filter in enumerate(FILTERS):
            for how in HOW if i == (2 if pad else 0) else HOW[:1]:
                with torch.no_grad():
                    cache = model.run_with_cache(**inputs, names_filter=names_filter, **how)[1]
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in cache.cache_dict.tensors()}
                real = sum(storage.nbytes() for storage in storages.values())
                foretold = model.cache_bytes(**inputs, names_filter=names_filter, **how)
                assert foretold == real == cache.nbytes, (images, i, how)


def test_everything_of_the_7b_fits_in_three_and_a_half_gigabytes():
    tower = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    tower |= dict(image_size=336, patch_size=14, projection_dim=768, model_type="clip_vision_model")
    text = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    text |= dict(vocab_size=32064, max_position_embeddings=4096, model_type="llama")
    config = {"model_type": "llava", "vision_config": tower, "text_config": text, "image_token_index": 32000}
    cfg = LlavaConfig.from_hf(transformers.LlavaConfig(**config))
    with torch.device("meta"):
        model = HookedLlava(cfg).to(torch.bfloat16)
    tokens = torch.tensor([[1, *[32000] * 576, *range(100, 139)]])
    inputs = Inputs(tokens, torch.zeros(1, 3, 336, 336, dtype=torch.bfloat16))
    assert tokens.shape[1] == 616
    assert 3.3e9 < model.cache_bytes(inputs) <= 3.5e9
    eager = 2 * 32 * 616 * 32 * 4096
    assert eager > 5.1e9 and model.cache_bytes(inputs, names_filter=lambda n: n.endswith("hook_result")) < 0.05 * eager


# ---- the kind that the forward of this path does not offer


def test_a_product_is_kept_by_its_input():
    model, _, seen = case("attention_bias")
    attn, mlp = model.blocks[1].attn, model.blocks[1].mlp
    z, post = seen["blocks.1.attn.hook_z"], seen["blocks.1.mlp.hook_post"]
    for x, linear, name in ((z, attn.o_proj, "attn_out"), (post, mlp.out_proj, "mlp_out")):
        recipe, whole = derived.linear(x, linear.weight, linear.bias), seen[f"blocks.1.hook_{name}"]
        assert recipe.shape == whole.shape and recipe.nbytes == whole.nbytes
        assert torch.equal(recipe.form(), whole)
        near(recipe.part(rows=[1], positions=[2, 0]), whole[[1]][:, [2, 0]])
        near(recipe.map(lambda t: t[1], batched=False).form(), whole[1])
        cut = recipe.cut(lambda t, axis: t.index_select(axis, torch.tensor([3])), [3])
        near(cut.form(), whole[:, [3]])
    product = derived.linear(z, attn.o_proj.weight, attn.o_proj.bias)
    cache = LlavaCache(Entries({"blocks.1.hook_attn_out": product}), model)
    assert torch.equal(cache["attn_out", 1], seen["blocks.1.hook_attn_out"])
