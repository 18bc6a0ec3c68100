"""A sweep with a file goes on where it was interrupted, to the same bits; a damaged or foreign file raises."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from brute_force import hooked, inputs_of

from llava_lens.errors import LensError
from llava_lens.sweep import Edit, engine, log_prob, logit, run_cells, settle
from llava_lens.sweep.journal import Journal, digest, source_of, weights_of
from llava_lens.sweep.rows import Row


def setting(metric: Any = None, odd: str = "plain", picture: float = 1.0):
    model = hooked(odd, torch.float32)
    inputs = inputs_of(model, odd, (1, 1), None)
    assert inputs.pixels is not None
    inputs = type(inputs)(inputs.tokens, inputs.pixels * picture)
    return settle(model, Row.of(model, inputs, 0), metric=metric or logit(3))


def cells(value: float = 0.5) -> list[tuple[Edit, ...]]:
    return [(Edit(f"blocks.{layer}.hook_resid_pre", value, pos=pos),) for layer in range(3) for pos in range(12)]


class Interrupted(Exception):
    """The plug is pulled."""


@pytest.mark.parametrize("after", [0, 1, 5])
def test_an_interrupted_sweep_goes_on_to_the_same_bits(tmp_path, monkeypatch, after):
    file, ran = tmp_path / "sweep.safetensors", []
    run = engine.wave_logits

    def limited(*args):
        if len(ran) == after:
            raise Interrupted
        ran.append(args)
        return run(*args)

    whole = run_cells(setting(), cells(), progress=False, max_bytes=2**17)
    monkeypatch.setattr(engine, "wave_logits", limited)
    with pytest.raises(Interrupted):
        run_cells(setting(), cells(), progress=False, max_bytes=2**17, file=file)
    held = Journal(file, 36 + 3, engine.sweep_key(setting(), cells(), "corrupt"))
    assert 0 <= int(held.done.sum()) < 36
    counted = []
    monkeypatch.setattr(engine, "wave_logits", lambda *args: counted.append(args) or run(*args))
    again = run_cells(setting(), cells(), progress=False, max_bytes=2**17, file=file)
    assert torch.equal(again.values, whole.values) and again.floor == whole.floor
    n_waves = len(counted) + after
    counted.clear()
    once_more = run_cells(setting(), cells(), progress=False, max_bytes=2**17, file=file)
    assert torch.equal(once_more.values, whole.values) and not counted and n_waves > 6
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.safetensors"]


def test_full_passes_go_on_too(tmp_path):
    file, made = tmp_path / "sweep.safetensors", [*cells()[:3], (Edit("blocks.1.hook_resid_pre", bad, pos=3),)]
    with pytest.raises(ZeroDivisionError):
        run_cells(settled_full(), made, progress=False, file=file)
    held = Journal(file, 4 + 3, engine.sweep_key(settled_full(), made, "corrupt"))
    assert held.done[:4].tolist() == [True, True, True, False]


def bad(part):
    raise ZeroDivisionError


def settled_full():
    model = hooked("plain", torch.float32)
    return settle(model, Row.of(model, inputs_of(model, "plain", (1, 1), None), 0), metric=logit(3), full=True)


class Callable:
    """A metric that is no plain function."""

    def __call__(self, logits):
        return logits[0, -1, 3]


@pytest.mark.parametrize("metric", [Callable(), Callable().__call__], ids=["object", "method"])
def test_a_metric_that_cannot_be_told_from_another_takes_no_file(tmp_path, metric):
    with pytest.raises(LensError, match=r"file= cannot tell .* from another: it works with a Callable"):
        run_cells(setting(metric), cells(), progress=False, file=tmp_path / "sweep.safetensors")
    assert not list(tmp_path.iterdir()) and run_cells(setting(metric), cells(), progress=False).ran == 36


FACTOR = 1.0


def scaled_by_global(logits):
    return logits[0, -1, 3] * FACTOR


def test_what_a_metric_works_with_belongs_to_the_key(monkeypatch):
    def metric(held):
        return lambda logits: logits[0, -1, 3] * next(iter(held.values())).item()

    values = (np.array([1.0]), np.array([2.0]), torch.tensor([3.0]))
    keys = [engine.sweep_key(setting(metric({"by": value})), cells(), "corrupt") for value in values]
    keys.append(engine.sweep_key(setting(scaled_by_global), cells(), "corrupt"))
    monkeypatch.setitem(globals(), "FACTOR", 2.0)
    keys.append(engine.sweep_key(setting(scaled_by_global), cells(), "corrupt"))
    assert len(set(keys)) == len(keys)


def test_hooks_of_the_user_belong_to_the_key(tmp_path):
    model = hooked("plain", torch.float32)
    row = Row.of(model, inputs_of(model, "plain", (1, 1), None), 0)

    def scaled(factor):
        return [("blocks.0.hook_mlp_out", lambda act, hook: act * factor)]

    file = tmp_path / "sweep.safetensors"
    for factor in (0.5, 2.0):
        held = settle(model, row, metric=logit(3), fwd_hooks=scaled(factor))
        if factor == 0.5:
            run_cells(held, cells()[:3], progress=False, file=file)
            continue
        with pytest.raises(LensError, match="holds another sweep"):
            run_cells(held, cells()[:3], progress=False, file=file)
    with model.hooks(fwd_hooks=scaled(3.0)), pytest.raises(LensError, match="pass hooks as fwd_hooks= instead"):
        run_cells(settle(model, row, metric=logit(3)), cells()[:3], progress=False, file=tmp_path / "b.safetensors")


def test_every_bit_of_every_weight_belongs_to_the_key():
    model = copy.deepcopy(hooked("plain", torch.float32))
    before = weights_of(model)
    with torch.no_grad():
        model.unembed.weight[86, 7] = torch.nextafter(model.unembed.weight[86, 7], torch.tensor(9.0))
    after = weights_of(model)
    with torch.no_grad():
        model.unembed.weight[[3, 4]] = model.unembed.weight[[4, 3]]
    assert len({before, after, weights_of(model)}) == 3


@pytest.mark.parametrize(
    "other",
    [
        lambda: (setting(logit(4)), cells()),
        lambda: (setting(log_prob(3)), cells()),
        lambda: (setting(lambda z: z[0, -1, 3]), cells()),
        lambda: (setting(odd="tied"), cells()),
        lambda: (setting(picture=2.0), cells()),
        lambda: (setting(), cells(0.6)),
        lambda: (setting(), cells()[:-1]),
        lambda: (setting(), [(Edit(c[0].hook, 0.5, "add", pos=c[0].pos),) for c in cells()]),
    ],
    ids=["token", "metric", "own metric", "model", "picture", "value", "cells", "how"],
)
def test_a_file_of_another_sweep_raises(tmp_path, other):
    file = tmp_path / "sweep.safetensors"
    first = run_cells(setting(), cells(), progress=False, file=file)
    before = file.read_bytes()
    theirs, edits = other()
    with pytest.raises(LensError, match="holds another sweep"):
        run_cells(theirs, edits, progress=False, file=file)
    assert file.read_bytes() == before
    assert torch.equal(run_cells(setting(), cells(), progress=False, file=file).values, first.values)


def test_a_damaged_file_raises(tmp_path):
    file = tmp_path / "sweep.safetensors"
    run_cells(setting(), cells(), progress=False, file=file)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"not at all"):
        file.write_bytes(damaged)
        with pytest.raises(LensError, match="was cut off"):
            run_cells(setting(), cells(), progress=False, file=file)
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    file.write_bytes(bytes(flipped))
    with pytest.raises(LensError, match="damaged"):
        run_cells(setting(), cells(), progress=False, file=file)
    torch.save({}, file)
    with pytest.raises(LensError, match="was cut off"):
        run_cells(setting(), cells(), progress=False, file=file)
    with pytest.raises(LensError, match="is a folder; expected a file in it"):
        run_cells(setting(), cells(), progress=False, file=tmp_path)
    with pytest.raises(LensError, match="there is no folder"):
        run_cells(setting(), cells(), progress=False, file=tmp_path / "nowhere" / "sweep.safetensors")


def test_a_cache_is_no_sweep(tmp_path):
    model = hooked("plain", torch.float32)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs_of(model, "plain", (1, 1), None), names_filter="hook_embed")
    cache.save(tmp_path / "cache.safetensors")
    with pytest.raises(LensError, match="no sweep"):
        run_cells(setting(), cells(), progress=False, file=tmp_path / "cache.safetensors")


def test_functions_are_told_apart_by_what_they_hold():
    def scaled(factor):
        return lambda part: part * factor

    one, same, other = ([(Edit("blocks.1.hook_resid_pre", scaled(f), pos=3),)] for f in (2.0, 2.0, 3.0))
    keys = [engine.sweep_key(setting(), cells, "corrupt") for cells in (one, same, other)]
    assert keys[0] == keys[1] != keys[2]
    parts = [digest(source_of(f)) for f in (partial(scaled, 1), partial(scaled, 2), scaled(torch.ones(2)), scaled, len)]
    assert len(set(parts)) == len(parts)


def test_digests_tell_shapes_and_nesting_apart():
    a = torch.arange(6.0)
    parts = [(a,), (a.reshape(2, 3),), (a.double(),), ([a],), (a, 1), ("1",), (1,), ([1], [2]), ([1, 2],)]
    assert len({digest(*part) for part in parts}) == len(parts)
    assert digest(a[::2]) == digest(a[::2].clone())
