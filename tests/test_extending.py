"""What a subclass's author is told: steps that return something else, hooks that never fire, unknown classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import example, hf_llava
from torch import Tensor

from llava_lens import HookedLlava, HookedMLLM, LlavaConfig, check_parity
from llava_lens.errors import LensError
from llava_lens.hooks import Hook
from llava_lens.models import MODELS, class_of, register


class Narrow(HookedLlava):
    def embed_tokens(self, tokens: Any) -> Any:
        return self.embed(tokens)[..., :-1]


class Lost(HookedLlava):
    def arrange(self, image: Any, inputs: Any) -> Any:
        return image[:, 1:]


class Short(HookedLlava):
    def positions(self, inputs: Any, mask: Any = None, beyond: int = 0) -> Any:
        return torch.arange(inputs.n_pos - 1)[None]


@pytest.mark.parametrize(
    "kind, message",
    [
        (Narrow, r"Narrow.embed_tokens gave \(2, 18, 63\); expected \(2, 18, 64\)"),
        (Lost, r"Lost: 18 image tokens, but encode_image gave \(2, 9, 64\) and arrange made \(2, 8, 64\) of it"),
        (Short, r"Short.positions gave \(1, 17\); expected \(1, 18\)"),
    ],
)  # fmt: skip
def test_a_step_that_returns_another_shape_is_named(kind: type[HookedLlava], message: str) -> None:
    hf = hf_llava("plain")
    model = kind.from_hf(hf)
    with pytest.raises((LensError, TypeError), match=message):
        model(**example(hf))


class Forgetful(HookedLlava):
    """A hook that no step calls."""

    def __init__(self, cfg: LlavaConfig, processor: Any = None):
        super().__init__(cfg, processor)
        self.hook_nowhere = Hook("batch pos d_model")
        self.setup()


def test_the_report_names_a_hook_that_never_fires() -> None:
    hf = hf_llava("plain")
    report = check_parity(Forgetful.from_hf(hf), hf, example(hf), new_tokens=0)
    assert report.is_equal and report.silent == ("hook_nowhere",)
    assert "hooks that never fired: hook_nowhere" in str(report)


class Later(HookedLlava):
    """Positions that begin at 3, and a mask that lets everything see everything."""

    def positions(self, inputs: Any, mask: Any = None, beyond: int = 0) -> Tensor:
        return torch.arange(3, 3 + inputs.n_pos + beyond)[None]


@torch.no_grad()
def test_positions_of_a_class_s_own_hold_in_every_kind_of_run() -> None:
    hf = hf_llava("plain")
    model, plain = Later.from_hf(hf), HookedLlava.from_hf(hf)
    inputs = model.read_inputs(**example(hf))
    at = torch.arange(3, 3 + inputs.n_pos)[None]
    whole = plain(inputs, position_ids=at)
    assert torch.equal(model(inputs), whole)
    stream = model(inputs, stop_at_layer=1)
    assert torch.equal(model(stream, start_at_layer=1, **inputs), whole)
    with model.looking_at(inputs):
        assert torch.equal(model(stream, start_at_layer=1), whole)
    with pytest.raises(LensError, match="pass \\*\\*inputs beside the stream"):
        model(stream, start_at_layer=1)
    assert torch.equal(model.generate(inputs, 4), model.generate(inputs, 4, use_kv_cache=False))


def test_a_class_is_found_by_the_model_type() -> None:
    with pytest.raises(LensError, match=r"no class for a 'lava' checkpoint; nearest: 'llava'"):
        class_of("lava")
    register("lava", Later)
    try:
        assert class_of("lava") is Later
    finally:
        del MODELS["lava"]
    assert type(HookedMLLM.from_hf(hf_llava("plain"))) is HookedLlava
    assert type(HookedMLLM.from_hf(hf_llava("plain"))).Config.families[0] == "llava"
