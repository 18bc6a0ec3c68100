"""The KV cache in room of its own, rotary angles looked up, and what the host finds out only once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from random_models import IMAGE, ODD, example, hf_llama, hf_llava
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llava_lens import HookedLlava, Inputs
from llava_lens.errors import LensError
from llava_lens.facts import carry, known, tell
from llava_lens.kv_cache import KVCache
from llava_lens.rotary import MOST_TABLES

WAITS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal", "index_put")
"""Operations for which the host waits for a device; so does `aten.index` by a boolean mask."""


class Waits(TorchDispatchMode):
    """Counts what would make the host wait, and tensors built from lists, which are copied to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or by_mask or name == "lift_fresh":
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts for `Waits` what never reaches torch's operations when the tensor lies on the CPU."""

    def __init__(self, seen: Counter[str]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.cpu, Tensor.numpy):
            self.seen[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def waiting() -> Iterator[Counter[str]]:
    with Waits() as mode, Lists(mode.seen):
        yield mode.seen


def waits_of(function: Any) -> Counter[str]:
    with waiting() as seen:
        function()
    return seen


def built(odd: str = "grouped", attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    hf = hf_llava(odd, attention, dtype)
    return hf, HookedLlava.from_hf(hf)


# ---- the host does not wait


def test_the_counter_counts() -> None:
    x = torch.arange(4)
    for wait in (
        lambda: bool(x.any()), lambda: x[x > 1], lambda: x.nonzero(), lambda: x.tolist(), lambda: torch.tensor([1]),
        lambda: x.max().item(), lambda: x.cpu(), lambda: x.unique(), lambda: torch.equal(x, x),
    ):  # fmt: skip
        assert waits_of(wait)
    assert not waits_of(lambda: (x[torch.arange(2)], x.masked_fill(x > 1, 0), x[:2], x[None]))


@pytest.mark.parametrize("pad", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_second_forward_waits_for_nothing(pad: str | None, attention: str) -> None:
    hf, model = built(attention=attention)
    raw = example(hf, images=(1, 1), pad=pad)
    inputs = Inputs(raw["input_ids"], raw["pixel_values"], raw["attention_mask"])
    with torch.no_grad():
        assert waits_of(lambda: model(inputs))
        assert not waits_of(lambda: model(inputs))
        assert not waits_of(lambda: model(**inputs))
        assert not waits_of(lambda: model(inputs.to("cpu")))
        assert not waits_of(lambda: model(replace(inputs, attention_mask=None)))


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("odd", ["grouped", "rope_longrope", "rope_dynamic"])
def test_a_step_waits_only_to_learn_whether_every_row_has_ended(pad: str | None, odd: str) -> None:
    hf, model = built(odd)
    inputs = example(hf, images=(1, 1), pad=pad)
    for stop, expected in (((), 0), ((96, 95), 1)):
        marks: list[int] = []
        with waiting() as seen:
            note: Any = lambda _, marks=marks, seen=seen: marks.append(sum(seen.values()))  # noqa: E731
            model.generate(**inputs, max_new_tokens=6, stop_tokens=stop, on_step=note)
        assert {after - before for before, after in pairwise(marks)} == {expected}, seen


def test_facts_move_along() -> None:
    hf, model = built()
    raw = example(hf, images=(1, 1), pad="left")
    inputs = Inputs.from_tokens(raw["input_ids"], model.cfg, raw["pixel_values"], raw["attention_mask"])
    with torch.no_grad():
        model(inputs)
        assert known(inputs.row(1).pixels, "finite")  # type: ignore[arg-type]
    tell(raw["input_ids"], "colour", "red")
    assert known(carry(raw["input_ids"], raw["input_ids"].clone()), "colour") == "red"
    raw["input_ids"].add_(0)
    assert known(carry(raw["input_ids"], raw["input_ids"].clone()), "colour") is None


def edit_token(inputs: Inputs) -> None:
    inputs.tokens[0, -1] = 97


def add_slot(inputs: Inputs) -> None:
    inputs.tokens[0, -1] = IMAGE


def spoil_pixels(inputs: Inputs) -> None:
    inputs.pixels.view(-1)[5] = torch.inf  # type: ignore[union-attr]


def spoil_mask(inputs: Inputs) -> None:
    inputs.attention_mask[1, -1] = 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_token, "token ids 3 … 97; expected 0 … 96|token ids .* … 97"),
        (add_slot, "19 image tokens"),
        (spoil_pixels, "not finite"),
        (spoil_mask, "other values than 0 and 1"),
    ],
)
def test_an_edit_in_place_is_checked_again(edit: Any, message: str) -> None:
    hf, model = built()
    raw = example(hf, images=(1, 1), pad="left")
    inputs = Inputs(raw["input_ids"], raw["pixel_values"], raw["attention_mask"])
    model(inputs)
    edit(inputs)
    with pytest.raises(LensError, match=message):
        model(inputs)


def test_a_mask_edited_in_place_hides_more() -> None:
    hf, model = built()
    inputs = example(hf, images=(1, 1))
    before = model(**inputs)
    inputs["attention_mask"][0, 0] = 0
    fresh = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    assert torch.equal(model(**inputs), model(**fresh)) and not torch.equal(model(**inputs), before)


# ---- keys and values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("odd", ["plain", "grouped", "wide_grouped_heads", "rope_longrope"])
def test_logits_of_every_step_are_hugging_face_s(odd: str, attention: str, dtype: torch.dtype) -> None:
    hf, model = built(odd, attention, dtype)
    for pad in (None, "left"):
        inputs = example(hf, images=(1, 1), pad=pad)
        how: Any = dict(do_sample=False, output_logits=True, return_dict_in_generate=True, suppress_tokens=[IMAGE])
        theirs = hf.generate(**inputs, max_new_tokens=5, **how).logits
        ours: list[Tensor] = []
        hooks: Any = [("hook_logits", lambda act, hook, ours=ours: ours.append(act[:, -1].float().clone()))]
        model.generate(**inputs, max_new_tokens=5, stop_tokens=(), fwd_hooks=hooks)
        assert len(ours) == 5 and all(torch.equal(a, b.float()) for a, b in zip(ours, theirs, strict=True)), pad


def keys(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, 3, n, 4, generator=generator) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("capacity", [None, 3, 9, 30])
def test_the_room_holds_what_joining_gives(capacity: int | None) -> None:
    cache, joined = KVCache(1, capacity), keys(0)
    for seed, n in enumerate((4, 1, 1, 1, 5, 1)):
        k, v = keys(n, seed)
        joined = torch.cat((joined[0], k), 2), torch.cat((joined[1], v), 2)
        with torch.no_grad():
            held = cache.extend(0, k, v)
        assert cache.length == joined[0].shape[2]
        assert torch.equal(held[0], joined[0]) and torch.equal(held[1], joined[1])


@torch.no_grad()
def test_a_known_capacity_is_made_room_for_once() -> None:
    cache = KVCache(1, 12)
    places = {cache.extend(0, *keys(n))[0].data_ptr() for n in (5, 1, 1, 1, 4)}
    assert len(places) == 1 and cache.rooms[0].k.shape[2] == 12  # type: ignore[union-attr]


@torch.no_grad()
def test_what_was_handed_out_keeps_its_values() -> None:
    cache = KVCache(1, 40)
    first = cache.extend(0, *keys(3))
    kept, entries = first[0].clone(), list(cache.entries)
    second = cache.extend(0, *keys(2, 1))
    cache.entries = entries  # back to the first three, and on from there
    other = cache.extend(0, *keys(2, 2))
    assert torch.equal(first[0], kept) and torch.equal(second[0][:, :, 3:], keys(2, 1)[0])
    assert torch.equal(other[0], torch.cat((kept, keys(2, 2)[0]), 2))


@torch.no_grad()
@pytest.mark.parametrize("k", [torch.zeros(1, 3, 1, 4), torch.zeros(2, 3, 1, 4).double(), torch.zeros(2, 1, 1, 4)])
def test_keys_that_do_not_fit_raise(k: Tensor) -> None:
    cache = KVCache(1, 12)
    cache.extend(0, *keys(3))
    with pytest.raises(LensError, match="cannot stand behind"):
        cache.extend(0, k, k)


def test_gradients_flow_through_the_cache() -> None:
    hf, model = built()
    tokens = example(hf, images=(0, 0))["input_ids"]
    weight = model.blocks[0].attn.k_proj.weight
    weight.requires_grad_(True)
    try:
        full = torch.autograd.grad(model(tokens)[:, -1].square().sum(), weight)[0]
        cache = KVCache(model.cfg.n_layers, 20)
        for part in (tokens[:, :3], tokens[:, 3:-1]):
            model(part, past_kv_cache=cache)
        ours = torch.autograd.grad(model(tokens[:, -1:], past_kv_cache=cache)[:, -1].square().sum(), weight)[0]
    finally:
        weight.requires_grad_(False)
    assert full.abs().max() > 1e-3
    torch.testing.assert_close(ours, full, rtol=0, atol=1e-5 * float(full.abs().max()))  # sums in another order


def test_inference_mode_and_plain_steps_take_turns() -> None:
    hf, model = built()
    tokens = example(hf, images=(0, 0))["input_ids"]
    full = model(tokens)
    cache = KVCache(model.cfg.n_layers, 20)
    with torch.inference_mode():
        model(tokens[:, :3], past_kv_cache=cache)
        model(tokens[:, 3:4], past_kv_cache=cache)
    with torch.no_grad():
        step = model(tokens[:, 4:], past_kv_cache=cache)
    torch.testing.assert_close(step, full[:, 4:], rtol=0, atol=1e-5 * float(full.detach().abs().max()))


@pytest.mark.parametrize("padded", [False, True])
def test_a_run_in_two_parts_continues_every_layer_where_it_stands(padded: bool) -> None:
    _, model = built()
    tokens = torch.randint(3, 80, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    how: Any = {"attention_mask": mask} if padded else {}
    cache, parts = KVCache(3), []
    with torch.no_grad():
        for new in (tokens[:, :6], tokens[:, 6:8], tokens[:, 8:]):
            given = {"attention_mask": mask[:, :6]} if padded and not parts else {}
            x = model(new, past_kv_cache=cache, stop_at_layer=1, **given)
            parts.append(model(x, past_kv_cache=cache, start_at_layer=1))
        whole = model(tokens, **how)
    assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-4)


def test_a_cache_whose_run_broke_off_is_refused() -> None:
    _, model = built()
    tokens = torch.randint(3, 80, (2, 9))

    def fail(act: Any, hook: Any) -> None:
        raise RuntimeError

    for held in (0, 8):
        cache = KVCache(3)
        with torch.no_grad():
            if held:
                model(tokens[:, :held], past_kv_cache=cache)
            with pytest.raises(RuntimeError), model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", fail)]):
                model(tokens[:, held:], past_kv_cache=cache)
            with pytest.raises(LensError, match=rf"hold {held} to 9 positions.*new KVCache"):
                model(tokens[:, held:], past_kv_cache=cache)


def test_a_remembered_mask_edited_in_inference_mode_hides_more() -> None:
    _, model = built()
    tokens, ones = torch.randint(3, 80, (2, 10)), torch.ones(2, 8, dtype=torch.long)
    steps = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            cache = KVCache(3)
            model(tokens[:, :8], attention_mask=ones, past_kv_cache=cache)
            model(tokens[:, 8:9], attention_mask=ones[:, :1], past_kv_cache=cache)
            assert cache.attention_mask is not None
            cache.attention_mask[:, 0] = 0
            steps.append(model(tokens[:, 9:], past_kv_cache=cache))
    assert torch.equal(*steps)


def test_a_replaced_key_is_what_is_held() -> None:
    hf, model = built()
    tokens = example(hf, images=(0, 0))["input_ids"]
    cache = KVCache(model.cfg.n_layers, 20)

    def constant(act: Tensor, hook: Any) -> Tensor:
        return torch.full_like(act, 7.0)

    with torch.no_grad(), model.hooks(fwd_hooks=[("blocks.1.attn.hook_rot_k", constant)]):
        model(tokens[:, :4], past_kv_cache=cache)
        model(tokens[:, 4:5], past_kv_cache=cache)
    with torch.no_grad():
        model(tokens[:, 5:6], past_kv_cache=cache)
    held = cache.entries[1][0]  # type: ignore[index]
    assert (held[:, :, :5] == 7).all() and not (held[:, :, 5] == 7).any()


# ---- rotary angles


@pytest.mark.parametrize("odd", [name for name in ODD if name.startswith("rope_")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_angles_looked_up_are_those_computed(odd: str, dtype: torch.dtype) -> None:
    rotary = HookedLlava.from_hf(hf_llama(odd)).rotary
    longrope = 16 if odd == "rope_longrope" else None
    for start, stop in ((0, 1), (0, 17), (5, 6), (3, 127), (90, 400), (0, 1000)):
        positions = torch.arange(start, stop)[None]
        length = rotary.cfg.rope_length(stop) if rotary.depends_on_length else None
        assert longrope is None or (length is None) == (stop <= longrope)
        truth = rotary._compute(positions, length, dtype)
        for found in (rotary.span(start, stop, dtype, torch.device("cpu")), rotary(positions, dtype)):
            assert torch.equal(found.cos, truth.cos) and torch.equal(found.sin, truth.sin)
    scattered = torch.tensor([[4, 0, 7], [1, 1, 90]])
    truth = rotary._compute(scattered, rotary.cfg.rope_length(91) if rotary.depends_on_length else None, dtype)
    assert torch.equal(rotary(scattered, dtype).cos, truth.cos)
    assert len(rotary.tables) <= MOST_TABLES and len(rotary._frequencies) <= MOST_TABLES


def test_tables_are_computed_once_and_serve_gradients() -> None:
    hf, model = built()
    tokens = example(hf, images=(0, 0))["input_ids"]
    with torch.inference_mode():
        model(tokens)
    table = model.rotary.tables[0]
    model(tokens).sum().backward() if model.embed.weight.requires_grad else model(tokens)
    model.embed.weight.requires_grad_(True)
    try:
        torch.autograd.grad(model(tokens).sum(), model.embed.weight)
    finally:
        model.embed.weight.requires_grad_(False)
    assert len(model.rotary.tables) == 1 and model.rotary.tables[0].cos is table.cos


def test_negative_and_far_positions_are_computed() -> None:
    rotary = HookedLlava.from_hf(hf_llama()).rotary
    far = torch.tensor([[-3, 10**6]])
    assert torch.equal(rotary(far, torch.float32).cos, rotary._compute(far, None, torch.float32).cos)
    assert not rotary.tables
