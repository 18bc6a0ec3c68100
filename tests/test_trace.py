"""Causal tracing against full runs with plain hooks, written apart from the engine; and what it shows in known scenes.

Tolerance: both ways add the same numbers in another order, in float64.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from random_models import IMAGE, hf_llava
from scipy.ndimage import gaussian_filter
from word_tokenizer import word_tokenizer

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.intervals import bootstrap
from llava_lens.analysis.interventions.corruptions import (
    Corruption,
    blur,
    gaussian,
    mean_embedding,
    multiplicative,
    pair,
    resample,
    text_swap,
)
from llava_lens.analysis.interventions.trace import causal_trace
from llava_lens.analysis.interventions.where import Patches
from llava_lens.errors import LensError
from llava_lens.sweep import Edit, recovery
from llava_lens.sweep.journal import digest
from llava_lens.tiny import questions, render_scene

QUIET: Any = {"progress": False}
PLAIN = ("gaussian", "multiplicative", "mean", "mean of others", "resample", "own")
"""Corruptions of the embedding."""
OTHER = ("pair", "pictures", "blur", "blur one", "swap")
"""Corruptions that are another prompt."""


def drawn(seed: int, row: int, repeat: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(digest(seed, row, repeat), 16))


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Slow:
    """One corruption the slow way: on a whole padded batch, by a hook on the embedding or as other inputs."""

    def __init__(self, kind: str, odd: str, images: tuple[int, ...], pad: str | None):
        self.kind, self.model = kind, hooked(odd)
        if kind == "swap":
            self.model = HookedLlava.from_hf(hf_llava(odd), word_tokenizer()).to(torch.float64)
        self.inputs = inputs_of(self.model, odd, images, pad)
        self.others = [inputs_of(self.model, odd, images, pad, seed=seed) for seed in (3, 4)]
        with torch.no_grad():
            self.clean_logits, self.clean = self.model.run_with_cache(self.inputs)
            self.other_embeds = [self.model.run_with_cache(other)[1]["hook_embed"] for other in self.others]

    @property
    def given(self) -> Corruption:
        swap = {f"w{self.word(row)}": "w7" for row in range(len(self.inputs.tokens))}
        return {
            "gaussian": gaussian(2.0),
            "multiplicative": multiplicative(0.7, at="text"),
            "mean": mean_embedding(),
            "mean of others": mean_embedding(at="all", reference=self.others),
            "resample": resample(self.others),
            "own": Own(),
            "pair": pair(self.others[0]),
            "pictures": resample(self.others[1], at=None),
            "blur": blur(1.5),
            "blur one": blur(1.5, image=0),
            "swap": text_swap(swap),
        }[self.kind]

    def word(self, row: int) -> int:
        """The word behind a row's pictures."""
        return int(self.inputs.tokens[row, self.columns(row)[-3]])

    def columns(self, row: int) -> list[int]:
        assert self.inputs.attention_mask is not None
        return self.inputs.attention_mask[row].nonzero()[:, 0].tolist()

    def slots(self, row: int, of: Inputs | None = None) -> list[int]:
        return ((of or self.inputs).tokens[row] == IMAGE).nonzero()[:, 0].tolist()

    def corrupt(self, row: int, repeat: int, seed: int) -> tuple[Inputs, list[Any]]:
        """Inputs and hooks of the corrupt run."""
        at, embed, generator = self.slots(row), self.clean["hook_embed"], drawn(seed, row, repeat)
        every = self.columns(row)
        text = [column for column in every if column not in at]
        new = embed[row].clone()
        if self.kind == "gaussian":
            noise, n = torch.randn(len(at), embed.shape[-1], generator=generator), self.model.cfg.tokens_per_image
            for i, column in enumerate(at):
                mine = at[i // n * n : i // n * n + n]
                new[column] += 2.0 * embed[row, mine].flatten().std() * noise[i].double()
        elif self.kind == "multiplicative":
            new[text] *= 1 + 0.7 * torch.randn(len(text), embed.shape[-1], generator=generator).double()
        elif self.kind == "mean":
            new[at] = embed[row, at].mean(0)
        elif self.kind == "mean of others":
            seen = self.inputs.attention_mask == 1
            new[every] = torch.cat([each[seen] for each in self.other_embeds]).mean(0)
        elif self.kind == "resample":
            new[at] = self.other_embeds[int(torch.randint(2, (1,), generator=generator))][row, at]
        elif self.kind == "own":
            new[at[:4]] = -new[at[:4]]
        else:
            return self.other_inputs(row), []

        def fn(act: torch.Tensor, hook: Any) -> torch.Tensor:
            out = act.clone()
            out[row] = new
            return out

        return self.inputs, [("hook_embed", fn)]

    def other_inputs(self, row: int) -> Inputs:
        tokens, pixels = self.inputs.tokens.clone(), self.inputs.pixels
        assert pixels is not None
        if self.kind == "pair":
            return self.others[0]
        if self.kind == "pictures":
            return replace(self.inputs, pixels=self.others[1].pixels)
        if self.kind == "swap":
            words = [self.word(each) for each in range(len(tokens))]
            return replace(self.inputs, tokens=torch.where(torch.isin(tokens, torch.tensor(words)), 7, tokens))
        first = int((self.inputs.tokens[:row] == IMAGE).sum()) // self.model.cfg.tokens_per_image
        blurred = pixels.clone()
        for i in range(first, first + 1 if self.kind == "blur one" else len(pixels)):
            for channel in range(3):
                sharp = pixels[i, channel].numpy()
                blurred[i, channel] = torch.from_numpy(gaussian_filter(sharp, 1.5, mode="nearest", truncate=4.0))
        return replace(self.inputs, pixels=blurred)

    def value(self, row: int, repeat: int, restored: list[tuple[str, Any]], seed: int = 0) -> torch.Tensor:
        """The clean answer's log-probability with parts (hook, index into the row's activation) from the clean run."""
        inputs, hooks = self.corrupt(row, repeat, seed)
        for name, index in restored:
            hooks.append((name, self.restoring(row, index)))
        with torch.no_grad():
            logits = self.model.run_with_hooks(inputs, fwd_hooks=hooks)
        last = self.columns(row)[-1]
        return logits[row, last].log_softmax(-1)[self.clean_logits[row, last].argmax()]

    def restoring(self, row: int, index: Any) -> Any:
        def fn(act: torch.Tensor, hook: Any) -> torch.Tensor:
            own = row if not hook.name.startswith(("vision.", "projector.")) else self.picture(row)
            out = act.clone()
            out[own][index] = self.clean[hook.name][own][index]
            return out

        return fn

    def picture(self, row: int) -> int:
        """The number of a row's first picture."""
        return int((self.inputs.tokens[:row] == IMAGE).sum()) // self.model.cfg.tokens_per_image


class Own(Corruption):
    """A user's own: the first patches upside down."""

    def __call__(self, model: Any, row: Any, generator: torch.Generator) -> tuple[Edit, ...]:
        at = row.slots(model)[0][:4]
        return (Edit("hook_embed", -1.0, "multiply", pos=at),)


CASES = [
    ("plain", (1, 2), "left"),
    ("full", (2, 1), "left"),
    ("grouped", (1, 1), "right"),
    ("layer_list", (2, 2), "left"),
]


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
@pytest.mark.parametrize(("odd", "images", "pad"), CASES)
def test_every_cell_is_a_full_run(kind, odd, images, pad):
    slow = Slow(kind, odd, images, pad)
    n = 2 if slow.given.drawn else 1
    rng = random.Random(f"{kind} {odd}")
    layer = rng.randrange(slow.model.cfg.n_layers)
    traced = causal_trace(slow.model, slow.inputs, slow.given, "resid_mid", layers=[layer], repeats=2, **QUIET)
    assert traced.axes == ("batch", "layer", "position") and traced.method["repeats"] == n
    for row in range(2):
        corrupts = [slow.value(row, repeat, []) for repeat in range(n)]
        close(torch.tensor(traced.method["corrupt_each"][row], dtype=torch.float64), torch.stack(corrupts))
        for column in rng.sample(slow.columns(row), 3):
            values = [slow.value(row, r, [(f"blocks.{layer}.hook_resid_mid", column)]) for r in range(n)]
            close(traced.values[row, 0, column], torch.stack(values).mean())


@pytest.mark.parametrize("kind", ["gaussian", "pair", "blur"])
@pytest.mark.parametrize(("hook", "full"), [("attn_out", "hook_attn_out"), ("mlp_out", "hook_mlp_out")])
def test_a_window_restores_its_layers_together(kind, hook, full):
    slow = Slow(kind, "plain", (1, 2), "left")
    at = slow.slots(1)[3]
    traced = causal_trace(slow.model, slow.inputs, slow.given, hook, window=2, at=at, repeats=1, row=1, **QUIET)
    assert traced.low is None
    for layer, window in enumerate(([0, 1], [1, 2], [2])):
        close(traced.values[layer, at], slow.value(1, 0, [(f"blocks.{i}.{full}", at) for i in window]))
    wide = causal_trace(slow.model, slow.inputs, slow.given, hook, ["layer"], window=10, repeats=1, row=1, **QUIET)
    close(wide.values[1], slow.value(1, 0, [(f"blocks.{i}.{full}", slice(None)) for i in range(3)]))


@pytest.mark.parametrize("kind", ["multiplicative", "pictures", "swap"])
def test_heads_and_groups_are_full_runs(kind):
    slow = Slow(kind, "wide_grouped_heads", (2, 1), "left")
    at = slow.columns(0)[-4:]
    traced = causal_trace(slow.model, slow.inputs, slow.given, "z", ("layer", "head"), at=at, repeats=2, row=0, **QUIET)
    n = traced.method["repeats"]
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        index = (torch.tensor(at)[:, None], torch.tensor([head]))
        values = [slow.value(0, r, [(f"blocks.{layer}.attn.hook_z", index)]) for r in range(n)]
        close(traced.values[layer, head], torch.stack(values).mean())
    groups = {"pictures": "image", "end": at}
    traced = causal_trace(slow.model, slow.inputs, slow.given, sweep=("layer", "group"), at=groups, row=0, **QUIET)
    values = [slow.value(0, r, [("blocks.1.hook_resid_post", at)]) for r in range(traced.method["repeats"])]
    close(traced[{"layer": 1, "group": 1}].values, torch.stack(values).mean())


@pytest.mark.parametrize("kind", ["pair", "pictures", "blur"])
def test_the_tower_is_restored_where_the_picture_is_corrupt(kind):
    slow = Slow(kind, "layer_list", (2, 1), "left")
    for restore, name in (("vision.resid_post", "vision.blocks.1.hook_resid_post"), ("projector.hook_out",) * 2):
        sweep = ("layer", "position") if "resid" in restore else "position"
        traced = causal_trace(slow.model, slow.inputs, slow.given, restore, sweep, row=1, **QUIET)
        for at in (0, 4):
            ours = traced.values[1, at] if "resid" in restore else traced.values[at]
            close(ours, slow.value(1, 0, [(name, at)]))


def test_a_model_with_hooks_of_the_user_is_run_in_full():
    slow = Slow("gaussian", "plain", (1, 1), "left")
    given: Any = {"restore": "resid_pre", "at": "last", "layers": [1], "repeats": 2, **QUIET}
    short = causal_trace(slow.model, slow.inputs, slow.given, **given)
    full = causal_trace(slow.model, slow.inputs, slow.given, full=True, **given)
    assert short.method["path"] == "shortened runs" and full.method["path"].startswith("full forward passes")
    torch.testing.assert_close(short.values, full.values, rtol=1e-12, atol=1e-12, equal_nan=True)

    def halved(act: torch.Tensor, hook: Any) -> torch.Tensor:
        return act * 0.5

    hooks = [("projector.hook_out", halved)]
    ours = causal_trace(slow.model, slow.inputs, slow.given, fwd_hooks=hooks, **given)
    with slow.model.hooks(fwd_hooks=hooks):
        same = causal_trace(slow.model, slow.inputs, slow.given, **given)
    assert torch.equal(ours.values.nan_to_num(), same.values.nan_to_num())
    assert (ours.values - short.values).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("kind", [*PLAIN, *OTHER])
def test_everything_restored_is_clean(kind):
    slow = Slow(kind, "plain", (1, 2), "left")
    traced = causal_trace(slow.model, slow.inputs, slow.given, "resid_pre", "layer", repeats=2, **QUIET)
    floor = torch.tensor(traced.method["noise_floor"]).max()  # one number where both rows have the same
    assert floor < 1e-12
    for row in range(2):
        clean, corrupt = traced.method["clean"][row], traced.method["corrupt"][row]
        assert abs(clean - corrupt) > 1e-3
        assert (traced.values[row] - clean).abs().max() <= max(1e-12, float(floor))
    given: Any = {"metric": recovery(), "repeats": 2, **QUIET}
    share = causal_trace(slow.model, slow.inputs, slow.given, "resid_pre", "layer", **given)
    assert share.unit == "recovered" and (share.values - 1).abs().max() < 1e-10


def test_a_seed_gives_the_same_numbers_and_each_repeat_its_own():
    slow = Slow("gaussian", "plain", (1, 1), "left")
    given: Any = {"layers": [0, 2], "at": "image", "repeats": 3, **QUIET}
    one, same = (causal_trace(slow.model, slow.inputs, slow.given, seed=5, **given) for _ in range(2))
    other = causal_trace(slow.model, slow.inputs, slow.given, seed=6, **given)
    assert torch.equal(one.values.nan_to_num(), same.values.nan_to_num()) and dict(one.method) == dict(same.method)
    each = [*one.method["corrupt_each"][0], *one.method["corrupt_each"][1], *other.method["corrupt_each"][0]]
    assert len(set(each)) == 9
    alone = causal_trace(slow.model, slow.inputs, slow.given, seed=5, row=1, **given)
    assert torch.equal(alone.values.nan_to_num(), one.values[1].nan_to_num())
    close(torch.tensor(each[4], dtype=torch.float64), slow.value(1, 1, [], seed=5))


def test_cells_are_paired_by_one_corruption():
    """A cell alone is the cell among others; a cell that restores what is clean anyway is the corrupt run itself."""
    slow = Slow("gaussian", "plain", (1, 1), "left")
    given: Any = {"restore": "resid_pre", "repeats": 3, "row": 1, **QUIET}
    traced = causal_trace(slow.model, slow.inputs, slow.given, **given)
    at = slow.slots(1)[2]
    cell = causal_trace(slow.model, slow.inputs, slow.given, layers=[1], at=at, **given)
    close(cell.values[0, at], traced.values[1, at])
    ahead = [column for column in slow.columns(1) if column < slow.slots(1)[0]]
    assert ahead and (traced.values[:, ahead] == traced.method["corrupt"]).all()
    n_cells, n_layers = 3 * 3 * len(slow.columns(1)), 3
    later = [column for column in slow.columns(1) if column > slow.slots(1)[-1]]
    still_clean = 3 * (n_layers * len(ahead) + len(later))  # before the noise, and text that has not seen it yet
    assert traced.method["cells"] == n_cells and traced.method["ran"] == n_cells - still_clean


def test_intervals_are_those_of_the_repeats():
    slow = Slow("multiplicative", "plain", (1, 1), "left")
    given: Any = {"restore": "resid_pre", "at": "last", "row": 0, **QUIET}
    traced = causal_trace(slow.model, slow.inputs, slow.given, repeats=4, **given)
    last = slow.columns(0)[-1]
    values = torch.stack([slow.value(0, r, [("blocks.2.hook_resid_pre", last)]) for r in range(4)])
    low, high = bootstrap(values[:, None])
    assert traced.low is not None and traced.high is not None and traced.roles is not None and len(traced.roles) == 1
    close(traced.low[2, last], low[0])
    close(traced.high[2, last], high[0])
    assert (traced.low[2, last] < traced.values[2, last]) and (traced.values[2, last] < traced.high[2, last])
    assert causal_trace(slow.model, slow.inputs, slow.given, repeats=1, **given).low is None
    method = causal_trace(slow.model, slow.inputs, blur(2.0), repeats=4, **given).method
    assert method["repeats"] == 1 and method["corruption"] == "blur(radius=2), nothing drawn: one run"
    assert causal_trace(slow.model, slow.inputs, blur(2.0), repeats=4, **given).low is None


def test_recovery_is_measured_repeat_by_repeat():
    slow = Slow("gaussian", "plain", (1, 1), "left")
    given: Any = {"restore": "resid_pre", "at": "image", "sweep": ("layer",), "row": 0, **QUIET}
    raw = [causal_trace(slow.model, slow.inputs, slow.given, repeats=n, **given) for n in (1, 2, 3)]
    each = [raw[0].values, 2 * raw[1].values - raw[0].values, 3 * raw[2].values - 2 * raw[1].values]
    corrupt = raw[2].method["corrupt_each"]
    clean = raw[2].method["clean"]
    shares = [(values - c) / (clean - c) for values, c in zip(each, corrupt, strict=True)]
    traced = causal_trace(slow.model, slow.inputs, slow.given, metric=recovery(), repeats=3, **given)
    torch.testing.assert_close(traced.values, torch.stack(shares).mean(0), rtol=1e-9, atol=1e-9)
    assert traced.method["metric"] == "recovery(log_prob)" and traced.method["baseline"] == 0.0


def test_an_interrupted_trace_goes_on(tmp_path):
    slow = Slow("gaussian", "plain", (1, 1), "left")
    given: Any = {"at": "text", "file": tmp_path / "trace.safetensors", **QUIET}
    two = causal_trace(slow.model, slow.inputs, slow.given, repeats=2, **given)
    held = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert sorted(held) == [f"trace.{row}.repeat{repeat}.safetensors" for row in range(2) for repeat in range(2)]
    again = causal_trace(slow.model, slow.inputs, slow.given, repeats=2, **given)
    three = causal_trace(slow.model, slow.inputs, slow.given, repeats=3, **given)
    assert torch.equal(two.values.nan_to_num(), again.values.nan_to_num()) and len(list(tmp_path.iterdir())) == 6
    assert three.method["corrupt_each"][0][:2] == two.method["corrupt_each"][0]
    for corruption, seed in ((slow.given, 1), (gaussian(2.5), 0)):
        with pytest.raises(LensError, match="holds another sweep"):
            causal_trace(slow.model, slow.inputs, corruption, seed=seed, **given)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"corruption": "noise"}, r"corruption of type str; expected one of corruptions: gaussian\(3.0\)"),
    ({"repeats": 0}, "repeats=0; expected 1 or more"),
    ({"restore": "resid_pos"}, "no hook is called 'resid_pos'; nearest: 'resid_post'"),
    ({"restore": "vision.resid_post"}, r"'vision.blocks.0.hook_resid_post' lies before the embedding, which gaussian"),
    ({"restore": "projector.hook_out", "sweep": "position"}, "lies before the embedding"),
    ({"restore": "hook_text_embed", "sweep": "position"}, "lies before the embedding"),
    ({"restore": "hook_text_embed", "sweep": "position", "corruption": blur(2.0)}, "nothing to restore at 'hook_text_"),
    (
        {"restore": "vision.resid_post", "corruption": blur(2.0, image=1), "row": 1},
        r"nothing to restore at 'vision.blocks.0.hook_resid_post' of image 0: blur\(radius=2, image=1\) changes",
    ),
    (
        {"restore": "vision.resid_post", "corruption": blur(2.0), "image": 3},
        "image 3 at 'vision.resid_post'; expected 0 … 0",
    ),
    ({"corruption": mean_embedding(at="last")}, r"mean_embedding\(at='last'\) changes nothing in this prompt"),
    ({"window": 0}, "a window of 0 layers"),
    ({"bar": 1}, "unknown option 'bar'"),
    ({"sweep": "head"}, "sweep over 'head' at 'resid_post'"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_traces_are_refused(given, message):
    slow = Slow("gaussian", "plain", (1, 2), "left")
    with pytest.raises(LensError, match=message):
        causal_trace(slow.model, slow.inputs, **QUIET, **given)


def test_a_pair_that_is_the_same_is_refused():
    slow = Slow("pair", "plain", (1, 2), "left")
    with pytest.raises(LensError, match=r"pair\(Inputs\(.*\)\) changes nothing in this prompt"):
        causal_trace(slow.model, slow.inputs, pair(slow.inputs), **QUIET)
    words = replace(slow.inputs, tokens=torch.where(slow.inputs.tokens == slow.word(0), 7, slow.inputs.tokens))
    with pytest.raises(LensError, match=r"nothing to restore at 'vision.blocks.0.hook_resid_post' of image 0"):
        causal_trace(slow.model, slow.inputs, pair(words), "vision.resid_post", row=0, **QUIET)


@pytest.mark.parametrize("corruption", [gaussian(3.0), blur(8)])
def test_the_asked_objects_patches_bring_the_answer_back(corruption):
    """On 20 held-out scenes, in the first two layers. The object's patches are far fewer than the others."""
    model = HookedLlava.tiny()
    gains = []
    for seed in range(3_000_000, 3_000_020):
        scene = render_scene(seed)
        asked = next(question for question in questions(scene) if question.kind == "color")
        assert asked.about is not None
        mask = scene.objects[asked.about[0]].mask
        groups = {"object": Patches(mask, buffer=1), "others": Patches(mask, buffer=1, outside=True)}
        given: Any = {"restore": "resid_pre", "sweep": ("layer", "group"), "at": groups, "layers": [0, 1], **QUIET}
        traced = causal_trace(model, model.prepare(asked.text, scene.image), corruption, repeats=2, **given)
        assert traced.method["answer"].strip() == asked.answer
        gains.append(traced.values - traced.method["corrupt"])
    low, _ = bootstrap(torch.stack([gain[:, 0] - gain[:, 1] for gain in gains]))
    assert (low > 1.0).all(), "nats that the object recovers more than everything else"
    assert (torch.stack(gains).mean(0)[:, 0] > 1.5).all()
