"""What `explain` gathers is what each analysis says alone; choices that there are not are refused."""

from __future__ import annotations

import json
import math
from functools import cache
from typing import Any

import pytest
import torch
from random_models import example, hf_llava

from llava_lens import HookedLlava, Inputs, explain
from llava_lens.analysis import log_prob_increase, mean_attention
from llava_lens.analysis.attribution.direct import direct_logit_attribution
from llava_lens.analysis.lenses.lens import logit_lens
from llava_lens.errors import LensError
from llava_lens.maps import importance_map
from llava_lens.tiny import render_scene

QUESTION = "What is the color of the circle?"


@cache
def model() -> HookedLlava:
    return HookedLlava.tiny()


@cache
def inputs(answer: str = "") -> Inputs:
    return model().prepare(QUESTION, render_scene(3).image, answer=answer)


def close(ours: Any, theirs: Any, atol: float = 2e-5) -> None:
    assert ours.axes == theirs.axes
    torch.testing.assert_close(ours.values.double(), theirs.values.double(), atol=atol, rtol=1e-4)


def test_each_part_is_what_its_analysis_says_from_a_whole_cache() -> None:
    by = ("layer", "head", "neuron", "source")
    e = explain(model(), inputs(), versus="blue", by=by)
    with torch.no_grad():
        logits, cache = model().run_with_cache(inputs())
    token = int(logits[0, -1].argmax())
    log_p = logits[0, -1].double().log_softmax(-1)
    assert e.answer_id == token and e.probability == pytest.approx(float(log_p[token].exp()))
    assert e.lead == pytest.approx(float(log_p[token] - log_p[model().to_single_token("blue")]), abs=1e-5)
    for each in by:
        close(e.direct[each], direct_logit_attribution(cache, token, "blue", by=each))
    for scores, name in ((e.layers, "layer"), (e.positions, "position"), (e.neurons, "neuron")):
        close(scores, log_prob_increase(cache, token, name))
    close(e.heads, log_prob_increase(cache, token, "head", exact=True))
    close(e.attention, mean_attention(cache))
    close(e.map, importance_map(model(), inputs(), "lpi", token, "blue"))
    last = logit_lens(cache, "last", token)[{"position": 0}]
    close(e.lens.scores, last.scores)
    readings = e.readings()
    assert readings[-1][0] == "final_post" and readings[-1][3][0][0] == e.answer
    assert readings[-1][1] == pytest.approx(math.log(e.probability), abs=1e-4)


def test_the_map_of_increases_is_the_one_that_importance_map_makes() -> None:
    e = explain(model(), inputs(), top_k=10**6)
    close(e.map, importance_map(model(), inputs(), "lpi", exact=True))
    assert e.map.axes == ("row", "col") and e.summed
    assert e.map.method["score"] == "lpi" and e.map.method["passes"] == {"forward": 1, "backward": 0}
    other = explain(model(), inputs(), method="occlusion", progress=False, by=())
    close(other.map, importance_map(model(), inputs(), "occlusion", progress=False))
    assert not other.summed and "occlusion: fall of the score without the patch" in other.summary()
    assert other.direct == {} and other.neurons is None


def test_options_of_the_map_are_passed_on() -> None:
    e = explain(model(), inputs(), method="attention", layers=[1])
    close(e.map, importance_map(model(), inputs(), "attention", layers=[1]))
    with pytest.raises(LensError, match="has no option 'layer'"):
        explain(model(), inputs(), method="attention", layer=1)


def test_all_tokens_of_an_answer_add_up() -> None:
    e = explain(model(), inputs("red"), "red blue", several="all")
    alone = explain(model(), inputs(), "red"), explain(model(), inputs("red"), "blue")
    assert e.answer_id == [each.answer_id for each in alone]
    assert e.probability == pytest.approx(alone[0].probability * alone[1].probability, rel=1e-4)
    for part in ("layers", "heads"):
        torch.testing.assert_close(
            getattr(e, part).values, sum(getattr(each, part).values for each in alone), atol=1e-4, rtol=1e-3
        )
    first = explain(model(), inputs(), "red blue", several="first")
    assert first.answer_id == alone[0].answer_id and "the first of 2 tokens" in first.summary()
    with pytest.raises(LensError, match=r"is 2 tokens .*several='first'"):
        explain(model(), inputs(), "red blue")


@pytest.mark.parametrize("odd", ["wide_grouped_heads", "attention_bias", "mlp_bias", "full", "layer_list"])
def test_odd_models_close(odd: str) -> None:
    hf = hf_llava(odd)
    given = example(hf, images=(2,))
    lens = HookedLlava.from_hf(hf)
    tokens, pixels = given["input_ids"], given["pixel_values"]
    e = explain(lens, Inputs.from_tokens(tokens, lens.cfg, pixels), image=1, by=("layer", "head", "neuron", "source"))
    assert e.closure < 1e-4 and all((scores.closure or 0) < 1e-3 for scores in e.direct.values())
    assert e.map.values.shape == e.roles.grid(1)
    torch.testing.assert_close(e.map.values, e.positions.over_image(1).values)
    assert e.text == "" and "row" in e.summary() and "pixels" not in e.summary()
    assert e.to_json()["picture"] == {"image": 1, "size": None, "patches_cover": None}
    same = explain(lens, {"input_ids": tokens, "pixel_values": pixels}, image=1, by=())
    assert torch.equal(same.map.values, e.map.values)


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(LensError, match="by='haed'; nearest: 'head'; expected some of 'layer'"):
        explain(model(), inputs(), by="haed")
    with pytest.raises(LensError, match="method 'relevance'; nearest: 'relevancy'"):
        explain(model(), inputs(), method="relevance")
    with pytest.raises(LensError, match="image 1; expected 0 … 0"):
        explain(model(), inputs(), image=1)
    with pytest.raises(LensError, match="a batch of 2; explain one at a time"):
        explain(model(), model().prepare([QUESTION] * 2, render_scene(3).image))


def test_it_shows_itself_in_a_notebook_and_as_json() -> None:
    e = explain(model(), inputs(), versus="blue", by="neuron")
    facts = json.loads(json.dumps(e.to_json(), allow_nan=False))
    assert facts["versus"] == "blue" and facts["direct"]["neuron"]["axes"] == ["layer", "neuron"]
    assert [reading["stream"] for reading in facts["lens"]][-1] == "final_post"
    shown = e._repr_html_()
    assert shown.count("<i ") == 64 + e.heads.values.numel() and "occlusion" not in shown
