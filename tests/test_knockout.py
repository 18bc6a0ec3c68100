"""Knockouts block exactly what they say, in decoder and tower; ablations put the right thing in a part's place."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from brute_force import hooked, images_before, inputs_of

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis import Patches, ablate, ask, blocked, knock_out, log_prob, logit
from llava_lens.errors import LensError
from llava_lens.sweep import hooks_of
from llava_lens.sweep.base import Base
from llava_lens.sweep.journal import digest
from llava_lens.tiny import questions, render_scene

TOKEN = 5


def last_of(inputs: Inputs, row: int) -> int:
    return inputs.n_pos - 1 if inputs.attention_mask is None else int(inputs.attention_mask[row].nonzero()[-1, 0])


def run(model: HookedLlava, inputs: Inputs, row: int, hooks: Any) -> float:
    with torch.no_grad():
        return float(model.run_with_hooks(inputs, fwd_hooks=hooks)[row, last_of(inputs, row), TOKEN])


def roles_known(model: HookedLlava, inputs: Inputs) -> Inputs:
    return inputs.with_roles(model.cfg)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("images, pad", [((1,), None), ((2, 1), "left"), ((1, 2), "right")])
def test_a_window_sweep_equals_weights_set_to_zero_by_hand(images, pad, attention):
    """By hand at the pattern instead of the scores: blocked weights zero, the others scaled up to sum to 1."""
    model = hooked("grouped", attention=attention)
    inputs = roles_known(model, inputs_of(model, "grouped", images, pad))
    how: Any = dict(metric=logit(TOKEN), progress=False)
    scores = knock_out(model, inputs, "last", "image", window=2, **how)
    for row in range(len(images)):
        keys = inputs.positions("image", row=row)
        query = last_of(inputs, row)

        def blind(pattern, hook, keys=keys, query=query, row=row):
            rest = pattern[row, :, query].index_fill(-1, keys, 0.0)
            pattern[row, :, query] = rest / rest.sum(-1, keepdim=True)

        for layer, window in enumerate([(0, 1), (1, 2), (2,)]):
            wanted = run(model, inputs, row, [(f"blocks.{at}.attn.hook_pattern", blind) for at in window])
            values = scores.values if len(images) == 1 else scores.values[row]
            assert float(values[layer]) == pytest.approx(wanted, rel=1e-9)


def test_pairs_heads_and_layers_have_their_own_axes():
    model = hooked("grouped")
    inputs = roles_known(model, inputs_of(model, "grouped", (1,), None))
    how: Any = dict(metric=logit(TOKEN), progress=False)
    first, rest = [1, 2, 3], [4, 5, 6, 7]
    scores = knock_out(
        model, inputs, "last", {"first": first, "rest": rest}, sweep=("layer", "head"), heads=[1, 3], **how
    )
    assert scores.axes == ("layer", "head", "to") and scores.labels["head"] == (1, 3)

    def blind(scores, hook):
        scores[0, 3, -1, rest] = -torch.inf

    wanted = run(model, inputs, 0, [("blocks.2.attn.hook_attn_scores", blind)])
    assert float(scores.values[2, 1, 1]) == pytest.approx(wanted, rel=1e-11)
    whole = knock_out(model, inputs, "last", first, [0, 2], **how)
    edits = blocked(model, inputs, "last", first, [0, 2])
    assert float(whole.values) == pytest.approx(run(model, inputs, 0, hooks_of(model, edits, inputs.n_pos)), rel=1e-11)
    assert whole.axes == () and whole.method["from"] == "last"


@pytest.mark.parametrize("image", [0, 1])
def test_in_the_tower(image):
    model = hooked("plain")
    inputs = roles_known(model, inputs_of(model, "plain", (1, 2), "left"))
    first = images_before(inputs, 1, model) + image
    how: Any = dict(metric=logit(TOKEN), progress=False, row=1, tower=True, image=image)
    scores = knock_out(model, inputs, "image", "class", window=1, **how)

    def blind(scores, hook):
        scores[first, :, 1:, 0] = -torch.inf

    wanted = run(model, inputs, 1, [("vision.blocks.1.attn.hook_attn_scores", blind)])
    assert float(scores.values[1]) == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_who_may_look_at_nothing_mixes_nothing(attention):
    model = hooked("attention_bias", attention=attention)
    inputs = roles_known(model, inputs_of(model, "attention_bias", (1,), None))
    scores = knock_out(model, inputs, "last", "all", 1, metric=logit(TOKEN), progress=False)
    bias = model.blocks[1].attn.b_O  # type: ignore[union-attr]

    def nothing(out, hook):
        out[0, -1] = bias

    wanted = run(model, inputs, 0, [("blocks.1.hook_attn_out", nothing)])
    assert float(scores.values) == pytest.approx(wanted, rel=1e-11)


def test_bad_knockouts():
    model = hooked("plain")
    inputs = roles_known(model, inputs_of(model, "plain", (1,), None))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"from_": "image", "to": "last"}, r"'image' \(up to position \d+\) never looks at 'last'"),
        ({"sweep": "position"}, "expected layer and head"),
        ({"heads": [7]}, "head 7; expected 0 … 3"),
        ({"layers": 9}, "layer 9; expected 0 … 2"),
        ({"window": 0}, "a window of 0 layers"),
        ({"to": "question"}, "the prompt has no 'question'"),
        ({"tower": True, "from_": "last"}, "text is not there"),
    ]
    for given, message in cases:
        with pytest.raises(LensError, match=message):
            knock_out(model, inputs, **given)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"row": 9}, "row 9; expected"),
        ({"heads": 9}, "head 9"),
        ({"from_": [2], "to": [5]}, "never looks at"),
    ]
    for given, message in refused:
        with pytest.raises(LensError, match=message):
            blocked(model, inputs, **given)
    with pytest.raises(LensError, match="has no 'image'"):
        knock_out(model, Inputs(torch.tensor([[5, 6, 7]])).with_roles(model.cfg), "last", "image")


# ---- ablation


@pytest.mark.parametrize("pad", ["left", "right"])
def test_zeros_by_head_neuron_and_image_token(pad):
    model = hooked("grouped")
    inputs = roles_known(model, inputs_of(model, "grouped", (1, 2), pad))
    how: Any = dict(metric=logit(TOKEN), progress=False, row=1)
    heads = ablate(model, inputs, "head", **how)
    assert heads.axes == ("layer", "head")

    def no_head(act, hook):
        act[1, :, 2] = 0

    wanted = run(model, inputs, 1, [("blocks.1.attn.hook_z", no_head)])
    assert float(heads.values[1, 2]) == pytest.approx(wanted, rel=1e-11)

    def no_neuron(act, hook):
        act[1, :, 9] = 0

    neurons = ablate(model, inputs, "neuron", neurons=[4, 9], **how)
    wanted = run(model, inputs, 1, [("blocks.0.mlp.hook_post", no_neuron)])
    assert float(neurons.values[0, 1]) == pytest.approx(wanted, rel=1e-11)
    at = inputs.roles_of(1).token_of(2, 1, image=1)

    def no_patch(act, hook):
        act[1, at] = 0

    patches = ablate(model, inputs, "image", image=1, **how)
    assert float(patches.values[2, 1]) == pytest.approx(run(model, inputs, 1, [("hook_embed", no_patch)]), rel=1e-11)
    mlp = ablate(model, inputs, "vision.mlp_out", sweep="layer", **how)
    first = images_before(inputs, 1, model)

    def no_mlp(act, hook):
        act[first] = 0

    wanted = run(model, inputs, 1, [("vision.blocks.0.hook_mlp_out", no_mlp)])
    assert float(mlp.values[0]) == pytest.approx(wanted, rel=1e-11)


def test_means_and_resamples_come_from_the_reference():
    torch.set_num_threads(1)
    model = HookedLlava.tiny(dtype=torch.float64)
    scenes = [render_scene(seed) for seed in range(2_000_000, 2_000_004)]
    asked = [next(q.text for q in questions(s) if q.text.startswith("What is the color")) for s in scenes]
    inputs = model.prepare(asked[0], scenes[0].image)
    others = model.prepare(asked[1:], [s.image for s in scenes[1:]])
    with torch.no_grad():
        _, cache = model.run_with_cache(others, names_filter=lambda n: n.endswith("attn.hook_z"))
    token = 7
    how: Any = dict(metric=logit(token), reference=others, progress=False)
    mean = ablate(model, inputs, "head", "mean", **how)
    labels = inputs.roles_of().labels
    z = cache["z", 1]

    def averaged(act, hook):
        for position, label in enumerate(labels):
            same = [i for i, other in enumerate(others.roles_of(0).labels) if other == label]
            same = [position] if label == "image" else same  # a patch's own, else all of the role
            act[0, position, 3] = z[:, same, 3].mean((0, 1))

    with torch.no_grad():
        wanted = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_z", averaged)])[0, -1, token]
    assert float(mean.values[1, 3]) == pytest.approx(float(wanted), rel=1e-11)

    drawn = ablate(model, inputs, "head", "resample", repeats=8, seed=3, **how)
    possible = []
    for i in range(3):

        def swapped(act, hook, i=i):
            act[0, :, 3] = z[i, :, 3]

        with torch.no_grad():
            out = model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_z", swapped)])
        possible.append(float(out[0, -1, token]))
    seeds = [int(digest(3, 0, k), 16) for k in range(8)]
    chosen = [int(torch.randint(3, (1,), generator=torch.Generator().manual_seed(seed))) for seed in seeds]
    assert float(drawn.values[1, 3]) == pytest.approx(sum(possible[i] for i in chosen) / 8, rel=1e-11)
    assert drawn.low is not None and bool((drawn.low <= drawn.values).all())


def test_an_answer_of_several_tokens_follows_the_references_too():
    torch.set_num_threads(1)
    model = HookedLlava.tiny()
    scenes = [render_scene(seed) for seed in range(2_000_000, 2_000_003)]
    asked = "What is the color of the square?"
    inputs, others = model.prepare(asked, scenes[0].image), model.prepare([asked] * 2, [s.image for s in scenes[1:]])
    for by in ("mean", "resample"):
        how: Any = dict(by=by, reference=others, metric=log_prob("red circle"), progress=False)
        assert bool(ablate(model, inputs, "mlp", **how).values.isfinite().all())


def test_windows_reach_over_all_layers_whichever_are_chosen():
    model = hooked("plain")
    inputs = roles_known(model, inputs_of(model, "plain", (1,), None))
    how: Any = dict(metric=logit(TOKEN), progress=False)
    some, every = (ablate(model, inputs, "mlp", layers=layers, window=3, **how) for layers in ([1], None))
    assert float(some.values[0]) == pytest.approx(float(every.values[1]), rel=1e-12)
    some, every = (knock_out(model, inputs, layers=layers, window=2, **how) for layers in ([1], None))
    assert float(some.values[0]) == pytest.approx(float(every.values[1]), rel=1e-12)


def test_noise_is_the_same_for_every_cell_and_seeded():
    model = hooked("plain")
    inputs = roles_known(model, inputs_of(model, "plain", (1,), None))
    how: Any = dict(metric=logit(TOKEN), by="noise", progress=False)
    one, same, other = (ablate(model, inputs, "mlp", seed=seed, **how) for seed in (1, 1, 2))
    assert torch.equal(one.values, same.values) and not torch.equal(one.values, other.values)
    by_position = ablate(model, inputs, "mlp_out", sweep="position", layers=[1], at=[4], seed=1, **how)
    at_once = ablate(model, inputs, "mlp_out", sweep=(), layers=[1], at=[4], seed=1, **how)
    assert float(by_position.values[4]) == float(at_once.values)


def test_bad_ablations():
    model = hooked("plain")
    inputs = roles_known(model, inputs_of(model, "plain", (1,), None))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"by": "mean"}, "reference of type NoneType; expected Inputs"),
        ({"by": "zero", "repeats": 3}, "nothing is drawn"),
        ({"by": "noise", "sigma": 0.0}, "sigma=0.0; expected more than 0"),
        ({"by": "noise", "repeats": 0}, "expected 1 or more"),
        ({"part": "haed"}, "no hook is called 'haed'"),
        ({"by": "mean", "reference": Inputs(torch.tensor([[5, 6, 7]]))}, "the reference has no 'image' position"),
        ({"by": "resample", "reference": Inputs(torch.tensor([[5, 6, 7]]))}, "with other roles"),
    ]
    for given, message in cases:
        with pytest.raises(LensError, match=message):
            ablate(model, inputs, **given)


# ---- many questions


@pytest.mark.parametrize("odd", ["plain", "grouped", "rope_dynamic"])
def test_questions_on_one_picture_give_the_logits_of_single_runs(odd):
    model = hooked(odd)
    one = inputs_of(model, odd, (1,), None)
    each = [Inputs(torch.cat((one.tokens, torch.tensor([[7 + i] * (1 + i)])), 1), one.pixels) for i in range(4)]
    each.append(inputs_of(model, odd, (2,), None, seed=5))
    found = ask(model, each)
    with torch.no_grad():
        wanted = torch.stack([model(inputs)[0, -1] for inputs in each])
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    batch = inputs_of(model, odd, (2, 1, 0), "left")
    with torch.no_grad():
        torch.testing.assert_close(ask(model, batch), model(batch)[:, -1], rtol=1e-11, atol=1e-11)


def test_asking_holds_on_to_one_run_at_a_time():
    model = hooked("plain")
    one = inputs_of(model, "plain", (1,), None)
    with pytest.raises(LensError, match="no prompt to ask"):
        ask(model, [])
    alive: list[int] = []
    runs: list[Any] = []
    original = Base.logits

    def counted(self, places):
        runs.append(weakref.ref(self))
        alive.append(sum(run() is not None for run in runs))
        return original(self, places)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Base, "logits", counted)
        ask(model, [Inputs(torch.cat((one.tokens, torch.tensor([[7 + i]])), 1), one.pixels) for i in range(6)])
    assert max(alive) <= 3


def test_the_picture_is_encoded_once(monkeypatch):
    model = hooked("plain")
    one = inputs_of(model, "plain", (1,), None)
    each = [Inputs(torch.cat((one.tokens, torch.tensor([[7 + i]])), 1), one.pixels) for i in range(3)]
    calls = []
    encode = HookedLlava.encode_image
    monkeypatch.setattr(HookedLlava, "encode_image", lambda self, pixels: calls.append(1) or encode(self, pixels))
    ask(model, each)
    assert len(calls) == 1


def test_a_study_of_several_questions_encodes_their_picture_once(monkeypatch):
    torch.set_num_threads(1)
    model, scene = HookedLlava.tiny(dtype=torch.float64), render_scene(2_000_007)
    asked = [q.text for q in questions(scene) if q.text.startswith("What is the color")][:3]
    inputs = model.prepare(asked, scene.image)
    alone = [ablate(model, inputs, metric=logit(TOKEN), row=i, progress=False) for i in range(len(asked))]
    calls = []
    encode = HookedLlava.encode_image
    monkeypatch.setattr(HookedLlava, "encode_image", lambda self, pixels: calls.append(1) or encode(self, pixels))
    monkeypatch.setattr("llava_lens.sweep.sites.FRONT_SEAMS", ())
    together = ablate(model, inputs, metric=logit(TOKEN), progress=False)
    assert len(asked) == 3 and len(calls) == 1
    torch.testing.assert_close(
        together.values, torch.stack([scores.values for scores in alone]), rtol=1e-12, atol=1e-12
    )


# ---- what it shows on the embedded model


def test_taking_the_asked_object_away_changes_the_answer_and_another_does_not():
    torch.set_num_threads(1)
    model = HookedLlava.tiny()
    gone: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(2_000_000, 2_000_012):
        scene = render_scene(seed)
        asked = [q for q in questions(scene) if q.text.startswith("What is the color") and q.about is not None]
        if len(scene.objects) < 2 or not asked or asked[0].about is None:
            continue
        inputs = model.prepare(asked[0].text, scene.image)
        about = asked[0].about[0]
        for own, i in ((True, about), (False, (about + 1) % len(scene.objects))):
            where = Patches(scene.objects[i].mask, buffer=0)
            drop = ablate(model, inputs, "image", at=where, sweep=(), metric="prob", progress=False)
            gone[own].append(drop.method["clean"] - float(drop.values))
    assert len(gone[True]) >= 8
    assert sum(gone[True]) / len(gone[True]) > 0.5 + sum(gone[False]) / len(gone[False])
