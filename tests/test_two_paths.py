"""The fused path goes round modules; whatever a user did to one of them is done on both paths, or closes the region."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fused import distance, held, inputs_for
from test_fused import pair as typed_pair
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, prune

from llava_lens import HookedLlava, packing
from llava_lens.errors import LensError
from llava_lens.layers import Attention, Block, GatedMLP
from llava_lens.norms import RMSNorm
from llava_lens.packing import Packed
from llava_lens.regions import Region, regions_of

PROJECTIONS = ("attn.q_proj", "attn.o_proj", "mlp.gate_proj", "mlp.in_proj", "mlp.out_proj")


def pair(odd: str = "plain") -> tuple[Any, Any]:
    """A model on the reference path and one on the fused path, of equal weights."""
    return typed_pair(odd)


class Adapted(nn.Module):
    """A projection with a low-rank update beside it, and no weight of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        draw = torch.Generator().manual_seed(0)
        self.down = torch.randn(2, base.in_features, generator=draw)
        self.up = torch.randn(base.out_features, 2, generator=draw)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


class Doubled(nn.Linear):
    """A linear layer by inheritance, with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Negated(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return -weight


def exchange(model: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)


def adapt(model: nn.Module, name: str) -> None:
    exchange(model, name, Adapted(model.get_submodule(name)))  # type: ignore[arg-type]


def inherit(model: nn.Module, name: str) -> None:
    old: Any = model.get_submodule(name)
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    exchange(model, name, new)


def hook_output(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_hook(_double)


def hook_input(model: nn.Module, name: str) -> None:
    model.get_submodule(name).register_forward_pre_hook(_double_first)


def _double(module: nn.Module, given: Any, out: Any) -> Any:
    return 2 * out


def _double_linear(module: nn.Module, given: Any, out: Any) -> Any:
    return 2 * out if isinstance(module, nn.Linear) else None


def _double_first(module: nn.Module, given: Any) -> Any:
    return 2 * given[0], *given[1:]


def put_over(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    usual = module.forward
    module.forward = lambda *given: 2 * usual(*given)


def parametrise(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(model.get_submodule(name), "weight", Negated())


def cut_small_weights(model: nn.Module, name: str) -> None:
    prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.5)


def turn(model: nn.Module, name: str) -> None:
    weight: Any = model.get_submodule(name).weight
    weight.data = weight.data.flip(0) if weight.shape[0] != weight.shape[1] else weight.data.T


def compare(change: Callable[[nn.Module, str], None], name: str, odd: str = "plain") -> None:
    """Changed alike, both models agree, and both differ from before; the change comes after a first run."""
    inputs, models = inputs_for(odd), pair(odd)
    with torch.no_grad():
        before = [model(inputs) for model in models]
        for model in models:
            change(model, name)
        reference, fused = (model(inputs) for model in models)
    assert distance(fused, reference) < 1e-5
    assert distance(reference, before[0]) > 1e-3, "the change does nothing"


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize(
    "change", [adapt, inherit, hook_output, hook_input, put_over, parametrise, cut_small_weights, turn]
)
def test_a_projection_that_is_no_plain_one_is_run_as_it_is(change, name):
    compare(change, f"blocks.1.{name}")


@pytest.mark.parametrize("name", ["attn", "mlp", "ln1"])
@pytest.mark.parametrize("change", [hook_output, put_over])
def test_a_part_with_a_hook_of_torch_is_called(change, name):
    compare(change, f"blocks.1.{name}")
    compare(change, f"vision.blocks.1.{name}")


@pytest.mark.parametrize("change", [hook_output, hook_input, put_over])
def test_a_norm_behind_a_sum_is_called(change):
    before_the_norm = change is hook_input
    compare(hook_output if before_the_norm else change, "vision.blocks.1.ln2")
    compare(hook_output if before_the_norm else change, "blocks.1.ln2", "attention_bias")
    if before_the_norm:  # doubling the input of a norm does nothing, and so must adding to it
        seen: list[Tensor] = []
        _, fused = pair("attention_bias")
        fused.blocks[1].ln2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
        fused(inputs_for("attention_bias"))
        assert len(seen) == 1


def test_a_hook_on_all_modules_reaches_the_projections():
    inputs, models = inputs_for("plain"), pair()
    handle = register_module_forward_hook(_double_linear)
    try:
        reference, fused = (model(inputs) for model in models)
        assert "hook on all modules" in models[1].plan()["blocks.0"]["attn.qkv"]
    finally:
        handle.remove()
    assert torch.equal(reference, fused)


def test_the_plan_names_what_was_exchanged():
    _, fused = pair()
    adapt(fused, "blocks.0.attn.q_proj")
    hook_output(fused, "blocks.1.mlp")
    assert "q_proj, k_proj, v_proj: not a plain nn.Linear" in fused.plan()["blocks.0"]["attn.qkv"]
    assert "mlp was exchanged, or has a hook" in fused.plan()["blocks.1"]["mlp_sum"]
    fused.use("fused")  # joins what can be joined, and leaves the rest


def test_an_exchanged_projection_is_not_kept():
    _, fused = pair()
    fused(inputs_for("plain"))
    old = weakref.ref(fused.blocks[0].attn.q_proj)
    exchange(fused, "blocks.0.attn.q_proj", nn.Linear(64, 64, bias=False).requires_grad_(False))
    fused.setup()  # lists the modules anew
    fused(inputs_for("plain"))
    assert old() is None
    assert "lie apart" in fused.plan()["blocks.0"]["attn.qkv"]


def test_a_model_goes_with_its_last_name():
    _, fused = pair()
    fused(inputs_for("plain"))
    block = weakref.ref(fused.blocks[0].attn.q_proj)
    gc.disable()
    try:
        del fused
        assert block() is None, "a cycle holds the weights until the collector comes"
    finally:
        gc.enable()


def test_parts_that_change_places_are_asked_for_their_own_hooks():
    inputs, models = inputs_for("plain"), pair()
    outs = []
    for model in models:
        one, other = model.blocks[0], model.blocks[1]
        one.attn, other.attn = other.attn, one.attn
        with model.hooks(fwd_hooks=[(other.attn.hook_result.name, lambda act, hook: 2 * act)]):
            outs.append(model(inputs))
    assert distance(outs[1], outs[0]) < 1e-5


def test_another_activation_is_taken():
    inputs, models = inputs_for("plain"), pair()
    for model in models:
        model.blocks[1].mlp.act = F.relu
        model.vision.blocks[1].mlp.act = F.relu
    assert distance(models[1](inputs), models[0](inputs)) < 1e-5


# ---- subclasses


class ShiftedNorm(RMSNorm):
    """Gains that are kept less one, as in some models."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) + x


class Keyed(Attention):
    def keys_and_values(self, x: Any, angles: Any) -> Any:
        k, v = super().keys_and_values(x, angles)
        return k, 2 * v


class Sequential(Block):
    def second_half(self, x: Any, own: bool = False) -> Any:
        return super().second_half(2 * x, own)


class BareMlp(nn.Module):
    """What a block needs of an MLP: to be callable."""

    def __init__(self, cfg: Any):
        super().__init__()
        self.out_proj = nn.Linear(cfg.d_model, cfg.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(x)


@pytest.mark.parametrize("what", ["norm", "attention", "block"])
def test_what_a_subclass_has_of_its_own_is_run(what):
    inputs, models = inputs_for("attention_bias"), pair("attention_bias")
    outs = []
    for model in models:
        cfg, old = model.cfg, model.blocks[1]
        new = (Sequential if what == "block" else Block)(cfg, 1, ShiftedNorm if what == "norm" else RMSNorm, GatedMLP)
        if what == "attention":
            new.attn = Keyed(cfg, 1)
        new.load_state_dict(old.state_dict())
        model.blocks[1] = new.requires_grad_(False)
        model.setup()
        model.use(model.path)
        outs.append(model(inputs))
    assert distance(outs[1], outs[0]) < 1e-5
    assert distance(outs[1], pair("attention_bias")[0](inputs)) > 1e-3


def test_a_part_that_shares_nothing_with_ours_can_stand_in_a_block():
    cfg = pair()[0].cfg

    class Plain(HookedLlava):
        Mlp = BareMlp  # type: ignore[assignment]

    model = Plain(cfg).requires_grad_(False)
    tokens = torch.randint(3, 80, (1, 5))
    reference = model(tokens)
    model.use("fused")
    assert distance(model(tokens), reference) < 1e-5
    assert model.plan()["blocks.0"]["mlp_sum"] == "a subclass has its own"


# ---- gradients, transforms and modes


def weights_by_name() -> Iterator[str]:
    parts = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "ln1", "ln2")
    yield from (f"blocks.1.{part}.weight" for part in (*parts, "mlp.gate_proj", "mlp.in_proj", "mlp.out_proj"))
    yield from (f"vision.blocks.1.{part}.bias" for part in (*parts, "mlp.in_proj", "mlp.out_proj"))


@pytest.mark.parametrize("odd", ["plain", "attention_bias"])
@pytest.mark.parametrize("name", [*weights_by_name()])
def test_one_trained_weight_gets_its_gradient(name, odd):
    inputs, grads = inputs_for(odd), []
    for model in pair(odd):
        weight = model.get_parameter(name).requires_grad_(True)
        model(inputs)[:, -1].square().sum().backward()
        grads.append(weight.grad)
    size = max(1.0, float(grads[0].abs().max()))  # a bias of keys moves no softmax: its gradient is rounding alone
    assert float((grads[1] - grads[0]).abs().max()) < 1e-4 * size


@pytest.mark.parametrize("odd", ["plain", "attention_bias"])
@pytest.mark.parametrize("name", ["embed.weight", "vision.class_embed", *weights_by_name(), "ln_final.weight"])
def test_what_the_plan_calls_fused_is_fused_however_little_is_trained(name, odd, monkeypatch):
    _, fused = pair(odd)
    fused.get_parameter(name).requires_grad_(True)
    usual, closed = Region.open, set()

    def watched(self: Region, *tensors: Tensor) -> bool:
        is_open = usual(self, *tensors)
        if not is_open:
            closed.add(id(self))
        return is_open

    monkeypatch.setattr(Region, "open", watched)
    fused(inputs_for(odd))
    monkeypatch.undo()
    ways = {f"{part}.{way.region}": way.why for part, ways in fused.plan().ways.items() for way in ways}
    wrong = [where for where, region in regions_of(fused) if id(region) in closed and not ways[where]]
    assert not wrong
    before = [why for where, why in ways.items() if where.startswith(("vision.ln_pre", "vision.blocks.0"))]
    assert not any(before) or name == "vision.class_embed", "what lies before the trained weight stays fused"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_take_the_reference():
    models = pair()
    x = models[0].embed(torch.randint(3, 80, (3, 5)))
    weights = {name: torch.stack([w, 2 * w]) for name, w in models[1].named_parameters()}
    for run in (
        lambda model: torch.func.grad(lambda x: model(x, start_at_layer=0).square().sum())(x),
        lambda model: torch.func.vmap(lambda x: model(x, start_at_layer=0))(x[:, None]),
        lambda model: torch.func.vmap(
            lambda weights: torch.func.functional_call(model, weights, (x,), {"start_at_layer": 0})
        )(weights),
    ):
        reference, fused = map(run, models)
        assert torch.equal(reference, fused)


def test_weights_joined_in_inference_mode_can_be_trained():
    model = pair()[0]
    with torch.inference_mode():
        model.use("fused")
    model.requires_grad_(True)
    model(inputs_for("plain")).sum().backward()
    assert model.blocks[0].attn.q_proj.weight.grad is not None
    with torch.inference_mode():
        made_there = HookedLlava.tiny()
    with pytest.raises(LensError, match=r"made in inference mode.*load the model outside"):
        made_there.optimize_for_cpu()


# ---- copies and files


@contextmanager
def nothing_blocked_is_small() -> Iterator[None]:
    before = packing.WORTH_BLOCKING
    packing.WORTH_BLOCKING = 0
    try:
        yield
    finally:
        packing.WORTH_BLOCKING = before


def through_pickle(model: HookedLlava) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: HookedLlava) -> Any:
    torch.save(model, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_a_file])
def test_a_copy_is_fused_too_and_holds_every_weight_once(through):
    inputs, (_, fused) = inputs_for("attention_bias"), pair("attention_bias")
    with nothing_blocked_is_small():
        fused.optimize_for_cpu()
    logits = fused(inputs)
    twin = through(fused)
    fusing = [packed for part in twin.modules() for packed in vars(part).values() if isinstance(packed, Packed)]
    assert all(packed._joint is None and packed._blocked is None for packed in fusing)
    assert held(twin) == held(fused)
    assert {why for part in twin.plan().ways for why in twin.plan()[part].values()} == {"fused"}
    assert distance(twin(inputs), logits) < 1e-5
    with torch.no_grad():
        twin.blocks[0].attn.q_proj.weight.zero_()
    assert torch.equal(fused(inputs), logits)
