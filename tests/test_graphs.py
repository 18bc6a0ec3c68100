"""The decode step of fixed shapes against the ordinary one, and how recordings are kept, on stand-ins for graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from random_models import IMAGE, example, hf_llava
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_lens import HookedLlava
from llava_lens.graphs import BUCKET, GraphRunner, StaticStep
from llava_lens.kv_cache import KVCache


class Replayed:
    """What a CUDA graph does, by running the function again on the same tensors."""

    def __init__(self, function: Any, inputs: tuple[Tensor, ...], output: Tensor):
        self.function, self.inputs, self.output, self.times = function, inputs, output, 0

    @torch.no_grad()
    def replay(self) -> None:
        self.times += 1
        self.output.copy_(self.function(*self.inputs))


def stand_in(function: Any, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Any, Tensor]:
    function(*inputs)
    output = function(*inputs)
    return Replayed(function, inputs, output), output


def built(odd: str = "grouped", limit: int = 8, **how: Any) -> tuple[Any, Any]:
    hf = hf_llava(odd, **how)
    model = HookedLlava.from_hf(hf)
    model.graphs = GraphRunner(limit, stand_in, "cpu")
    model.graphs.enabled = True
    return hf, model


def replays(model: HookedLlava) -> int:
    return sum(recording.graph.times for recording in model.graphs.recordings.values())


def kinds(model: HookedLlava) -> list[str]:
    keys: Any = list(model.graphs.recordings)
    return [what if isinstance(what, str) else what[0] for what, *_ in keys]


# ---- the step


@torch.no_grad()
@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("odd", ["plain", "grouped", "wide_grouped_heads", "rope_llama3", "tied"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_static_step_equals_an_ordinary_one(odd: str, pad: str | None, attention: str) -> None:
    """Up to the rounding of sums over masked places: 1e-6 of the largest logit, float32."""
    hf, model = built(odd, attention=attention)
    inputs = example(hf, images=(1, 1), pad=pad)
    step = StaticStep(model, 2, 64)
    ordinary = KVCache(model.cfg.n_layers)
    first = model(**inputs, past_kv_cache=ordinary)
    assert torch.equal(model(**inputs, past_kv_cache=step.past), first)
    step.start()
    token = first[:, -1:].argmax(-1)
    position = inputs["attention_mask"].sum(-1, keepdim=True)
    for i in range(6):
        expected = model(token, past_kv_cache=ordinary, position_ids=position + i)[:, -1]
        found = step.step(token)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
        token = expected.argmax(-1)[:, None].clamp(max=IMAGE - 1)
    shown = step.hand_over()
    assert shown.length == ordinary.length
    expected = model(token, past_kv_cache=ordinary, position_ids=position + 6)
    found = model(token, past_kv_cache=shown, position_ids=position + 6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@torch.no_grad()
def test_no_shape_of_a_step_changes_and_nothing_waits() -> None:
    hf, model = built()
    inputs = example(hf, images=(1, 1), pad="left")
    step = StaticStep(model, 2, 64)
    token = model(**inputs, past_kv_cache=step.past)[:, -1:].argmax(-1)
    step.start()

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            self.seen.append((str(func), tuple(out.shape) if isinstance(out, Tensor) else None))
            return out

    step.step(token)
    seen = []
    for _ in range(2):
        with Calls() as calls:
            step.step(token)
        seen.append(calls.seen)
    assert seen[0] == seen[1] and len(seen[0]) > 100
    waits = ("_local_scalar_dense", "nonzero", "_unique2", "is_nonzero", "lift_fresh")
    assert not [name for name, _ in seen[0] if any(wait in name for wait in waits)]


# ---- generate and forward on recordings


@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("count", [1, 3])
def test_generate_replays_one_recording_per_room(pad: str | None, count: int) -> None:
    hf, model = built()
    plain = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1,) * count, pad=pad)
    free = plain.generate(**inputs, max_new_tokens=8, stop_tokens=())
    stop = int(free[0, -4])
    for stops in ((), [stop]):
        expected = plain.generate(**inputs, max_new_tokens=8, stop_tokens=stops)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, max_new_tokens=8, stop_tokens=stops), expected)
    assert sorted(kinds(model)) == ["image", "step"] and replays(model) > 20
    assert all(step.capacity == BUCKET and not step.busy for step in model.graphs.steps.values())
    other = example(hf, images=(1,) * count, pad=pad, seed=5, text=5)
    expected = plain.generate(**other, max_new_tokens=8, stop_tokens=())
    assert torch.equal(model.generate(**other, max_new_tokens=8, stop_tokens=()), expected)
    assert len(model.graphs.steps) == 1


def test_forward_replays_for_one_shape() -> None:
    hf, model = built()
    plain = HookedLlava.from_hf(hf)
    with torch.no_grad():
        for pad in (None, "left", "right"):
            for seed in (1, 2):
                inputs = example(hf, images=(1, 1), pad=pad, seed=seed)
                assert torch.equal(model(**inputs), plain(**inputs))
                assert torch.equal(model(**inputs, logits_to_keep=1), plain(**inputs, logits_to_keep=1))
    made = kinds(model)  # left and right padding are one shape
    assert (
        made.count("image") == 1 and made.count("logits") == 4 and replays(model) == 24 - 5
    )  # each shape runs plainly once
    outputs = [model(**inputs) for _ in range(2)]
    assert outputs[0].data_ptr() != outputs[1].data_ptr()


@torch.no_grad()
def test_nothing_is_replayed_where_python_is_needed() -> None:
    hf, model = built()
    inputs = example(hf, images=(1, 1))
    fits = model.graphs.fits
    assert fits(model)
    with torch.enable_grad():
        assert not fits(model)
    with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda act, hook: None)]):
        assert not fits(model)
        model(**inputs)
    handle = model.blocks[1].mlp.register_forward_hook(lambda *_: None)
    assert not fits(model)
    handle.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits(model)
    assert fits(model) and not replays(model)
    model.graphs.enabled = None
    assert not fits(model)
    model.path = "fused"  # type: ignore[assignment]
    assert fits(model)
    model.graphs.device_type = "cuda"
    assert not fits(model)

    class Own(HookedLlava):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    own = Own.from_hf(hf)
    own.graphs = GraphRunner(8, stand_in, "cpu")
    own.graphs.enabled = True
    assert own.graphs.step(own, 1, 10) is None and model.graphs.step(model, 1, 10) is None


def test_hooks_that_come_and_go_between_steps() -> None:
    hf, model = built()
    plain = HookedLlava.from_hf(hf)
    inputs = example(hf, images=(1, 1), pad="left")

    def zero(act: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(act)

    def run(model: HookedLlava) -> Tensor:
        steps: list[Tensor] = []

        def between(new: Tensor) -> None:
            steps.append(new)
            if len(steps) == 3:
                model.add_hook("blocks.1.hook_attn_out", zero)
            if len(steps) == 6:
                model.reset_hooks()

        return model.generate(**inputs, max_new_tokens=10, stop_tokens=(), on_step=between)

    expected = run(plain)
    assert torch.equal(run(model), expected) and replays(model) > 4
    assert not torch.equal(expected, plain.generate(**inputs, max_new_tokens=10, stop_tokens=()))


@pytest.mark.parametrize("how", ["in place", "exchanged", "moved"])
def test_recordings_are_dropped_when_weights_change(how: str) -> None:
    hf = copy.deepcopy(hf_llava("grouped"))
    model: Any = HookedLlava.from_hf(hf)
    model.graphs = GraphRunner(8, stand_in, "cpu")
    model.graphs.enabled = True
    inputs = example(hf, images=(1,))
    with torch.no_grad():
        for _ in range(2):
            model(**inputs)
        before = list(model.graphs.recordings.values())
        weight = model.blocks[1].mlp.out_proj.weight
        if how == "in place":
            weight.mul_(2)
        elif how == "exchanged":
            model.blocks[1].mlp.out_proj.weight = torch.nn.Parameter(weight * 2)
        else:
            model.double()
            inputs["pixel_values"] = inputs["pixel_values"].double()
        model(**inputs)
        logits = model(**inputs)
        assert len(before) == len(model.graphs.recordings) == 2
        assert not any(old is new for old in before for new in model.graphs.recordings.values())
        model.graphs.enabled = False
        assert torch.equal(model(**inputs), logits)


@torch.no_grad()
def test_recordings_are_few_and_the_longest_unused_goes() -> None:
    hf, model = built(limit=3)
    for n in (1, 1, 2, 2, 3, 3, 1, 4, 4):
        model(example(hf, images=(0,), text=n + 3)["input_ids"])
    keys: Any = list(model.graphs.recordings)
    lengths = [key[2][0][1] for key in keys]
    assert lengths == [n + 3 for n in (3, 1, 4)]


def test_a_room_in_use_is_not_lent_twice() -> None:
    hf, model = built()
    inputs = example(hf, images=(1,))
    expected = HookedLlava.from_hf(hf).generate(**inputs, max_new_tokens=5, stop_tokens=())
    inner: list[Tensor] = []

    def between(_: Tensor) -> None:
        inner.append(model.generate(**inputs, max_new_tokens=5, stop_tokens=()))

    assert torch.equal(model.generate(**inputs, max_new_tokens=5, stop_tokens=(), on_step=between), expected)
    assert all(torch.equal(each, expected) for each in inner)


def test_a_copied_model_records_for_itself() -> None:
    hf, model = built()
    with torch.no_grad():
        for _ in range(2):
            model(**example(hf, images=(1,)))
    twin = copy.deepcopy(model)
    assert model.graphs.recordings and not twin.graphs.recordings and twin.graphs.device_type == "cuda"
