"""Shortened runs equal full forward passes, for every kind of intervention; brute force is written apart from them."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from brute_force import brute_force, hooked, inputs_of, random_block, random_edit
from random_models import ODD

from llava_lens import HookedLlava, reader
from llava_lens.errors import LensError, UnknownHook
from llava_lens.sweep import Edit, block_attention, kl, log_prob, logit, logit_diff, prob, recovery, run_cells, settle
from llava_lens.sweep.engine import Outcome
from llava_lens.sweep.metrics import ids_of
from llava_lens.sweep.plan import located, waves
from llava_lens.sweep.rows import Row, shared_length

BATCHES = {"plain": ((1, 1), None), "left": ((2, 1, 0), "left"), "right": ((1, 2), "right")}
QUICK = ("plain", "grouped", "wide_grouped_heads", "attention_bias", "full", "layer_list_full", "first_layer", "tied")


def random_cells(model: HookedLlava, inputs: Any, row: int, rng: random.Random, n: int, pad: str | None) -> list:
    """Cells of one to three edits; where there is padding, whole patterns (which would look at it) are left out."""
    cells = []
    while len(cells) < n:
        kinds = [rng.random() < 0.2 for _ in range(rng.choice([1, 1, 2, 3]))]
        edits = [(random_block if k else random_edit)(model, inputs, row, rng) for k in kinds]
        if pad and any(e.hook.endswith("hook_pattern") and e.key is None for e in edits):
            continue
        cells.append(tuple(edits))
    return cells


def names_of(cells: list) -> list[str]:
    return sorted({edit.hook for cell in cells for edit in cell})


def compare(odd: str, batch: str, dtype: torch.dtype, attention: str, n: int, bound: float) -> None:
    images, pad = BATCHES[batch]
    model = hooked(odd, dtype, attention)
    rng = random.Random(f"{odd} {batch} {dtype} {attention}")
    inputs = inputs_of(model, odd, images, pad)
    for i in range(len(images)):
        cells = random_cells(model, inputs, i, rng, n, pad)
        row = Row.of(model, inputs, i)
        token = rng.randrange(model.cfg.d_vocab)
        out = run_cells(settle(model, row, metric=logit(token), names=names_of(cells)), cells, progress=False)
        assert out.floor <= bound * 10 and out.path == "shortened runs"
        for cell, value in zip(cells, out.values.tolist(), strict=True):
            wanted = float(brute_force(model, inputs, i, cell, [row.last])[0, token])
            assert value == pytest.approx(wanted, rel=bound, abs=bound), [(e.hook, e.how, e.selection) for e in cell]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("odd", QUICK)
def test_any_intervention_equals_a_full_forward_pass_in_float64(odd, batch):
    compare(odd, batch, torch.float64, "sdpa", 10, 1e-12)


@pytest.mark.parametrize("batch", BATCHES)
def test_any_intervention_equals_a_full_forward_pass_in_float32(batch):
    compare("grouped", batch, torch.float32, "sdpa", 12, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("odd", ODD)
def test_any_intervention_in_any_configuration(odd, batch, attention):
    if not (odd in ("rope_longrope", "rope_dynamic") and batch == "right"):  # there padding stretches the positions
        compare(odd, batch, torch.float64, attention, 10, 1e-12)
        compare(odd, batch, torch.float32, attention, 4, 1e-5)


def setting_of(
    odd: str = "grouped", metric: Any = None, names: Any = (), dtype: torch.dtype = torch.float64, **more: Any
):
    model = hooked(odd, dtype)
    inputs = inputs_of(model, odd, (1, 1), None)
    return settle(model, Row.of(model, inputs, 0), metric=metric, names=names, **more), inputs


@pytest.mark.parametrize("hook", [n for n in hooked("shallow").hook_dict if n != "hook_logits"])
def test_every_single_hook(hook):
    """Each hook alone, so that none is left out by chance."""
    model = hooked("shallow")
    inputs = inputs_of(model, "shallow", (1, 2), "left")
    rng = random.Random(hook)
    for i in range(2):
        cells = []
        while len(cells) < 3:
            edit = random_edit(model, inputs, i, rng, hook)
            cells += [] if hook.endswith("hook_pattern") and edit.key is None else [(edit,)]
        row = Row.of(model, inputs, i)
        out = run_cells(settle(model, row, metric=logit(5), names=[hook]), cells, progress=False)
        for cell, value in zip(cells, out.values.tolist(), strict=True):
            wanted = float(brute_force(model, inputs, i, cell, [row.last])[0, 5])
            assert value == pytest.approx(wanted, rel=1e-12, abs=1e-12), (cell[0].how, cell[0].selection)


def test_bytes_split_batches_without_changing_results():
    setting, _ = setting_of(metric=logit(3))
    cells = [(Edit(f"blocks.{layer}.hook_resid_pre", 0.5, pos=pos),) for layer in range(3) for pos in range(10)]
    whole = run_cells(setting, cells, progress=False)
    planned = [located(setting.clean, i, cell) for i, cell in enumerate(cells)]
    few = list(waves(setting.clean, planned, 1, 2**30))
    many = list(waves(setting.clean, planned, 1, 1))
    assert len(many) == len(cells) > len(few) and sum(len(w.cells) for w in few) == len(cells)
    parts = run_cells(setting, cells, max_bytes=1, progress=False)
    torch.testing.assert_close(parts.values, whole.values, rtol=1e-12, atol=1e-12)


def test_what_is_bitwise_equal_does_not_run():
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1, 1), None)
    clean = Row.of(model, inputs, 0)
    tokens = inputs.tokens.clone()
    tokens[0, -3] = (tokens[0, -3] + 1) % 80
    corrupt = Row.of(model, type(inputs)(tokens, inputs.pixels), 0)
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]
    setting = settle(model, clean, corrupt, logit(4), names)
    n = len(clean.columns)
    cells = [(Edit(name, setting.clean.acts[name][0, p : p + 1], pos=p),) for name in names for p in range(n)]
    out = run_cells(setting, cells, progress=False)
    assert setting.corrupt.shared == n - 3 == shared_length(clean, corrupt, model)
    same = out.values.reshape(3, n) == out.baseline
    assert out.ran == 1 + 3 + 3 and same.sum(1).tolist() == [n - 1, n - 3, n - 3]
    for cell, value in zip(cells, out.values.tolist(), strict=True):
        wanted = float(brute_force(model, corrupt.inputs, 0, cell, [clean.last])[0, 4])
        assert value == pytest.approx(wanted, rel=1e-12)


def test_a_second_picture_that_differs_leaves_the_first_shared():
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (2, 2), None)
    assert inputs.pixels is not None
    pixels = inputs.pixels.clone()
    pixels[1] += 1
    one, other = Row.of(model, inputs, 0), Row.of(model, type(inputs)(inputs.tokens, pixels), 0)
    second = one.slots(model)[1][0]
    assert shared_length(one, other, model) == second
    setting = settle(model, one, other, logit(4), ["projector.hook_out"])
    full = settle(model, one, other, logit(4), ["projector.hook_out"], full=True)
    assert setting.corrupt.shared == second
    torch.testing.assert_close(setting.corrupt.acts["projector.hook_out"], full.corrupt.acts["projector.hook_out"])
    assert setting.corrupt_value == pytest.approx(full.corrupt_value, rel=1e-12)


@pytest.mark.parametrize("odd", ["plain", "rope_dynamic", "rope_longrope"])
def test_a_branch_records_what_a_run_of_its_own_records(odd):
    model = hooked(odd)
    inputs = inputs_of(model, odd, (1, 1), None)
    tokens = inputs.tokens.clone()
    tokens[0, -2] = 7
    rows = Row.of(model, inputs, 0), Row.of(model, type(inputs)(tokens, inputs.pixels), 0)
    names = [n for n in model.hook_dict if n != "hook_logits"]
    setting = settle(model, *rows, logit(4), names)
    alone = settle(model, rows[1], None, logit(4), names)
    assert setting.corrupt.shared
    for name in names:
        torch.testing.assert_close(setting.corrupt.acts[name], alone.clean.acts[name], rtol=1e-10, atol=1e-12)


# ---- when runs are not shortened


def full_and_short(cells: list, **how: Any) -> tuple[Outcome, Outcome]:
    short, _ = setting_of(metric=logit(3), names=names_of(cells))
    full, _ = setting_of(metric=logit(3), names=names_of(cells), **how)
    return run_cells(short, cells, progress=False), run_cells(full, cells, progress=False)


def test_full_passes_give_the_same_results_and_say_so():
    model = hooked("grouped")
    rng = random.Random(3)
    cells = random_cells(model, inputs_of(model, "grouped", (1, 1), None), 0, rng, 20, None)
    short, full = full_and_short(cells, full=True)
    torch.testing.assert_close(short.values, full.values, rtol=1e-12, atol=1e-12)
    assert full.path == "full forward passes (a full forward pass was asked for)" and full.floor == 0


def test_hooks_of_the_user_are_held_in_every_run():
    """A hook that looks at everything: the run cannot be shortened, and is not."""
    cells = [(Edit("blocks.1.hook_resid_pre", 0.3, pos=4),), (Edit("blocks.2.attn.hook_z", 0.0, head=1),)]
    model = hooked("grouped")

    def squash(act, hook):
        return act / act.norm()

    hooks = [("blocks.0.hook_resid_post", squash)]
    setting, _ = setting_of(metric=logit(3), fwd_hooks=hooks)
    out = run_cells(setting, cells, progress=False)
    assert out.path == "full forward passes (hooks of the user are held)"
    with model.hooks(fwd_hooks=hooks):
        held, _ = setting_of(metric=logit(3))
        same = run_cells(held, cells, progress=False)
        alone = setting.clean.row.inputs  # rows are studied one at a time, so the hook sees a batch of one
        wanted = [float(brute_force(model, alone, 0, cell, [-1])[0, 3]) for cell in cells]
    assert same.path.startswith("full forward passes (a hook on 'blocks.0.hook_resid_post' is held")
    assert out.values.tolist() == pytest.approx(wanted, rel=1e-12) and torch.equal(out.values, same.values)
    assert not any(hook.live for hook in model.hook_dict.values())


def test_a_reader_sees_full_runs():
    seen = []

    @reader
    def look(act, hook):
        seen.append(act.shape)

    cells = [(Edit("blocks.2.hook_resid_pre", 0.3, pos=4),)]
    setting, inputs = setting_of(metric=logit(3), fwd_hooks=[("blocks.0.hook_resid_pre", look)])
    run_cells(setting, cells, progress=False)
    assert len(seen) >= 2 and all(shape[1] == inputs.n_pos for shape in seen)


def mean_of_rows(part):
    return part.mean(0, keepdim=True).expand_as(part) * 1.5


MIXING = ["hook_logits", "ln_final.hook_normalized", "ln_final.hook_scale", *(
    f"blocks.2.{name}" for name in ("hook_resid_post", "hook_mlp_out", "mlp.hook_post", "ln2.hook_normalized",
    "hook_resid_mid", "hook_attn_out", "attn.hook_z", "attn.hook_q", "attn.hook_v", "hook_resid_pre", "hook_attn_in")),
    "blocks.1.hook_resid_post", "hook_text_embed", "hook_embed"]  # fmt: skip


@pytest.mark.parametrize("hook", MIXING)
def test_a_function_is_shown_all_that_it_selects(hook):
    """Also in the last block and behind it, where other edits need only what is read; and text, not pictures."""
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1, 2), "left")
    for i in range(2):
        row = Row.of(model, inputs, i)
        picture = row.slots(model)[0]
        for pos in ([*row.columns[-3:]], [picture[-1], picture[-1] + 1, row.last]):
            cell = (Edit(hook, mean_of_rows, pos=pos),)
            out = run_cells(settle(model, row, metric=logit(5), names=[hook]), [cell], progress=False)
            wanted = float(brute_force(model, inputs, i, cell, [row.last])[0, 5])
            assert out.path == "shortened runs" and float(out.values[0]) == pytest.approx(wanted, rel=1e-11)


def test_padding_is_left_alone_on_both_paths():
    model = hooked("plain")
    row = Row.of(model, inputs_of(model, "plain", (2, 0), "left"), 1)
    n = row.n_columns
    weights = torch.rand(4, 1, n, dtype=torch.float64)
    cells = [
        (Edit("blocks.1.attn.hook_pattern", weights, pos=row.last),),
        (Edit("blocks.1.hook_resid_pre", mean_of_rows),),
        (Edit("blocks.1.hook_resid_pre", torch.rand(n, 64, dtype=torch.float64)),),
    ]
    values = [
        run_cells(settle(model, row, metric=logit(5), full=full), cells, progress=False).values
        for full in (True, False)
    ]
    torch.testing.assert_close(*values, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("what", ["block", "norm", "model", "forward", "mask"])
def test_whoever_else_is_in_the_forward_pass_is_seen(what, monkeypatch):
    model = copy.deepcopy(hooked("plain"))
    inputs = inputs_of(model, "plain", (1,), None)
    block: Any = model.blocks[1]
    if what == "forward":
        forward = block.forward
        monkeypatch.setattr(block, "forward", lambda *a, **k: forward(*a, **k) * 1.5)
    elif what == "mask":
        monkeypatch.setattr(model, "mask", model.mask)
    else:
        module = {"block": block, "norm": model.ln_final, "model": model}[what]
        module.register_forward_hook(lambda m, args, out: out * 1.5)
    cell = (Edit("blocks.0.hook_resid_pre", 0.3, pos=4),)
    out = run_cells(settle(model, Row.of(model, inputs), metric=logit(3)), [cell], progress=False)
    assert out.path.startswith("full forward passes")
    assert float(out.values[0]) == pytest.approx(float(brute_force(model, inputs, 0, cell, [-1])[0, 3]), rel=1e-11)


class Doubled(HookedLlava):
    """A forward pass of its own: blocks that are run twice."""

    def run_blocks(self, x, first, last, attention_mask, positions, past, inputs=None):
        x = super().run_blocks(x, first, last, attention_mask, positions, past, inputs)
        return x * 2.0


def test_a_subclass_with_its_own_forward_runs_in_full():
    from random_models import hf_llava

    model = Doubled.from_hf(hf_llava("plain"))
    inputs = inputs_of(model, "plain", (1, 1), None)
    setting = settle(model, Row.of(model, inputs, 0), metric=logit(3))
    cell = (Edit("blocks.1.hook_resid_pre", 0.3, pos=4),)
    out = run_cells(setting, [cell], progress=False)
    assert out.path == "full forward passes (Doubled.run_blocks is its own)"
    assert float(out.values[0]) == pytest.approx(float(brute_force(model, inputs, 0, cell, [-1])[0, 3]), rel=1e-5)


@pytest.mark.parametrize(
    ("lasting", "cell", "short"),
    [
        ("hook_embed", "projector.hook_out", False),
        ("hook_embed", "hook_text_embed", False),
        ("vision.blocks.1.hook_resid_pre", "vision.blocks.0.hook_resid_pre", False),
        ("projector.hook_out", "projector.hook_in", False),
        ("hook_embed", "hook_embed", True),
        ("vision.blocks.0.hook_resid_pre", "vision.blocks.1.hook_resid_pre", True),
        ("projector.hook_out", "blocks.1.hook_resid_pre", True),
    ],
)
def test_a_lasting_edit_holds_behind_every_cell(lasting, cell, short):
    model = hooked("grouped")
    inputs = inputs_of(model, "grouped", (1, 1), None)
    row = Row.of(model, inputs, 0)
    noise = torch.randn(3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    kept = Edit(lasting, noise, "add", pos=[1, 2, 3])
    made = (Edit(cell, 0.7, "multiply", pos=[2]),)
    setting = settle(model, row, metric=logit(3), names=[cell], corruption=[kept])
    out = run_cells(setting, [made], progress=False)
    assert (out.path == "shortened runs") == short
    wanted = float(brute_force(model, inputs, 0, (kept, *made), [row.last])[0, 3])
    assert float(out.values[0]) == pytest.approx(wanted, rel=1e-12)
    assert setting.corrupt_value == pytest.approx(
        float(brute_force(model, inputs, 0, [kept], [row.last])[0, 3]), rel=1e-12
    )


# ---- metrics


def logits_with(cell: Any, read: list[int], setting: Any, inputs: Any) -> torch.Tensor:
    return brute_force(setting.model, inputs, 0, cell, read)


CELL = (Edit("blocks.1.hook_resid_pre", 0.3, pos=4),)


def test_metrics_by_their_formulas():
    wanted = {
        "log_prob": (log_prob(9), lambda z, c: z.log_softmax(-1)[-1, 9]),
        "prob": (prob(9), lambda z, c: z.softmax(-1)[-1, 9]),
        "logit": (logit(9), lambda z, c: z[-1, 9]),
        "logit_diff": (logit_diff(9, 4), lambda z, c: z[-1, 9] - z[-1, 4]),
        "kl": (kl(), lambda z, c: (c[-1].softmax(-1) * (c[-1].log_softmax(-1) - z[-1].log_softmax(-1))).sum()),
        "own": (lambda z: z[0, -1, 9] ** 2, lambda z, c: z[-1, 9] ** 2),
        "own, everywhere": (lambda z: z[0, :, 9].sum(), lambda z, c: z[:, 9].sum()),
        "own, by number": (lambda z: z[0, z.shape[1] - 1, 9], lambda z, c: z[-1, 9]),
        "own, first": (lambda z: float(z[0, 0, 2] + z[0, 6, 2]), lambda z, c: z[0, 2] + z[6, 2]),
    }
    for name, (metric, formula) in wanted.items():
        setting, inputs = setting_of(metric=metric)
        every = list(range(inputs.n_pos))
        changed, clean = (logits_with(cell, every, setting, inputs) for cell in (CELL, ()))
        out = run_cells(setting, [CELL], progress=False)
        assert float(out.values[0]) == pytest.approx(float(formula(changed, clean)), rel=1e-12), name
        assert setting.clean_value == pytest.approx(float(formula(clean, clean)), rel=1e-12, abs=1e-12), name


def test_a_users_metric_that_reads_the_end_gets_only_the_end():
    shapes = []

    def metric(logits):
        shapes.append(tuple(logits.shape))
        return logits[0, -1, 9]

    setting, _ = setting_of(metric=metric)
    assert not setting.bound.everywhere
    shapes.clear()
    run_cells(setting, [CELL], progress=False)
    assert set(shapes) == {(1, 1, setting.model.cfg.d_vocab)}


READS: dict[str, tuple[Any, bool]] = {
    "last": (lambda z: z[0, -1, 3] - z[0, -1, 4], False),
    "last row": (lambda z: z[0, -1].log_softmax(-1)[3], False),
    "item": (lambda z: z[0, -1:, 3].item(), False),
    "numpy": (lambda z: float(z[0, -1].numpy()[1]), False),
    "by number": (lambda z: z[0, z.shape[1] - 1, 3], False),
    "argmax before": (lambda z: (z[0, -2].argmax() == 3).float() + z[0, -1, 3], True),
    "exact match": (lambda z: (z[0, -3:].argmax(-1) == torch.tensor([1, 2, 3])).all().float(), True),
    "rank": (lambda z: (z[0, -2] > z[0, -2, 3]).sum(), True),
    "numpy of all": (lambda z: float(z.numpy()[0, 0, 1] > 5), True),
    "list of all": (lambda z: z.tolist()[0][0][1] * 0, True),
    "first": (lambda z: z[0, 0, 2], True),
    "all": (lambda z: z.log_softmax(-1)[0, -1, 3], True),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_users_metric_reads_is_watched(name):
    metric, everywhere = READS[name]
    setting, inputs = setting_of(metric=metric)
    assert setting.bound.everywhere == everywhere
    cell = (Edit("blocks.1.hook_resid_pre", 0.9, "multiply", pos=list(range(4, inputs.n_pos))),)
    out = run_cells(setting, [cell], progress=False)
    whole = brute_force(setting.model, inputs, 0, cell, list(range(inputs.n_pos)))
    assert float(out.values[0]) == pytest.approx(float(metric(whole[None])), rel=1e-11)


def test_a_cell_that_is_no_number_raises():
    setting, _ = setting_of(metric=lambda z: z[0, -1, 3].clamp(max=1e3).sqrt() if z[0, -1, 3] < 0 else z[0, -1, 3])
    cells = [(Edit("hook_logits", value, pos=setting.clean.row.last),) for value in (1.0, -1.0)]
    with pytest.raises(LensError, match="not a number in cell 1"):
        run_cells(setting, cells, progress=False)
    for value in (float("nan"), torch.tensor([float("inf")])):
        with pytest.raises(LensError, match="not finite"):
            run_cells(setting, [(Edit("blocks.1.hook_resid_pre", value),)], progress=False)


def test_recovery_is_0_where_corrupt_and_1_where_clean():
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1, 1), None)
    assert inputs.pixels is not None
    corrupt = Row.of(model, type(inputs)(inputs.tokens, -inputs.pixels), 0)
    clean = Row.of(model, inputs, 0)
    setting = settle(model, clean, corrupt, recovery(logit_diff(3, 4)), ["hook_embed"])
    cells = [(Edit("hook_embed", setting.clean.acts["hook_embed"][0]),), (Edit("hook_embed", 0.0, "add"),)]
    out = run_cells(setting, cells, progress=False)
    assert out.values.tolist() == pytest.approx([1, 0], abs=1e-9) and out.baseline == 0
    with pytest.raises(LensError, match="nothing to recover"):
        settle(model, clean, clean, recovery(logit(3)))


def test_an_answer_of_several_tokens_is_scored_by_teacher_forcing():
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (2, 1, 0), "left")
    for i in range(3):
        row = Row.of(model, inputs, i)
        more = row.extended([5, 8])
        setting = settle(model, more, metric=logit(3))
        setting.bound = type(setting.bound)(log_prob(), [5, 8, 2])
        cell = (Edit("blocks.1.hook_resid_pre", 0.3, pos=row.columns[2]),)
        out = run_cells(setting, [cell], progress=False)
        log_p = brute_force(model, more.inputs, 0, cell, [-3, -2, -1]).log_softmax(-1)
        assert float(out.values[0]) == pytest.approx(float(log_p[0, 5] + log_p[1, 8] + log_p[2, 2]), rel=1e-12)


def test_a_vector_is_no_metric():
    for metric in (lambda z: z[0, -1], lambda z: None):
        with pytest.raises(LensError, match="expected one number per run"):
            setting_of(metric=metric)
    with pytest.raises(LensError, match="expected a finite number"):
        setting_of(metric=lambda z: float("nan"))
    with pytest.raises(LensError, match="nearest: 'log_prob'"):
        setting_of(metric="logprob")
    with pytest.raises(LensError, match=r"logit_diff\(answer, versus\)"):
        setting_of(metric="logit_diff")


# ---- bad input


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("blocks.1.attn.hook_z", 0.0, head=9), "head 9 at 'blocks.1.attn.hook_z'; expected 0 … 3"),
        (Edit("blocks.1.attn.hook_k", 0.0, head=3), "head 3 at 'blocks.1.attn.hook_k'; expected 0 … 1"),
        (Edit("blocks.1.hook_resid_pre", 0.0, pos=99), "position 99 is outside 0 … "),
        (Edit("blocks.1.hook_resid_pre", 0.0, head=0), "has no axis for head="),
        (Edit("vision.blocks.1.hook_resid_pre", 0.0, image=1), "image 1 at 'vision.blocks.1.hook_resid_pre'"),
        (Edit("blocks.1.mlp.hook_post", 0.0, neuron=500), "neuron 500"),
        (block_attention(0, 3, 99), "position 99"),
    ],
)
def test_an_edit_of_what_is_not_there(edit, message):
    setting, _ = setting_of(metric=logit(3))
    with pytest.raises(LensError, match=message):
        run_cells(setting, [(edit,)], progress=False)


def test_bad_cells():
    setting, _ = setting_of(metric=logit(3))
    with pytest.raises(UnknownHook, match=r"nearest: 'blocks\.1\.hook_resid_pre'"):
        run_cells(setting, [(Edit("blocks.1.hook_resid_pr", 0.0),)], progress=False)
    with pytest.raises(LensError, match="an empty sweep"):
        run_cells(setting, [], progress=False)
    with pytest.raises(LensError, match="cell 0 has no edit"):
        run_cells(setting, [()], progress=False)
    with pytest.raises(LensError, match="padding"):
        model = hooked("plain")
        row = Row.of(model, inputs_of(model, "plain", (2, 0), "left"), 1)
        run_cells(settle(model, row, metric=logit(3)), [(Edit("blocks.0.hook_resid_pre", 0.0, pos=0),)], progress=False)
    bare: Any = [Edit("blocks.1.hook_resid_pre", 0.0)]
    with pytest.raises(Exception, match="tuple"):
        run_cells(setting, bare, progress=False)
    for answer in (True, 5.0, object()):
        with pytest.raises(LensError, match="expected a token id or a string"):
            ids_of(setting.model, answer)
    assert ids_of(setting.model, torch.tensor(5)) == [5]
    assert not any(hook.live for hook in setting.model.hook_dict.values())


def test_weights_and_hooks_are_as_they_were_after_an_error():
    setting, _ = setting_of(metric=logit(3))

    def fail(part):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        run_cells(setting, [(Edit("blocks.1.mlp.hook_post", fail),)], progress=False)
    assert not any(hook.live for hook in setting.model.hook_dict.values())


def test_rows_with_and_without_pictures_start_from_each_other():
    model = hooked("plain")
    inputs = inputs_of(model, "plain", (1, 0, 2), "right")
    bases = []
    for i in (1, 0, 2, 1):
        setting = settle(model, Row.of(model, inputs, i), metric=logit(4), like=bases[-1] if bases else None)
        bases.append(setting.clean)
        alone = settle(model, Row.of(model, inputs, i), metric=logit(4))
        assert setting.clean_value == pytest.approx(alone.clean_value, rel=1e-12)
