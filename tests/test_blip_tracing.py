"""Causal tracing of BLIP against full runs of Hugging Face's model with plain hooks, one per cell.

Tolerance: both ways add the same numbers in another order, in float64.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from random_blip import START, blip_processor, hf_blip
from torch.testing import assert_close

from llava_lens.analysis import Patches, log_prob, prob, recovery
from llava_lens.analysis.interventions.corruptions import blur, gaussian, multiplicative, pair
from llava_lens.errors import LensError
from llava_lens.models.blip import HookedBlip
from llava_lens.models.blip_tracing import blip_trace
from llava_lens.sweep.journal import digest

RANDOM = np.random.default_rng(0)
PICTURE, OTHER = (RANDOM.integers(0, 256, (24, 36, 3), dtype=np.uint8) for _ in range(2))
QUESTION = "what color is the dog?"


@cache
def models() -> tuple[Any, Any]:
    hf = deepcopy(hf_blip()).double()
    return hf, HookedBlip.from_hf(hf, blip_processor())


def module_of(hf: Any, restore: str, layer: int) -> Any:
    """Hugging Face's module whose output a short name means; a block's output stands for the sum before its norm."""
    stack, _, kind = restore.partition(".")
    if stack == "vision":
        block = hf.vision_model.encoder.layers[layer]
        return {"resid_post": block, "attn_out": block.self_attn, "mlp_out": block.mlp}[kind]
    bert = hf.text_encoder if stack == "encoder" else hf.text_decoder.bert
    block = bert.encoder.layer[layer]
    parts = {"attn_out": block.attention.output.dense, "cross_attn_out": block.crossattention.output.dense}
    return {**parts, "resid_post": block, "mlp_out": block.output.dense}[kind]


def noisy_module(hf: Any, noise_at: str) -> Any:
    return {
        "vision.hook_embed": hf.vision_model.embeddings,
        "vision.hook_features": hf.vision_model.post_layernorm,
        "encoder.hook_embed": hf.text_encoder.embeddings.word_embeddings,
        "encoder.hook_full_embed": hf.text_encoder.embeddings,
    }[noise_at]


class Slow:
    """Full runs of Hugging Face's model, each with hooks of its own."""

    def __init__(self, answer: list[int], pixels: Any = None, **inputs: Any):
        self.hf, self.answer = models()[0], answer
        start = torch.tensor([[START, *answer[:-1]]])
        self.inputs = {**inputs, "pixel_values": pixels, "decoder_input_ids": start}

    @torch.no_grad()
    def run(self, edits: list[tuple[Any, Any]]) -> float:
        """The answer's probability, with functions that change modules' outputs in place."""
        out = []
        handles = [module.register_forward_hook(self.changing(fn)) for module, fn in edits]
        handles.append(self.hf.text_decoder.register_forward_hook(lambda _, __, result: out.append(result.logits)))
        try:
            self.hf(**self.inputs)
        finally:
            for handle in handles:
                handle.remove()
        log_p = out[0][0].log_softmax(-1)
        return float(torch.stack([log_p[i, token] for i, token in enumerate(self.answer)]).sum().exp())

    @staticmethod
    def changing(fn: Any) -> Any:
        def hook(module: Any, given: Any, out: Any) -> Any:
            part = out[0] if isinstance(out, tuple) else out
            if part.ndim < 3:
                return None  # the pooled class token, which nobody reads
            new = part.clone()
            fn(new)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    def held(self, module: Any) -> torch.Tensor:
        """What a module gives in a clean run."""
        found: list[torch.Tensor] = []
        self.run([(module, lambda act: found.append(act.clone()))])
        return found[0]


def drawn(sigma: float, n: int, repeat: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(digest(0, 0, repeat), 16))
    return sigma * torch.randn(n, 48, generator=generator, dtype=torch.float32).double()


def noise(slow: Slow, how: str, sigma: float, noise_at: str, where: list[int], repeat: int) -> tuple[Any, Any]:
    module, numbers = noisy_module(slow.hf, noise_at), drawn(sigma, len(where), repeat)
    held = slow.hf.text_encoder.embeddings.word_embeddings.weight if noise_at.startswith("enc") else slow.held(module)
    std = float(held.detach().std())

    def corrupt(act: torch.Tensor) -> None:
        act[:, where] = act[:, where] + std * numbers if how == "add" else act[:, where] * (1 + numbers)

    return module, corrupt


ALL = list(range(10))
CASES: list[tuple[Any, dict[str, Any], tuple[Any, ...]]] = [
    (None, {"restore": "encoder.resid_post"}, ("add", 3.0, "vision.hook_features", ALL)),
    (gaussian(2.0, at="image"), {"restore": "encoder.cross_attn_out"}, ("add", 2.0, "vision.hook_features", ALL[1:])),
    (multiplicative(1.0, at="all"), {"restore": "encoder.mlp_out"}, ("multiply", 1.0, "vision.hook_features", ALL)),
    (gaussian(4.0, at="dog"), {"restore": "encoder.attn_out"}, ("add", 4.0, "encoder.hook_embed", [5])),
    (
        gaussian(1.0, at="question"),
        {"restore": "decoder.cross_attn_out", "noise_at": "encoder.hook_full_embed"},
        ("add", 1.0, "encoder.hook_full_embed", [1, 2, 3, 4, 5, 6]),
    ),
    (gaussian(3.0, at="all"), {"restore": "decoder.resid_post"}, ("add", 3.0, "vision.hook_features", ALL)),
    (
        gaussian(3.0, at="all"),
        {"restore": "vision.resid_post", "noise_at": "vision.hook_embed"},
        ("add", 3.0, "vision.hook_embed", ALL),
    ),
    (
        gaussian(2.0, at="all"),
        {"restore": "vision.attn_out", "noise_at": "vision.hook_embed", "window": 2},
        ("add", 2.0, "vision.hook_embed", ALL),
    ),
    (
        gaussian(3.0, at="all"),
        {"restore": "encoder.cross_attn_out", "window": 3},
        ("add", 3.0, "vision.hook_features", ALL),
    ),
]
NAMES = [f"{given['restore']}-{noisy[2]}-{given.get('window', 1)}" for _, given, noisy in CASES]


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_every_cell_of_blip_is_a_full_run_of_hugging_faces(case):
    (corruption, given, noisy), answer = CASES[case], ("red", "red ball")[case % 2]
    hf, model = models()
    inputs = model.prepare(QUESTION, PICTURE)
    ids = model.tokenizer(answer, add_special_tokens=False)["input_ids"]
    traced = blip_trace(model, inputs, corruption, metric=prob(answer), repeats=2, max_rows=4, **given)
    slow = Slow(ids, inputs["pixel_values"], input_ids=inputs["input_ids"])
    n_layers, n_pos = traced.values.shape
    modules = [module_of(hf, given["restore"], layer) for layer in range(n_layers)]
    clean = [slow.held(module) for module in modules]
    window = given.get("window", 1)
    total = torch.zeros(n_layers, n_pos, dtype=torch.float64)
    for repeat in range(2):
        corrupt = noise(slow, *noisy, repeat=repeat)
        assert traced.method["corrupt_each"][repeat] == pytest.approx(slow.run([corrupt]), rel=1e-9)
        for layer in range(n_layers):
            near = [i for i in range(n_layers) if -((window - 1) // 2) <= i - layer <= window // 2]
            for place in range(n_pos):
                puts = [(modules[i], lambda act, i=i, p=place: act[:, p].copy_(clean[i][:, p])) for i in near]
                total[layer, place] += slow.run([corrupt, *puts]) / 2
    assert_close(traced.values, total, rtol=1e-9, atol=1e-12)
    assert traced.method["clean"] == pytest.approx(slow.run([]), rel=1e-9)
    assert traced.method["noise_floor"] < 1e-12 and traced.method["answer"] == answer
    assert traced.low is not None and bool((traced.low <= traced.values).all())
    assert float((traced.values - traced.method["corrupt"]).abs().max()) > 1e-6


def test_everything_restored_is_the_clean_run():
    _, model = models()
    inputs = model.prepare(QUESTION, PICTURE)
    given: dict[str, Any] = {"repeats": 2, "metric": recovery(log_prob()), "at": {"all": None, "mark": [0]}}
    for restore, noise_at in (("encoder.resid_post", None), ("vision.resid_post", "vision.hook_embed")):
        traced = blip_trace(model, inputs, restore=restore, noise_at=noise_at, **given)
        assert traced.axes == ("layer", "group") and traced.labels["group"] == ("all", "mark")
        whole = traced.values[:, 0] if restore.startswith("vision") else traced.values[-1:, 0]  # later layers look too
        assert_close(whole, torch.ones(len(whole), dtype=torch.float64), rtol=0, atol=1e-9)
        assert traced.method["baseline"] == 0.0 and traced.unit == "recovered"


@torch.no_grad()
def test_a_pair_is_patching_from_another_picture():
    _, model = models()
    clean, other = (model.prepare(QUESTION, picture) for picture in (PICTURE, OTHER))
    traced = blip_trace(model, clean, pair(other), "vision.mlp_out", at="image", layers=[1])
    _, cache = model.run_with_cache(clean)

    def put(act, hook, place):
        act[:, place] = cache[hook.name][:, place]

    answer = int(model(clean)[0, -1].argmax())
    for place in range(1, 10):
        hooks = [("vision.blocks.1.hook_mlp_out", lambda act, hook, p=place: put(act, hook, p))]
        logits = model.run_with_hooks(other, fwd_hooks=hooks)
        expected = float(logits[0, -1].softmax(-1)[answer])
        assert float(traced.sel(layer=1).values[place]) == pytest.approx(expected, rel=1e-9)
    assert traced.values[0, 0].isnan() and traced.low is None and traced.method["repeats"] == 1
    assert traced.labels["position"][:2] == ("class token", "patch (0, 0)")
    assert traced[{"layer": 0}].over_image().axes == ("row", "col")


def test_selections_and_labels():
    _, model = models()
    inputs = model.prepare(QUESTION, PICTURE)
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 1] = True
    given: dict[str, Any] = {"repeats": 1, "layers": [0]}
    one, same = (blip_trace(model, inputs, gaussian(3.0, at=at), **given) for at in (Patches(mask), mask))
    assert torch.equal(one.values, same.values) and one.low is None
    assert one.labels["position"] == ("[CLS]", "what", "color", "is", "the", "dog", "?", "[SEP]")
    some = blip_trace(model, inputs, gaussian(3.0, at=[1, "dog"]), at=["is", -1], restore="encoder.z", **given)
    assert (~some.values.isnan()).nonzero()[:, 1].tolist() == [3, 7]
    assert "in encoder.hook_embed" in some.method["corruption"]


GOOD = {"repeats": 1}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"corruption": blur(2.0)}, r"Blur as corruption; expected gaussian\(…\), multiplicative\(…\), pair"),
    ({"restore": "resid_post"}, "restore='resid_post'; expected a stack in front: vision.…, encoder.…, decoder.…"),
    ({"restore": "encoder.cross_atn_out"}, "no hook is called 'encoder.cross_atn_out'; nearest: 'cross_attn_out'"),
    ({"restore": "encoder.pattern"}, "'encoder.pattern' has no positions of its own"),
    ({"restore": "vision.resid_post"}, "lies before 'vision.hook_features', which is corrupted; give noise_at='vision"),
    ({"noise_at": "vision.hook_embd"}, "noise_at='vision.hook_embd'; nearest: 'vision.hook_embed'"),
    ({"corruption": gaussian(1.0, at="cat")}, "no word 'cat' in the question"),
    ({"corruption": gaussian(1.0, at="answer")}, "'encoder' has no 'answer'; it has system, question, template"),
    ({"corruption": gaussian(1.0, at=[8])}, "position 8 in 'encoder'; expected 0 … 7"),
    ({"at": "image"}, "'encoder' has no 'image'"),
    ({"at": Patches(torch.ones(3, 3).bool())}, "in 'encoder'; expected 'all', 'image', 'class' or patches in 'vision'"),
    ({"restore": "vision.z", "noise_at": "vision.hook_embed", "at": "dog"}, "'dog' in 'vision'; expected 'all', 'ima"),
    ({"window": 0}, "a window of 0 layers"),
    ({"layers": 3}, "layer 3; expected 0 … 2"),
    ({"repeats": 0}, "repeats=0, max_rows=64; expected 1 or more"),
    ({"metric": lambda logits: 0.0}, "expected one of llava_lens.analysis.interventions.metrics"),
    ({"metric": prob("colr")}, "'colr' is 1 token"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=range(len(BAD)))
def test_bad_blip_traces_are_refused(given, message):
    _, model = models()
    with pytest.raises(LensError, match=message):
        blip_trace(model, model.prepare(QUESTION, PICTURE), **{**GOOD, **given})


def test_pairs_and_batches_that_do_not_fit_are_refused():
    _, model = models()
    inputs = model.prepare(QUESTION, PICTURE)
    with pytest.raises(LensError, match="clean has 8 question tokens, the pair 3"):
        blip_trace(model, inputs, pair(model.prepare("red", PICTURE)))
    with pytest.raises(LensError, match=r"nothing to restore at 'encoder.blocks.0.hook_resid_post': pair"):
        blip_trace(model, inputs, pair(model.prepare(QUESTION, PICTURE)))
    with pytest.raises(LensError, match=r"a batch of 2; trace one at a time: inputs.row\(i\)"):
        blip_trace(model, model.prepare([QUESTION, "red"], PICTURE))
