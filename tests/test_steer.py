"""Steering equals plain hooks, and generation under edits equals full passes by hand, step by step, with every hook."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from brute_force import brute_force, by_hand, hooked, images_before, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.steer import generate_with, run_with_edits, steer, steering, steering_vector
from llava_lens.errors import LensError, UnknownHook
from llava_lens.generate import Draft
from llava_lens.hooks import reader
from llava_lens.sweep import Edit, block_attention, logit_diff
from llava_lens.tiny import Scene, render_scene

SHAPES: dict[str, tuple[tuple[int, ...], str | None]] = {"left": ((2, 0, 1), "left"), "text": ((0,), None)}
STEPS = 3


def last(logits: Tensor) -> Tensor:
    """A number that every logit of the last position moves."""
    weights = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return (logits[0, -1] * weights).sum()


def vector_of(model: HookedLlava, *shape: int) -> Tensor:
    drawn = torch.randn(*shape, model.cfg.d_model, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return drawn / 2


# ---- generation, the slow way


@torch.no_grad()
def by_full_passes(
    model: HookedLlava, inputs: Inputs, each: list[list[Edit]], steps: int = STEPS
) -> tuple[Tensor, list[Tensor]]:
    """Tokens, and the logits of every step, from full passes with hooks written apart from the library's."""
    tokens, found = inputs.tokens, []
    mask = torch.ones_like(tokens) if inputs.attention_mask is None else inputs.attention_mask
    for step in range(steps):
        now = Inputs(tokens, inputs.pixels, mask)
        later = range(inputs.n_pos, inputs.n_pos + step)
        hooks = []
        for row, edits in enumerate(each):
            for edit in edits:
                pos = (*edit.pos, *later) if edit.onward and edit.pos is not None else edit.pos
                shown = Edit(edit.hook, edit.value, edit.how, pos, edit.head, edit.neuron, edit.key, edit.image)
                hooks.append(by_hand(shown, row, images_before(now, row, model)))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model.run_with_hooks(now, fwd_hooks=hooks, position_ids=positions)[:, -1].float()
        found.append(logits)
        allowed = logits.clone()
        allowed[:, model.cfg.image_token_id] = -torch.inf
        tokens = torch.cat((tokens, allowed.argmax(-1)[:, None]), -1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), -1)
    return tokens, found


def by_the_library(
    model: HookedLlava, inputs: Inputs, edits: Any, monkeypatch: Any, cached: bool, **how: Any
) -> tuple[Tensor, list[Tensor]]:
    """The same by `generate_with`."""
    found, logits = [], Draft.logits

    def noted(draft: Draft) -> Tensor:
        found.append(logits(draft))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Draft, "logits", noted)
        options: Any = dict(max_new_tokens=STEPS, stop_tokens=(), use_kv_cache=cached, **how)
        tokens = generate_with(model, inputs, edits, **options)
    return tokens, found


def some_edits(model: HookedLlava, inputs: Inputs, row: int) -> list[Edit]:
    """Every hook of the decoder, at positions of the prompt, at all, and onward."""
    seen = inputs.attention_mask[row] if inputs.attention_mask is not None else torch.ones(inputs.n_pos)
    columns = seen.nonzero()[:, 0].tolist()
    pos = [columns[0], columns[-1]]
    made = []
    names = [n for n in model.hook_dict if n.startswith("blocks.1.") or "." not in n or n.startswith("ln_final")]

    def change(part: Tensor) -> Tensor:
        return part * 0.6 + 0.2

    for name in names:
        axes = model.hook(name).axes.split()[1:]
        key: Any = {"key": [columns[0], columns[-2 if len(columns) > 1 else 0]]} if "key" in axes else {}
        if len(columns) == 1:
            key: Any = {"key": [columns[0]]} if key else {}
        heads: Any = {"head": [1]} if "head" in axes or "kv_head" in axes else {}
        made += [Edit(name, change, pos=pos[-1:], **key, **heads), Edit(name, 0.7, "multiply", **heads, **key)]
        made += [Edit(name, change, pos=pos[:1], onward=True, **heads, **key)]
        if name == "blocks.1.hook_resid_post":
            made += [Edit(name, torch.arange(2.0)[:, None] - 1.5, "add", pos=[columns[0], columns[0] + 1])] * (
                len(columns) > 1
            )
            made += [Edit(name, 3.0, pos=pos, neuron=[4, 7], onward=True)] * (len(columns) > 1)
    return made


def same(ours: tuple[Tensor, list[Tensor]], truth: tuple[Tensor, list[Tensor]]) -> float:
    """The largest difference of any step's logits; the tokens must be equal."""
    assert torch.equal(ours[0], truth[0])
    finite = [torch.where(a == b, 0.0, a - b) for a, b in zip(ours[1], truth[1], strict=True)]
    return max(float(each.abs().max()) for each in finite)


TIGHT = 2e-5
"""The logits that generation chooses from are float32, of a model in float64."""


@pytest.mark.parametrize(("shape", "attention"), [("left", "sdpa"), ("text", "eager"), ("one token", "sdpa")])
def test_every_decoder_hook_holds_in_every_step(shape, attention, monkeypatch):
    model = hooked("grouped", attention=attention)
    one = shape == "one token"
    inputs = Inputs(torch.tensor([[7]])) if one else inputs_of(model, "grouped", *SHAPES[shape])
    row = inputs.batch_size - 1
    plain = by_full_passes(model, inputs, [[] for _ in range(inputs.batch_size)])
    moved = 0
    edits = some_edits(model, inputs, row)
    for edit in edits:
        each: list[list[Edit]] = [[] for _ in range(inputs.batch_size)]
        each[row] = [edit]
        truth = by_full_passes(model, inputs, each)
        for cached in (True, False):
            ours = by_the_library(model, inputs, each, monkeypatch, cached)
            assert same(ours, truth) < TIGHT, (edit.hook, edit.pos, edit.key, edit.onward, cached)
        moved += any(bool((a - b).abs().max() > 1e-3) for a, b in zip(truth[1], plain[1], strict=True))
    assert moved > 0.7 * len(edits)


@pytest.mark.parametrize("cached", [True, False])
def test_edits_of_several_rows_and_pictures_go_together(cached, monkeypatch):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (2, 0, 1), "left")
    columns = inputs.attention_mask[1].nonzero()[:, 0].tolist()  # type: ignore[index]
    images = inputs.slots(model.cfg)[0].nonzero()[:, 0].tolist()
    each = [
        [Edit("vision.blocks.0.hook_mlp_out", 2.0, pos=[1, 4], image=1), Edit("projector.hook_out", 0.5, "multiply"),
         block_attention(1, [inputs.n_pos - 1], images, onward=True)],
        [Edit("blocks.0.hook_resid_pre", 0.3, "add", pos=columns[-2:]), block_attention(0, columns[-1:], columns[:2])],
        [block_attention(0, range(10), [3, 4], tower=True), Edit("blocks.2.attn.hook_z", 0.0, head=1)],
    ]  # fmt: skip
    truth = by_full_passes(model, inputs, each)
    assert same(by_the_library(model, inputs, each, monkeypatch, cached), truth) < TIGHT
    for row in range(3):
        alone = [own if i == row else [] for i, own in enumerate(each)]
        mine = by_full_passes(model, inputs, alone)
        ours = by_the_library(model, inputs, each[row], monkeypatch, cached, row=row)
        assert same(ours, mine) < TIGHT
        assert (mine[1][-1][row] - truth[1][-1][row]).abs().max() < TIGHT


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_blocked_onward_stays_out_of_sight(cached, attention):
    model = hooked("grouped", attention=attention)
    inputs = inputs_of(model, "grouped", (1,), None)
    images = inputs.slots(model.cfg)[0].nonzero()[:, 0].tolist()
    rows: list[Tensor] = []
    look = reader(lambda act, hook: rows.append(act[0, :, -1]))
    options: dict[str, Any] = dict(max_new_tokens=3, stop_tokens=(), use_kv_cache=cached)
    for onward in (True, False):
        rows.clear()
        edit = block_attention(1, [inputs.n_pos - 1], images, onward=onward)
        generate_with(model, inputs, [edit], fwd_hooks=[("blocks.1.attn.hook_pattern", look)], **options)
        assert [row.shape[-1] for row in rows] == [inputs.n_pos + i for i in range(3)]
        assert not rows[0][:, images].any() and torch.allclose(rows[1].sum(-1), torch.ones(4, dtype=torch.float64))
        assert all(bool(row[:, images].any()) is not onward for row in rows[1:])

    def restore(act: Tensor, hook: Any) -> Tensor:
        return act.nan_to_num(neginf=0.0)

    scores = "blocks.1.attn.hook_attn_scores"
    edit = block_attention(1, [inputs.n_pos - 1], images, onward=True)
    generate_with(model, inputs, [edit], fwd_hooks=[(scores, restore)], **options)  # the edit comes behind it
    with pytest.raises(LensError, match="not zero after the softmax"):
        generate_with(model, inputs, [edit, Edit(scores, lambda part: part.nan_to_num(neginf=0.0))], **options)


def test_a_tower_edit_acts_once_and_none_on_text(monkeypatch):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1,), None)
    calls = []

    def note(part: Tensor) -> Tensor:
        calls.append(part.shape)
        return part + 1

    generate_with(model, inputs, Edit("vision.blocks.0.hook_resid_post", note), max_new_tokens=3, stop_tokens=())
    assert len(calls) == 1
    with pytest.raises(LensError, match="expected none: the prompt has no picture"):
        generate_with(model, Inputs(torch.tensor([[5, 6]])), [Edit("vision.blocks.0.hook_resid_post", 0.0)])


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([Edit("blocks.1.hook_resid_post", 0.0, pos=99)], "position 99 is outside"),
        ([Edit("blocks.1.hook_resid_post", 0.0, pos=-1)], "count from 0 on"),
        ([Edit("blocks.1.attn.hook_v", 0.0, head=3)], "head 3 at 'blocks.1.attn.hook_v'; expected 0 … 1"),
        ([Edit("blocks.1.hook_resid_post", 0.0, head=1)], "no axis for head="),
        ([Edit("blocks.1.hook_resid", 0.0)], "no hook is called"),
        ([Edit("vision.hook_embed", 0.0, onward=True)], "onward at 'vision.hook_embed'"),
        ([Edit("blocks.1.hook_mlp_out", torch.zeros(9, 64))], r"9 places of 'pos' .* with pos=None.*pos=range\(9\)"),
        ([Edit("blocks.1.hook_mlp_out", torch.zeros(2, 64), pos=[3, 4], onward=True)], "2 places of 'pos' .* onward"),
        ([Edit("blocks.1.attn.hook_pattern", torch.zeros(1, 18), pos=[3])], "18 places of 'key' .* with key=None"),
        (["blocks.1.hook_mlp_out"], "an edit of type str"),
        ([[], []], "2 lists of edits for 1 rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_edits_that_cannot_hold_raise_before_anything_runs(edits, message):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1,), None)
    runs = model.n_runs
    with pytest.raises((LensError, UnknownHook), match=message):
        generate_with(model, inputs, edits, max_new_tokens=2)
    assert model.n_runs == runs


def test_edits_say_whose_they_are():
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1, 1), None)
    edit = Edit("blocks.1.hook_mlp_out", 0.0)
    for call in (generate_with, run_with_edits):
        with pytest.raises(LensError, match="edits for a batch of 2: say which row=0 … 1, or give a list of edits per"):
            call(model, inputs, [edit])
        with pytest.raises(LensError, match="row 2; expected -2 … 1"):
            call(model, inputs, [edit], row=2)
        with pytest.raises(LensError, match="2 lists of edits with row=0"):
            call(model, inputs, [[edit], []], row=0)
    assert torch.equal(generate_with(model, inputs, [(), ()], max_new_tokens=2), model.generate(inputs, 2))


@pytest.mark.parametrize("shape", ["left", "text"])
def test_one_run_with_edits_equals_plain_hooks(shape):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", *SHAPES[shape])
    row = inputs.batch_size - 1
    edits = [
        Edit("blocks.0.hook_mlp_out", 1.0, "add", pos=[inputs.n_pos - 2]),
        Edit("blocks.1.attn.hook_z", 0.0, head=2),
    ]
    edits += [Edit("vision.blocks.1.hook_resid_mid", 0.5, "multiply", pos=[2])] if shape == "left" else []
    logits, cache = run_with_edits(model, inputs, edits, row, names_filter=["blocks.1.attn.hook_z", "hook_logits"])
    plain = model(inputs)
    truth = brute_force(model, inputs, row, edits, list(range(inputs.n_pos)))
    assert (logits[row] - truth).abs().max() < 1e-12 and torch.equal(cache["hook_logits"], logits)
    assert (truth - plain[row]).abs().max() > 1e-2
    assert not cache["blocks.1.attn.hook_z"][row, :, 2].any() and cache["blocks.1.attn.hook_z"][row, :, 1].any()
    assert torch.equal(logits[:row], plain[:row]) and set(cache.cache_dict) == {"blocks.1.attn.hook_z", "hook_logits"}
    assert not any(model.hook(name).live for name in model.hook_dict)


# ---- vectors and sweeps


@torch.no_grad()
def test_a_steering_vector_is_the_difference_of_two_means():
    model = hooked("grouped")
    one, two = (inputs_of(model, "grouped", (1, 0, 2), pad, seed=i) for i, pad in enumerate(("left", "right")))
    three = inputs_of(model, "grouped", (1,), None, seed=7)
    name = "blocks.{}.hook_resid_post"

    def activations(inputs: Inputs, layer: int) -> list[Tensor]:
        act = model.run_with_cache(inputs)[1][name.format(layer)] if inputs.pixels is not None else None
        assert act is not None
        mask = torch.ones_like(inputs.tokens) if inputs.attention_mask is None else inputs.attention_mask
        return [act[i, row.bool()] for i, row in enumerate(mask)]

    for layer in range(3):
        ends = [torch.stack([act[-1] for act in activations(each, layer)]) for each in (one, two, three)]
        expected = torch.cat((ends[0], ends[2])).mean(0) - ends[1].mean(0)
        ours = steering_vector(model, [one, three], two, layer)
        assert ours.shape == (64,) and (ours - expected).abs().max() < 1e-12
        whole = [torch.stack([act.mean(0) for act in activations(each, layer)]).mean(0) for each in (one, two)]
        assert (steering_vector(model, one, [two], layer, at="all") - (whole[0] - whole[1])).abs().max() < 1e-12
    every = steering_vector(model, one, two, at=None)
    assert every.shape == (3, 64) and torch.equal(every[1:], steering_vector(model, one, two, [1, -1], at=None))
    branch = steering_vector(model, one, two, 1, hook="mlp_out")
    assert (branch - steering_vector(model, one, two, 1)).abs().max() > 1e-3


def test_a_sweep_over_layers_and_scales_equals_full_passes():
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (2, 0, 1), "left")
    for vector in (vector_of(model), vector_of(model, 3)):
        scores = steering(model, inputs, vector, scales=(-1, 0, 0.5), metric=last, at="last", progress=False)
        assert scores.axes == ("batch", "layer", "scale") and scores.labels["scale"] == ("-1", "0", "0.5")
        for row, layer, i in [(0, 0, 0), (1, 2, 2), (2, 1, 0), (2, 1, 1)]:
            scale = (-1, 0, 0.5)[i]
            edits = steer(
                model, inputs, vector if vector.ndim == 1 else vector[layer], layer, scale=scale, at="last", row=row
            )
            truth = last(brute_force(model, inputs, row, edits, [inputs.n_pos - 1])[None])
            assert abs(float(scores.values[row, layer, i]) - float(truth)) < 1e-12
        assert (scores.values[:, :, 1] == torch.tensor(scores.method["baseline"], dtype=torch.float64)[:, None]).all()
        assert float((scores.values[:, :, 2] - scores.values[:, :, 1]).abs().min()) > 1e-3


def test_other_sweeps_keep_their_axes_apart():
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1,), None)
    vector, how = vector_of(model), dict(metric=last, progress=False)
    patches = steering(model, inputs, vector, ("layer", "patch", "scale"), scales=(1, 2), layers=[0, 1], **how)  # type: ignore[arg-type]
    assert patches.axes == ("layer", "row", "col", "scale") and patches.values.shape == (2, 3, 3, 2)
    turned = steering(model, inputs, vector, ("scale", "patch", "layer"), scales=(1, 2), layers=[0, 1], **how)  # type: ignore[arg-type]
    assert (turned.values.permute(3, 1, 2, 0) - patches.values).abs().max() < 1e-12
    where = inputs.slots(model.cfg)[0].nonzero()[:, 0].tolist()[5]
    edits = [Edit("blocks.1.hook_resid_post", 2 * vector, "add", pos=where)]
    truth = last(brute_force(model, inputs, 0, edits, [inputs.n_pos - 1])[None])
    assert abs(float(patches.values[1, 1, 2, 1]) - float(truth)) < 1e-12
    together = steering(model, inputs, vector_of(model, 2), "scale", scales=(1,), layers=[0, 2], **how)  # type: ignore[arg-type]
    both = [Edit(f"blocks.{layer}.hook_resid_post", vector_of(model, 2)[i], "add") for i, layer in enumerate((0, 2))]
    truth = last(brute_force(model, inputs, 0, both, [inputs.n_pos - 1])[None])
    assert together.axes == ("scale",) and abs(float(together.values[0]) - float(truth)) < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, i, v: steering_vector(m, i, i, 5), "layer 5; expected 0 … 2"),
        (lambda m, i, v: steering_vector(m, i, i, 1, hook="z"), "'z' carries pos head d_head; expected a hook of the"),
        (lambda m, i, v: steering_vector(m, i, i, 1, hook="vision.resid_post"), "expected a hook of the decoder"),
        (lambda m, i, v: steering_vector(m, i, [], 1), "no negative inputs"),
        (lambda m, i, v: steering_vector(m, i, ["x"], 1), "negative of type str; expected Inputs"),
        (lambda m, i, v: steer(m, i, v[:9], 1), r"a vector \[9\]; expected \[64\]"),
        (lambda m, i, v: steer(m, i, v * torch.nan, 1), "not finite"),
        (lambda m, i, v: steer(m, i, v, 1, row=1), "row 1; expected -1 … 0"),
        (lambda m, i, v: steering(m, i, v[None]), "1 vectors for 3 layers; expected one, or one per layer"),
        (lambda m, i, v: steering(m, i, v, scales=()), r"scales \(\)"),
        (lambda m, i, v: steering(m, i, v, "layer"), "expected one or more, and 'scale' once for several"),
        (
            lambda m, i, v: steering(m, i, v, ("layer", "scales")),
            "sweep over 'scales'; nearest: 'scale'; expected layer",
        ),
    ],
)
def test_wrong_asking_raises(call: Callable[..., Any], message: str):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1,), None)
    vector: Any = vector_of(model)
    with pytest.raises(LensError, match=message):
        if call(model, inputs, vector):
            pass


# ---- on the trained model

N = 20


@cache
def colored(first: int) -> dict[str, list[Scene]]:
    """Scenes of one circle and others of other shapes, the circle red, and the same with it blue."""
    found, seed = [], first
    while len(found) < N:
        scene = render_scene(seed, distinct=True)
        seed += 1
        found += [scene] if scene.find(shape="circle") and not scene.find(color="red") else []
    return {
        color: [scene.recolored(scene.find(shape="circle")[0], color) for scene in found] for color in ("red", "blue")
    }


def asked(model: HookedLlava, scenes: list[Scene]) -> Inputs:
    return model.prepare(["What is the color of the circle?"] * N, [scene.image for scene in scenes])


@torch.no_grad()
def test_red_minus_blue_turns_the_answer_red():
    """On scenes that the vector was not made from."""
    model = HookedLlava.tiny()
    train, test = colored(1_060_000), colored(1_061_000)
    vectors = steering_vector(model, asked(model, train["red"]), asked(model, train["blue"]))
    blue = asked(model, test["blue"])
    scores = steering(
        model, blue, vectors, scales=(-1, 0, 1), metric=logit_diff("red", "blue"), at="last", progress=False
    )
    moved = (scores[{"scale": 2}] - scores[{"scale": 1}]).mean()
    assert moved.low is not None and float(moved.low[2:].min()) > 5.0, moved
    assert (scores.values[:, 2:, 0] < scores.values[:, 2:, 1]).all()
    assert model.generate(blue, 1, return_type="text") == ["blue"] * N
    each = [steer(model, blue, vectors[-1], -1, at="last", row=row) for row in range(N)]
    answers = generate_with(model, blue, each, max_new_tokens=1, return_type="text")
    assert answers.count("red") >= 0.9 * N, answers
