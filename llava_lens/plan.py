"""Which way every stretch of a forward takes: the reference way, or a fused one that is equal up to rounding.

Unusual: the plan is not made beforehand. Each region decides as it is entered, from the hooks that are live then; this
file switches the fused ways on and off, and tells what would run now.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn

from llava_lens.errors import LensError, nearest
from llava_lens.packing import onednn_takes
from llava_lens.regions import PATHS, Path, Region, regions_of


class Switch:
    """What `use` returns: in a `with` statement the path before comes back at the end."""

    before: Path

    def __init__(self, model: Any, before: Path):
        self.model, self.before = model, before

    def __enter__(self) -> Any:
        return self.model

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.model._take(self.before)

    def __repr__(self) -> str:
        return f"using {self.model.path!r}; before {self.before!r}"


class Planned:
    """A model whose blocks have a fused way beside the reference way."""

    path: Path
    graphs: Any

    def use(self, path: Path | str) -> Switch:
        """Take the "reference" path, bit-equal to Hugging Face, or the "fused" one, faster and equal up to rounding.

        As a statement it stays; as a context manager (`with model.use("fused"):`) the path before comes back. What may
        be written by a hook, and what gradients pass through, takes the reference way on either path (`plan()` tells).
        "fused" moves the weights of queries, keys and values, and of gate and up, next to each other: weights that are
        shared with another model (`from_hf`) become this model's own. Raises `LensError` for another name.
        """
        if path not in PATHS:
            raise LensError(f"path {path!r}{nearest(path, PATHS)}; expected 'reference' or 'fused'")
        before: Path = self.path
        self._take(cast(Path, path))
        return Switch(self, before)

    def optimize_for_cpu(self, rows: int = 512) -> None:
        """Take the fused path with every projection of the blocks held a second time, in oneDNN's own order.

        Large products then take less time (docs/benchmarks.md says how much), for twice the memory of their weights;
        small ones stay as they are. `rows` is the length of inputs to choose the order for. An edit of a weight is
        noticed (not one through `.data`), and that product runs without the copy from then on. Raises `LensError` for
        a model that is not in float32 on a CPU, for weights made in inference mode, whose edits nobody can notice, and
        for a torch without these functions.
        """
        if any(weight.is_inference() for weight in self.parameters()):  # type: ignore[attr-defined]
            raise LensError("weights made in inference mode, whose edits nobody counts; load the model outside of it")
        weight = next(self.parameters())  # type: ignore[attr-defined]
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise LensError(f"a model in {weight.dtype} on {weight.device}; optimize_for_cpu takes float32 on a CPU")
        if not onednn_takes(weight):
            raise LensError(f"torch {torch.__version__} is without oneDNN's packed products; use('fused') needs none")
        self._take("fused")
        for _, region in regions_of(self):  # type: ignore[arg-type]
            if region.packed is not None:
                region.packed.block(rows)

    def _take(self, path: Path) -> None:
        self.path = path
        for _, region in regions_of(self):  # type: ignore[arg-type]
            region.fused = path == "fused"
        if path == "fused":
            self.settle_weights()  # the other path keeps what the fused one laid out, for the way back
        else:
            self.graphs.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self.settle_weights()  # a copied or loaded model has each weight by itself

    def settle_weights(self) -> None:
        """Put weights that run as one product next to each other, if they do, after they were loaded or moved."""
        self.graphs.clear()
        for _, region in regions_of(self):  # type: ignore[arg-type]
            if region.packed is not None:
                region.packed.pack() if self.path == "fused" else region.packed.forget()

    def plan(self) -> Plan:
        """What every region of every block would take now, with the hooks and the gradients that are on now."""
        return Plan.of(self)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Way:
    """A region, and why it is closed to the fused way (empty: it is open)."""

    region: str
    why: str

    def __str__(self) -> str:
        return f"{self.region}: {'reference, ' + self.why if self.why else 'fused'}"


@dataclass(frozen=True)
class Plan:
    """The ways of all regions, by the part of the model they belong to (`blocks.3`, `vision.blocks.0`, `ln_final`)."""

    path: Path
    ways: dict[str, tuple[Way, ...]]

    @classmethod
    def of(cls, model: Any) -> Plan:
        """What would run now."""
        ways: dict[str, list[Way]] = {}
        named = list(model.named_parameters())
        for name, region in regions_of(model):
            head, block, rest = name.partition("blocks.")
            number, _, inside = rest.partition(".")
            part, what = (f"{head}blocks.{number}", inside) if block else name.rpartition(".")[::2]
            ways.setdefault(part, []).append(Way(what, region.why_closed(*weights_up_to(name, region, model, named))))
        return cls(model.path, {part: tuple(found) for part, found in ways.items()})

    def __getitem__(self, part: str) -> dict[str, str]:
        """Region → "fused" or the reason why not, of one part; raises `LensError` for a part without regions."""
        if part not in self.ways:
            raise LensError(f"no part {part!r}{nearest(part, self.ways)}")
        return {way.region: way.why or "fused" for way in self.ways[part]}

    def __str__(self) -> str:
        lines = [f"path {self.path!r}"]
        for _, group in groupby(self.ways.items(), key=lambda item: (item[0].partition("blocks.")[0], item[1])):
            parts = list(group)
            first, last, ways = parts[0][0], parts[-1][0], parts[0][1]
            name = first if first == last else f"{first} … {last.rpartition('.')[2]}"
            same = {way.why for way in ways}
            told = str(Way("all", ways[0].why)) if len(same) == 1 else "; ".join(map(str, ways))
            lines.append(f"  {name}: {told}")
        return "\n".join(lines)


def weights_up_to(
    name: str, region: Region, model: nn.Module, named: list[tuple[str, nn.Parameter]]
) -> list[nn.Parameter]:
    """A region's own weights and those that lie before it in a picture's run: what a gradient may come from."""
    owner = name.rpartition(".")[0]
    start = ".".join((owner, *list(region.around)[-1:])) + "."
    before = next((i for i, (weight, _) in enumerate(named) if weight.startswith(start)), len(named))
    parts = region.packed.linears if region.packed is not None else [model.get_submodule(owner)]
    own = [weight for part in parts for weight in part.parameters()] if region.packed or not region.around else []
    return [weight for _, weight in named[:before]] + own
