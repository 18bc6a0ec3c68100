"""The benchmark's baselines find the same numbers as brute force, and its measuring does the arithmetic it says."""

from __future__ import annotations

import itertools
import json
import subprocess

import pytest
import torch
from toy_study import LOOSE, TOY, exact_of

from benchmarks import baselines, measure, ours, truth
from benchmarks import compare as compare_module
from benchmarks.__main__ import main
from benchmarks.bridge import CANNOT, Bridge, nothing_is_installed
from benchmarks.cases import every_case
from benchmarks.compare import Settings, Variant, compare, spread_out
from benchmarks.floors import Ceilings, Work
from benchmarks.measure import Patience, Spread, Tries, peak_bytes, summarise
from benchmarks.models import make_study, questions
from benchmarks.rows import HEAD, table

LAYERS, POSITIONS, HEADS = range(TOY.layers), range(TOY.positions), range(TOY.heads)
RESID = list(itertools.product(LAYERS, POSITIONS))
Z = list(itertools.product(LAYERS, HEADS))
LAST = slice(-1, None)


@pytest.fixture(scope="module")
def study():
    return make_study(TOY)


@pytest.fixture(scope="module")
def words():
    return make_study(TOY, "words")


def unpatched(study):
    with torch.no_grad():
        return study.metric(baselines.last_logits(study.hf, study.corrupt))


@pytest.mark.parametrize("twin", ["model", "exact"])
@pytest.mark.parametrize("differ", ["study", "words"])
def test_the_loop_over_the_stream_equals_brute_force(differ, twin, request):
    study = request.getfixturevalue(differ)
    found = baselines.patch_resid(study, RESID, baselines.clean_activations(study)["resid_pre"])
    wanted = truth.patch_resid(exact_of(study) if twin == "exact" else study.model, study, RESID)
    torch.testing.assert_close(found, wanted.to(found.dtype), **LOOSE)
    assert (found - unpatched(study)).abs().max() > 0.1  # the cells say something
    clean = study.metric(baselines.last_logits(study.hf, study.clean))
    last = RESID.index((TOY.layers - 1, TOY.positions - 1))
    assert (found[last] - clean).abs() < (unpatched(study) - clean).abs()


def test_words_differ_in_the_question_alone(words):
    differs = (words.clean.tokens != words.corrupt.tokens)[0].nonzero()[:, 0].tolist()
    assert len(differs) == 3 and set(differs) < set(words.words)
    assert words.clean.pixels is words.corrupt.pixels
    assert TOY.image_token not in words.corrupt.tokens[0, words.words]


@pytest.mark.parametrize("at", [slice(None), LAST], ids=["all positions", "last position"])
def test_the_loop_over_heads_equals_brute_force(study, at):
    found = baselines.patch_heads(study, Z, baselines.clean_activations(study)["z"], at)
    torch.testing.assert_close(found, truth.patch_heads(exact_of(study), study, Z, at).to(found.dtype), **LOOSE)
    assert (found - unpatched(study)).abs().max() > 0.1


@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_knockout_loop_equals_brute_force(study, width):
    cells, sources = list(itertools.product(LAYERS, range(2))), [study.image, study.image[:4]]
    found = baselines.knock_out(study, cells, sources, width)
    wanted = truth.knock_out(exact_of(study), study, cells, sources, width)
    torch.testing.assert_close(found, wanted.to(found.dtype), **LOOSE)
    assert (found - unpatched(study)).abs().min() > 1e-3


def test_windows_are_centred_and_clipped():
    assert [list(w) for w in baselines.windows(4, 3)] == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]
    assert [list(w) for w in baselines.windows(3, 2)] == [[0], [0, 1], [1, 2]]


@pytest.mark.parametrize("way", ["ask_each", "ask_batch", "ask_prefix"])
def test_every_way_to_ask_gives_the_same_logits(study, way):
    prompts = questions(study, 4)
    assert len({inputs.n_pos for inputs in prompts}) == 4
    found = getattr(baselines, way)(study.hf, prompts)
    torch.testing.assert_close(found, truth.ask(exact_of(study), prompts).to(found.dtype), **LOOSE)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_ours_equals_brute_force(study, words):
    sources = [study.image, study.image[:4]]
    cells = list(itertools.product(LAYERS, range(2)))
    pairs = [
        (ours.patch_resid(study), truth.patch_resid(exact_of(study), study, RESID)),
        (ours.patch_resid(words), truth.patch_resid(exact_of(words), words, RESID)),
        (ours.patch_heads(study), truth.patch_heads(exact_of(study), study, Z)),
        (ours.patch_heads(study, "last"), truth.patch_heads(exact_of(study), study, Z, LAST)),
        (ours.knock_out(study, sources, 3), truth.knock_out(exact_of(study), study, cells, sources, 3)),
        (ours.ask(study, questions(study, 4)), truth.ask(exact_of(study), questions(study, 4))),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found.flatten().double(), wanted.flatten().double(), **LOOSE)


def test_loops_leave_no_hooks_behind(study):
    before = unpatched(study)
    baselines.patch_resid(study, RESID[-2:], baselines.clean_activations(study)["resid_pre"])
    baselines.knock_out(study, [(1, 0)], [study.image], 3)
    assert torch.equal(unpatched(study), before)


@pytest.mark.filterwarnings("ignore")
def test_transformer_lens_agrees_where_its_sweeps_can_do_it(study):
    bridge = Bridge(study)
    stream, z = bridge.clean_cache("resid_pre"), bridge.clean_cache("z")
    pairs = [
        (bridge.patch_resid(RESID[::5], stream), truth.patch_resid(exact_of(study), study, RESID[::5])),
        (bridge.patch_heads(Z, z), truth.patch_heads(exact_of(study), study, Z)),
        (bridge.patch_heads_last(Z, z), truth.patch_heads(exact_of(study), study, Z, LAST)),
    ]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted.to(found.dtype), **LOOSE)
    assert set(CANNOT) == {"knockout", "questions"}


def test_the_bridge_may_not_start_pip():
    with nothing_is_installed():
        for start in (subprocess.run, subprocess.check_call, subprocess.Popen):
            with pytest.raises(AssertionError, match="a subprocess was started"):
                start(["pip", "install", "torchvision"])
    assert subprocess.run(["true"]).returncode == 0


def test_ratios_of_medians_and_medians_of_ratios():
    seconds = {"slow": [4.0, 6.0, 20.0], "fast": [2.0, 1.0, 4.0]}
    timings = summarise({name: Tries(print, "cpu", print, taken) for name, taken in seconds.items()}, "slow")
    assert timings["fast"].seconds == Spread(2.0, 1.0, 4.0)
    assert timings["fast"].times_faster == 3.0  # 6 / 2
    assert timings["fast"].times_faster_by_round == Spread(5.0, 2.0, 6.0)  # of 2, 6, 5
    assert timings["slow"].times_faster == 1.0 and timings["slow"].times_faster_by_round == Spread(1.0, 1.0, 1.0)
    assert timings["fast"].rounds == 3 and timings["fast"].baseline == "slow"


def test_variants_are_interleaved_back_and_forth_and_scaled(monkeypatch):
    ran, clock = [], itertools.count()
    monkeypatch.setattr(measure, "peak_bytes", lambda run, device: 7)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))  # every call takes one second
    variants = {name: lambda name=name: ran.append(name) or name for name in "ab"}
    timings = measure.measure(variants, "a", Patience(3), warmup=1, scale={"b": 10.0}, read={"b": str.upper})
    assert "".join(ran) == "ab" + "ab" + "ba" + "ab"
    assert timings["a"].seconds.median == 1.0 and timings["b"].seconds.median == 10.0
    assert timings["b"].times_faster == 0.1 and timings["b"].result == "B" and timings["b"].peak_bytes == 7
    with pytest.raises(ValueError, match="'c' is not among a, b"):
        measure.measure(variants, "c")


def test_a_run_that_measured_itself_is_believed():
    ran = []
    runs = {"a": lambda: ran.append("a") or measure.Own("made", 3.0, 11), "b": lambda: ran.append("b") or "plain"}
    timings = measure.measure(runs, "a", Patience(2), warmup=0)
    assert "".join(ran) == "abba"  # neither a warm-up nor a run for the peak
    assert timings["a"].seconds == Spread(3.0, 3.0, 3.0) and timings["a"].peak_bytes == 11
    assert timings["a"].result == "made" and timings["b"].peak_bytes is None and timings["b"].seconds.high < 1


def test_peak_memory_sees_what_is_freed_again():
    def hold():
        torch.ones(16 * 2**20)

    found = peak_bytes(hold, "cpu")
    if found is None:
        pytest.skip("this system does not tell the peak")
    assert 60 * 2**20 < found < 80 * 2**20
    assert peak_bytes(lambda: None, "cpu") < 8 * 2**20  # type: ignore[operator]


def test_cells_are_spread_evenly_with_both_ends():
    assert spread_out(10, 4) == [0, 3, 6, 9]
    assert spread_out(3, 8) == [0, 1, 2]


def test_rows_hold_error_and_share(study):
    truth_here = torch.tensor([0.0, 2.0])
    variants = [
        Variant("loop", lambda: torch.tensor([0.0, 2.5]), share=0.1),
        Variant("whole", lambda: torch.tensor([0.25, 2.0])),
    ]
    rows = compare("a/case", TOY, {"n": 1}, 20, variants, truth_here, Settings(rounds=2))
    assert [row.error for row in rows] == [0.5, 0.25] and rows[0].span == 2.0
    assert [row.cells_measured for row in rows] == [2, 20]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1 and "2 of 20" in lines[2]
    assert len(lines[0].strip("|").split("|")) == len(HEAD)
    with pytest.raises(ValueError, match=r"a/case, short: \(1,\) numbers, expected \(2,\)"):
        compare("a/case", TOY, {}, 20, [Variant("short", lambda: torch.ones(1))], truth_here, Settings(rounds=1))


def test_columns_without_a_word_to_say_are_left_out(monkeypatch):
    monkeypatch.setattr(compare_module, "ceilings", lambda *_: Ceilings(100.0, 10.0, torch.float32))
    work = Work(flops=200.0, bytes=1.0)
    variants = [
        Variant("plain", lambda: torch.zeros(1)),
        Variant("own", lambda: measure.Own(torch.zeros(1), 8.0), work=work, held_bytes=2**20),
    ]
    plain, own = compare("a/case", TOY, {}, 1, variants, None, Settings(rounds=1))
    assert own.floor_seconds == 2.0 and plain.floor_seconds is None and own.error is None
    assert "floor" not in table([plain]) and "held" not in table([plain])
    head, _, first, second = (
        [cell.strip() for cell in line.strip("|").split("|")] for line in table([plain, own]).splitlines()
    )
    assert head == [*HEAD, "floor", "of floor", "held"]
    assert first[-3:] == ["", "", ""] and second[-3:] == ["2", "0.25", "1.0 MiB"] and "none" in second


def test_the_command_lists_every_case(capsys):
    assert main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [case.name for case in every_case()] and "sweeps/resid" in listed
    assert main(["nosuch", "--list"]) == 2
    assert "no case begins with 'nosuch'" in capsys.readouterr().err


def test_the_command_writes_what_it_measured(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert main(["sweeps/knockout", "--quick", "--rounds", "1", "--json", str(file)]) == 0
    written = json.loads(file.read_text(encoding="utf-8"))
    first = written["rows"][0]
    assert first["case"] == "sweeps/knockout" and first["variant"] == "hf loop" and first["error"] < 2e-5
    assert {"device", "cpu", "threads", "versions", "date"} <= set(written["machine"])
    assert "float64" in first["error_against"] and "VmHWM" in written["machine"]["peak_bytes"]
    assert "without transformer_lens" in capsys.readouterr().out
