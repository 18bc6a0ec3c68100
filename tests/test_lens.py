"""Lenses against Hugging Face's own modules in float64, the model's own logits, and each other."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from random_models import example, hf_llama, hf_llava
from torch import Tensor

from llava_lens import HookedLlava, LlavaCache
from llava_lens.analysis import Lens, logit_lens, names_for_lens, tower_lens, visual_words
from llava_lens.analysis.attribution.needs import whole
from llava_lens.analysis.attribution.readout import Readout
from llava_lens.analysis.lenses import words
from llava_lens.errors import LensError
from llava_lens.inputs import Inputs
from llava_lens.tiny import questions, render_scene

ODD = ["plain", "wide_grouped_heads", "tied", "attention_bias", "mlp_bias", "eps_1e-6", "full"]
PICTURES = ["plain", "full", "first_layer", "layer_list", "layer_list_full", "bare_projector", "gelu_tower"]
CLOSE = 2e-5
"""Hugging Face's norms compute in float32 whatever the model is in: 1e-7 relative, on logits of up to 10."""
WORD = 42


class Seen:
    """What passed through a Hugging Face model in float64: decoder streams, tower streams, projected features."""

    def __init__(self, odd: str, images: tuple[int, ...] = (1,), pad: str | None = None):
        self.hf = hf_llava(odd, "eager", torch.float64)
        inputs = example(self.hf, images, pad)
        self.inputs = {**inputs, "pixel_values": inputs["pixel_values"].double()}
        self.streams: list[Tensor] = []
        self.mids: list[Tensor] = []
        self.tower: list[Tensor] = []
        self.features = torch.empty(0)
        decoder, tower = self.hf.model.language_model, self.hf.model.vision_tower
        handles = [
            *(block.register_forward_pre_hook(lambda _, a: self.streams.append(a[0])) for block in decoder.layers),
            *(
                block.post_attention_layernorm.register_forward_pre_hook(lambda _, a: self.mids.append(a[0]))
                for block in decoder.layers
            ),
            decoder.norm.register_forward_pre_hook(lambda _, a: self.streams.append(a[0])),
            tower.pre_layrnorm.register_forward_hook(lambda _, a, out: self.tower.append(out)),
            *(
                layer.register_forward_hook(
                    lambda _, a, out: self.tower.append(out[0] if isinstance(out, tuple) else out)
                )
                for layer in tower.encoder.layers
            ),
            self.hf.model.multi_modal_projector.register_forward_hook(lambda _, a, out: setattr(self, "features", out)),
        ]
        with torch.no_grad():
            self.logits = self.hf(**self.inputs).logits
        for handle in handles:
            handle.remove()

    @torch.no_grad()
    def own(self, x: Tensor) -> Tensor:
        """Log-probabilities of a stream normed by itself, by Hugging Face's own modules."""
        return torch.log_softmax(self.hf.lm_head(self.hf.model.language_model.norm(x)), -1)

    @torch.no_grad()
    def frozen(self, x: Tensor, row: int, at: int) -> Tensor:
        """Log-probabilities of a vector under the scale of the final stream, written out."""
        norm, final = self.hf.model.language_model.norm, self.streams[-1][row, at]
        scale = 1 / math.sqrt(float((final**2).mean()) + norm.variance_epsilon)
        logits = torch.stack([(word * norm.weight * scale) @ x for word in self.hf.lm_head.weight])
        return torch.log(torch.exp(logits) / torch.exp(logits).sum())


@cache
def seen(odd: str) -> Seen:
    return Seen(odd)


@cache
def run(odd: str) -> tuple[HookedLlava, Tensor, LlavaCache]:
    model = HookedLlava.from_hf(seen(odd).hf)
    with torch.no_grad():
        logits, cache = model.run_with_cache(**seen(odd).inputs)
    return model, logits, cache


def check_place(lens: Lens, place: tuple[int, ...], expected: Tensor, word: int = WORD) -> None:
    """Score, rank and highest words of one place against the scores of the whole vocabulary."""
    assert float(lens.scores.values[place]) == pytest.approx(float(expected[word]), abs=CLOSE)
    assert int(lens.ranks.values[place]) == 1 + sum(float(other) > float(expected[word]) for other in expected)
    order = sorted(range(len(expected)), key=lambda i: -float(expected[i]))[: lens.ids.shape[-1]]
    assert lens.ids[place].tolist() == order
    assert lens.values[place].tolist() == pytest.approx([float(expected[i]) for i in order], abs=CLOSE)


# ---- the logit lens


@pytest.mark.parametrize("odd", ODD)
def test_every_stream_is_read_as_hugging_faces_own_norm_and_head_read_it(odd: str) -> None:
    reference, (_, _, cache) = seen(odd), run(odd)
    lens = logit_lens(cache, answer=WORD, incl_mid=True)
    n = reference.logits.shape[1]
    labels = lens.scores.labels_of("stream")
    assert labels == ("0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post")
    streams = [x for pair in zip(reference.streams, reference.mids, strict=False) for x in pair]
    for stream, x in enumerate([*streams, reference.streams[-1]]):
        for position in (0, 3, n - 1):
            check_place(lens, (stream, position), reference.own(x[0, position]))
    plain = logit_lens(cache, answer=WORD)
    assert torch.equal(plain.scores.values, lens.scores.values[[0, 2, 4, 6]])


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 0.05)])
def test_the_last_row_is_the_models_own_logits(dtype: torch.dtype, close: float) -> None:
    hf = hf_llava("wide_grouped_heads", "sdpa", dtype)
    model, inputs = HookedLlava.from_hf(hf), example(hf, (1,))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad():
        logits, cache = model.run_with_cache(**inputs)
    for by, theirs in (("logit", logits), ("log_prob", logits.double().log_softmax(-1))):
        lens = logit_lens(cache, answer=WORD, by=by, top=97)
        last = torch.empty_like(lens.values[-1]).scatter(-1, lens.ids[-1], lens.values[-1])
        torch.testing.assert_close(last.double(), theirs[0].double(), atol=close, rtol=1e-2 if close > 0.01 else 1e-6)
        assert lens.scores.closure is not None and lens.scores.closure <= close
    if dtype != torch.bfloat16:  # there logits that round to the same number have no order
        assert torch.equal(lens.ids[-1, :, 0], logits[0].argmax(-1))
        assert logit_lens(cache).scores.method["answer_id"] == int(logits[0, -1].argmax())


@torch.no_grad()
def test_the_norm_is_applied_once_with_each_streams_own_scale() -> None:
    model, _, cache = run("plain")
    lens = logit_lens(cache, answer=WORD).scores.values
    torch.testing.assert_close(lens, cache.logit_lens()[0].log_softmax(-1)[:, 0, :, WORD])
    readout = Readout.of(model, cache["resid_post", -1][0, 5])
    assert (
        abs(float(readout.log_probs(cache["resid_pre", 0][0, 5])[WORD] - lens[0, 5])) > 0.1
    )  # a frozen scale is not it
    twice = model.unembed(model.ln_final(model.ln_final(cache["resid_post", -1]))).log_softmax(-1)[0, :, WORD]
    assert (lens[-1] - twice).abs().max() > 0.01


def test_chunks_of_one_place_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, cache = run("plain")
    whole = logit_lens(cache)
    largest = []
    read = words.Reader.scores
    monkeypatch.setattr(words, "MAX_LOGITS", 2 * 97)
    monkeypatch.setattr(words.Reader, "scores", lambda self, x: largest.append(len(x)) or read(self, x))
    parts = logit_lens(cache)
    assert max(largest) == 2
    torch.testing.assert_close(parts.scores.values, whole.scores.values)
    assert torch.equal(parts.ids, whole.ids)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_of_a_padded_batch_equal_each_row_alone(pad: str) -> None:
    hf = hf_llava("grouped", "sdpa")
    model = HookedLlava.from_hf(hf)
    given = example(hf, (1, 2), pad=pad)
    both = Inputs.from_tokens(given["input_ids"], model.cfg, given["pixel_values"], given["attention_mask"])
    names = names_for_lens(model, "mid", "visual_words", "tower_lens")
    with torch.no_grad():
        _, cache = model.run_with_cache(both, names_filter=names)
        alone = [model.run_with_cache(both.row(i), names_filter=names)[1] for i in range(2)]
    whole = logit_lens(cache, answer=WORD, incl_mid=True)
    assert whole.axes == ("batch", "stream", "position")
    for i, one in enumerate(alone):
        kept = given["attention_mask"][i].bool()
        own = logit_lens(one, answer=WORD, incl_mid=True)
        torch.testing.assert_close(whole.scores.values[i][:, kept], own.scores.values, atol=1e-5, rtol=1e-4)
        assert torch.equal(whole.ids[i][:, kept], own.ids)
        assert whole.scores.values[i][:, ~kept].isnan().all() and (whole.ids[i][:, ~kept] == -1).all()
        assert set(whole.words[i][:, ~kept].flatten()) <= {""}
        last = logit_lens(cache, "last", row=i)
        assert last.scores.method["answer_id"] == int(last.ids[-1, 0, 0])
        assert torch.equal(last.ids[:, 0], logit_lens(one, "last").ids[:, 0])
        for image in range(i + 1):
            for lens in (visual_words, tower_lens):
                found, expected = lens(cache, answer=WORD, row=i, image=image), lens(one, answer=WORD, image=image)
                torch.testing.assert_close(found.scores.values, expected.scores.values, atol=1e-5, rtol=1e-4)
    assert "nan" not in repr(whole[{"batch": 0}]) and "Lens[batch 2" in repr(whole)
    pictures = visual_words(cache, answer=WORD)
    assert pictures.axes == ("batch", "row", "col")
    assert (
        pictures.scores.values[1] - visual_words(cache, answer=WORD, row=1, image=1).scores.values
    ).abs().max() > 0.01
    with pytest.raises(LensError, match=r"image 1; expected 0 … 0"):
        visual_words(cache, answer=WORD, image=1)
    with pytest.raises(LensError, match="rows that differ in what is read"):
        logit_lens(cache, "image")


def test_positions_by_role_word_and_number() -> None:
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    inputs = model.prepare("What is the color of the square?", scene.image)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    roles, whole = inputs.roles_of(), logit_lens(cache)
    for given, at in (("question", roles.positions("question")), ("square", roles.positions_of("square")),
                      ("last", [roles.last]), (-2, [len(roles) - 2]), ([5, 1], [5, 1])):  # fmt: skip
        lens = logit_lens(cache, given)
        at = list(map(int, at))
        torch.testing.assert_close(lens.scores.values, whole.scores.values[:, at])
        assert lens.scores.labels_of("position") == tuple(whole.scores.labels_of("position")[i] for i in at)
        assert (lens.words == whole.words[:, at]).all()
    over = whole.over_image()
    assert over.axes == ("stream", "row", "col") and over.ids.shape == (5, 8, 8, 5)
    assert over.words[2, 3, 4].tolist() == whole.words[2, roles.token_of(3, 4)].tolist()
    assert over[{"stream": -1}].words[3, 4, 0] == whole.words[-1, roles.token_of(3, 4), 0]
    assert whole.words[-1, -1, 0] == whole.scores.method["answer"] == "blue"
    assert float(whole.probs.values[-1, -1]) == pytest.approx(float(whole.scores.values[-1, -1].exp()))
    assert float(whole.reciprocal_ranks.values[-1, -1]) == 1
    assert "final_post" in repr(whole) and "blue 99.9%" in repr(whole)
    with torch.no_grad():
        _, cut = model.run_with_cache(inputs, pos_slice=(70, None))
    torch.testing.assert_close(logit_lens(cut).scores.values, whole.scores.values[:, 70:], atol=1e-5, rtol=1e-5)
    with pytest.raises(LensError, match="position 3 is not among"):
        logit_lens(cut, 3)


def test_text_alone_and_a_cache_without_batch_axis() -> None:
    hf = hf_llama()
    model, tokens = HookedLlava.from_hf(hf), torch.tensor([[1, 5, 9, 13]])
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
        _, bare = model.run_with_cache(tokens, remove_batch_dim=True)
    assert torch.equal(logit_lens(cache).ids[-1, :, 0], logits[0].argmax(-1))
    assert torch.equal(logit_lens(cache).ids, logit_lens(bare).ids)
    assert logit_lens(cache).words[0, 0, 0].startswith("<")
    with pytest.raises(LensError, match="no vision tower"):
        visual_words(cache)


# ---- pictures


@pytest.mark.parametrize("odd", PICTURES)
def test_visual_words_are_products_with_every_word(odd: str) -> None:
    reference, (_, _, cache) = seen(odd), run(odd)
    embed = reference.hf.get_input_embeddings().weight.detach()
    features = reference.features[0][int("full" in odd) :]
    cosine, dot = visual_words(cache, answer=WORD), visual_words(cache, answer=WORD, by="dot")
    output = visual_words(cache, answer=WORD, space="output")
    own = visual_words(cache, answer=WORD, space="output", norm="own")
    for patch in (0, 4, 8):
        x, place = features[patch], divmod(patch, 3)
        check_place(dot, place, torch.stack([x @ word for word in embed]))
        check_place(cosine, place, torch.stack([x @ word / (x.norm() * word.norm()) for word in embed]))
        check_place(output, place, reference.frozen(x, 0, -1))
        check_place(own, place, reference.own(x))
    assert cosine.scores.unit == "cosine" and output.scores.unit == "nats"


@pytest.mark.parametrize("odd", PICTURES)
def test_every_tower_layer_goes_through_the_rest_of_the_path(odd: str) -> None:
    reference, (model, _, cache) = seen(odd), run(odd)
    assert model.cfg.vision is not None
    read = model.cfg.vision.feature_layers
    embed, skip = reference.hf.get_input_embeddings().weight.detach(), int("full" in odd)
    for slot in range(len(read)):
        lens = tower_lens(cache, answer=WORD, slot=slot)
        assert lens.axes == ("layer", "row", "col") and lens.scores.length("layer") == max(read) + 1
        for layer in range(max(read) + 1):
            mixed = [reference.tower[layer if i == slot else other][0] for i, other in enumerate(read)]
            with torch.no_grad():
                features = reference.hf.model.multi_modal_projector(torch.cat(mixed, -1)[1:])
            x = features[5]
            check_place(lens, (layer, 1, 2), torch.stack([x @ w / (x.norm() * w.norm()) for w in embed]))
        own = lens[{"layer": read[slot]}]
        torch.testing.assert_close(own.scores.values, visual_words(cache, answer=WORD).scores.values)
    assert skip == model.cfg.vision.keep_class_token


def test_the_stream_at_a_patch_starts_as_its_visual_word() -> None:
    _, _, cache = run("full")
    start = logit_lens(cache, answer=WORD).over_image()[{"stream": 0}]
    own = visual_words(cache, answer=WORD, space="output", norm="own")
    torch.testing.assert_close(start.scores.values, own.scores.values)
    assert torch.equal(start.ids, own.ids)


def test_a_model_and_inputs_stand_in_for_a_cache() -> None:
    model, scene = HookedLlava.tiny(), render_scene(1_000_003)
    inputs = model.prepare(questions(scene)[0].text, scene.image)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    for lens in (visual_words, tower_lens):
        one, other = lens(model, inputs), lens(cache)
        assert torch.equal(one.scores.values, other.scores.values) and one.scores.method["answer"] == "blue"
        assert one.scores.roles == inputs.roles
        with pytest.raises(LensError, match="takes a cache alone, or a model and inputs"):
            lens(model)
    with pytest.raises(LensError, match="these inputs have none"):
        visual_words(model, model.prepare("What is the color of the square?"))
    assert "orange" in repr(one)


def test_features_alone_are_enough_for_a_given_word() -> None:
    hf = hf_llava("plain")
    model = HookedLlava.from_hf(hf)
    with torch.no_grad():
        _, cache = model.run_with_cache(**example(hf, (1, 1)), names_filter="projector.hook_out")
    assert visual_words(cache, answer=WORD).scores.values.shape == (2, 3, 3)
    with pytest.raises(LensError, match=r"row 2; expected -2 … 1"):
        visual_words(cache, answer=WORD, row=2)
    with pytest.raises(LensError, match=r"no answer given, and the cache lacks blocks\.0\.hook_resid_pre"):
        visual_words(cache)
    with pytest.raises(LensError, match="norm='frozen' takes the scale of the final stream"):
        visual_words(cache, answer=WORD, space="output")


def test_a_word_of_length_zero_has_the_cosine_zero() -> None:
    hf = hf_llava("plain")
    model, inputs = HookedLlava.from_hf(hf), example(hf, (1,))
    before = model.embed.weight[0].clone()
    with torch.no_grad():
        model.embed.weight[0] = 0
        _, cache = model.run_with_cache(**inputs, names_filter="projector.hook_out")
        found = visual_words(cache, answer=0)
        model.embed.weight[0] = before
    assert found.scores.values.eq(0).all() and not found.values.isnan().any()


# ---- what is refused


@pytest.mark.parametrize("what", ["logit_lens", "mid", "visual_words", "tower_lens"])
def test_the_names_of_a_lens_are_enough_and_all_are_missed(what: Any) -> None:
    model, _, full = run("layer_list")
    lens = {"visual_words": visual_words, "tower_lens": tower_lens}.get(what, logit_lens)
    how = {"incl_mid": True} if what == "mid" else {"space": "output"} if "logit" not in what else {}
    names = names_for_lens(model, what)
    with torch.no_grad():
        _, cache = model.run_with_cache(**seen("layer_list").inputs, names_filter=names)
    assert torch.equal(lens(cache, **how).ids, lens(full, **how).ids)
    for name in names:
        less = LlavaCache(dict(cache.cache_dict), model, inputs=cache.inputs)
        del less.cache_dict[name]
        with pytest.raises(LensError, match=f"lacks .*{name}"):
            lens(less, **how)


@pytest.mark.parametrize(
    "lens, arguments, message",
    [
        (logit_lens, {"answer": 97}, "answer 97; expected a token id, 0 … 96"),
        (logit_lens, {"positions": 99}, "position 99; expected"),
        (logit_lens, {"positions": []}, "selects none"),
        (logit_lens, {"positions": "question"}, "no 'question'; it has text, image"),
        (logit_lens, {"row": 1}, "row 1; expected -1 … 0"),
        (logit_lens, {"top": 0}, "top=0; expected 1 … 97"),
        (logit_lens, {"by": "cosine"}, "by='cosine' in the output space; expected 'log_prob' or 'logit'"),
        (visual_words, {"space": "middle"}, "space='middle'; expected 'output'"),
        (visual_words, {"norm": "none"}, "norm='none'; expected 'frozen' or 'own'"),
        (visual_words, {"image": 1}, "image 1; expected 0 … 0"),
        (tower_lens, {"slot": 1}, r"projector layers \(3,\): slot 1; expected -1 … 0"),
    ],
)
def test_what_is_not_there_is_refused(lens: Any, arguments: dict[str, Any], message: str) -> None:
    _, _, cache = run("plain")
    with pytest.raises(LensError, match=message):
        lens(cache, **arguments)


def test_a_lens_that_is_not_there_and_probabilities_of_cosines() -> None:
    model, _, cache = run("plain")
    with pytest.raises(LensError, match=r"lens='logit_lense'; expected .*; nearest: 'logit_lens'"):
        names_for_lens(model, "logit_lense")
    with pytest.raises(LensError, match="scores in cosine are no probabilities"):
        _ = visual_words(cache).probs


@pytest.mark.parametrize("given", [1.5, True, "a", None, [1], torch.tensor(0.5), np.array([1, 2]), 5, -1])
def test_what_is_no_whole_number_in_the_range_is_refused(given: Any) -> None:
    with pytest.raises(LensError, match=r"position .*; expected 0 … 4"):
        whole("position", given, 0, 4)
    _, _, cache = run("plain")
    with pytest.raises(LensError, match="position True; expected -18 … 17"):
        logit_lens(cache, [True])


def test_positions_of_numpy_and_torch() -> None:
    _, _, cache = run("plain")
    wanted = logit_lens(cache, [3, 5], WORD).scores.values
    for given in (np.array([3, 5]), torch.tensor([3, 5]), (np.int64(3), torch.tensor(5))):
        assert torch.equal(logit_lens(cache, given, WORD).scores.values, wanted)


@pytest.mark.parametrize("lens", [logit_lens, visual_words, tower_lens])
def test_the_cache_of_a_deeper_model_is_refused(lens: Any) -> None:
    _, _, cache = run("plain")
    shallow = HookedLlava.from_hf(hf_llava("shallow"))
    with pytest.raises(LensError, match="the model has 2 layers: it is another model's cache"):
        lens(LlavaCache(dict(cache.cache_dict), shallow, inputs=cache.inputs), answer=WORD)


def test_a_changed_unembedding_is_noticed() -> None:
    model, _, cache = run("plain")
    changed: Any = copy.deepcopy(model)
    with torch.no_grad():
        changed.unembed.weight[WORD] *= 1.1
    with pytest.raises(LensError, match="hook_logits at position 17 are not those of the final stream"):
        logit_lens(LlavaCache(dict(cache.cache_dict), changed, inputs=cache.inputs), answer=WORD)
