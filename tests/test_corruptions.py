"""Corruptions: what is drawn, how large it is, what stays as it was; and words swapped as a prompt written anew."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from brute_force import hooked, inputs_of
from random_models import IMAGE
from scipy.ndimage import gaussian_filter
from test_inputs import setup

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.corruptions import (
    Corruption,
    blur,
    embeddings,
    gaussian,
    mean_embedding,
    multiplicative,
    pair,
    resample,
    text_swap,
)
from llava_lens.analysis.interventions.study import read
from llava_lens.analysis.interventions.where import Patches
from llava_lens.errors import LensError
from llava_lens.preparation import prepare
from llava_lens.sweep import Row

TWO = (1, 2)
"""Pictures in each row of most prompts here."""


def row_of(odd: str = "plain", i: int = 1, dtype: torch.dtype = torch.float64, pad: str | None = "left") -> Any:
    """A model, a batch, and one of its rows."""
    model = hooked(odd, dtype)
    inputs = read(model, inputs_of(model, odd, TWO, pad))
    return model, inputs, Row.of(model, inputs, i)


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(corruption: Corruption, model: Any, row: Row, seed: int = 0) -> Any:
    return corruption(model, row, drawn(seed))


def slots_of(inputs: Inputs, i: int) -> list[int]:
    return (inputs.tokens[i] == IMAGE).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("odd", ["plain", "full"])
def test_noise_has_the_size_of_what_it_is_added_to(odd):
    model, inputs, row = row_of(odd)
    (edit,) = run(gaussian(2.0, at=["image", "last"]), model, row)
    slots, each = slots_of(inputs, 1), model.cfg.tokens_per_image
    assert list(edit.pos) == [*slots, row.last] and edit.how == "add" and edit.hook == "hook_embed"
    plain = torch.randn(len(edit.pos), model.cfg.d_model, generator=drawn()).double()
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="hook_embed")
    stds = [cache["hook_embed"][1, slots[i : i + each]].flatten().std() for i in (0, each)]
    assert abs(stds[0] - stds[1]) > 1e-3
    for part, std in ((slice(0, each), stds[0]), (slice(each, 2 * each), stds[1]), (slice(-1, None), model.W_E.std())):
        torch.testing.assert_close(edit.value[part], 2 * std.detach() * plain[part], rtol=1e-12, atol=0)
    (edit,) = run(multiplicative(0.5, at="text"), model, row, 3)
    assert set(edit.pos).isdisjoint(slots) and edit.how == "multiply"
    plain = torch.randn(len(edit.pos), model.cfg.d_model, generator=drawn(3)).double()
    torch.testing.assert_close(edit.value, 1 + 0.5 * plain, rtol=1e-15, atol=0)


def test_a_seed_means_the_same_noise_in_every_dtype():
    noises = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model, _, row = row_of(dtype=dtype)
        (edit,) = run(multiplicative(1.0), model, row, 7)
        noises.append(edit.value)
        (other,) = run(multiplicative(1.0), model, row, 7)
        (another,) = run(multiplicative(1.0), model, row, 8)
        assert torch.equal(edit.value, other.value) and not torch.equal(edit.value, another.value)
        (added,) = run(gaussian(1.0), model, row, 7)
        scale = (added.value / (edit.value - 1)).flatten()
        assert scale.unique().numel() <= 2 * scale.numel() // model.cfg.d_model or dtype != torch.float64
    assert torch.equal(noises[0], noises[1]) and torch.equal(noises[0], noises[2])


def test_noise_does_not_depend_on_padding_or_neighbours():
    model, inputs, row = row_of(i=0)
    alone = read(model, inputs.row(0))
    assert row.columns[0] > 0 and alone.attention_mask is None
    for corruption in (gaussian(3.0), gaussian(3.0, at="text"), mean_embedding()):
        (padded,), (bare,) = (run(corruption, model, each) for each in (row, Row.of(model, alone)))
        torch.testing.assert_close(padded.value, bare.value, rtol=1e-12, atol=1e-14)
        assert [p - row.columns[0] for p in padded.pos] == list(bare.pos)


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.5, 9.0])
def test_a_blur_is_scipys(radius):
    model, _, row = row_of()
    made = run(blur(radius), model, row)
    for before, after in zip(row.inputs.pixels.flatten(0, 1), made.pixels.flatten(0, 1), strict=True):
        truth = gaussian_filter(before.numpy(), radius, mode="nearest", truncate=4.0)
        torch.testing.assert_close(after, torch.from_numpy(truth), rtol=0, atol=1e-13)
    one = run(blur(radius, image=1), model, row)
    assert torch.equal(one.pixels[0], row.inputs.pixels[0]) and torch.equal(one.pixels[1], made.pixels[1])
    assert made.roles == row.inputs.roles and torch.equal(made.tokens, row.inputs.tokens)
    half = run(blur(radius), *row_of(dtype=torch.bfloat16)[::2])
    assert half.pixels.dtype == torch.bfloat16


def test_means_are_over_what_is_selected():
    model, inputs, row = row_of()
    slots = slots_of(inputs, 1)
    x = embeddings(model, row)
    (own,) = run(mean_embedding(), model, row)
    torch.testing.assert_close(own.value, x[slots].mean(0), rtol=1e-12, atol=1e-14)
    (edit,) = run(mean_embedding(at="image", reference=[inputs, inputs]), model, row)
    first = embeddings(model, Row.of(model, inputs, 0))[slots_of(inputs, 0)]
    torch.testing.assert_close(edit.value, torch.cat((first, x[slots])).mean(0), rtol=1e-12, atol=1e-14)
    assert list(edit.pos) == slots


def test_a_resample_takes_one_of_the_others():
    model, inputs, row = row_of()
    others: list[Any] = [read(model, inputs_of(model, "plain", TWO, "left", seed=seed)) for seed in (5, 6, 7)]
    corruption = resample(others).of_row(model, inputs, 1)
    assert corruption.drawn and not resample(others[0]).drawn
    held = [embeddings(model, Row.of(model, other, 1)) for other in others]
    picks = []
    for seed in range(12):
        (edit,) = run(corruption, model, row, seed)
        assert list(edit.pos) == slots_of(inputs, 1)
        picks.append([torch.equal(edit.value, x[list(edit.pos)]) for x in held].index(True))
    assert set(picks) == {0, 1, 2}
    made = run(resample(others[1], at=None).of_row(model, inputs, 1), model, row)
    assert torch.equal(made.pixels, others[1].pixels[1:]) and torch.equal(made.tokens, row.inputs.tokens)
    made = run(pair(others[2]).of_row(model, inputs, 1), model, row)
    assert torch.equal(made.pixels, others[2].pixels[1:]) and torch.equal(made.tokens, others[2].tokens[1:])


SWAPS = [
    ("What is the color of the circle?", {"color": "shape"}, "What is the shape of the circle?"),
    ("Color? The color of the circle.", {"COLOR": "shape"}, "Shape? The shape of the circle."),
    ("Is the red circle at the blue square?", {"red": "blue", "blue": "red"}, "Is the blue circle at the red square?"),
    ("red, and blue", {"red, and": "blue, and"}, "blue, and blue"),
]


@pytest.mark.parametrize("template", ["LLaVA", "none"])
@pytest.mark.parametrize(("asked", "words", "instead"), SWAPS)
def test_a_swap_is_the_other_question(asked, words, instead, template):
    model: Any = HookedLlava.tiny()
    how = {"template": template != "none"}
    asked, instead = (q if how["template"] else f"<image> {q}" for q in (asked, instead))
    picture = torch.rand(40, 40, 3).numpy()
    clean, other = (model.prepare(question, picture, **how) for question in (asked, instead))
    made = run(text_swap(words), model, Row.of(model, clean))
    assert torch.equal(made.tokens, other.tokens) and torch.equal(made.pixels, clean.pixels)
    assert made.roles == other.roles


@pytest.mark.parametrize("asked", ["red two objects", "two red objects", "\nred two", "of two? (red)"])
def test_a_swap_of_split_words_is_the_other_question(asked):
    """With a tokenizer that splits words, as Llama's: as many pieces, or an error that names them."""
    processor, cfg = setup("Llama-like")
    tokenizer = processor.tokenizer
    model: Any = SimpleNamespace(tokenizer=tokenizer, cfg=cfg)
    words = ["two", "many", "circle", "there", "color", "xyz", "qq", "oo", "rex", "dad", "re", "rd", "bed", "rat"]
    clean = prepare(processor, cfg, asked, None)
    swaps = refused = 0
    for new in words:
        other = prepare(processor, cfg, asked.replace("red", new), None)
        row, swap = Row.of(model, clean), text_swap({"red": new})
        if other.n_pos == clean.n_pos:
            made = run(swap, model, row)
            labels, others = clean.roles_of().labels, other.roles_of()
            assert torch.equal(made.tokens, other.tokens) and made.roles_of().labels == labels
            assert replace(made.roles_of(), labels=others.labels) == others
            swaps += 1
        else:
            with pytest.raises(
                LensError, match=rf"'red' is \d tokens \[.*'d'\], '{new}' \d tokens? \[.*\]; expected as many"
            ):
                run(swap, model, row)
            refused += 1
    assert swaps > 2 and refused > 2


BAD: dict[str, tuple[Any, str]] = {
    "no sigma": (lambda: gaussian(0.0), r"sigma=0.0; expected more than 0"),
    "negative": (lambda: multiplicative(-1), r"sigma=-1; expected more than 0"),
    "not a number": (lambda: gaussian(float("nan")), r"sigma=nan"),
    "no radius": (lambda: blur(0), r"radius=0; expected more than 0"),
    "nothing to draw": (lambda: resample([]), r"resample from list without inputs"),
    "no list": (lambda: resample(3), r"resample from int without inputs; expected Inputs, or a list"),
    "no words": (lambda: text_swap({}), r"text_swap\({}\); expected words for words: {'circle': 'square'}"),
    "an empty word": (lambda: text_swap({"circle": " "}), r"text_swap\(\{'circle': ' '\}\)"),
    "role": (lambda: gaussian(at="imag"), "'imag'"),
    "position": (lambda: gaussian(at=99), "position 99 is outside"),
    "padding": (lambda: gaussian(at=0), "position 0 is padding"),
    "picture": (lambda: blur(2.0, image=2), r"image 2 in blur\(radius=2, image=2\); expected 0 … 0"),
    "reference": (lambda: mean_embedding(reference=[]), "an empty reference"),
    "reference of text": (lambda: mean_embedding(reference=[3]), "reference of type int; expected Inputs"),
    "no inputs": (lambda: pair(3), "other of type int; expected Inputs"),
    "no tokenizer": (lambda: text_swap({"a": "b"}), "this model has no tokenizer"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corruptions_are_refused(name):
    model, inputs, row = row_of(i=0)
    make, message = BAD[name]
    with pytest.raises(LensError, match=message):
        run(make().of_row(model, inputs, 0), model, row)


def test_other_layouts_are_refused():
    model, inputs, _ = row_of()
    for images, message in (((2, 1), "positions|pictures|padding"), ((1,), "clean has 2 rows, corrupt 1")):
        other = inputs_of(model, "plain", images, "left")
        for corruption in (pair(other), resample([inputs, other])):
            with pytest.raises(LensError, match=message):
                corruption.of_row(model, inputs, 1)
    text = Row.of(model, read(model, Inputs(torch.tensor([[5, 6, 7]]))))
    for corruption, message in (
        (blur(2.0), "needs a picture; the prompt has none"),
        (gaussian(), "the prompt has no 'image'; it has text, last"),
        (mean_embedding(), "the prompt has no 'image'"),
    ):
        with pytest.raises(LensError, match=message):
            run(corruption, model, text)


def test_words_that_are_not_there_are_refused():
    model = HookedLlava.tiny()
    rows = model.prepare(["Is the circle red?", "Is the square red?"])
    swap = text_swap({"circle": "heart", "square": "star"})
    for i, asked in enumerate(("Is the heart red?", "Is the star red?")):
        made = run(swap.of_row(model, rows, i), model, Row.of(model, rows, i))
        assert torch.equal(made.tokens, model.prepare(asked).tokens)
    with pytest.raises(LensError, match="no word 'crcle' in the question or the given answer"):
        text_swap({"square": "heart", "crcle": "star"}).of_row(model, rows, 0)
    row = Row.of(model, model.prepare("What is the color of the circle?", torch.rand(40, 40, 3).numpy()))
    for words, message in (
        ({"circl": "square"}, "no word 'circl' in the question or the given answer; nearest: 'circle'"),
        ({"circle": "dodecahedron"}, "'dodecahedron' for 'circle': a word that the tokenizer does not know"),
        ({"circle": "red square"}, r"'circle' is 1 token \['circle'\], 'red square' 2 tokens \['red', 'square'\]"),
        ({"assistant": "user"}, "no word 'assistant'"),
    ):
        with pytest.raises(LensError, match=message):
            run(text_swap(words), model, row)


def test_a_corruption_says_what_it_is():
    _, inputs, _ = row_of()
    said = [
        (gaussian(), "gaussian(sigma=3, at='image')"),
        (multiplicative(0.5, at=[1, 2]), "multiplicative(sigma=0.5, at=[1, 2])"),
        (gaussian(at=Patches(torch.ones(3, 3, dtype=torch.bool))), "gaussian(sigma=3, at=Patches)"),
        (blur(4), "blur(radius=4)"),
        (mean_embedding(reference=inputs), "mean_embedding(at='image', of a reference)"),
        (resample([inputs], at=None), "resample(1 inputs, at=None)"),
        (text_swap({"a": "b"}), "text_swap({'a': 'b'})"),
    ]
    for corruption, words in said:
        assert str(corruption) == words
