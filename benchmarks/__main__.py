"""`python -m benchmarks [NAME ...]`: run the cases whose names begin so (all for none), print a table, write JSON.

`python -m benchmarks gpu` runs all of them within some minutes on a GPU (`benchmarks.gpu`).
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

import torch

from benchmarks import gpu
from benchmarks.cases import chosen
from benchmarks.compare import Settings
from benchmarks.rows import Report, machine, text


def arguments() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a case or the start of its name, as sweeps")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    parser.add_argument("--quick", action="store_true", help="a toy size: does everything work?")
    parser.add_argument("--json", metavar="FILE", help="write rows and machine there")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--rounds", type=int, help="timed rounds (2 with --quick, else 3)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 2 for a name that no case has, or a device that is not there."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["gpu"]:
        return gpu.main(given[1:])
    asked = arguments().parse_args(given)
    try:
        cases = chosen(asked.names)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{case.name:20} {case.about}" for case in cases))
        return 0
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"--device {asked.device}: there is no CUDA device; expected cpu", file=sys.stderr)
        return 2
    if asked.threads:
        torch.set_num_threads(asked.threads)
    settings = Settings(asked.quick, asked.device, asked.rounds or (2 if asked.quick else 3))
    report = Report(machine(asked.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other libraries' deprecations
        for case in cases:
            print(f"{case.name}: {case.about}", file=sys.stderr, flush=True)
            report.add(case.run(settings))
            if asked.json:
                report.save(asked.json)
    print(text(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
