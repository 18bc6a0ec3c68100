"""`python -m benchmarks gpu`: everything on a GPU within some minutes: checks, the cases at 7B, the goals.

Unusual: the time is kept. Rounds become fewer as it runs out, and what did not fit is listed as left out. Nothing is
measured where a check fails. With `--quick --device cpu` it is a dry run of itself.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence

import torch

from benchmarks import checks, goals
from benchmarks.cases import Case, every_case
from benchmarks.compare import Settings
from benchmarks.rows import LeftOut, Report, machine, text
from benchmarks.twins import within

FIRST = (
    "forward/prefill",
    "decode/greedy",
    "tower/encode",
    "cached/run",
    "sweeps/heads-last",
    "sweeps/knockout",
    "sweeps/resid-words",
    "increase/cells",
    "sweeps/heads",
    "sweeps/resid",
    "kernels/",
    "patterns/last",
    "attribution/resid",
    "sweeps/questions",
)
"""The cases in the order in which the time is spent: what goals need comes first."""
ELSEWHERE = ("startup/", "curves/", "increase/cells-strong")
"""Cases that are measured on a CPU."""
LEAST = 5.0
"""Seconds that have to be left for another case to begin."""
LONGEST = 20.0
"""Seconds that one comparison may take at most."""


def ordered() -> list[Case]:
    """What is run."""
    cases = [case for case in every_case() if not case.name.startswith(ELSEWHERE)]
    found = [next(i for i, start in enumerate(FIRST) if case.name.startswith(start)) for case in cases]
    return [case for _, case in sorted(zip(found, cases, strict=True), key=lambda pair: pair[0])]


def measure_all(report: Report, settings: Settings, seconds: float, after: Callable[[], None]) -> None:
    """Every case into the report, `after` each of them, in about so many seconds."""
    start, cases = time.monotonic(), ordered()
    for done, case in enumerate(cases):
        left = seconds - (time.monotonic() - start)
        if left < LEAST:
            report.left_out.append(LeftOut(case.name, "every variant", f"the {seconds:.0f} s were over"))
            continue
        limit = min(LONGEST, left / (len(cases) - done))
        print(f"{case.name}: {left:.0f} s left", file=sys.stderr, flush=True)
        try:
            with within(left):
                report.add(case.run(Settings(settings.quick, settings.device, settings.rounds, limit)))
        except Exception as error:  # one case must not cost the others their time on the device
            line = (str(error).strip().splitlines() or [""])[0]
            report.left_out.append(LeftOut(case.name, "what has no row", f"{type(error).__name__}: {line}"))
        gc.collect()
        if settings.cuda:
            torch.cuda.empty_cache()
        after()
    elsewhere = [case.name for case in every_case() if case.name.startswith(ELSEWHERE)]
    report.left_out += [LeftOut(name, "every variant", "it is measured on a CPU") for name in elsewhere]
    after()


def main(argv: Sequence[str]) -> int:
    """Run from the command line: 1 where a check fails, 2 where there is no such device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything work?")
    parser.add_argument(
        "--json", metavar="FILE", help="where rows go (benchmarks/results/ and the device's name; with --quick nowhere)"
    )
    parser.add_argument("--seconds", type=float, default=440, help="for checks and cases together (440)")
    asked = parser.parse_args(argv)
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no CUDA device; --quick --device cpu is a dry run", file=sys.stderr)
        return 2
    start = time.monotonic()
    report = Report(machine(asked.device))
    own = (
        None
        if asked.quick
        else f"benchmarks/results/{re.sub('[^a-z0-9]+', '-', report.machine['device'].lower())}.json"
    )
    file = asked.json or own  # a dry run writes over no result
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' deprecations
        made, failed = checks.failures(asked.device)
        print(f"{made} checks, {len(failed)} failed", *failed, sep="\n", flush=True)
        if failed:
            return 1
        settings = Settings(asked.quick, asked.device, 1 if asked.quick else 3)
        measure_all(
            report, settings, asked.seconds - (time.monotonic() - start), lambda: report.save(file) if file else None
        )
    print(text(report), "", goals.table([report]), sep="\n")
    return 0
