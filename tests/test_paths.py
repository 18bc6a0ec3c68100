"""Path patching equals two full runs: one with everything else frozen, whose receivers' inputs the other is given."""

from __future__ import annotations

import inspect
import random
from functools import cache
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.paths import path_patch, spelled
from llava_lens.errors import LensError
from llava_lens.hooks import reader
from llava_lens.sweep import logit_diff
from llava_lens.tiny import questions, render_scene

SHAPES: dict[str, tuple[tuple[int, ...], str | None]] = {
    "text": ((0,), None),
    "left": ((2, 0, 1), "left"),
    "right": ((1, 1), "right"),
}
WEIGHTS = torch.randn(97, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def last(logits: Tensor) -> Tensor:
    """A number that every logit of the last position moves."""
    return (logits[0, -1] * WEIGHTS).sum()


def everywhere(logits: Tensor) -> Tensor:
    """The same of all positions."""
    return (logits[0] * WEIGHTS).sum() / logits.shape[1]


def pair(model: HookedLlava, odd: str, shape: str) -> tuple[Inputs, Inputs]:
    """Two inputs with the same places, other words and other pictures."""
    images, pad = SHAPES[shape]
    one = inputs_of(model, odd, images, pad)
    tokens = one.tokens.clone()
    words = (tokens != model.cfg.image_token_id) & (one.attention_mask.bool() if one.attention_mask is not None else 1)
    chosen = words & (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(3)) < 0.4)
    tokens[chosen] = (tokens[chosen] + 11) % 89
    pixels = None if one.pixels is None else one.pixels.flip(-1)
    return one, Inputs(tokens, pixels, one.attention_mask)


@torch.no_grad()
def two_runs(
    model: HookedLlava, base: Inputs, source: Inputs, row: int, sender: Any, pos: list[int], receivers: list[Any]
) -> Tensor:
    """Logits of the base batch with the direct paths from a sender patched; hooks alone, nothing of the library's."""
    parts = ("attn.hook_z", "hook_attn_out", "hook_mlp_out")
    names = ["hook_embed", *(f"blocks.{i}.{part}" for i in range(model.cfg.n_layers) for part in parts)]
    held, said = (model.run_with_cache(inputs, names_filter=names)[1] for inputs in (base, source))
    layer, part = sender if isinstance(sender, tuple) else (None, sender)
    freeze = []

    def put(name: str, select: tuple[Any, ...] = ()) -> None:
        def fn(act: Tensor, hook: Any) -> Tensor:
            new = held[name].clone()
            new[(row, pos, *select)] = said[name][(row, pos, *select)]
            return new

        freeze.append((name, fn))

    def hold(name: str) -> None:
        freeze.append((name, lambda act, hook: held[name].clone()))

    for i in range(model.cfg.n_layers):
        z, attn, mlp = f"blocks.{i}.attn.hook_z", f"blocks.{i}.hook_attn_out", f"blocks.{i}.hook_mlp_out"
        put(z, (part,)) if layer == i and isinstance(part, int) else hold(z)
        put(attn) if (layer, part) == (i, "attn") else None
        put(mlp) if (layer, part) == (i, "mlp") else hold(mlp)
    if sender == "embed":
        put("hook_embed")
    final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    where = {}
    for receiver in receivers:
        kind = receiver if receiver == "logits" else receiver[-1]
        where[receiver] = {"logits": final, "mlp": f"blocks.{receiver[0]}.hook_mlp_in"}.get(
            kind, f"blocks.{receiver[0]}.attn.hook_{kind}"
        )
    with model.hooks(fwd_hooks=freeze):
        inputs_heard = model.run_with_cache(base, names_filter=list(where.values()))[1]
    before = model.run_with_cache(base, names_filter=[final])[1][final]

    def give(receiver: Any) -> Any:
        def fn(act: Tensor, hook: Any) -> Tensor:
            new, heard = act.clone(), inputs_heard[where[receiver]]
            if receiver == "logits":
                new[row] = act[row] + (heard - before)[row]
            elif receiver[-1] == "mlp":
                new[row] = heard[row]
            else:
                new[row, :, receiver[1]] = heard[row, :, receiver[1]]
            return new

        return where[receiver], fn

    return model.run_with_hooks(base, fwd_hooks=[give(receiver) for receiver in receivers])[row]


def seen(inputs: Inputs, row: int) -> list[int]:
    return torch.ones_like(inputs.tokens[row]).nonzero()[:, 0].tolist() if inputs.attention_mask is None else (
        inputs.attention_mask[row].nonzero()[:, 0].tolist())  # fmt: skip


def some_receivers(model: HookedLlava, rng: random.Random) -> list[Any]:
    cfg = model.cfg
    kv = cfg.n_key_value_heads
    each = [(layer, head, "q") for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    each += [(layer, head, kind) for layer in range(cfg.n_layers) for head in range(kv) for kind in "kv"]
    each += [(layer, "mlp") for layer in range(cfg.n_layers)] * 4
    return list(dict.fromkeys(rng.choices(each, k=3))) + (["logits"] if rng.random() < 0.4 else [])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("odd", ["grouped", "attention_bias", "mlp_bias", "wide_grouped_heads"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_heads_and_mlps_equal_two_full_runs(odd, shape, direction):
    model = hooked(odd)
    clean, corrupt = pair(model, odd, shape)
    base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
    rng = random.Random(f"{odd} {shape} {direction}")
    n = model.cfg.n_layers
    for senders in ([(layer, head) for layer in range(n) for head in range(2)],
                    [(layer, kind) for layer in range(n) for kind in ("mlp", "attn")] + ["embed"]):  # fmt: skip
        row, receivers = rng.randrange(clean.batch_size), some_receivers(model, rng)
        if receivers == [r for r in receivers if r[0] == 0 and r[-1] in "qkv"]:
            receivers.append((2, 1, "v"))
        columns = seen(clean, row)
        at = sorted({*rng.sample(columns, 4), columns[-1]}) if rng.random() < 0.5 else None
        metric = rng.choice([last, everywhere])
        how: Any = dict(senders=senders, at=at, metric=metric, row=row, progress=False, direction=direction)
        scores = path_patch(model, clean, corrupt, receivers, **how)
        assert scores.axes == ("sender",) and scores.labels["sender"] == tuple(map(spelled, senders))
        end = columns[-1] + 1
        truth = [two_runs(model, base, source, row, s, at or columns, receivers)[columns[0] : end] for s in senders]
        expected = torch.stack([metric(each[None]) for each in truth])
        assert (scores.values - expected).abs().max() < 1e-12, (receivers, at, row)
        assert float(scores.values.std()) > 1e-4
        full = path_patch(model, clean, corrupt, receivers, full=True, **how)
        assert (full.values - expected).abs().max() < 1e-12


def test_a_wide_sender_is_the_sum_of_its_heads():
    """Without the axis head a layer's heads send together: attention without its bias, which cancels."""
    model = hooked("attention_bias")
    clean, corrupt = pair(model, "attention_bias", "left")
    how: Any = dict(metric=last, row=0, progress=False)
    receivers = ["L1 mlp", "L2H1 k", "logits"]
    heads = path_patch(model, clean, corrupt, receivers, sweep="layer", **how)
    whole = path_patch(model, clean, corrupt, receivers, senders="attn", **how)
    assert heads.axes == whole.axes == ("layer",) and (heads.values - whole.values).abs().max() < 1e-12


def test_several_rows_and_positions():
    model = hooked("grouped")
    clean, corrupt = pair(model, "grouped", "left")
    scores = path_patch(model, clean, corrupt, ["L2H3 q", "logits"], metric=last, progress=False)
    assert scores.axes == ("batch", "layer", "head") and scores.values.shape == (3, 3, 4)
    assert scores.method["receivers"] == ["L2H3 q", "logits"] and max(scores.method["noise_floor"]) < 1e-12
    one = path_patch(model, clean, corrupt, [(2, 3, "q"), "logits"], metric=last, progress=False, row=1)
    assert torch.equal(one.values, scores.values[1])
    columns = seen(clean, 1)
    where = path_patch(model, clean, corrupt, ["L2 mlp"], senders=["L1H2", "embed"], sweep=("sender", "position"),
                       at=columns[3:6], metric=last, row=1, progress=False)  # fmt: skip
    assert where.axes == ("sender", "position") and int(where.values.isfinite().sum()) == 6
    truth = two_runs(model, corrupt, clean, 1, (1, 2), [columns[4]], [(2, "mlp")])
    assert abs(float(where.values[0, columns[4]]) - float(last(truth[None]))) < 1e-12


def test_a_sender_with_no_receiver_behind_it_leaves_the_baseline():
    model = hooked("grouped")
    clean, corrupt = pair(model, "grouped", "left")
    scores = path_patch(model, clean, corrupt, ["L1H1 v"], metric=last, row=0, progress=False)
    assert (scores.values[0] != scores.method["baseline"]).all() and scores.method["ran"] == 4
    assert (scores.values[1:] == scores.method["baseline"]).all()
    mlps = path_patch(model, clean, corrupt, ["L1 mlp"], metric=last, row=0, senders="mlp", progress=False)
    assert mlps.values[0] != mlps.method["baseline"] and (mlps.values[1:] == mlps.method["baseline"]).all()
    heads = path_patch(model, clean, corrupt, ["L1 mlp"], metric=last, row=0, progress=False)
    assert (heads.values[:2] != heads.method["baseline"]).all()


def test_a_file_of_other_senders_is_refused(tmp_path):
    """The values are made late, so what tells them apart is their name."""
    model = hooked("grouped")
    clean, corrupt = pair(model, "grouped", "text")
    how: Any = dict(metric=last, progress=False, file=tmp_path / "paths.safetensors")
    first = path_patch(model, clean, corrupt, ["L2H0 q"], senders=["L0H1"], **how)
    assert torch.equal(path_patch(model, clean, corrupt, ["L2H0 q"], senders=[(0, 1)], **how).values, first.values)
    with pytest.raises(LensError, match="holds another sweep"):
        path_patch(model, clean, corrupt, ["L2H0 q"], senders=["L0H2"], **how)


def test_hooks_elsewhere_are_held_and_those_between_refused():
    model = hooked("grouped")
    clean, corrupt = pair(model, "grouped", "left")

    def mute(z: Tensor, hook: Any) -> Tensor:
        z[:, :, 1] = 0
        return z

    how: Any = dict(metric=last, row=0, progress=False)
    muted = path_patch(model, clean, corrupt, ["logits"], fwd_hooks=[("blocks.1.attn.hook_z", mute)], **how)
    assert muted.values[1, 1] == muted.method["baseline"] and muted.values[1, 2] != muted.method["baseline"]
    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_z", mute)]):
        batch = {"base": corrupt, "source": clean, "row": 0, "pos": seen(clean, 0), "receivers": ["logits"]}
        truth = two_runs(model, sender=(2, 0), **batch)
    assert abs(float(muted.values[2, 0]) - float(last(truth[None]))) < 1e-12
    for name in ("blocks.0.hook_resid_post", "blocks.2.ln1.hook_scale", "blocks.2.attn.hook_q"):
        with pytest.raises(LensError, match=rf"a hook on '{name}', which lies between"):
            path_patch(model, clean, corrupt, ["L2H1 q"], fwd_hooks=[(name, reader(lambda act, hook: None))], **how)


@pytest.mark.parametrize(
    ("receivers", "how", "message"),
    [
        ([], {}, "no receiver; expected 'L3H5 q'"),
        (["L2H1"], {}, r"receiver 'L2H1'; expected 'L3H5 q' \(or k, v\)"),
        (["L2 q"], {}, "receiver 'L2 q'; expected"),
        (["logit"], {}, "receiver 'logit'; nearest: 'logits'"),
        (["L3 mlp"], {}, r"layer 3; expected 0 … 2"),
        ([(2, 4, "q")], {}, r"receiver \(2, 4, 'q'\): head 4; expected 0 … 3$"),
        (["L2H2 k"], {}, r"head 2; expected 0 … 1: keys and values are numbered by their own heads, each shared by 2"),
        (["L0H1 q"], {}, "no sender comes before L0H1 q"),
        (["L1 mlp"], {"senders": ["L1 mlp", "L2H1"]}, "no sender comes before L1 mlp"),
        (["logits"], {"senders": "heads"}, "sender 'heads'; nearest: 'head'"),
        (["logits"], {"senders": []}, "no sender; expected one or more"),
        (["logits"], {"senders": ["L1"]}, "sender 'L1'; expected 'L3H5'"),
        (["logits"], {"senders": ["L1H1 q"]}, "sender 'L1H1 q'; expected"),
        (["logits"], {"senders": [(1, 7)]}, r"sender \(1, 7\): head 7; expected 0 … 3"),
        (["logits"], {"senders": [(1, 2)], "sweep": "position"}, "expected \\('sender', …\\)"),
        (["logits"], {"sweep": ("layer", "neuron", "heads")}, "sweep over 'heads'"),
        (["logits"], {"at": 99}, "position 99 is outside"),
    ],
    ids=str,
)
def test_wrong_asking_raises_before_anything_runs(receivers: Any, how: dict[str, Any], message: str):
    model = hooked("grouped")
    clean, corrupt = pair(model, "grouped", "text")
    runs, asked = model.n_runs, {"metric": last, "progress": False} | how
    with pytest.raises(LensError, match=message):
        path_patch(model, clean, corrupt, receivers, **asked)
    assert model.n_runs == runs


def test_an_unknown_direction_raises():
    model = hooked("grouped")
    with pytest.raises(LensError, match="direction='up'; expected 'denoise' or 'noise'"):
        inspect.unwrap(path_patch)(model, *pair(model, "grouped", "text"), ["logits"], direction="up")


# ---- on the trained model


@cache
def recolored(n: int = 6) -> tuple[HookedLlava, Inputs, Inputs, list[str], list[str]]:
    """Pairs of scenes that differ in the colour that is asked for."""
    model, asked, seed = HookedLlava.tiny(), [], 1_050_000
    while len(asked) < n:
        scene = render_scene(seed)
        seed += 1
        colors = [q for q in questions(scene) if q.kind == "color" and q.text.startswith("What is")]
        if colors:
            thing = colors[0].about[0]  # type: ignore[index]
            other = "green" if scene.objects[thing].color != "green" else "blue"
            asked.append((colors[0].text, scene, scene.recolored(thing, other), colors[0].answer, other))
    texts, one, two, right, wrong = map(list, zip(*asked, strict=True))
    pictures = [[scene.image for scene in scenes] for scenes in (one, two)]
    return model, model.prepare(texts, pictures[0]), model.prepare(texts, pictures[1]), right, wrong


def ranks(values: Tensor) -> Tensor:
    return values.flatten().argsort().argsort().double()


@torch.no_grad()
def test_the_direct_effect_of_heads_ranks_them_as_their_direct_logit_attribution():
    """Both ask what a head adds to the answer's logit; they differ in the final norm's scale alone."""
    model, clean, corrupt, right, wrong = recolored()
    metric = logit_diff(right, wrong)
    scores = path_patch(model, clean, corrupt, ["logits"], metric=metric, direction="noise", progress=False)
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)] + ["ln_final.hook_scale"]
    one, two = (model.run_with_cache(inputs, names_filter=names)[1] for inputs in (clean, corrupt))
    blocks: Any = model.blocks
    agreements = []
    for row, (a, b) in enumerate(zip(right, wrong, strict=True)):
        W_U = model.unembed.weight[[model.to_single_token(word) for word in (a, b)]] * model.ln_final.weight
        direction = (W_U[0] - W_U[1]) / one["ln_final.hook_scale"][row, -1]
        lost = torch.stack([
            torch.einsum("hd,hdm,m->h", (two[name] - one[name])[row, -1], block.attn.W_O, direction)
            for name, block in zip(names, blocks, strict=False)
        ])  # fmt: skip
        effect = scores.values[row] - scores.method["baseline"][row]
        agreements.append(float(torch.corrcoef(torch.stack((ranks(effect), ranks(lost))))[0, 1]))
        strongest = [set(each.flatten().argsort()[:5].tolist()) for each in (effect, lost)]
        assert len(strongest[0] & strongest[1]) >= 4, row
    # the scale moves the many heads with next to no effect against each other, so the ranks agree, but not quite
    assert min(agreements) > 0.9, agreements
