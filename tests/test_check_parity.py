"""`check_parity` says equal where all is, and points at the one stage that was broken, whichever it is."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_models import IMAGE, example, hf_llama, hf_llava
from transformers import LlamaForCausalLM

from llava_lens import HookedLlava, check_parity
from llava_lens.errors import LensError
from llava_lens.parity import Difference
from llava_lens.parity.twin import Twin
from llava_lens.rename import LLAVA_TABLE, Row
from llava_lens.rotary import Rotary

BATCHES = {
    "batch": dict(images=(1, 1)),
    "ragged_left": dict(images=(1, 2, 0), pad="left"),
    "ragged_right": dict(images=(1, 1), pad="right"),
    "text_only": dict(images=(0, 0), pad="left"),
}
ODDS = ["plain", "wide_grouped_heads", "tied", "layer_list_full", "first_layer"]
LOW = ["full", "bare_projector", "gelu_tower"]


def twins(odd: str = "grouped", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model that shares no weight with the Hugging Face model beside it."""
    hf = hf_llava(odd, dtype=dtype)
    return HookedLlava.from_hf(deepcopy(hf)), hf


def names(stages) -> list[str]:
    return [stage.name for stage in stages]


@pytest.mark.parametrize(
    ("odd", "dtype"), [*((odd, torch.float32) for odd in ODDS), *((odd, torch.bfloat16) for odd in LOW)]
)
def test_a_model_equals_its_twin(odd, dtype):
    model, hf = twins(odd, dtype)
    report = check_parity(model, hf, example(hf, images=(1, 1), pad="left"), new_tokens=3)
    assert report.is_equal and report.close(0.0) and report.first_difference is None and not report.at_fault
    n_tower = len(model.vision.blocks)
    assert len(report.compared) == len(report.stages) == 7 + n_tower + model.cfg.n_layers
    assert report.weights.n_equal == len(dict(model.named_parameters(remove_duplicate=False)))
    unbuilt = tuple(range(n_tower, hf.config.vision_config.num_hidden_layers))
    assert report.weights == replace(report.weights, differing=(), unknown=(), homeless=(), unmatched=())
    assert report.weights.not_built == unbuilt
    assert report.generation.equal and [len(row) for row in report.generation.ours] == [3, 3]


@pytest.mark.parametrize("batch", BATCHES)
def test_inputs_of_every_kind(batch):
    model, hf = twins()
    report = check_parity(model, hf, example(hf, **BATCHES[batch]), new_tokens=2)
    assert report.is_equal
    skipped = [stage for stage in report.stages if stage.skipped]
    pictures = batch != "text_only"
    assert names(skipped) == (
        [] if pictures else [s.name for s in report.stages if "vision" in s.ours or "projec" in s.ours]
    )
    assert all("no picture" in stage.skipped for stage in skipped)
    assert ("no picture" in str(report)) is not pictures
    assert ("pad on the left" in report.generation.skipped) is (batch == "ragged_right")
    assert ("padded positions left out" in str(report)) is (batch != "batch")


def test_a_plain_llama():
    hf = hf_llama("grouped")
    tokens = torch.randint(3, 90, (2, 11), generator=torch.Generator().manual_seed(0))
    report = check_parity(HookedLlava.from_hf(hf), hf, tokens, new_tokens=2)
    assert report.is_equal
    assert names(report.stages) == [
        "text embeddings", "spliced embeddings", "block 0", "block 1", "block 2", "final norm", "logits",
    ]  # fmt: skip


# ---- one thing broken at a time


def nudge(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.view(-1)[3] += 0.5


def permute_positions(model) -> None:
    weight = model.vision.pos_embed.weight
    weight.data = weight.data.roll(1, 0)


def read_another_layer(model) -> None:
    model.vision.cfg = replace(model.vision.cfg, feature_layers=(2,))


def splice_backwards(model) -> None:
    model.splice = lambda text, slots, image: HookedLlava.splice(model, text, slots, image.flip(1))


def turn_faster(model) -> None:
    model.rotary = Rotary(replace(model.cfg, rope={"rope_type": "default", "rope_theta": 500.0}))


def scale_unembed(model) -> None:
    model.unembed.weight.data = model.unembed.weight.data * 1.5


BREAKS = {
    "embedding": (lambda m: nudge(m.embed.weight[5]), ["text embeddings"], "embed.weight"),
    "positions": (permute_positions, ["tower embeddings"], "vision.pos_embed.weight"),
    "tower norm": (lambda m: setattr(m.vision.ln_pre, "eps", 0.1), ["tower embeddings"], None),
    "tower weight": (
        lambda m: nudge(m.vision.blocks[1].attn.o_proj.weight),
        ["tower block 1"],
        "vision.blocks.1.attn.o_proj.weight",
    ),
    "last tower block": (lambda m: setattr(m.vision.blocks[2].ln2, "eps", 0.1), ["tower block 2"], None),
    "feature layer": (read_another_layer, ["tower features"], None),
    "projector": (lambda m: setattr(m.projector, "act", F.relu), ["projector"], None),
    "splice": (splice_backwards, ["spliced embeddings"], None),
    "block weight": (lambda m: nudge(m.blocks[1].mlp.out_proj.weight), ["block 1"], "blocks.1.mlp.out_proj.weight"),
    "block norm": (lambda m: setattr(m.blocks[0].ln1, "eps", 0.1), ["block 0"], None),
    "last block": (lambda m: setattr(m.blocks[2].ln2, "eps", 0.1), ["block 2"], None),
    "rope": (turn_faster, ["block 0", "block 1", "block 2"], None),
    "final norm": (lambda m: setattr(m.ln_final, "eps", 0.1), ["final norm"], None),
    "unembed": (scale_unembed, ["logits"], "unembed.weight"),
}
"""What is broken → how, the stages that then differ by themselves, and the weight that differs."""


@pytest.mark.parametrize("what", BREAKS)
def test_the_report_points_at_what_is_broken(what):
    break_it, expected, weight = BREAKS[what]
    model, hf = twins()
    inputs = example(hf, images=(1, 1), pad="left")
    inputs["input_ids"][:, -1] = 5  # a word whose embedding one of the cases changes
    break_it(model)
    report = check_parity(model, hf, inputs, new_tokens=0)
    assert report.first_difference is not None and report.first_difference.name == expected[0]
    assert names(report.at_fault) == expected
    assert [each.name for each in report.weights.differing] == ([] if weight is None else [weight])
    assert not report.is_equal and not report.close(1e-6) and report.close(1e3)
    last = report.stages[-1]
    assert last.differs and last.verdict == ("differs" if what == "unembed" else "follows")
    assert f"First difference: {expected[0]}" in report.summary
    assert ("every block differs by itself" in report.summary) is (what == "rope")
    assert (weight or "weights: 87 of 87 are equal") in str(report)


def test_two_faults_are_both_found_and_what_lies_between_follows():
    model, hf = twins()
    model.projector.act = F.relu
    model.blocks[1].ln2.eps = 0.1
    report = check_parity(model, hf, example(hf), new_tokens=0)
    assert names(report.at_fault) == ["projector", "block 1"]
    verdicts = {stage.name: stage.verdict for stage in report.stages}
    assert verdicts["tower features"] == "equal" and verdicts["spliced embeddings"] == verdicts["block 0"] == "follows"


def test_swapped_rows_of_the_table_show_in_the_block():
    swap = {"gate_proj": "in_proj", "in_proj": "gate_proj"}

    def swapped(rule):
        part = rule.ours.split(".")[-2] if isinstance(rule, Row) and ".mlp." in rule.ours else ""
        wrong = part in swap and rule.ours.startswith("blocks")
        return Row(rule.published, rule.ours.replace(part, swap[part])) if wrong else rule

    class Swapped(HookedLlava):
        weight_table = tuple(map(swapped, LLAVA_TABLE))

    hf = hf_llava()
    report = check_parity(Swapped.from_hf(hf), hf, example(hf), new_tokens=0)
    assert not report.weights.differing and names(report.at_fault) == ["block 0", "block 1", "block 2"]


def test_the_row_that_pictures_take_the_place_of_does_not_count():
    model, hf = twins()
    nudge(model.embed.weight[IMAGE])
    report = check_parity(model, hf, example(hf), new_tokens=0)
    assert report.first_difference is None and not report.is_equal
    assert [each.name for each in report.weights.differing] == ["embed.weight"]


def test_a_part_is_the_module_that_owns_just_its_weights():
    twin = Twin(*twins())
    homes = {
        "blocks.2.": "model.language_model.layers.2",
        "blocks.": "model.language_model.layers",
        "vision.blocks.3.": "model.vision_tower.encoder.layers.3",  # which the model does not build
        "projector.": "model.multi_modal_projector",
        "projector.linear_2.": "model.multi_modal_projector.linear_2",
        "unembed.": "lm_head",
        "blocks.0.ln": None,  # two norms of a block that owns more
        "blocks.3.": None,
    }
    assert {part: twin.home(part) for part in homes} == homes


def test_differences_are_those_of_the_tensors():
    model, hf = twins()
    inputs = example(hf)
    model.blocks[0].ln1.eps = 0.1
    with torch.no_grad():
        theirs = hf(**inputs).logits
        gap = (model(**inputs) - theirs).abs().max()
    found = check_parity(model, hf, inputs, new_tokens=0).stages[-1].difference
    assert found is not None and found.absolute == float(gap)
    assert found.relative == pytest.approx(float(gap / theirs.abs().max()), rel=1e-6)


def test_padded_positions_do_not_count():
    model, hf = twins()
    inputs = example(hf, images=(1, 1), pad="right")

    def spoil(_module, _args, out, keep):
        return torch.where(keep[..., None], out, torch.nan)

    handle = model.ln_final.register_forward_hook(partial(spoil, keep=inputs["attention_mask"].bool()))
    assert check_parity(model, hf, inputs, new_tokens=0).is_equal
    handle.remove()
    model.ln_final.register_forward_hook(partial(spoil, keep=inputs["attention_mask"].bool().roll(1, 1)))
    report = check_parity(model, hf, inputs, new_tokens=0)
    assert names(report.at_fault) == ["final norm"]
    assert report.at_fault[0].alone == Difference(torch.inf, torch.inf, False) and not report.close(1e9)
    assert json.dumps(report.to_json(), allow_nan=False)


def test_generated_tokens_are_compared():
    model, hf = twins()
    inputs = example(hf, images=(1, 1), pad="left")
    model.unembed.weight.data = model.unembed.weight.data.roll(1, 0)
    report = check_parity(model, hf, inputs, new_tokens=4)
    assert report.generation.first_difference == (0, 0) and not report.is_equal
    start = inputs["input_ids"].shape[1]
    with torch.no_grad():
        first = hf(**inputs).logits[:, -1].argmax(-1)
    assert [row[0] for row in report.generation.theirs] == first.tolist()
    assert report.generation.ours == tuple(map(tuple, model.generate(**inputs, max_new_tokens=4)[:, start:].tolist()))
    assert "row 0, new token 0" in str(report)


def test_rounding_is_said_to_be_rounding():
    model, hf = twins()
    model.use("fused")
    report = check_parity(model, hf, example(hf), new_tokens=0)
    assert not report.is_equal and report.close(1e-5)  # fused kernels add in another order: a few fp32 roundings
    assert "roundings" in report.summary and "fused path" in report.title
    assert check_parity(HookedLlava.from_hf(hf).double(), hf, example(hf), new_tokens=0).at_fault


# ---- what it is given, and what it leaves


def test_models_that_do_not_belong_together_are_refused():
    model, hf = twins("plain")
    inputs = example(hf)
    for odd, said in {
        "shallow": "3 decoder blocks and LlavaForConditionalGeneration has 2",
        "wide_heads": r"blocks.0.attn.q_proj.weight has shape \(64, 64\), Hugging Face's .*q_proj.weight \(96, 64\)",
    }.items():
        with pytest.raises(LensError, match=said):
            check_parity(model, hf_llava(odd), inputs)
    with pytest.raises(LensError, match="HookedLlava has a part 'projector' and LlamaForCausalLM has none"):
        check_parity(model, hf_llama(), inputs)
    with pytest.raises(LensError, match="no rule of HookedLlava names a weight of Linear"):
        check_parity(model, torch.nn.Linear(2, 2), inputs)
    config = deepcopy(hf_llama().config)
    config.vocab_size += 3
    with pytest.raises(LensError, match=r"embed.weight has shape \(97, 64\), .* \(100, 64\)"):
        check_parity(HookedLlava.from_hf(hf_llama()), LlamaForCausalLM(config), torch.tensor([[3, 4]]))
    with pytest.raises(LensError, match="new_tokens=-1"):
        check_parity(model, hf, inputs, new_tokens=-1)


def test_weights_that_no_rule_names_and_stages_without_a_hook_are_listed():
    model, hf = twins()
    hf = deepcopy(hf)
    hf.model.language_model.layers[0].extra = torch.nn.Linear(2, 2, bias=False)
    del model.mod_dict["projector.hook_in"], model.hook_dict["projector.hook_in"]
    decoder = hf.model.language_model
    decoder.forward = lambda *args, run=decoder.forward, **named: (run(*args, **named), run(*args, **named))[1]
    report = check_parity(model, hf, example(hf), new_tokens=0)
    assert report.is_equal and report.weights.unknown == ("model.language_model.layers.0.extra.weight",)
    assert "weights: no rule names model.language_model.layers.0.extra.weight" in str(report)
    assert "not compared: tower features: our model has no hook 'projector.hook_in'" in str(report)
    assert "not compared: spliced embeddings, blocks 0–2, final norm: Hugging Face ran it 2 times" in str(report)
    assert names(report.compared)[-2:] == ["projector", "logits"]


def hooks_of(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fails", ["", "ours", "theirs"])
def test_both_models_are_left_as_they_were(fails):
    model, hf = twins("plain")
    hf = deepcopy(hf)
    inputs = example(hf)
    model.vision.train()
    hf.train()
    hf.model.language_model.eval()
    hf(**inputs)  # transformers attaches hooks of its own at the first run
    modes = [[module.training for module in each.modules()] for each in (model, hf)]
    before = hooks_of(hf)
    model.add_hook("hook_embed", lambda act, hook: None)

    def fail(*_):
        raise RuntimeError("broken")

    broken = {"ours": model.blocks[1].mlp, "theirs": hf.model.language_model.layers[1].mlp}.get(fails)
    if broken is not None:
        broken.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken"):
            check_parity(model, hf, inputs)
    else:
        assert check_parity(model, hf, inputs).is_equal
    assert modes == [[module.training for module in each.modules()] for each in (model, hf)]
    assert hooks_of(model) == 1 + (fails == "ours") and hooks_of(hf) == before + (fails == "theirs")
    assert torch.is_grad_enabled() and hf.generation_config.do_sample in (False, None)


def test_the_report_as_text_and_json():
    model, hf = twins()
    model.blocks[1].ln1.eps = 0.1
    report = check_parity(model, hf, example(hf), new_tokens=2)
    lines = str(report).splitlines()
    head = next(line for line in lines if "by itself" in line)
    rows = lines[lines.index(head) + 1 :][: len(report.compared)]
    assert [row[3:].split("  ")[0] for row in rows] == names(report.compared)
    column = head.index("Hugging Face")
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)
    assert [row[3:].split("  ")[0] for row in rows if row.startswith("→")] == ["block 1"]
    facts = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert facts["first_difference"] == "block 1" and facts["at_fault"] == ["block 1"]
    assert [stage["verdict"] for stage in facts["stages"]][-4:] == ["differs", "follows", "follows", "follows"]
    assert facts["stages"][-1]["shape"] == list(report.stages[-1].shape)
