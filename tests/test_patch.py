"""`patch` by every axis and in both directions, against TransformerLens's own sweeps and loops by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from brute_force import hooked, images_before, inputs_of
from transformer_lens import patching
from transformer_lens.utilities import get_act_name

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis import Patches, Scores, back_patch, kl, log_prob, logit_diff, patch, recovery
from llava_lens.analysis.interventions.study import check_pair
from llava_lens.errors import LensError, UnknownHook
from llava_lens.tiny import render_scene

A, B = 5, 6


def pair(
    odd: str = "grouped", images: tuple[int, ...] = (1,), pad: str | None = None
) -> tuple[HookedLlava, Inputs, Inputs]:
    model = hooked(odd)
    clean = inputs_of(model, odd, images, pad)
    assert clean.pixels is not None
    return model, clean, Inputs(clean.tokens, -clean.pixels, clean.attention_mask)


def metric(logits: torch.Tensor) -> torch.Tensor:
    return (logits[:, -1, A] - logits[:, -1, B]).sum()


FAMILIES = {
    "resid_pre": ("resid_pre", ("layer", "position")),
    "resid_mid": ("resid_mid", ("layer", "position")),
    "attn_out": ("attn_out", ("layer", "position")),
    "mlp_out": ("mlp_out", ("layer", "position")),
    "attn_head_out_by_pos": ("z", ("layer", "position", "head")),
    "attn_head_q_by_pos": ("q", ("layer", "position", "head")),
    "attn_head_k_by_pos": ("k", ("layer", "position", "head")),
    "attn_head_v_by_pos": ("v", ("layer", "position", "head")),
    "attn_head_pattern_by_pos": ("pattern", ("layer", "head", "position")),
    "attn_head_out_all_pos": ("z", ("layer", "head")),
    "attn_head_k_all_pos": ("k", ("layer", "head")),
    "attn_head_v_all_pos": ("v", ("layer", "head")),
    "attn_head_pattern_all_pos": ("pattern", ("layer", "head")),
}
"""TransformerLens's sweep → our hook and axes."""


QUICK = ("resid_pre", "attn_head_out_all_pos", "attn_head_k_all_pos", "attn_head_pattern_all_pos")


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES], ids=list(FAMILIES)
)
def test_our_sweeps_equal_transformer_lenss_own(family):
    model, clean, corrupt = pair()
    hook, sweep = FAMILIES[family]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)
        with model.looking_at(corrupt):
            theirs = getattr(patching, f"get_act_patch_{family}")(model, corrupt.tokens, cache, metric)
    ours = patch(model, clean, corrupt, hook, sweep, metric=logit_diff(A, B), progress=False)
    assert ours.axes == sweep and ours.method["path"] == "shortened runs" and ours.method["noise_floor"] < 1e-12
    torch.testing.assert_close(ours.values, theirs.double(), rtol=1e-6, atol=1e-6)  # TransformerLens keeps float32


def by_hand(model: Any, into: Inputs, source: Inputs, hook: str, row: int, place: Any) -> float:
    with torch.no_grad():
        _, cache = model.run_with_cache(source, names_filter=hook)

        def put(act, hook):
            act[place] = cache[hook.name][place]

        logits = model.run_with_hooks(into, fwd_hooks=[(hook, put)])
    last = -1 if into.attention_mask is None else int(into.attention_mask[row].nonzero()[-1, 0])
    return float(logits[row, last, A] - logits[row, last, B])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_of_a_ragged_batch_with_several_pictures(pad, direction):
    model, clean, corrupt = pair(images=(2, 1), pad=pad)
    how: Any = dict(metric=logit_diff(A, B), direction=direction, progress=False)
    scores = patch(model, clean, corrupt, "resid_post", ("layer", "position"), **how)
    assert scores.axes == ("batch", "layer", "position") and scores.values.shape[-1] == clean.n_pos
    into, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    assert clean.attention_mask is not None
    for row in range(2):
        seen = clean.attention_mask[row].bool()
        assert torch.equal(scores.values[row, 0].isnan(), ~seen)
        for position in seen.nonzero()[::5, 0].tolist():
            wanted = by_hand(model, into, source, "blocks.1.hook_resid_post", row, (row, position))
            assert float(scores.values[row, 1, position]) == pytest.approx(wanted, rel=1e-11)
    alone = patch(model, clean, corrupt, "resid_post", row=1, **how)
    torch.testing.assert_close(alone.values, scores.values[1], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    ("hook", "full", "sweep"),
    [
        ("vision.resid_pre", "vision.blocks.{}.hook_resid_pre", ("layer", "patch")),
        ("vision.resid_post", "vision.blocks.{}.hook_resid_post", ("layer", "position")),
        ("vision.z", "vision.blocks.{}.attn.hook_z", ("layer", "head")),
        ("vision.mlp_out", "vision.blocks.{}.hook_mlp_out", ("layer", "position")),
        ("projector.hook_out", "projector.hook_out", ("patch",)),
        ("vision.hook_patch_embed", "vision.hook_patch_embed", ("patch",)),
        ("vision.hook_features", "vision.hook_features", ("patch", "neuron")),
    ],
)
@pytest.mark.parametrize("image", [0, 1])
def test_tower_and_projector(hook, full, sweep, image):
    model, clean, corrupt = pair(images=(1, 2), pad="left")
    neurons = [0, 7] if "neuron" in sweep else None
    how: Any = dict(metric=logit_diff(A, B), progress=False, row=1, image=image, neurons=neurons)
    scores = patch(model, clean, corrupt, hook, sweep, **how)
    first = images_before(clean, 1, model) + image
    cols = model.cfg.vision.grid[1]  # type: ignore[union-attr]
    class_token = int(hook.startswith("vision.") and "patch_embed" not in hook and "features" not in hook)
    cells = [c for c in scores.values.isfinite().nonzero().tolist()]
    assert len(cells) == scores.values.numel()
    for cell in cells[:: max(1, len(cells) // 6)]:
        at = dict(zip(scores.axes, cell, strict=True))
        place: tuple[Any, ...] = (first,)
        if "row" in at:
            place += (class_token + at["row"] * cols + at["col"],)
        if "position" in at:
            place += (at["position"],)
        if "head" in at:
            place += (slice(None), at["head"])
        if "neuron" in at:
            place += (neurons[at["neuron"]],)  # type: ignore[index]
        wanted = by_hand(model, corrupt, clean, full.format(at.get("layer")), 1, place)
        assert float(scores.values[tuple(cell)]) == pytest.approx(wanted, rel=1e-11), cell


def test_neurons_windows_and_chosen_layers():
    model, clean, corrupt = pair()
    how: Any = dict(metric=logit_diff(A, B), progress=False)
    neurons = patch(
        model, clean, corrupt, "post", ("layer", "neuron"), at="last", neurons=[3, 50], layers=[0, -1], **how
    )
    assert neurons.labels == {"layer": (0, 2), "neuron": (3, 50)}
    wanted = by_hand(model, corrupt, clean, "blocks.2.mlp.hook_post", 0, (0, -1, 50))
    assert float(neurons.values[1, 1]) == pytest.approx(wanted, rel=1e-11)
    windows = patch(model, clean, corrupt, "attn_out", "layer", window=2, at="image", **how)
    single = patch(model, clean, corrupt, "attn_out", (), layers=[1, 2], at="image", **how)
    assert float(windows.values[1]) == pytest.approx(float(single.values), rel=1e-12) and single.axes == ()


# ---- words, on the embedded model


@pytest.fixture(scope="module")
def tiny():
    torch.set_num_threads(1)
    model = HookedLlava.tiny()
    scene = next(s for s in map(render_scene, range(2_000_000, 2_000_100)) if s.find(shape="circle") == (0,))
    other = scene.recolored(0, "green" if scene.objects[0].color != "green" else "blue")
    asked = "What is the color of the circle?"
    return model, scene, model.prepare(asked, scene.image), model.prepare(asked, other.image), other


def test_groups_by_role_word_and_object(tiny):
    model, scene, clean, corrupt, _ = tiny
    mask = scene.objects[0].mask
    at = {
        "object": Patches(mask),
        "object + 1": Patches(mask, buffer=1),
        "rest": Patches(mask, buffer=1, outside=True),
        "circle": "circle",
        "question": "question",
        "last": "last",
        "some": [3, 5],
    }
    scores = patch(model, clean, corrupt, "resid_pre", ("layer", "group"), at=at, metric=recovery(), progress=False)
    assert scores.labels["group"] == tuple(at) and scores.unit == "recovered"
    roles = clean.roles_of()
    for buffer in (0, 1, 2):
        wanted = roles.patch_positions()[roles.patches_of_mask(mask, buffer=buffer)].tolist()
        one = patch(
            model, clean, corrupt, "resid_pre", "layer", at=Patches(mask, buffer), metric=recovery(), progress=False
        )
        same = patch(model, clean, corrupt, "resid_pre", "layer", at=wanted, metric=recovery(), progress=False)
        assert torch.equal(one.values, same.values)
    default = patch(model, clean, corrupt, "resid_pre", ("layer", "group"), metric=recovery(), progress=False)
    assert default.labels["group"] == ("system", "image", "question", "template", "last")
    image, last = default.labels["group"].index("image"), default.labels["group"].index("last")
    assert float(default.values[0, image]) == pytest.approx(1, abs=1e-4)  # the pictures are all that differs
    assert float(default.values[-1, last]) > 0.9 and float(default.values[0, last]) == 0
    positions = patch(model, clean, corrupt, "resid_pre", metric=recovery(), at="image", progress=False)
    assert positions.over_image().values.shape == (4, 8, 8)
    patches = patch(model, clean, corrupt, "resid_pre", ("layer", "patch"), metric=recovery(), progress=False)
    assert torch.equal(positions.over_image().values, patches.values)


def test_a_grid_of_patches_is_a_mask_too(tiny):
    model, _, clean, corrupt, _ = tiny
    grid = np.zeros((8, 8), bool)
    grid[2, 3] = True
    how: Any = dict(metric=recovery(), progress=False)
    one = patch(model, clean, corrupt, "resid_pre", "layer", at=Patches(grid), **how)
    every = patch(model, clean, corrupt, "resid_pre", ("layer", "patch"), **how)
    torch.testing.assert_close(one.values, every.values[:, 2, 3], rtol=0, atol=1e-6)


def test_an_answer_of_several_words(tiny):
    model, scene, _, _, other = tiny
    asked = "What is the color of the circle?"
    both: Any = [model.prepare(asked, each.image) for each in (scene, other)]
    color = scene.objects[0].color
    scores = patch(
        model, both[0], both[1], "resid_pre", ("layer", "group"), metric=log_prob(f"{color} circle"), progress=False
    )
    given = [model.prepare(asked, each.image, answer=color) for each in (scene, other)]
    with torch.no_grad():
        log_p = [model(each).log_softmax(-1)[0] for each in given]
    first, second = (model.to_single_token(word) for word in (color, "circle"))
    wanted = [float(p[-2, first] + p[-1, second]) for p in log_p]
    assert [scores.method["clean"], scores.method["corrupt"]] == pytest.approx(wanted, rel=1e-5)
    assert scores.method["answer"] == f"{color} circle" and scores.labels["group"][-1] == "last"


def test_results_say_what_they_are(tiny):
    model, scene, clean, corrupt, _ = tiny
    scores = patch(model, clean, corrupt, "z", ("layer", "head"), at="last", progress=False)
    assert scores.unit == "nats" and scores.method["answer"] == scene.objects[0].color
    assert {"clean", "corrupt", "baseline", "noise_floor", "cells", "ran", "path", "direction"} <= set(scores.method)
    assert scores.method["baseline"] == scores.method["corrupt"] and scores.method["cells"] == 32
    assert 0 <= scores.method["noise_floor"] < 1e-4
    assert Scores.from_json(scores.to_json()).method == scores.method
    assert "shortened runs" in repr(scores)


def test_back_patching_takes_late_states_to_early_layers():
    model, clean, _ = pair()
    scores = back_patch(model, clean, sources=[1, 2], targets=[0, 1], metric=logit_diff(A, B), progress=False)
    assert scores.axes == ("source", "target") and scores.labels["source"] == (1, 2)
    at = clean.slots(model.cfg)[0].nonzero()[:, 0]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean)

        def put(act, hook):
            act[0, at] = cache["resid_post", 2][0, at]

        wanted = metric(model.run_with_hooks(clean, fwd_hooks=[("blocks.1.hook_resid_pre", put)]))
    assert float(scores.values[1, 1]) == pytest.approx(float(wanted), rel=1e-11)


def test_the_users_hooks_keep_working(tiny):
    model, _, clean, corrupt, _ = tiny

    def half(act, hook):
        return act / 2

    hooks = [("blocks.0.hook_mlp_out", half)]
    scores = patch(model, clean, corrupt, "resid_pre", ("layer", "group"), fwd_hooks=hooks, progress=False)
    assert scores.method["path"].startswith("full forward passes")
    with torch.no_grad():
        logits = model.run_with_hooks(corrupt, fwd_hooks=hooks)
        token = model.to_single_token(scores.method["answer"])
    assert scores.method["corrupt"] == pytest.approx(float(logits[0, -1].log_softmax(-1)[token]), rel=1e-5)


# ---- bad input, before any long work

BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "hook": ({"hook": "resid_pr"}, UnknownHook, "nearest: 'resid_pre'"),
    "axis": ({"sweep": "layers"}, LensError, "sweep over 'layers'; nearest: 'layer'"),
    "axis of hook": ({"sweep": "head"}, LensError, "sweep over 'head' at 'resid_pre', whose axes are pos d_model"),
    "twice": ({"sweep": ("layer", "layer")}, LensError, "each axis once"),
    "two of a kind": ({"sweep": ("patch", "group")}, LensError, "one of position, patch and group"),
    "layer": ({"layers": [9]}, LensError, "layer 9; expected 0 … 3"),
    "one hook": ({"hook": "blocks.0.hook_resid_pre"}, LensError, "sweep over layers of the one hook"),
    "head": ({"hook": "z", "sweep": "head", "heads": [8]}, LensError, "head 8; expected 0 … 7"),
    "role": ({"at": "answer"}, LensError, "the prompt has no 'answer'; it has system, image"),
    "word": ({"at": "triangle"}, LensError, "'triangle' is no role"),
    "position": ({"at": [200]}, LensError, "position 200 is outside 0 … "),
    "no positions": ({"at": []}, LensError, "no positions"),
    "image": ({"hook": "vision.resid_pre", "image": 3}, LensError, "image 3"),
    "text in the tower": ({"hook": "vision.resid_pre", "at": "question"}, LensError, "text is not there"),
    "window": ({"sweep": "position", "window": 3}, LensError, "window=3 without a sweep over layers"),
    "no window": ({"window": 0}, LensError, "a window of 0 layers"),
    "direction": ({"direction": "both"}, Exception, "'denoise'.*'noise'"),
    "option": ({"progres": True}, LensError, "unknown option 'progres'; nearest: 'progress'"),
    "row": ({"row": 1}, LensError, "row 1; expected -1 … 0"),
    "vector": ({"metric": lambda z: z[0, -1]}, LensError, r"returned a tensor \[134\]; expected one number"),
    "nan": (
        {"metric": lambda z: z.sum() * float("nan")},
        LensError,
        "is nan on the clean run; expected a finite number",
    ),
    "infinite": ({"metric": lambda z: z[0, -1, 3] * float("inf")}, LensError, "expected a finite number"),
    "layers twice": ({"layers": [0, -4]}, LensError, "name one twice"),
    "bytes": ({"max_bytes": 0}, LensError, "max_bytes=0; expected a whole number of bytes"),
    "several tokens": ({"metric": logit_diff("red circle", "blue")}, LensError, "'red circle' is 2 tokens"),
    "unknown word": ({"metric": log_prob("reddish")}, LensError, "expected one that is in the vocabulary"),
    "answers": ({"metric": log_prob(["red", "blue"])}, LensError, "2 entries in answer=, 1 rows"),
    "metric": ({"metric": 3}, LensError, "metric of type int"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_raises_before_any_long_work(tiny, what, monkeypatch):
    model, _, clean, corrupt, _ = tiny
    given, kind, message = BAD[what]
    monkeypatch.setattr("llava_lens.sweep.engine.wave_logits", lambda *_: pytest.fail("it went on"))
    with pytest.raises(kind, match=message):
        patch(model, clean, corrupt, **given)


def test_inputs_that_do_not_correspond(tiny):
    model, scene, clean, corrupt, _ = tiny
    longer = model.prepare("What is the color of the small circle?".replace("small ", "red "), scene.image)
    two = model.prepare(["What is the color of the circle?"] * 2, [scene.image] * 2)
    text = model.prepare("What is the color of the circle?")
    for other, message in ((longer, "positions"), (two, "2 rows|1 rows"), (text, "positions|pictures")):
        with pytest.raises(LensError, match=message):
            patch(model, clean, other)
    with pytest.raises(LensError, match="clean of type str; expected Inputs"):
        patch(model, "What is it?", corrupt)
    with pytest.raises(LensError, match="nothing to recover"):
        patch(model, clean, clean, metric=recovery())
    moved = Inputs(clean.tokens.roll(1, -1), clean.pixels)
    with pytest.raises(LensError, match="stand at different positions"):
        check_pair(model, clean, moved)
    broken = Inputs(clean.tokens, clean.pixels * float("nan"), roles=clean.roles)
    with pytest.raises(LensError, match="not finite"):
        patch(model, clean, broken)


def test_kl_is_zero_on_the_clean_run(tiny):
    model, _, clean, corrupt, _ = tiny
    scores = patch(model, clean, corrupt, "resid_pre", ("layer", "group"), at=["image"], metric=kl(), progress=False)
    assert scores.method["clean"] == 0 and scores.method["corrupt"] > 1
    assert float(scores.values[0, 0]) == pytest.approx(0, abs=1e-5)
    assert get_act_name("resid_pre", 0) == "blocks.0.hook_resid_pre"
