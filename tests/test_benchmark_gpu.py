"""The command for a GPU, run dry: its checks see what is wrong, its time is kept, its goals are counted from rows."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from toy_study import TOY

from benchmarks import batched, checks, goals, gpu, measure, ours, truth, twins
from benchmarks.__main__ import main
from benchmarks.bridge import Bridge
from benchmarks.cases import Case, chosen, every_case
from benchmarks.cases.attribution import estimates
from benchmarks.cases.kernels import OPERATIONS
from benchmarks.cases.sweeps import Grid
from benchmarks.compare import Settings
from benchmarks.goals import GOALS, Goal
from benchmarks.measure import Patience, Spread
from benchmarks.models import PATHS, SIZES, bytes_of, make_study, share
from benchmarks.rows import LeftOut, Report, Row
from llava_lens import HookedLlava
from llava_lens.kernels import fast

QUICK = Settings(quick=True, rounds=1)


@pytest.fixture(scope="module")
def study():
    return make_study(TOY)


def row(**given):
    """A row with what is given, the rest made up."""
    seconds = given.pop("seconds", 1.0)
    made = dict(case="a/case", variant="own", size="7b: large", params={}, cells=1, cells_measured=1, rounds=3)
    made |= dict(baseline="other", times_faster=1.0, times_faster_by_round=Spread(1, 1, 1), peak_bytes=None)
    made |= dict(error=None, error_against="", span=0.0, seconds=Spread(seconds, seconds * 0.9, seconds * 1.1))
    return Row(**{**made, **given})


def report(*rows, cuda: str | None = "13.0"):
    return Report({"cuda": cuda}, list(rows))


def test_weights_of_all_models_are_in_memory_once(study):
    hf, paths = study.hf, study.paths
    bridge = Bridge(study)
    eager = twins.sharing(hf, "eager")
    alone = bytes_of([hf])
    assert bytes_of([hf, *paths.values(), eager, bridge.bridge]) == pytest.approx(alone, rel=0.01)  # buffers
    weights = {name: weight.clone() for name, weight in hf.named_parameters()}
    packed: Any = HookedLlava.from_hf(hf)
    for block in packed.blocks:  # as a path that keeps queries, keys and values in one matrix
        parts = [block.attn.q_proj, block.attn.k_proj, block.attn.v_proj]
        whole = torch.cat([part.weight.data for part in parts])
        for part, own in zip(parts, whole.split([len(part.weight) for part in parts]), strict=True):
            part.weight.data = own
    assert bytes_of([hf, packed]) > 1.1 * alone
    share(packed, list(paths.values()), hf)
    assert bytes_of([hf, packed, *paths.values()]) == pytest.approx(alone, rel=0.01)
    assert all(torch.equal(weight, weights[name]) for name, weight in hf.named_parameters())


def test_batched_loops_equal_one_by_one(study):
    from benchmarks import baselines

    clean = baselines.clean_activations(study)
    resid, heads = [(0, 3), (2, 7), (1, 18), (0, 0), (2, 18)], [(0, 1), (2, 3), (1, 0)]
    sources = [study.image, study.image[:4]]
    where = slice(-1, None)
    pairs = [
        (
            batched.patch_resid(study, resid, clean["resid_pre"], 3),
            baselines.patch_resid(study, resid, clean["resid_pre"]),
        ),
        (batched.patch_heads(study, heads, clean["z"], 2), baselines.patch_heads(study, heads, clean["z"])),
        (
            batched.patch_heads(study, heads, clean["z"], 2, where),
            baselines.patch_heads(study, heads, clean["z"], where),
        ),
        (
            batched.knock_out(study, [(0, 0), (1, 1), (2, 0)], sources, 2, 2),
            baselines.knock_out(study, [(0, 0), (1, 1), (2, 0)], sources, 2),
        ),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)  # float32 in another order of sums
        assert found.unique().numel() > 1


def test_the_first_order_by_hand_is_the_librarys(study):
    torch.testing.assert_close(batched.first_order(study).double(), estimates(study).double(), rtol=0, atol=2e-5)


def test_a_part_of_a_grid_is_found_in_its_place(study):
    resid = Grid(TOY.layers, TOY.positions, settings=Settings(), every=(1, 4), visit=6, check=3)
    heads = Grid(TOY.layers, TOY.heads, settings=Settings(), every=(0, 2), visit=6, check=4)
    assert resid.axes[1] == [0, 4, 9, 14, 18] and heads.axes[0] == [0, 2]
    variants = [
        (resid, resid.whole("ours", lambda: ours.patch_resid(study, resid.axes[1])), 5 / TOY.positions),
        (heads, heads.whole("ours", lambda: ours.patch_heads(study, None, heads.axes[0])), 2 / 3),
    ]
    for grid, variant, part in variants:
        found = truth.patch_resid if grid is resid else truth.patch_heads
        with truth.in_float64(study.reference) as model:
            wanted = found(model, study, grid.checked)
        assert variant.share == pytest.approx(part) and len(wanted) == len(grid.checked) > 2
        torch.testing.assert_close(variant.read(variant.run()).double(), wanted, rtol=0, atol=2e-5)
    assert Grid(TOY.layers, 7, settings=QUICK).whole("ours", lambda: torch.ones(1)).share == 1.0


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_way_to_an_operation_agrees(operation):
    found = list(chosen([f"kernels/{operation.name}"])[0].run(QUICK))
    if not hasattr(fast, operation.name):
        assert [type(each) for each in found] == [LeftOut]
        return
    rows = [each for each in found if isinstance(each, Row)]
    assert {"reference", "fast"} <= {each.variant for each in rows}
    assert all(each.error is not None and each.error <= 2e-6 * max(1, each.span) for each in rows)
    assert all(each.floor_seconds and each.floor_seconds < each.seconds.high for each in rows)


def test_patience_stops_where_it_says():
    def rounds(patience, each):
        done = 0
        while patience.goes_on(done, done * each, done * each + 1):
            done += 1
        return done

    assert rounds(Patience(3), 9.0) == 3
    assert rounds(Patience(3, enough=2.0), 0.25) == 8 and rounds(Patience(3, enough=2.0), 0.001) == 30
    assert rounds(Patience(3, limit=5.5), 2.0) == 2  # the third would end at 7
    assert rounds(Patience(3, limit=0.1), 2.0) == 1


def test_launches_are_counted_by_what_starts_work():
    calls = {"cudaLaunchKernel": 12, "cuLaunchKernelEx": 3, "cudaGraphLaunch": 1, "cudaMemcpyAsync": 5, "gemm": 7}
    assert measure.launches_among(calls) == 16


def test_goals_are_counted_from_rows():
    faster = Goal("G", "t", "faster", 1.5, 2.5, "7b", "a/case", "own", "other")
    rows = [row(floor_seconds=0.5, held_bytes=4 * 10**9, error=1e-3), row(variant="other", seconds=2.0, error=1e-2)]
    value = faster.value(report(*rows))
    assert value == pytest.approx((2.0, 1.8 / 1.1, 2.2 / 0.9))
    for of, wanted in [("slower", 0.5), ("seconds more", -1.0), ("seconds", 1.0), ("of floor", 0.5), ("error", 0.1)]:
        found = replace(faster, of=of).value(report(*rows))
        assert found is not None and found[0] == pytest.approx(wanted), of
    assert replace(faster, of="gigabytes held").value(report(*rows)) == (4.0, 4.0, 4.0)
    assert goals.standing(faster, [report(*rows)]) == ("2 [1.64, 2.44]", "yes")
    assert goals.standing(replace(faster, must=3), [report(*rows)])[1] == "no"
    assert goals.standing(replace(faster, stretch=1.9), [report(*rows)])[1] == "stretch"
    assert goals.standing(replace(faster, of="slower", must=0.4, stretch=0.3), [report(*rows)])[1] == "no"


def test_a_goal_without_its_rows_is_not_measured():
    goal = Goal("G", "t", "faster", 1.5, 2.5, "7b", "a/case", "own", "other")
    rows = [row(), row(variant="other")]
    for other in (
        report(),
        report(rows[0]),
        report(*rows, cuda=None),
        report(*(replace(r, size="toy: s") for r in rows)),
    ):
        assert goals.standing(goal, [other]) == ("not measured (no GPU)", "")
    assert goals.standing(replace(goal, cuda=False), [report(*rows)])[0] == "not measured"
    assert goals.standing(replace(goal, params={"batch": 2}), [report(*rows)])[0].startswith("not")


def test_every_goal_names_a_case_that_there_is():
    cases = {case.name for case in every_case()}
    assert {goal.case for goal in GOALS} <= cases
    assert {goal.name for goal in GOALS} == {f"G{i}" for i in range(1, 13)}
    assert {goal.size for goal in GOALS} <= set(SIZES)
    assert all(goal.must is not None or goal.stretch is not None for goal in GOALS)


def test_checks_see_a_wrong_kernel_and_a_wrong_path(monkeypatch):
    made, failed = checks.failures("cpu")
    assert made > 100 and not failed
    swiglu = fast.swiglu
    monkeypatch.setattr(fast, "swiglu", lambda gate, up: swiglu(gate, up) * 1.01)
    failed = [line.split(",")[0] for line in checks.failures("cpu")[1]]
    assert failed.count("kernels: swiglu by fast") == 2 and "paths: llava_lens fused" in failed
    assert not any("reference" in line for line in failed)
    monkeypatch.undo()
    forward = ours.last_logits
    monkeypatch.setattr(checks.ours, "last_logits", lambda *given: forward(*given) + 0.01)
    subjects = {line.split(":")[0] for line in checks.failures("cpu")[1]}
    assert {"paths", "caches"} <= subjects
    monkeypatch.setitem(checks.CHECKS, "paths", lambda device: 1 / 0)
    assert any("paths: ZeroDivisionError" in line for line in checks.failures("cpu")[1])


def test_nothing_is_measured_where_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(checks, "failures", lambda device: (3, ["kernels: broken"]))
    monkeypatch.setattr(gpu, "measure_all", lambda *_: pytest.fail("measured"))
    assert main(["gpu", "--device", "cpu", "--quick"]) == 1
    assert "3 checks, 1 failed\nkernels: broken" in capsys.readouterr().out


def test_a_gpu_that_is_not_there_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu"]) == 2 and main(["tower", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("no CUDA device") == 2


def test_what_fails_or_finds_no_time_is_listed(monkeypatch, tmp_path, capsys):
    def stops(settings):
        yield row(variant="first")
        raise RuntimeError("out of memory\nand more")

    cases = [
        Case("tower/encode", "", lambda settings: [row(case="tower/encode")]),
        Case("forward/prefill", "", stops),
        Case("startup/import", "", lambda settings: pytest.fail("elsewhere")),
    ]
    monkeypatch.setattr(gpu, "every_case", lambda: cases)
    found = report()
    gpu.measure_all(found, QUICK, 60.0, lambda: found.save(tmp_path / "rows.json"))
    assert [each.variant for each in found.rows] == ["first", "own"]  # in the order of FIRST
    said = {each.case: each.reason for each in found.left_out}
    assert said["forward/prefill"] == "RuntimeError: out of memory" and "on a CPU" in said["startup/import"]
    assert len(json.loads((tmp_path / "rows.json").read_text())["left_out"]) == 2
    late = report()
    gpu.measure_all(late, QUICK, 1.0, lambda: None)
    assert not late.rows and "the 1 s were over" in late.left_out[0].reason


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_command_for_a_gpu_runs_dry(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["gpu", "--device", "cpu", "--quick", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert " checks, 0 failed" in out and "| G10" in out
    ran = {each.case for each in Report.load(file).rows}
    assert {"forward/prefill", "decode/greedy", "sweeps/resid", "increase/cells", "kernels/swiglu"} <= ran
    wrong = [each for each in Report.load(file).left_out if each.variant == "what has no row"]
    assert not wrong


def test_paths_are_those_that_there_are(study):
    assert list(study.paths) == (list(PATHS) if hasattr(HookedLlava, "use") else ["reference"])
    assert set(study.variants) | set(study.missing) == {f"llava_lens {path}" for path in PATHS}


def test_a_dry_run_writes_over_no_result(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "failures", lambda device: (1, []))
    monkeypatch.setattr(gpu, "every_case", lambda: [Case("tower/encode", "", lambda settings: [row()])])
    assert main(["gpu", "--device", "cpu", "--quick"]) == 0
    assert not list(tmp_path.iterdir())
