"""What a benchmark reports: rows, what was left out and why, and the machine; as JSON and as a table."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.floors import FLOOR
from benchmarks.measure import MEMORY, Spread


@dataclass(frozen=True)
class Row:
    """One variant of one case. Seconds are for all `cells`, scaled up by count where fewer were measured.

    `error` is the largest absolute difference of the metric to `error_against`; `span` is how far that reference
    itself ranges, largest minus smallest; None where there are no numbers to compare. `floor_seconds` is what the work
    takes at least under `ceilings`; `held_bytes` is what the variant keeps when it is done; `launches` is how often the
    host starts work on the device, None where that was not counted.
    """

    case: str
    variant: str
    size: str
    params: dict[str, Any]
    cells: int
    cells_measured: int
    rounds: int
    seconds: Spread
    baseline: str
    times_faster: float
    times_faster_by_round: Spread
    peak_bytes: int | None
    error: float | None
    error_against: str
    span: float
    floor_seconds: float | None = None
    ceilings: str = ""
    held_bytes: int | None = None
    per_second: str = ""
    launches: int | None = None

    def show(self, *names: str) -> str:
        """Its case with its parameters (all but `names`)."""
        return self.case + "".join(f" {key}={value}" for key, value in self.params.items() if key not in names)


@dataclass(frozen=True)
class LeftOut:
    """A variant that a case could not have, and why."""

    case: str
    variant: str
    reason: str


@dataclass
class Report:
    """All rows of a run, with what they were measured on."""

    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def add(self, found: Iterable[Row | LeftOut]) -> None:
        """Take in what a case finds, piece by piece: what came before an error is kept."""
        for each in found:
            if isinstance(each, Row):
                self.rows.append(each)
            else:
                self.left_out.append(each)

    def find(self, case: str, variant: str, size: str, **params: Any) -> Row | None:
        """The row of a variant on a size, whose parameters hold the given ones; None where there is none."""
        fits = [row for row in self.rows if (row.case, row.variant, row.size.split(":")[0]) == (case, variant, size)]
        return next((row for row in fits if all(row.params.get(key) == value for key, value in params.items())), None)

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what `save` wrote."""
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        spreads = ("seconds", "times_faster_by_round")
        made: list[dict[str, Any]] = [
            {key: Spread(**value) if key in spreads else value for key, value in row.items()} for row in facts["rows"]
        ]
        rows = [Row(**fields) for fields in made]
        return cls(facts["machine"], rows, [LeftOut(**each) for each in facts["left_out"]])


LIBRARIES = ("torch", "transformers", "transformer_lens", "triton", "liger_kernel", "nnsight")


def machine(device: str) -> dict[str, Any]:
    """The device, the processor, the threads, the versions of what is installed, and the date."""
    cuda = device.startswith("cuda")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in LIBRARIES if find_spec(name)},
        "peak_bytes": MEMORY["cuda" if cuda else "cpu"],
    }


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


HEAD = ("case", "variant", "cells", "seconds", "[low, high]", "× faster", "by round [low, high]", "peak", "error")


EXTRA: dict[str, Callable[[Row], str]] = {
    "floor": lambda row: "" if row.floor_seconds is None else f"{row.floor_seconds:.3g}",
    "of floor": lambda row: "" if row.floor_seconds is None else f"{row.floor_seconds / row.seconds.median:.2f}",
    "held": lambda row: "" if row.held_bytes is None else f"{row.held_bytes / 2**20:.1f} MiB",
    "launches": lambda row: "" if row.launches is None else str(row.launches),
    "per second": lambda row: row.per_second,
}
"""Columns that stand in a table where a row has something to say in them."""


def table(rows: Sequence[Row]) -> str:
    """A markdown table; `*` marks seconds scaled up from some cells."""
    extra = {name: show for name, show in EXTRA.items() if any(map(show, rows))}
    body = [(*HEAD, *extra), *((*_cells(row), *(show(row) for show in extra.values())) for row in rows)]
    return markdown(body)


def markdown(body: Sequence[Sequence[str]]) -> str:
    """A head and lines as a table whose columns line up as plain text too."""
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in body]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    part = row.cells_measured < row.cells
    by_round = row.times_faster_by_round
    return (
        row.show(),
        row.variant,
        f"{row.cells_measured} of {row.cells}" if part else str(row.cells),
        f"{row.seconds.median:.3g}{'*' if part else ''}",
        f"[{row.seconds.low:.3g}, {row.seconds.high:.3g}]",
        f"{row.times_faster:.2f}",
        f"{by_round.median:.2f} [{by_round.low:.2f}, {by_round.high:.2f}]",
        "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB",
        "none" if row.error is None else f"{row.error:.1e} of {row.span:.2g}",
    )


def text(report: Report) -> str:
    """The report to read: the table, then what it rests on."""
    facts, versions = report.machine, report.machine["versions"]
    lines = [
        table(report.rows),
        "",
        f"{facts['device']}; {facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f"; {facts['date']}",
        "seconds: median of the rounds; * scaled up by count from the cells measured. × faster: than each case's "
        f"baseline ({', '.join(sorted({row.baseline for row in report.rows}))}).",
        "Loops: the clean activations they put in are collected outside their time; llava_lens pays for its clean run.",
        f"peak: {facts['peak_bytes']}.",
        "error: largest absolute difference of the metric, and the range of what it is compared with: "
        + "; ".join(sorted({row.error_against for row in report.rows}))
        + ".",
    ]
    if any(row.floor_seconds is not None for row in report.rows):
        lines.append(f"{FLOOR} Ceilings: " + "; ".join(sorted({row.ceilings for row in report.rows} - {""})) + ".")
    lines += [f"size {size}" for size in dict.fromkeys(row.size for row in report.rows)]
    lines += [f"{each.case}: without {each.variant}: {each.reason}" for each in report.left_out]
    return "\n".join(lines)
