"""Gradients of a metric at the activations of one row's run, and the first-order effects of a grid's cells.

Unusual: every activation asked for is a node of its own on the graph, so its gradient is that of this very place (the
branch, the key/value head, the value that only listeners get). Weights gather no gradient, whether they want one or
not, and one graph serves many backward passes, each of which can drop what flows back through one block.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens import kernels
from llava_lens.analysis.interventions.grid import Grid
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.rotary import Angles
from llava_lens.sweep.attach import attached
from llava_lens.sweep.base import END, Base
from llava_lens.sweep.edits import FRONT, Places, hooks_of
from llava_lens.sweep.engine import MAX_BYTES
from llava_lens.sweep.metrics import Bound, Metric, scalar
from llava_lens.sweep.setting import FullBase, Setting
from llava_lens.sweep.sites import site_of

ADDED = ("hook_attn_out", "hook_mlp_out")
"""What a block adds to the stream."""


@contextmanager
def on_graph() -> Iterator[None]:
    """Record the graph, whatever the caller has switched off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def base_of(setting: Setting, direction: str) -> tuple[Base, Base]:
    """The run that is changed, and the one that the changes come from."""
    clean, corrupt = setting.clean, setting.corrupt
    return (corrupt, clean) if direction == "denoise" else (clean, corrupt)


class Slope(NamedTuple):
    """A metric on one run, in the units of the result, and its gradient at the logits of the places it reads."""

    value: float
    at_logits: Float[Tensor, "read d_vocab"]


def slope_of(setting: Setting, base: Base) -> Slope:
    """The metric's slope on a run, before any long work.

    Raises `LensError` for a function of the user's that no gradient passes through, a gradient that is not finite, and
    `kl` on the clean run, where its first order is zero whatever is changed.
    """
    bound = setting.bound
    if isinstance(bound.metric, Metric) and bound.metric.kind == "kl" and base is setting.clean:
        raise LensError(
            "kl is smallest on the clean run: its gradient there is zero, so a first order says nothing; "
            "use direction='denoise' or another metric"
        )
    with on_graph():
        logits = base.logits(bound.places(len(base.row.columns))).clone().requires_grad_()
        value = _measured(bound, logits)
        (gradient,) = torch.autograd.grad(value, logits, allow_unused=True)
    if gradient is None:
        raise LensError(f"the metric {bound.name!r} does not depend on the logits that it is shown")
    if not bool(torch.isfinite(gradient).all()):
        raise LensError(f"the gradient of the metric {bound.name!r} holds values that are not finite")
    return Slope(float(value.detach()), gradient)


def _measured(bound: Bound, logits: Float[Tensor, "read d_vocab"]) -> Tensor:
    """The metric of one run, on the graph."""
    if isinstance(bound.metric, Metric):
        return bound(logits[None])[0]
    if bound.whole is not None:  # it reads the end alone, at its place behind the others
        logits = torch.cat((torch.zeros_like(bound.whole[0, :-1]), logits[-1:]))
    with warnings.catch_warnings():  # torch warns of float(), which is an error below
        warnings.filterwarnings("ignore", message="Converting a tensor with requires_grad")
        value = bound.metric(logits[None])
        scalar(value, bound.name)
    if not isinstance(value, Tensor) or not value.requires_grad:
        got = "a tensor without a graph" if isinstance(value, Tensor) else type(value).__name__
        raise LensError(
            f"the metric {bound.name!r} returned {got}, through which no gradient passes; "
            "expected a tensor computed from the logits (no float(), .item(), .detach(), argmax)"
        )
    return value.reshape(())


class Graph:
    """A run of a base on the autograd graph, with the activations called `names` as nodes.

    `places` are those whose logits are read. `blocks` are prefixes of hook names (`"blocks.3."`): what these blocks add
    to the stream can be dropped in a backward pass. Where everything asked for sits in the decoder, the run starts at
    the first block that holds some of it.
    """

    def __init__(self, base: Base, names: Iterable[str], places: Sequence[int], blocks: Sequence[str] = ()):
        self.base, self.places, self.dropped = base, list(places), ""
        self.names = tuple(dict.fromkeys(names))
        self.nodes: dict[str, Tensor] = {}
        first = self._first()
        gates = {block + added: block for block in blocks for added in ADDED}
        if first >= 0 and not isinstance(base, FullBase):  # what lies before it does not run
            gates = {n: b for n, b in gates.items() if not n.startswith(FRONT) and _layer(base, n) >= first}
        todo = {name: self._keeper(name, gates.get(name)) for name in dict.fromkeys((*self.names, *gates))}
        with on_graph():
            self.logits = self._full(base, todo) if isinstance(base, FullBase) else self._short(todo, first)

    def _first(self) -> int:
        """The first block of the decoder that is run, -1 where the run starts before them."""
        if any(site_of(self.base.model, name).room != "decoder" for name in self.names):
            return -1
        return min(_layer(self.base, name) for name in self.names)

    def _keeper(self, name: str, block: str | None) -> Callable[..., Tensor]:
        def keep(act: Tensor, hook: Any) -> Tensor:
            if name in self.names:
                self.nodes[name] = act = act if act.requires_grad else act.requires_grad_()
            act = act.view_as(act)  # another tensor: what only listeners get lies on the path from here on
            if block is not None and act.requires_grad:
                act.register_hook(lambda grad: torch.zeros_like(grad) if self.dropped == block else None)
            return act

        return keep

    def _short(self, todo: Mapping[str, Callable[..., Tensor]], first: int) -> Tensor:
        base, model = self.base, self.base.model
        angles = Angles(*(part.clone() for part in base.angles))
        late = any(name == "hook_logits" or name.startswith("ln_final.") for name in self.names)
        with attached(model, todo):
            inputs = base.row.compact.check(model.cfg)
            x = model.embed_inputs(inputs) if first < 0 else self._entering(first)
            for block in model.blocks[max(first, 0) :]:
                x = block(x, base.mask, angles)
            return model.read_out(x)[:, self.places] if late else model.read_out(x[:, self.places])

    def _entering(self, layer: int) -> Tensor:
        name = END if layer == self.base.model.cfg.n_layers else f"blocks.{layer}.hook_resid_pre"
        return self.base.acts[name].clone()

    def _full(self, base: FullBase, todo: Mapping[str, Callable[..., Tensor]]) -> Tensor:
        hooks = [*base.fwd_hooks, *hooks_of(base.model, base.edits, base.row.n_columns), *todo.items()]
        with base.model.hooks(fwd_hooks=hooks):
            logits = base.model(base.row.inputs)
        return logits[:, [base.row.columns[place] for place in self.places]]

    def backward(self, slope: Slope, drop: str = "", again: bool = False) -> dict[str, Tensor]:
        """The metric's gradient at every node, without padding; nothing flows back through the block `drop`.

        `again` keeps the graph for another pass.
        """
        if not self.logits.requires_grad:
            return {name: torch.zeros_like(self.base.acts[name]) for name in self.names}
        self.dropped = drop
        nodes = [self.nodes[name] for name in self.names]
        at_logits = slope.at_logits[None].to(self.logits)
        with on_graph():
            found = torch.autograd.grad(self.logits, nodes, at_logits, retain_graph=again, allow_unused=True)
        grads = [torch.zeros_like(node) if g is None else g for g, node in zip(found, nodes, strict=True)]
        compact = self.base._compact if isinstance(self.base, FullBase) else lambda _, grad: grad
        return {name: compact(name, grad) for name, grad in zip(self.names, grads, strict=True)}


def _layer(base: Base, name: str) -> int:
    """The block of a hook of the decoder, the number of blocks for what comes behind them."""
    return base.model.hook(name).layer() if "blocks." in name else base.model.cfg.n_layers


def change(source: Base, base: Base, name: str) -> Tensor:
    """What one run holds at a hook minus what the other does; zero where both are the same, infinite scores too."""
    ours, theirs = upcast(source.acts[name]), upcast(base.acts[name])
    return torch.where(ours == theirs, 0.0, ours - theirs)


# ---- exactly through the softmax


def beside(hook: str, name: str) -> str:
    """Another hook of the same attention."""
    return hook.rpartition(".")[0] + "." + name


def rotated_name(model: Any, hook: str, name: str) -> str:
    """Queries or keys as they enter the scores: rotated in the decoder."""
    rotated = beside(hook, f"hook_rot_{name}")
    return rotated if rotated in model.hook_dict else beside(hook, f"hook_{name}")


def attention_names(model: Any, grid: Grid) -> list[str]:
    """What the attention of the swept layers is made of."""
    each = [(rotated_name(model, h, "q"), rotated_name(model, h, "k"), beside(h, "hook_v"), beside(h, "hook_z"))
            for h in grid.hooks]  # fmt: skip
    return [name for names in each for name in names]


def through_softmax(
    base: Base, source: Base, grid: Grid, grads: dict[str, Tensor], max_bytes: int = MAX_BYTES
) -> Float[Tensor, " cell"]:
    """Effects of cells at queries or keys: `Σ ∂metric/∂pattern · (pattern' − pattern)`, with the softmax exact.

    `grads` are the gradients at `hook_z`. Raises `LensError` where a hook of the user's changes scores, pattern or
    mixture, so that the softmax is not what was run.
    """
    total = torch.zeros(len(grid.cells), dtype=torch.float64)
    numbered = list(enumerate(grid.cells))
    for hook in grid.hooks:
        heads = Softmax.of(base, source, hook, grads[beside(hook, "hook_z")], grid.cells[0].image, max_bytes)
        here = [(i, cell) for i, cell in numbered if hook in cell.hooks]
        here.sort(key=lambda pair: pair[1].neuron or ())
        for neuron, group in groupby(here, key=lambda pair: pair[1].neuron):
            cells = list(group)
            where = list(dict.fromkeys(cell.pos for _, cell in cells))
            effects = heads.effects(neuron, [heads.mask(pos, base) for pos in where]).cpu()
            for i, cell in cells:
                mine = effects[where.index(cell.pos)]
                total[i] += mine.sum() if cell.head is None else mine[list(cell.head)].sum()
    return total


@dataclass(frozen=True)
class Softmax:
    """One layer's attention on a base run, `[pos, head, d_head]` each, and the queries or keys that are put into it.

    `at_z` is the metric's gradient at the mixtures. All in float64. `seen` says what each place sees; None: everything,
    in the tower.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    at_z: Tensor
    before: Tensor
    moved: Tensor
    side: str
    angles: Angles | None
    seen: Tensor | None
    scale: float
    max_bytes: int

    @classmethod
    def of(cls, base: Base, source: Base, hook: str, at_z: Tensor, image: int, max_bytes: int) -> Softmax:
        """The attention that `hook` belongs to. Raises `LensError` where its mixtures are not what was recorded."""
        model, front = base.model, hook.startswith(FRONT)
        sample = image if front else 0
        names = [rotated_name(model, hook, "q"), rotated_name(model, hook, "k"), beside(hook, "hook_v"), hook]
        q, k, v, before = (base.acts[name][sample].double() for name in names)
        moved, side = source.acts[hook][sample].double(), hook[-1]
        turned = hook != rotated_name(model, hook, side)
        angles = Angles(*(part.double() for part in base.angles)) if turned else None
        scale = model.get_submodule(hook.rpartition(".")[0]).scale
        seen = None if front else base.visible(0)
        made = cls(q, k, v, at_z[sample].double(), before, moved, side, angles, seen, scale, max_bytes)
        z = base.acts[beside(hook, "hook_z")][sample]
        miss = float((made.mixtures() - z.double()).abs().max())
        if miss > torch.finfo(z.dtype).eps ** 0.5 * max(1.0, float(z.abs().max())):
            raise LensError(
                f"the attention around {hook!r} is not the softmax of its queries and keys (its mixtures miss by "
                f"{miss:.2g}): a hook of yours changes it; leave out correction='qk'"
            )
        return made

    def mask(self, pos: Places | None, base: Base) -> Tensor:
        """Which places a cell takes, ones and zeros."""
        mask = self.k.new_zeros(len(self.k))
        front = self.seen is None
        mask[slice(None) if pos is None else list(pos) if front else base.row.rows.local(pos)[1]] = 1
        return mask

    def patched(self, neuron: Places | None) -> Tensor:
        """Queries or keys as they would enter the scores if every place were patched (in some of their entries)."""
        new = self.moved if neuron is None else self.before.clone()
        if neuron is not None:
            new[..., list(neuron)] = self.moved[..., list(neuron)]
        if self.angles is None:
            return new
        return kernels.rotate(new.transpose(0, 1)[None], *self.angles)[0].transpose(0, 1)

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """Key/value head, its query heads, and some queries: as many as memory holds."""
        share, n = self.q.shape[1] // self.k.shape[1], len(self.k)
        rows = max(1, self.max_bytes // (8 * 10 * share * n))
        for kv in range(self.k.shape[1]):
            for start in range(0, n, rows):
                yield kv, slice(kv * share, (kv + 1) * share), slice(start, start + rows)

    def scores(self, q: Tensor, k: Tensor, kv: int, heads: slice, rows: slice) -> Float[Tensor, "query head key"]:
        """Scores of some queries; what they may not see is -inf."""
        scores = q[rows, heads] @ k[:, kv].T * self.scale
        if self.seen is not None:
            scores = scores.masked_fill(~self.seen[rows, None], -torch.inf)
        return scores

    def mixtures(self) -> Tensor:
        """What the heads mix, `[pos, head, d_head]`."""
        z = torch.empty_like(self.at_z)
        for kv, heads, rows in self.blocks():
            z[rows, heads] = self.scores(self.q, self.k, kv, heads, rows).softmax(-1) @ self.v[:, kv]
        return z

    def effects(self, neuron: Places | None, masks: Sequence[Tensor]) -> Float[Tensor, "where head"]:
        """What patching each set of places does, by head (key/value heads for keys)."""
        new, where = self.patched(neuron), torch.stack(list(masks))
        out = where.new_zeros(len(where), self.before.shape[1])
        for kv, heads, rows in self.blocks():
            at_pattern = self.at_z[rows, heads] @ self.v[:, kv].T
            old = self.scores(self.q, self.k, kv, heads, rows)
            if self.side == "q":
                pattern = self.scores(new, self.k, kv, heads, rows).softmax(-1) - old.softmax(-1)
                out[:, heads] += where[:, rows] @ (pattern * at_pattern).sum(-1)
            else:
                scores = self.scores(self.q, new, kv, heads, rows)
                out[:, kv] += self._by_keys(old, scores, at_pattern, where)
        return out

    def _by_keys(self, old: Tensor, new: Tensor, at_pattern: Tensor, where: Tensor) -> Float[Tensor, " where"]:
        """Keys in a set score as in `new`, the others as in `old`: only the sums that make up the softmax change."""
        top = old.amax(-1, keepdim=True)
        before, after = (old - top).exp(), (new - top).clamp(max=600.0).exp()
        mean = (at_pattern * before).sum(-1, keepdim=True) / before.sum(-1, keepdim=True)
        lever = (at_pattern - mean) * (after - before)
        out = where.new_zeros(len(where))
        step = max(1, self.max_bytes // (8 * 4 * max(1, before[..., 0].numel())))
        for start in range(0, len(where), step):
            some = where[start : start + step].T
            whole = before @ (1 - some) + after @ some
            out[start : start + step] = ((lever @ some) / whole).sum((0, 1))
        return out
