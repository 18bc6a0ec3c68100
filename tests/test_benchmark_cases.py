"""The forward, tower, decode, cache, attribution and start-up benchmarks: their rivals agree, their floors add up."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from toy_study import LOOSE, TOY, exact_of
from transformers.models.llama import modeling_llama

from benchmarks import baselines, floors, ours, truth, twins
from benchmarks.bridge import Bridge
from benchmarks.cases import chosen
from benchmarks.cases.attribution import estimates
from benchmarks.cases.cached import bytes_held
from benchmarks.cases.decode import behind, between_tokens, by_hf, by_ours, steps
from benchmarks.cases.startup import in_fresh_process
from benchmarks.compare import Settings
from benchmarks.floors import Ceilings, Work, floor
from benchmarks.models import batch_of, make_study
from benchmarks.rows import LeftOut, Row
from llava_lens import HookedLlava

QUICK = Settings(quick=True, rounds=1)


@pytest.fixture(scope="module")
def study():
    return make_study(TOY)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "variants"),
    [
        (
            "forward/prefill",
            2 * ["hf sdpa", "hf eager", "transformer_lens", "llava_lens reference", "llava_lens fused"],
        ),
        ("tower/encode", 2 * ["hf sdpa", "hf eager", "llava_lens reference", "llava_lens fused"]),
        ("decode/greedy", ["hf sdpa", "llava_lens reference", "llava_lens fused"]),
        ("patterns/last", ["hf eager", "transformer_lens", "llava_lens reference", "llava_lens fused"]),
    ],
)
def test_every_variant_finds_the_same(name, variants):
    found = [row for row in chosen([name])[0].run(QUICK) if isinstance(row, Row)]
    assert [row.variant for row in found] == variants
    for row in found:
        assert row.error is not None and row.error < LOOSE["atol"], row
        assert row.floor_seconds and 0 < row.floor_seconds < row.seconds.low


@pytest.mark.filterwarnings("ignore")
def test_what_is_kept_is_held_and_no_logit_changes():
    rows = {row.variant: row for row in chosen(["cached/run"])[0].run(QUICK) if isinstance(row, Row)}
    assert all(row.error is not None and row.error < LOOSE["atol"] for row in rows.values())
    held = {name: row.held_bytes or 0 for name, row in rows.items()}
    own = [held[f"llava_lens reference {what}"] for what in ("everything", "no result", "5 names", "forward")]
    assert own == sorted(own, reverse=True) and own[-1] == 0 < own[-2]
    attentions = 4 * TOY.layers * TOY.heads * TOY.positions**2
    hidden = 4 * (TOY.layers + 1) * TOY.positions * TOY.d_model
    assert held["hf eager outputs"] == attentions + hidden


def test_memory_that_tensors_share_is_held_once():
    base = torch.zeros(8, 4)
    assert bytes_held([base, base[2:], base.view(-1)]) == 128
    assert bytes_held([base, torch.zeros(2)]) == 136 and bytes_held([]) == 0


def test_missing_rivals_say_why(study):
    found = chosen(["forward/prefill"])[0].run(Settings(quick=True, rounds=1))
    missing = {each.variant for each in found if isinstance(each, LeftOut)}
    assert missing == {"hf compiled", "liger-kernel", *study.missing}
    assert twins.liger(study.hf) == "liger-kernel's kernels run on CUDA only"


def test_compiling_that_fails_is_a_reason(study, monkeypatch):
    inputs = batch_of(study, 2)
    wanted = ours.last_logits(study.model, inputs)
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    forward = twins.compiled(study.hf, inputs, Settings())
    assert not isinstance(forward, str)
    torch.testing.assert_close(forward(inputs), wanted, **LOOSE)

    def fail(*_, **__):
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(twins, "last_logits", fail)
    assert twins.compiled(study.hf, inputs, Settings()) == "torch.compile: RuntimeError: no compiler"


def test_patience_ends():
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match="not done within 1 s"), twins.within(1):
        time.sleep(5)
    assert time.perf_counter() - start < 4
    with twins.within(1):
        pass
    with pytest.raises(TimeoutError, match="within 1 s"), twins.within(1):
        with pytest.raises(TimeoutError, match="within 0 s"), twins.within(0.1):
            time.sleep(5)
        time.sleep(5)  # the outer clock goes on
    assert time.perf_counter() - start < 8


def test_a_patched_twin_is_patched_alone(study):
    calls, plain = [], modeling_llama.apply_rotary_pos_emb

    def patch(model):
        def rotate(*args, **kwargs):
            calls.append(model)
            return plain(*args, **kwargs)

        modeling_llama.apply_rotary_pos_emb = rotate

    forward = twins.patched(study.hf, patch)
    assert modeling_llama.apply_rotary_pos_emb is plain
    wanted = twins.plain(study.hf)(study.clean)
    assert not calls
    assert torch.equal(forward(study.clean), wanted) and len(calls) == TOY.layers
    assert modeling_llama.apply_rotary_pos_emb is plain


@pytest.mark.filterwarnings("ignore")
def test_twins_share_their_weights_and_leave_the_model_alone(study):
    before = {name: weight.clone() for name, weight in study.hf.named_parameters()}
    wanted = twins.plain(study.hf)(study.clean)
    eager = twins.sharing(study.hf, "eager")
    for (name, weight), view in zip(study.hf.named_parameters(), eager.parameters(), strict=True):
        assert weight.data_ptr() == view.data_ptr() and weight is not view, name
    bridge = Bridge(study)
    bridge.last_logits(study.clean)
    assert study.hf.config.text_config._attn_implementation == "sdpa"
    assert all(torch.equal(weight, before[name]) for name, weight in study.hf.named_parameters())
    assert torch.equal(twins.plain(study.hf)(study.clean), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float64_by_the_block_equals_float64_at_once(dtype):
    study = make_study(TOY, dtype=dtype)
    inputs = batch_of(study, 3)
    before = [weight.data_ptr() for weight in study.model.parameters()]
    found = truth.last_logits(study.model, inputs)
    assert found.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(found, exact_of(study)(inputs.to(torch.float64), logits_to_keep=1)[:, -1])
    assert {weight.dtype for weight in study.model.parameters()} == {dtype}
    assert [weight.data_ptr() for weight in study.model.parameters()] == before


def test_weights_are_narrow_again_after_an_error(study):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), truth.in_float64(study.model) as model, torch.no_grad():
        model.run_with_hooks(study.clean.to(torch.float64), fwd_hooks=[("blocks.1.hook_resid_mid", stop)])
    assert {weight.dtype for weight in study.model.parameters()} == {torch.float32}


def test_rows_of_a_batch_are_prompts_of_their_own(study):
    inputs = batch_of(study, 3)
    assert inputs.tokens.shape == (3, TOY.positions) and inputs.pixels is not None and len(inputs.pixels) == 3
    assert len(inputs.tokens.unique(dim=0)) == 3
    found = baselines.last_logits(study.hf, inputs)
    torch.testing.assert_close(
        found[1], ours.last_logits(study.model, inputs.with_roles(study.model.cfg).row(1))[0], **LOOSE
    )
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_screen_that_runs_every_cell_is_brute_force(study):
    cells = list(itertools.product(range(TOY.layers), range(TOY.positions)))
    found = estimates(study, top_k=len(cells)).flatten()
    torch.testing.assert_close(found, truth.patch_resid(exact_of(study), study, cells), **LOOSE)
    assert (estimates(study).flatten() - found).abs().max() > 1e-3  # the first order is not exact


def test_operations_are_those_that_torch_counts():
    study = make_study(TOY)
    eager = HookedLlava.from_hf(twins.sharing(study.hf, "eager"))
    inputs, batch = batch_of(study, 2), 2
    assert inputs.pixels is not None
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        eager(inputs, logits_to_keep=1)
    length = TOY.positions
    unseen = 4 * TOY.layers * TOY.d_model * (length**2 - length * (length + 1) // 2) * batch  # behind the causal mask
    assert counted.get_total_flops() == floors.prefill(TOY, batch, 4).flops + unseen
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        eager.encode_image(inputs.pixels)
    assert counted.get_total_flops() == floors.tower(TOY, batch, 4).flops


def test_a_rerun_is_a_decoder_without_what_nobody_needs():
    n, d, d_head = TOY.positions, TOY.d_model, TOY.d_model // TOY.heads
    whole = floors.decoder(TOY, 1, n, 4).flops
    unread = 2 * (n - 1) * (2 * d * d_head * TOY.heads + 3 * d * TOY.d_mlp)  # in the last layer, before the last row
    assert floors.rerun(TOY, 0, n).flops == whole - unread - 4 * d * (n * (n + 1) / 2 - n)
    one = replace(TOY, layers=1)
    assert floors.rerun(one, 0, 1).flops == floors.decoder(one, 1, 1, 4, seen=n - 1).flops
    middle = floors.rerun(TOY, 1, 5, from_middle=True).flops
    assert middle == 2 * 5 * 3 * d * TOY.d_mlp + floors.rerun(TOY, 2, 5).flops
    assert floors.rerun(TOY, 2, 5, from_middle=True).flops == 2 * 3 * d * TOY.d_mlp + 2 * d * TOY.vocab


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["sweeps/resid-words", "sweeps/heads-last", "sweeps/knockout"])
def test_sweeps_take_longer_than_their_floors(name):
    rows = [row for row in chosen([name])[0].run(QUICK) if isinstance(row, Row)]
    assert {"hf loop", "hf batched", "llava_lens"} <= {row.variant for row in rows}
    ours_, loop = (next(row for row in rows if row.variant == each) for each in ("llava_lens", "hf loop"))
    floor_of_ours, floor_of_loop = ours_.floor_seconds or 0, loop.floor_seconds or 0
    assert 0 < floor_of_ours < floor_of_loop and floor_of_ours < ours_.seconds.high
    assert all(row.error is not None and row.error < LOOSE["atol"] for row in rows)


def test_bytes_are_those_of_the_matrices(study):
    def matrices(module):
        return sum(weight.nbytes for weight in module.parameters() if weight.ndim > 1)

    model = study.model
    decoder = matrices(model.blocks) + matrices(model.unembed)
    assert floors.decoder(TOY, 5, 7, 4).bytes == decoder
    blocks = list(model.vision.blocks)[: TOY.tower_layers - 1]
    patches = next(w for name, w in model.vision.named_parameters() if "patch" in name and w.ndim == 4).nbytes
    assert floors.tower(TOY, 5, 4).bytes == sum(map(matrices, blocks)) + patches + matrices(model.projector)
    a_key_and_value = 2 * 4 * TOY.layers * TOY.kv_heads * TOY.d_model // TOY.heads
    assert steps(TOY, 2, 4).bytes == 2 * decoder + a_key_and_value * (2 * TOY.positions + 1)


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    limits = Ceilings(flops=10.0, bytes=4.0, dtype=torch.float32)
    assert floor(Work(30.0, 4.0), limits) == 3.0 and floor(Work(30.0, 20.0), limits) == 5.0
    assert Work(1.0, 2.0) + Work(3.0, 4.0) * 2 == Work(7.0, 10.0)
    measured = floors.ceilings("cpu", torch.float32, True)
    assert measured.flops > 1e8 and measured.bytes > 1e7 and "float32" in str(measured)


def test_decoding_is_timed_between_tokens(study):
    for by in (partial(by_hf, study), partial(by_ours, study, study.model)):
        own = between_tokens(partial(by, 5), 5, "cpu")
        assert len(own.result) == 5 and own.seconds > 0

    def write(tick):
        for pause in (0.2, 0.05, 0.05):  # the first is the prompt's
            time.sleep(pause)
            tick()
        time.sleep(0.2)
        return torch.arange(3)

    assert 0.1 <= between_tokens(write, 3, "cpu").seconds < 0.2
    with pytest.raises(AssertionError, match="3 ticks for 5 tokens"):
        between_tokens(write, 5, "cpu")


def test_a_token_is_as_far_behind_as_its_logit_in_a_run_of_its_own(study):
    written = by_hf(study, 4, lambda: None).tolist()
    assert behind(study, tuple(written)).tolist() == [0.0] * 4
    written[2] = TOY.image_token - 1 if written[2] != TOY.image_token - 1 else 9
    text = torch.cat((study.clean.tokens, torch.tensor([written[:2]])), 1)
    with torch.no_grad():
        last = exact_of(study)(replace(study.clean.to(torch.float64), tokens=text, roles=None))[0, -1]
    last[TOY.image_token] = -torch.inf
    assert behind(study, tuple(written))[2].item() == pytest.approx(float(last.max() - last[written[2]]), rel=1e-12)


def test_a_fresh_process_measures_itself():
    own = in_fresh_process(
        "import sys\nkept, gone = bytearray(2**26), bytearray(2**26)\ndel gone",
        "x = bytearray(2**25)\nresult = [len(sys.argv)]",
        "a",
    )
    assert own.result.tolist() == [2.0] and 0 < own.seconds < 5
    if own.peak_bytes is not None:
        assert 30 * 2**20 < own.peak_bytes < 45 * 2**20  # not what was held before
    with pytest.raises(RuntimeError, match="a measured process failed: ZeroDivisionError"):
        in_fresh_process("", "1 / 0")
