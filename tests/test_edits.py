"""Edits on plain tensors and as hooks: what they select, what they do to it, and what they refuse."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import hooked, inputs_of
from torch import Tensor

from llava_lens.errors import LensError, UnknownHook
from llava_lens.sweep import Edit, Row, block_attention, hooks_of, settle
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import Rows, places
from llava_lens.sweep.plan import check

HEADS = ["pos", "head", "d_head"]
PATTERN = ["head", "query", "key"]
STREAM = ["pos", "d_model"]


def act(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(shape)).reshape(shape)


def written(edit: Edit, given: Tensor, axes: list[str], rows: Rows | None = None) -> Tensor:
    out = given.clone()
    edit.write(out, axes, rows)
    return out


# ---- selections


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), (3, (3,)), (range(2), (0, 1)), ([4, 2], (4, 2)), (torch.tensor([4, 2]), (4, 2))],
    ids=str,
)
def test_places_are_whole_numbers(given, found):
    assert places(given) == found


@pytest.mark.parametrize("given", ["last", [1.5], [True], ["1"], torch.tensor([0.5])], ids=str)
def test_other_places_raise(given):
    with pytest.raises(LensError, match=r"pos .*; expected whole numbers"):
        Edit("blocks.0.hook_mlp_out", 0.0, pos=given)


@pytest.mark.parametrize("name", ["pos", "head", "neuron", "key"])
def test_an_empty_selection_raises(name):
    where: dict[str, Any] = {name: []}
    with pytest.raises(LensError, match=f"no {name}; expected one or more"):
        Edit("blocks.0.attn.hook_z", 0.0, **where)


@pytest.mark.parametrize(
    ("axes", "where", "index"),
    [
        (HEADS, {}, np.s_[:]),
        (HEADS, {"pos": 2}, np.s_[[2]]),
        (HEADS, {"pos": [1, 2]}, np.s_[1:3]),
        (HEADS, {"pos": [3, 0]}, np.s_[[3, 0]]),
        (HEADS, {"head": [0, 2]}, np.s_[:, [0, 2]]),
        (HEADS, {"neuron": [1, 4]}, np.s_[:, :, [1, 4]]),
        (HEADS, {"pos": [0, 3], "head": 1}, np.ix_([0, 3], [1])),
        (HEADS, {"pos": [0, 3], "neuron": [2, 4]}, np.ix_([0, 3], range(3), [2, 4])),
        (HEADS, {"pos": [3, 1], "head": [2, 0], "neuron": [4]}, np.ix_([3, 1], [2, 0], [4])),
        (PATTERN, {"pos": 1}, np.s_[:, [1]]),
        (PATTERN, {"key": [4, 0]}, np.s_[:, :, [4, 0]]),
        (PATTERN, {"head": 3, "pos": [0, 2], "key": [1, 3]}, np.ix_([3], [0, 2], [1, 3])),
        (PATTERN, {"pos": [2, 1], "key": 4}, np.ix_(range(4), [2, 1], [4])),
        (["kv_head", "d_head"], {"head": 1}, np.s_[[1]]),
        (["patch", "d_model"], {"pos": [2]}, np.s_[[2]]),
        (["feature", "d_features"], {"pos": [2], "neuron": 0}, np.ix_([2], [0])),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["replace", "add", "multiply", "function", "number"])
def test_selections_and_values_are_numpy_s(axes, where, index, how):
    """Value tensors have the selection's shape, in the order in which it was given."""
    given = act(*{3: (4, 3, 5), 2: (4, 5)}[len(axes)])
    expected = given.numpy().copy()
    part = expected[index]
    value: Any = torch.from_numpy(part.copy() * 0.5 + 7).flip(-1)
    changed = {"replace": value.numpy(), "add": part + value.numpy(), "multiply": part * value.numpy(),
               "function": part * 3 - 1, "number": np.full_like(part, 2.5)}[how]  # fmt: skip
    expected[index] = changed
    value = {"function": lambda part: part * 3 - 1, "number": 2.5}.get(how, value)
    edit = Edit("x", value, how if how in ("add", "multiply") else "replace", **where)
    assert torch.equal(written(edit, given, axes), torch.from_numpy(expected))
    assert torch.equal(edit.part(given, axes), torch.from_numpy(given.numpy()[index]))
    assert torch.equal(given, act(*given.shape))


def test_a_value_broadcasts_and_takes_the_activation_s_dtype():
    given = act(4, 3, 5).half()
    out = written(Edit("x", torch.arange(5, dtype=torch.float64), pos=[1, 3], head=2), given, HEADS)
    assert out.dtype == torch.float16 and torch.equal(out[[1, 3], 2], torch.arange(5.0).half().expand(2, -1))
    assert torch.equal(out[[0, 2]], given[[0, 2]])


def test_a_part_is_a_copy():
    given = act(4, 5)
    Edit("x", 0.0, pos=[0, 1]).part(given, STREAM).zero_()
    assert torch.equal(given, act(4, 5))


@pytest.mark.parametrize(
    ("where", "axes", "message"),
    [
        ({"key": 1}, HEADS, "'x' has no axis for key=; its axes are pos head d_head"),
        ({"head": 1}, STREAM, "'x' has no axis for head=; its axes are pos d_model"),
        ({"pos": 1}, ["channel", "height", "width"], "'x' has no axis for pos=; its axes are channel height width"),
    ],
)
def test_a_selection_along_no_axis_raises(where, axes, message):
    edit = Edit("x", 0.0, **where)
    for call in (lambda: written(edit, act(4, 3, 5), axes), lambda: edit.part(act(4, 3, 5), axes)):
        with pytest.raises(LensError, match=message):
            call()


def test_an_unknown_way_raises():
    with pytest.raises(LensError, match="how='set'; expected 'replace', 'add' or 'multiply'"):
        inspect.unwrap(Edit.__init__)(object.__new__(Edit), "x", 0.0, how="set")


# ---- positions that are carried


def test_only_positions_that_are_carried_are_written():
    """A value for several positions is cut to those; a function sees those alone."""
    rows = Rows([3, 4, 6])
    given = act(3, 5)
    value = act(3, 5) * 10
    out = written(Edit("x", value, pos=[6, 2, 3]), given, STREAM, rows)
    assert torch.equal(out, torch.stack((value[2], given[1], value[0])))
    seen: list[Tensor] = []
    written(Edit("x", lambda part: seen.append(part.clone()) or part, pos=[6, 2, 3]), given, STREAM, rows)
    assert torch.equal(seen[0], given[[2, 0]])
    assert torch.equal(written(Edit("x", 9.0, pos=[0, 5]), given, STREAM, rows), given)
    assert not Edit("x", 9.0, pos=[0, 5]).part(given, STREAM, rows).numel()
    whole = written(Edit("x", act(8, 5)), given, STREAM, rows)  # a value for every position, padding too
    assert torch.equal(whole, act(8, 5)[[3, 4, 6]])


def test_queries_may_be_fewer_than_keys():
    keys = Rows([1, 3, 4, 6])
    rows = Rows([4, 6], keys)
    given = act(2, 2, 4)
    out = written(Edit("x", 0.0, pos=[6, 1], key=[3, 1, 0]), given, PATTERN, rows)
    expected = given.clone()
    expected[:, 1, [1, 0]] = 0
    assert torch.equal(out, expected)
    value = act(2, 8, 8)
    assert torch.equal(written(Edit("x", value), given, PATTERN, rows), value[:, [4, 6]][:, :, [1, 3, 4, 6]])


# ---- what is not there


@pytest.mark.parametrize(
    ("hook", "where", "message"),
    [
        ("blocks.1.hook_resid_pre", {"pos": 0}, "position 0 is padding"),
        ("blocks.1.hook_resid_pre", {"pos": 40}, "position 40 is outside 0 … "),
        ("blocks.1.hook_resid_pre", {"pos": -1}, "pos -1 at 'blocks.1.hook_resid_pre'; count from 0 on"),
        ("blocks.1.attn.hook_pattern", {"key": 0}, "position 0 is padding"),
        ("blocks.1.attn.hook_q", {"head": 4}, "head 4 at 'blocks.1.attn.hook_q'; expected 0 … 3"),
        ("blocks.1.attn.hook_k", {"head": [0, 2]}, "head 2 at 'blocks.1.attn.hook_k'; expected 0 … 1"),
        ("blocks.1.mlp.hook_post", {"neuron": 112}, "neuron 112 at 'blocks.1.mlp.hook_post'; expected 0 … 111"),
        ("blocks.1.hook_mlp_out", {"neuron": -1}, "neuron -1 at 'blocks.1.hook_mlp_out'; expected 0 … 63"),
        ("hook_logits", {"neuron": 97}, "neuron 97 at 'hook_logits'; expected 0 … 96"),
        ("blocks.1.hook_mlp_out", {"head": 1}, "has no axis for head="),
        ("vision.blocks.0.hook_mlp_out", {"pos": 10}, "pos 10 at 'vision.blocks.0.hook_mlp_out'; expected 0 … 9"),
        ("vision.blocks.0.attn.hook_z", {"head": 3}, "head 3 at 'vision.blocks.0.attn.hook_z'; expected 0 … 2"),
        ("projector.hook_out", {"pos": 9}, "pos 9 at 'projector.hook_out'; expected 0 … 8"),
        ("projector.hook_out", {"image": 1}, "image 1 at 'projector.hook_out'; expected 0 … 0"),
    ],
)
def test_what_is_not_there_raises(hook, where, message):
    model = hooked("grouped")
    row = Row.of(model, inputs_of(model, "grouped", (1, 2), "left"), 0)
    with pytest.raises(LensError, match=message):
        check(Base(model, row), Edit(hook, 0.0, **where))


# ---- as hooks


def test_hooks_are_for_one_row_and_its_pictures():
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (2, 0, 1), "left")
    at = inputs.n_pos - 1
    edits = [Edit("blocks.0.hook_mlp_out", 5.0, pos=at, neuron=[1, 2]), Edit("projector.hook_out", 6.0, pos=3, image=0)]
    names = [edit.hook for edit in edits]
    with model.hooks(fwd_hooks=hooks_of(model, edits, inputs.n_pos, row=2, first_image=2)):
        held = model.run_with_cache(inputs, names_filter=names)[1]
    plain = model.run_with_cache(inputs, names_filter=names)[1]
    for name, sample, where in ((names[0], 2, np.ix_([at], [1, 2])), (names[1], 2, np.s_[3])):
        changed = torch.zeros(held[name].shape, dtype=torch.bool)
        changed[sample][where] = True
        assert (held[name][changed] == (5.0 if sample == 2 and name == names[0] else 6.0)).all()
        same = ~changed if name == names[1] else ~changed & (torch.arange(3) < 2)[:, None, None]
        assert torch.equal(held[name][same], plain[name][same])


def test_a_hook_that_does_not_exist_or_never_fires_raises():
    model = hooked("grouped")
    with pytest.raises(UnknownHook, match=r"nearest: 'blocks.1.hook_mlp_out'"):
        hooks_of(model, [Edit("blocks.1.hook_mlp_outs", 0.0)], 9)
    inputs = inputs_of(model, "grouped", (0,), None)
    hooks: Any = hooks_of(model, [Edit("vision.blocks.0.hook_mlp_out", 0.0)], inputs.n_pos)
    with pytest.raises(UnknownHook, match="no picture went through the tower"):
        model.run_with_hooks(inputs, fwd_hooks=hooks)


# ---- blocked attention


def test_a_blocked_edge_is_an_edit_of_the_scores():
    edit = block_attention(2, [5, 6], 3, head=1)
    assert edit.hook == "blocks.2.attn.hook_attn_scores" and edit.blocks and edit.how == "replace"
    assert edit.selection == {"pos": (5, 6), "head": (1,), "key": (3,)} and not edit.onward
    tower = block_attention(0, None, [1], tower=True, image=1)
    assert tower.hook == "vision.blocks.0.attn.hook_attn_scores" and tower.blocks and tower.image == 1
    assert not Edit("blocks.2.attn.hook_attn_scores", 0.0, pos=5).blocks
    assert not Edit("blocks.2.hook_mlp_out", -math.inf).blocks


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", [False, True])
def test_blocked_weights_are_zero_and_the_others_grow(tower, attention):
    model = hooked("attention_bias", attention=attention)
    inputs = inputs_of(model, "attention_bias", (1,), None)
    queries, keys = ([4, 7], [0, 2]) if tower else ([12, inputs.n_pos - 1], [0, 3, 12])
    name = f"{'vision.' if tower else ''}blocks.1.attn.hook_pattern"
    plain = model.run_with_cache(inputs, names_filter=[name])[1][name][0]
    hooks = hooks_of(model, [block_attention(1, queries, keys, head=[0, 2], tower=tower)], inputs.n_pos)
    with model.hooks(fwd_hooks=hooks):
        held = model.run_with_cache(inputs, names_filter=[name])[1][name][0]
    expected = plain.clone()
    for head in (0, 2):
        for query in queries:
            expected[head, query, keys] = 0
            expected[head, query] /= expected[head, query].sum()
    assert (held - expected).abs().max() < 1e-12 and not held[[0, 2]][:, queries][:, :, keys].any()
    assert torch.equal(held[1], plain[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tower", [False, True])
def test_a_query_that_sees_nothing_adds_the_bias_alone(tower, attention):
    model = hooked("attention_bias", attention=attention)
    inputs = inputs_of(model, "attention_bias", (1,), None)
    prefix, n = ("vision.", model.cfg.vision.n_ctx) if tower and model.cfg.vision else ("", inputs.n_pos)
    names = [f"{prefix}blocks.1.{name}" for name in ("attn.hook_pattern", "attn.hook_z", "hook_attn_out")]
    for keep in (names, names[1:]):  # with and without a listener at the pattern
        with model.hooks(fwd_hooks=hooks_of(model, [block_attention(1, [5], range(n), tower=tower)], inputs.n_pos)):
            logits, cache = model.run_with_cache(inputs, names_filter=keep)
        blocks: Any = model.vision.blocks if tower else model.blocks
        bias = blocks[1].attn.b_O
        assert bias.abs().max() > 1e-2 and torch.equal(cache[names[2]][0, 5], bias)
        assert not cache[names[1]][0, 5].any() and cache[names[1]][0, 4].any() and logits.isfinite().all()
        if names[0] in keep:
            assert not cache[names[0]][0, :, 5].any() and cache[names[0]][0, :, 4].any()


@pytest.mark.parametrize("where", ["attn.hook_attn_scores", "attn.hook_pattern"])
@pytest.mark.parametrize("tower", [False, True])
def test_restoring_what_is_blocked_raises(where, tower):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1,), None)
    prefix = "vision." if tower else ""
    hooks: Any = hooks_of(model, [block_attention(1, [5], [2], tower=tower)], inputs.n_pos)
    scores, pattern = (f"{prefix}blocks.1.attn.{name}" for name in ("hook_attn_scores", "hook_pattern"))
    assert [name for name, _ in hooks] == [scores, pattern]
    restore = (f"{prefix}blocks.1.{where}", lambda act, hook: act.nan_to_num(neginf=0.0) + 0.01)
    message = f"attention that '{scores}' blocks is not zero after the softmax"
    order = [hooks[0], restore, hooks[1]] if where.endswith("pattern") else [*hooks, restore]
    with pytest.raises(LensError, match=message):
        model.run_with_hooks(inputs, fwd_hooks=order)
    model.run_with_hooks(inputs, fwd_hooks=[restore, *hooks] if where.endswith("scores") else hooks)
    assert not any(model.hook(name).live for name in model.hook_dict)


def test_a_study_with_a_hook_that_restores_raises():
    model = hooked("grouped")
    row = Row.of(model, inputs_of(model, "grouped", (1,), None))
    user = ("blocks.1.attn.hook_pattern", lambda act, hook: act + 0.01)
    base: Any = settle(model, row, fwd_hooks=[user]).clean
    with pytest.raises(LensError, match="not zero after the softmax"):
        base.run([block_attention(1, [5], [2])], [row.n_columns - 1])
