"""Edges against finite differences of runs with one edge patched by hand, and sums that close."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from brute_force import hooked, images_before, inputs_of
from torch import Tensor

from llava_lens import HookedLlava, Inputs
from llava_lens.analysis.interventions.edges import edge_attribution
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError
from llava_lens.sweep import logit_diff, recovery
from llava_lens.tiny import render_scene

ROWS = [("grouped", (2, 1), "left", 1), ("attention_bias", (1,), None, 0), ("one_kv_head", (1, 2), "right", 0),
        ("mlp_bias", (2,), None, 0)]  # fmt: skip


def pair(odd: str, images: tuple[int, ...], pad: str | None) -> tuple[HookedLlava, Inputs, Inputs]:
    model = hooked(odd)
    clean = inputs_of(model, odd, images, pad)
    assert clean.pixels is not None
    noise = torch.randn(clean.pixels.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    tokens = clean.tokens.clone()
    tokens[:, -2:] = torch.tensor([11, 12])
    return model, clean, Inputs(tokens, clean.pixels + 0.5 * noise, clean.attention_mask)


class ByHand:
    """Log-probability differences of one row's slow runs in which one edge is patched, a little."""

    def __init__(self, model: HookedLlava, clean: Inputs, corrupt: Inputs, row: int):
        self.model, self.corrupt, self.row = model, corrupt, row
        seen = torch.ones_like(clean.tokens) if clean.attention_mask is None else clean.attention_mask
        self.columns = seen[row].nonzero()[:, 0]
        with torch.no_grad():
            (logits, self.clean), (_, self.base) = (model.run_with_cache(inputs) for inputs in (clean, corrupt))
        self.answer = int(logits[row, self.columns[-1]].argmax())

    def sent(self, sender: str) -> Tensor:
        """How the runs differ in what a sender adds to the stream."""
        found = re.fullmatch(r"L(\d+)(?:H(\d+)| mlp)", sender)
        if found is None:
            name, head = "hook_embed", None
        else:
            head = found[2] and int(found[2])
            name = f"blocks.{found[1]}." + ("hook_mlp_out" if head is None else "attn.hook_result")
        change = self.clean[name][self.row] - self.base[name][self.row]
        return change if head is None else change[:, head]

    def hook(self, receiver: str, moved: Tensor) -> tuple[str, Any]:
        """A hook that lets one receiver alone read a stream that is moved."""
        found = re.fullmatch(r"L(\d+)(?:H(\d+) (q|k|v)| mlp)", receiver)
        row, last = self.row, self.model.cfg.n_layers - 1
        layer = last if found is None else int(found[1])
        block: Any = self.model.blocks[layer]
        if found is None or found[3] is None:

            def shift(act: Tensor, hook: Any) -> Tensor:
                act[row] = act[row] + moved
                return act

            return f"blocks.{layer}.hook_{'resid_post' if found is None else 'mlp_in'}", shift
        head, kind = int(found[2]), found[3]
        stream = self.base[f"blocks.{layer}.hook_resid_pre"][row] + moved
        new = getattr(block.attn, f"{kind}_proj")(block.ln1(stream[None]))[0]

        def put(act: Tensor, hook: Any) -> Tensor:
            act[row, :, head] = new.view(len(new), -1, act.shape[-1])[:, head]
            return act

        return f"blocks.{layer}.attn.hook_{kind}", put

    def value(self, moved: Tensor, receiver: str) -> float:
        with torch.no_grad():
            logits = self.model.run_with_hooks(self.corrupt, fwd_hooks=[self.hook(receiver, moved)])
        return float(logits[self.row, self.columns[-1]].log_softmax(-1)[self.answer])

    def slope(self, sender: str, receiver: str, alpha: float = 1e-3) -> float:
        moved = self.sent(sender)
        return (self.value(alpha * moved, receiver) - self.value(-alpha * moved, receiver)) / (2 * alpha)


@pytest.mark.parametrize("odd,images,pad,row", ROWS)
def test_an_edge_is_the_first_order_of_patching_it(odd, images, pad, row):
    model, clean, corrupt = pair(odd, images, pad)
    scores = edge_attribution(model, clean, corrupt, row=row)
    senders, receivers = scores.labels_of("sender"), scores.labels_of("receiver")
    assert len(senders) == 1 + 3 * 5 and len(receivers) == 3 * (4 + 2 * model.cfg.n_key_value_heads + 1) + 1
    slow = ByHand(model, clean, corrupt, row)
    edges = [("embed", "L0H1 q"), ("embed", "L2H0 k"), ("L0H3", "L0 mlp"), ("L0H2", "L1H0 v"), ("L1 mlp", "L2H3 q"),
             ("L0 mlp", "logits"), ("L2H1", "logits"), ("L1H0", "L2 mlp"), ("L0H1", "L2H0 k"),
             ("L2 mlp", "logits")]  # fmt: skip
    for sender, receiver in edges:
        got = float(scores.values[senders.index(sender), receivers.index(receiver)])
        assert got != 0 and got == pytest.approx(slow.slope(sender, receiver), rel=1e-4, abs=1e-7), (sender, receiver)


@pytest.mark.parametrize("odd,images,pad,row", ROWS)
@pytest.mark.parametrize("how", [{}, {"direction": "noise"}, {"full": True}, {"metric": recovery(logit_diff(5, 7))},
                                 {"at": [-1, -2]}, {"metric": lambda z: z[0, -1, 5].sin()}],
                         ids=lambda how: ", ".join(how))  # fmt: skip
def test_senders_sum_to_the_effect_of_a_receivers_input(odd, images, pad, row, how):
    model, clean, corrupt = pair(odd, images, pad)
    how = dict(how)
    if pad == "right" and "at" in how:
        how["at"] = [3, 4]
    scores = edge_attribution(model, clean, corrupt, row=row, **how)
    assert scores.closure is not None and scores.closure < 1e-10
    assert float(scores.values.abs().max()) > 1e-3 and scores.unit in ("nats", "recovered", "")


def test_sums_are_gradient_times_change_of_the_input():
    """The same by another way: gradients of a run with cache, of all heads' queries, keys and values together."""
    odd, images, pad, row = ROWS[0]
    model, clean, corrupt = pair(odd, images, pad)
    slow = ByHand(model, clean, corrupt, row)
    last = int(slow.columns[-1])
    _, cache = model.run_with_cache(
        corrupt, incl_bwd=True, metric=lambda logits: logits[row, last].log_softmax(-1)[slow.answer]
    )
    scores = edge_attribution(model, clean, corrupt, row=row)
    total = dict(zip(scores.labels_of("receiver"), scores.sum("sender").values.tolist(), strict=True))

    def effect(gradient: str, stream: str) -> float:
        change = slow.clean[stream][row, slow.columns] - slow.base[stream][row, slow.columns]
        return float((cache[gradient + "_grad"][row, slow.columns] * change).sum())

    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}."
        read = sum(value for name, value in total.items() if str(name).startswith(f"L{layer}H"))
        assert read == pytest.approx(effect(block + "hook_attn_in", block + "hook_resid_pre"), abs=1e-10)
        mlp = effect(block + "hook_mlp_in", block + "hook_resid_mid")
        assert total[f"L{layer} mlp"] == pytest.approx(mlp, abs=1e-10)
    final = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    assert total["logits"] == pytest.approx(effect(final, final), abs=1e-10)


def before(sender: str, receiver: str) -> bool:
    if sender == "embed" or receiver == "logits":
        return True
    one, other = int(sender[1]), int(receiver[1])
    return one < other or (one == other and "H" in sender and receiver.endswith("mlp"))


def test_edges_that_do_not_exist_are_zero_and_the_others_are_not():
    odd, images, pad, _ = ROWS[0]
    scores = edge_attribution(*pair(odd, images, pad), row=0)
    exists = torch.tensor(
        [[before(str(s), str(r)) for r in scores.labels_of("receiver")] for s in scores.labels_of("sender")]
    )
    assert torch.equal(scores.values != 0, exists)


def test_some_receivers_some_positions_and_a_batch():
    odd, images, pad, _ = ROWS[0]
    model, clean, corrupt = pair(odd, images, pad)
    whole = edge_attribution(model, clean, corrupt)
    assert whole.axes == ("batch", "sender", "receiver") and whole.method["score"] == "edge attribution"
    for kinds in ("logits", ("mlp", "k"), ["v"], ("q",)):
        few = edge_attribution(model, clean, corrupt, receivers=kinds, row=1)
        at = [whole.labels_of("receiver").index(name) for name in few.labels_of("receiver")]
        assert torch.allclose(few.values, whole.values[1][:, at], rtol=0, atol=1e-12)
    columns = range(13, clean.n_pos) if clean.attention_mask is None else clean.attention_mask[1].nonzero()[:, 0]
    middle = int(columns[len(columns) // 2])
    halves = [[c for c in map(int, columns) if (c < middle) == first] for first in (True, False)]
    each = [edge_attribution(model, clean, corrupt, at=half, row=1).values for half in halves]
    assert torch.allclose(each[0] + each[1], whole.values[1], rtol=0, atol=1e-12)
    assert images_before(clean, 1, model) == 2 and not each[0].allclose(each[1])


def test_weights_and_hooks_are_left_alone():
    odd, images, pad, _ = ROWS[0]
    model, clean, corrupt = pair(odd, images, pad)
    with torch.inference_mode():
        scores = edge_attribution(model, clean, corrupt)
    assert isinstance(scores, Scores) and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(hook.live for hook in model.hook_dict.values())


@pytest.mark.parametrize(
    "how,message",
    [
        ({"receivers": ("q", "mpl")}, "receivers: 'mpl'; nearest: 'mlp'; expected some of q, k, v, mlp, logits"),
        ({"receivers": ()}, "receivers: none; expected some of q, k, v, mlp, logits"),
        ({"direction": "up"}, "expected 'denoise' or 'noise'"),
        ({"file": "edges.safetensors"}, "file= with edge_attribution"),
        ({"metric": "kl", "direction": "noise"}, "kl is smallest on the clean run"),
        ({"metric": lambda z: z[0, -1, 5].item()}, "returned float, through which no gradient passes"),
        ({"at": "question"}, "no 'question'|carry no roles|spans"),
    ],
)
def test_errors_say_what_was_expected(how, message):
    with pytest.raises(LensError, match=message):
        inspect.unwrap(edge_attribution)(*pair("plain", (1,), None), **how)


def test_on_the_embedded_model_the_sums_close_in_single_precision():
    model = HookedLlava.tiny()
    scene = render_scene(1_000_000)
    shape, color = scene.objects[0].shape, scene.objects[0].color
    other = next(c for c in ("red", "blue") if c != color)
    clean, corrupt = (model.prepare(f"What color is the {shape}?", s.image) for s in (scene, scene.recolored(0, other)))
    scores = edge_attribution(model, clean, corrupt, metric=logit_diff(color, other))
    assert scores.closure is not None and scores.closure < 1e-3
    assert float(scores.values.abs().max()) > 0.1
