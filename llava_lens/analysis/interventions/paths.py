"""Path patching: what one component tells others directly, all between them held still (arXiv 2211.00593, 2304.05969).

Unusual: nothing has to be frozen. Every block adds to one stream, so along the direct paths a receiver's input changes
by exactly the difference of the sender's output; that input alone is edited, and the runs are as short as any sweep's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Unpack

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.grid import Cell, Grid, Reach, Sweep
from llava_lens.analysis.interventions.study import Direction, Running, Turn, each_row, read_pair
from llava_lens.analysis.scores import Scores
from llava_lens.errors import LensError, nearest
from llava_lens.kernels import upcast
from llava_lens.layers import Attention, Block
from llava_lens.sweep.base import Base
from llava_lens.sweep.edits import Edit
from llava_lens.sweep.rows import Row
from llava_lens.sweep.sites import site_of

KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "head": ("z", ("layer", "head")),
    "attn": ("attn_out", ("layer",)),
    "mlp": ("mlp_out", ("layer",)),
    "embed": ("hook_embed", ()),
}
"""What can send: the hook of its output, and what is swept by default."""
NODE = re.compile(r"L(\d+)(?:H(\d+))?(?:\s*\b(q|k|v|mlp|attn))?|logits|embed")
RECEIVERS = "'L3H5 q' (or k, v) or (3, 5, 'q'), 'L4 mlp' or (4, 'mlp'), 'logits'"
SENDERS = "'L3H5' or (3, 5), 'L4 mlp' or (4, 'mlp'), 'L4 attn' or (4, 'attn'), 'embed'"
BETWEEN = ("hook_resid_pre", "hook_attn_out", "attn.hook_result", "hook_resid_mid", "hook_resid_post")
"""What every message passes, in each block."""
Delta = Float[Tensor, "place d_model"]


def path_patch(
    model: Any,
    clean: Any,
    corrupt: Any,
    receivers: Any,
    *,
    senders: Any = "head",
    sweep: Sweep | None = None,
    at: Any = None,
    metric: Any = None,
    direction: Direction = "denoise",
    **how: Unpack[Running],
) -> Scores:
    """Patch the direct paths from each sender to the receivers, one cell at a time; `Scores` of the metric.

    A sender's output takes the other run's value; other heads and MLPs between it and the receivers keep the base
    run's. So what a receiver reads changes by the difference in the stream, through its own norm. All receivers behind
    the sender get their inputs so, and keep them whatever the others make of theirs; from there the run goes on freely.
    Under the final norm ("logits") the difference is added to what the other receivers cause. A sender without a
    receiver behind it leaves the baseline. "denoise" sends clean outputs into the corrupt run, "noise" corrupt ones
    into the clean run.

    `receivers` is a list of "L3H5 q" (what head 5 of layer 3 makes its queries from; "k" and "v" are numbered by
    key/value heads, which several heads share in grouped-query attention), "L4 mlp" and "logits", or tuples
    `(3, 5, "q")`, `(4, "mlp")`. `senders` is "head", "attn", "mlp" or "embed" for all of them, swept over
    ("layer", "head"), ("layer",) or, for the embedding, nothing; or a list of "L3H5", "L4 mlp", "L4 attn", "embed", or
    tuples `(3, 5)`, `(4, "mlp")`, with the axis "sender". `sweep` may add "position", "patch" or "group" of the
    sender; `at` restricts its positions. `at`, `metric` and `how` are as in `patch`.

    Raises `LensError` as `patch` does, and for a receiver or sender that is not there, senders none of which comes
    before a receiver, and hooks of yours on the way between them.
    """
    clean, corrupt = read_pair(model, clean, corrupt, direction)
    hearing = receivers_of(model, receivers)
    refuse_hooks(model, how.get("fwd_hooks", ()), hearing)

    def study(turn: Turn) -> Scores:
        rows = turn.row(clean), turn.row(corrupt)
        grid = grid_of(model, rows[0], turn.n_pos, senders, sweep, at)
        check_order(model, grid, hearing)
        setting = turn.settle(*rows, [*grid.hooks, *(r.stream for r in hearing)])
        runs = (setting.corrupt, setting.clean) if direction == "denoise" else (setting.clean, setting.corrupt)
        base = runs[0]
        shown = {base.row.columns[place] for place in setting.bound.places(len(base.row.columns))}
        cells = [edits_of(Message(*runs, cell), hearing, shown) for cell in grid.cells]
        on, names = ("corrupt" if direction == "denoise" else "clean"), [r.name for r in hearing]
        return turn.measure(setting, grid, cells, on, score="path patch", direction=direction, receivers=names)

    return each_row(model, clean, metric, how, study)


@dataclass(frozen=True)
class Receiver:
    """Something that reads the stream: a head's queries, keys or values, an MLP, or the final norm."""

    model: Any
    layer: int
    kind: str
    head: int | None = None

    @property
    def name(self) -> str:
        if self.kind == "logits":
            return "logits"
        return f"L{self.layer} mlp" if self.kind == "mlp" else f"L{self.layer}H{self.head} {self.kind}"

    @property
    def hook(self) -> str:
        """Where it gets what it reads."""
        names = {"mlp": "hook_mlp_in", "logits": "hook_resid_post"}
        return f"blocks.{self.layer}.{names.get(self.kind) or f'attn.hook_{self.kind}'}"

    @property
    def stream(self) -> str:
        """The stream that it reads."""
        names = {"mlp": "hook_resid_mid", "logits": "hook_resid_post"}
        return f"blocks.{self.layer}.{names.get(self.kind, 'hook_resid_pre')}"

    @cached_property
    def stage(self) -> int:
        """When it reads, as in `site_of`; senders with this stage or an earlier one are heard."""
        return site_of(self.model, self.hook).stage

    def input(self, base: Base, places: Sequence[int], delta: Delta) -> Tensor:
        """What it gets at some places if the stream there differs by `delta`; the final norm, the difference itself."""
        if self.kind == "logits":
            return delta
        x = base.acts[self.stream][:, list(places)]
        x = (upcast(x) + delta).to(x.dtype)
        if self.kind == "mlp":
            return x[0]
        block = self.model.blocks[self.layer]
        weight, bias = (getattr(block.attn, f"{part}_{self.kind.upper()}")[self.head] for part in "Wb")
        return (block.ln1(x)[0] @ weight + bias)[:, None]


@dataclass(frozen=True)
class Message:
    """What one cell's senders add to the base run's stream when they say what they say in the source run."""

    base: Base
    source: Base
    cell: Cell

    def columns(self, stage: int) -> list[int]:
        """The positions where a reader at a stage hears a difference."""
        different = torch.zeros(len(self.base.row.columns), dtype=torch.bool)
        for hook in self._heard(stage):
            said = self._said(hook, self.places)
            different[self.places] |= said.flatten(1).any(-1).cpu()
        return [column for column, d in zip(self.base.row.columns, different.tolist(), strict=True) if d]

    def delta(self, stage: int, places: Sequence[int]) -> Delta:
        """The difference in the stream that a reader at a stage hears."""
        asked, sending = list(places), set(self.places)
        total = torch.stack([self._written(hook, asked) for hook in self._heard(stage)]).sum(0)
        speaks = torch.tensor([place in sending for place in asked], device=total.device)
        return torch.where(speaks[:, None], total, 0.0)

    @cached_property
    def places(self) -> list[int]:
        """The senders' places."""
        row = self.base.row
        return [row.rows.place[column] for column in (row.columns if self.cell.pos is None else self.cell.pos)]

    def _heard(self, stage: int) -> list[str]:
        return [hook for hook in self.cell.hooks if site_of(self.base.model, hook).stage <= stage]

    def _said(self, hook: str, places: list[int]) -> Tensor:
        """The source run's output minus the base run's."""
        said, held = (upcast(run.acts[hook][0, places]) for run in (self.source, self.base))
        return said - held if self.cell.head is None else (said - held)[:, list(self.cell.head)]

    def _written(self, hook: str, places: list[int]) -> Delta:
        """What that adds to the stream."""
        said = self._said(hook, places)
        if not hook.endswith("hook_z"):
            return said
        W_O = self.base.model.blocks[self.base.model.hook(hook).layer()].attn.W_O
        W_O = upcast(W_O if self.cell.head is None else W_O[list(self.cell.head)])
        return einsum(said, W_O, "place head d_head, head d_head d_model -> place d_model")


class Input:
    """A receiver's input as the value of an edit, made when the run gets there: all of them would not fit memory.

    `sweep_key` tells one from another where a sweep's file is compared with its cells.
    """

    def __init__(self, receiver: Receiver, message: Message, places: Sequence[int]):
        self.receiver, self.message, self.places = receiver, message, list(places)
        cell = message.cell
        self.sweep_key = f"{cell.hooks} {cell.pos} {cell.head} → {receiver.name} {self.places}"

    def __call__(self, part: Tensor) -> Tensor:
        delta = self.message.delta(self.receiver.stage, self.places)
        return self.receiver.input(self.message.base, self.places, delta).to(part)


def edits_of(message: Message, receivers: Sequence[Receiver], shown: set[int]) -> tuple[Edit, ...]:
    """One cell: the inputs of all receivers that the message reaches; `shown` are the positions that are measured."""
    cell, row = message.cell, message.base.row
    heard = {r: where for r in receivers if (where := message.columns(r.stage))}
    frozen = {r: where for r, where in heard.items() if r.kind != "logits"}
    if len({r.stage for r in frozen}) > 1:  # one may change what another reads, at later positions too
        start = min(min(where) for where in frozen.values()) if message.base.is_causal else 0
        frozen = {r: [column for column in row.columns if column >= start] for r in frozen}
    made = []
    for receiver, where in (heard | frozen).items():
        at = [column for column in where if receiver.kind != "logits" or column in shown]
        if at:
            value = Input(receiver, message, [row.rows.place[column] for column in at])
            how = "add" if receiver.kind == "logits" else "replace"
            made.append(Edit(receiver.hook, value, how, at, receiver.head))
    return tuple(made) or (Edit(cell.hooks[0], 0.0, "add", cell.pos, cell.head),)


# ---- what was asked for


def grid_of(model: Any, row: Row, n_pos: int, senders: Any, sweep: Sweep | None, at: Any) -> Grid:
    """The senders as cells; raises `LensError` for one that is not there."""
    if isinstance(senders, str) and senders in KINDS:
        hook, axes = KINDS[senders]
        return Reach(hook, axes if sweep is None else sweep, at).grid(model, row, n_pos)
    given = [senders] if isinstance(senders, str) else list(senders)
    if not given:
        raise LensError("no sender; expected one or more")
    axes = ("sender",) if sweep is None else (sweep,) if isinstance(sweep, str) else tuple(sweep)
    if axes[:1] != ("sender",):
        raise LensError(f"sweep={sweep!r} with a list of senders; expected ('sender', …)")
    cells, names, grid = [], [], None
    for i, each in enumerate(given):
        layer, head, kind = parsed(each, "sender", SENDERS + f"; or one of {', '.join(KINDS)} for all")
        kind = kind or "head"
        if kind not in KINDS or (kind == "head") != (head is not None):
            raise LensError(f"sender {each!r}; expected {SENDERS}")
        check_there(model, each, "sender", layer, head, model.cfg.n_heads)
        hook = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}.get(kind)
        hook = "hook_embed" if hook is None else f"blocks.{layer}.{hook}"
        grid = Reach(hook, axes[1:], at, heads=head).grid(model, row, n_pos)
        cells += [replace(cell, index=(i, *cell.index)) for cell in grid.cells]
        names.append(spelled(each))
    assert grid is not None
    labels = {"sender": tuple(names), **grid.labels}
    return Grid(tuple(cells), ("sender", *grid.axes), (len(given), *grid.shape), labels)


def receivers_of(model: Any, given: Any) -> list[Receiver]:
    """The receivers that are meant. Raises `LensError` for none, for what is none, and for one that is not there."""
    if not all(type(block) is Block and type(block.attn) is Attention for block in model.blocks):
        raise LensError("path patching knows what llava_lens's own blocks read; this model's are of another class")
    found = []
    for each in [given] if isinstance(given, str) else list(given):
        layer, head, kind = parsed(each, "receiver", RECEIVERS)
        if kind not in ("q", "k", "v", "mlp", "logits") or (head is not None) != (kind in ("q", "k", "v")):
            raise LensError(f"receiver {each!r}; expected {RECEIVERS}")
        cfg = model.cfg
        check_there(model, each, "receiver", layer, head, cfg.n_heads if kind == "q" else cfg.n_key_value_heads)
        found.append(Receiver(model, cfg.n_layers - 1 if layer is None else layer, kind, head))
    if not found:
        raise LensError(f"no receiver; expected {RECEIVERS}")
    return sorted(dict.fromkeys(found), key=lambda receiver: receiver.stage)


def spelled(given: Any) -> str:
    """A component's name, from its name or from a tuple of its numbers and its kind.

    >>> spelled((3, 5, "q")), spelled((4, "mlp")), spelled("logits")
    ('L3H5 q', 'L4 mlp', 'logits')
    """
    if isinstance(given, tuple | list):
        numbers = "".join(f"{letter}{each}" for letter, each in zip("LH", given, strict=False) if isinstance(each, int))
        return " ".join([numbers, *(str(each) for each in given[numbers.count("L") + numbers.count("H") :])])
    return str(given)


def parsed(given: Any, what: str, expected: str) -> tuple[int | None, int | None, str | None]:
    """Layer, head and kind of a component, None where it names none. Raises `LensError` for what is no component."""
    name = spelled(given)
    match = NODE.fullmatch(name)
    if match is None:
        raise LensError(f"{what} {given!r}{nearest(name, [*KINDS, 'logits'])}; expected {expected}")
    if match[1] is None:
        return None, None, name
    return int(match[1]), None if match[2] is None else int(match[2]), match[3]


def check_there(model: Any, given: Any, what: str, layer: int | None, head: int | None, n_heads: int) -> None:
    """Raise `LensError` for a layer or a head that the model does not have."""
    cfg = model.cfg
    if layer is not None and layer >= cfg.n_layers:
        raise LensError(f"{what} {given!r}: layer {layer}; expected 0 … {cfg.n_layers - 1}")
    if head is not None and head >= n_heads:
        share = cfg.n_heads // n_heads
        why = f": keys and values are numbered by their own heads, each shared by {share} of the {cfg.n_heads} heads"
        raise LensError(f"{what} {given!r}: head {head}; expected 0 … {n_heads - 1}{why if share > 1 else ''}")


def check_order(model: Any, grid: Grid, receivers: Sequence[Receiver]) -> None:
    """Raise `LensError` where no sender can reach a receiver."""
    first = min(site_of(model, hook).stage for hook in grid.hooks)
    if first > max(receiver.stage for receiver in receivers):
        raise LensError(f"no sender comes before {', '.join(r.name for r in receivers)}: nothing could change")


def refuse_hooks(model: Any, fwd_hooks: Sequence[tuple[Any, Any]], receivers: Sequence[Receiver]) -> None:
    """Raise `LensError` where a hook of the user sits on the way from senders to receivers, which is no run then."""
    held = [name for wanted, _ in fwd_hooks for name in model.hook_names(wanted)]
    held += [name for name, hook in model.hook_dict.items() if hook.live]
    ways = {f"blocks.{layer}.{name}" for layer in range(model.cfg.n_layers) for name in BETWEEN}
    for receiver in receivers:
        ways.add(receiver.hook)
        if receiver.head is not None:
            names = ("hook_attn_in", "ln1.hook_scale", "ln1.hook_normalized")
            ways |= {f"blocks.{receiver.layer}.{name}" for name in names}
    found = next((name for name in held if name in ways), None)
    if found is not None:
        raise LensError(f"a hook on {found!r}, which lies between senders and receivers; remove it for path patching")
