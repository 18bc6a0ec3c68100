"""Recipes: values that a forward did not form, kept as the tensors and facts that they follow from.

Unusual: a recipe is data, not a closure, so it is cut, moved, sliced and saved without being formed; it notices when
one of its tensors or weights was edited in place after the run, and then raises instead of showing a stale value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from llava_lens import kernels
from llava_lens.errors import LensError

Index = Sequence[int] | None
"""Places on one axis, None for all of them."""
ROWS_AT_ONCE = 64
"""Up to so many queries are formed over all keys at once; what a pattern is divided by is computed in such chunks."""


@dataclass(eq=False)
class Derived:
    """A value of some kind, its sources (activations) and weights, and what else it takes to form it.

    Sources have the axes of their hooks. `dtype` is what the value is turned into; without `batched` the batch axis was
    taken off. `broken` says why it cannot be formed any more.
    """

    kind: str
    sources: dict[str, Tensor]
    weights: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    batched: bool = True
    broken: str | None = None
    versions: dict[str, int | None] = field(default_factory=dict)
    divisors: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        for role, tensor in (*self.sources.items(), *self.weights.items()):
            self.versions.setdefault(role, version_of(tensor))

    @property
    def shape(self) -> torch.Size:
        """The shape that the value would have."""
        full = KINDS[self.kind].shape(self._whole())
        return torch.Size(full if self.batched else full[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that the value would take."""
        given = next(iter(self.sources.values())).dtype
        wide = torch.promote_types(given, torch.float32) if self.kind == "scale" else given
        return math.prod(self.shape) * (self.dtype or wide).itemsize

    def form(self, name: str = "this entry") -> Tensor:
        """The value, in memory of its own; raises `LensError` where a source or weight was edited since the run."""
        return self.part(name=name)

    @torch.inference_mode(False)
    @torch.no_grad()
    def part(
        self,
        rows: Index = None,
        heads: Index = None,
        positions: Index = None,
        keys: Index = None,
        name: str = "this entry",
    ) -> Tensor:
        """Some batch rows, heads, positions (queries) and keys of the value, without forming the rest.

        Raises `LensError` where a source or weight was edited since the run.
        """
        self.check(name)
        out = KINDS[self.kind].form(self._whole(), Part(rows, heads, positions, keys))
        return out.to(self.dtype) if self.batched else out[0].to(self.dtype)

    def check(self, name: str = "this entry") -> None:
        """Raise `LensError` where the value of the run can no longer be formed."""
        why = self.why_broken()
        if why is not None:
            raise LensError(f"{name!r} is derived from other tensors when it is asked for, and {why}")

    def why_broken(self) -> str | None:
        """Which of the tensors changed since the run, None for none."""
        if self.broken is None:
            for role, tensor in (*self.sources.items(), *self.weights.items()):
                if version_of(tensor) != self.versions[role]:
                    what = f"the model's {role} was" if role in self.weights else f"its {role} was"
                    return f"{what} edited in place after the run; ask for it before the edit, or run again"
        return self.broken

    def map(self, fn: Callable[[Tensor], Tensor], **changes: Any) -> Derived:
        """The recipe with every source replaced; the weights stay, and so does what went wrong before."""
        why, sources = self.why_broken(), {role: fn(tensor) for role, tensor in self.sources.items()}
        versions = {role: self.versions[role] for role in self.weights}
        return replace(self, sources=sources, broken=why, versions=versions, divisors=None, **changes)

    def cut(self, cut: Callable[[Tensor, int], Tensor], rows: Sequence[int]) -> Derived:
        """The recipe of some positions: `cut` takes the axis of a source that they lie on, `rows` are their numbers."""
        axes = KINDS[self.kind].row_axes
        sources = {role: cut(t, axes[role]) if role in axes else t for role, t in self.sources.items()}
        facts = self.facts
        if "rows" in facts:
            before = range(facts["length"]) if facts["rows"] is None else facts["rows"]
            facts = facts | {"rows": [before[row] for row in rows]}
        versions = {role: self.versions[role] for role in self.weights}
        return replace(self, sources=sources, facts=facts, versions=versions, divisors=None)

    def _whole(self) -> Derived:
        if self.batched:
            return self
        return replace(self, sources={role: t[None] for role, t in self.sources.items()}, batched=True, versions={})


class Part(NamedTuple):
    """Which part of a value is formed, None for all along an axis."""

    rows: Index = None
    heads: Index = None
    positions: Index = None
    keys: Index = None


class Kind(NamedTuple):
    """How a kind of value is formed, its shape, and the axis of each source that its positions lie on."""

    form: Callable[[Derived, Part], Tensor]
    shape: Callable[[Derived], tuple[int, ...]]
    row_axes: dict[str, int]


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor's memory was edited in place; None for one of inference mode, which does not count."""
    return None if tensor.is_inference() else tensor._version


def identity(act: Tensor) -> tuple[Any, ...]:
    """What two live tensors share exactly if they are one: device, address, shape, strides and dtype."""
    return act.device, act.data_ptr(), tuple(act.shape), act.stride(), act.dtype


def pick(tensor: Tensor, axis: int, index: Index) -> Tensor:
    """Places of one axis; the tensor itself for None."""
    return tensor if index is None else tensor.index_select(axis, torch.tensor(index, device=tensor.device))


# ---- recipes


def attention(
    kind: str,
    q: Float[Tensor, "batch head query d_head"],
    k: Float[Tensor, "batch kv_head key d_head"],
    scale: float,
    allowed: Bool[Tensor, "#batch 1 query key"] | None,
    causal: bool,
    uniform: bool = False,
    contiguous: bool = False,
) -> Derived:
    """Of `"scores"` or a `"pattern"`; with `uniform` a query that sees nothing looks at every key alike.

    `contiguous` says that the forward multiplied with keys laid out anew, which may round otherwise.
    """
    sources = {"q": q.detach().transpose(1, 2), "k": k.detach().transpose(1, 2)}
    if allowed is not None:
        sources["allowed"] = allowed.expand(len(q), -1, -1, -1)
    how = {"scale": scale, "causal": causal, "uniform": uniform, "contiguous": contiguous}
    return Derived(kind, sources, facts=how | {"rows": None, "length": q.shape[2]})


def result(z: Float[Tensor, "batch pos head d_head"], weight: Float[Tensor, "d_model width"]) -> Derived:
    """Of each head's share of the attention's output."""
    return Derived("result", {"z": z.detach()}, {"weight": weight.detach()})


def norm(kind: str, x: Float[Tensor, "batch pos d_model"], eps: float, centered: bool) -> Derived:
    """Of what a norm divides by (`"scale"`), or of the stream after it (`"normalized"`); `centered` in a LayerNorm."""
    return Derived(kind, {"stream": x.detach()}, facts={"eps": eps, "centered": centered})


def linear(
    x: Float[Tensor, "batch pos *width"], weight: Float[Tensor, "d_model width"], bias: Tensor | None
) -> Derived:
    """Of a matrix product, `x Wᵀ + b`; several trailing axes of `x` count as one."""
    weights = {"weight": weight.detach()} | ({} if bias is None else {"bias": bias.detach()})
    return Derived("linear", {"input": x.detach()}, weights)


# ---- forming them


def _scores(recipe: Derived, part: Part) -> Float[Tensor, "batch head query key"]:
    q, k = pick(recipe.sources["q"], 0, part.rows), pick(recipe.sources["k"], 0, part.rows)
    share, uniform = q.shape[2] // k.shape[2], recipe.facts["uniform"]
    if part.heads is not None:
        q, k = pick(q, 2, part.heads), pick(k, 2, [head // share for head in part.heads])
    q = pick(q, 1, part.positions)
    allowed, causal = _visible(recipe, part)
    if part.keys is None:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        k = k.contiguous() if recipe.facts["contiguous"] else k
        return kernels.attention_scores(q, k, recipe.facts["scale"], allowed, causal, uniform)
    q, k = q.transpose(1, 2), pick(k, 1, part.keys).transpose(1, 2)
    seen = None if allowed is None else pick(allowed, -1, part.keys)
    scores = kernels.attention_scores(q, k, recipe.facts["scale"], seen, False)
    if uniform and allowed is not None:
        scores = scores.masked_fill(~allowed.any(-1, keepdim=True), torch.finfo(scores.dtype).min)
    return scores


def _visible(recipe: Derived, part: Part) -> tuple[Bool[Tensor, "#batch 1 query key"] | None, bool]:
    """What the queries of a part may see, and whether it is left to the kernel to make that causal."""
    allowed, facts = recipe.sources.get("allowed"), recipe.facts
    if allowed is not None:
        return pick(pick(allowed, 0, part.rows), 2, part.positions), False
    if not facts["causal"] or (facts["rows"] is None and part.positions is None and part.keys is None):
        return None, facts["causal"]
    rows = range(facts["length"]) if facts["rows"] is None else facts["rows"]
    rows = rows if part.positions is None else [rows[position] for position in part.positions]
    keys = recipe.sources["k"].shape[1]
    device = recipe.sources["k"].device
    last = torch.tensor(list(rows), device=device)[:, None] + (keys - facts["length"])
    return (torch.arange(keys, device=device) <= last)[None, None], False


def _pattern(recipe: Derived, part: Part) -> Float[Tensor, "batch head query key"]:
    n_rows = recipe.sources["q"].shape[1] if part.positions is None else len(part.positions)
    if part.keys is None or n_rows <= ROWS_AT_ONCE:
        return pick(kernels.attention_pattern(_scores(recipe, part._replace(keys=None))), -1, part.keys)
    scores = _scores(recipe, part)
    recipe.divisors = _divisors(recipe) if recipe.divisors is None else recipe.divisors
    peak, total = (pick(pick(pick(t, 0, part.rows), 1, part.heads), 2, part.positions) for t in recipe.divisors)
    weights = (kernels.upcast(scores) - peak).exp_().div_(total)
    return weights.to(scores.dtype)


def _divisors(recipe: Derived) -> tuple[Tensor, Tensor]:
    """Each query's largest score and the sum of exponentials behind it, `[batch, head, query, 1]`.

    Together they are the log of the sum, in a form that is exact also where all scores are the lowest number there is.
    A query that sees nothing gets 0 and infinity, so that its weights are zero.
    """
    found = []
    for start in range(0, recipe.sources["q"].shape[1], ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, recipe.sources["q"].shape[1])
        scores = kernels.upcast(_scores(recipe, Part(positions=range(start, stop))))
        peak = scores.amax(-1, keepdim=True)
        blind = peak == -torch.inf
        peak = peak.masked_fill(blind, 0.0)
        total = (scores - peak).exp_().sum(-1, keepdim=True).masked_fill(blind, torch.inf)
        found.append((peak, total))
    peaks, totals = zip(*found, strict=True)
    return torch.cat(peaks, 2), torch.cat(totals, 2)


def _result(recipe: Derived, part: Part) -> Float[Tensor, "batch pos head d_model"]:
    z = pick(pick(pick(recipe.sources["z"], 0, part.rows), 1, part.positions), 2, part.heads)
    weight = recipe.weights["weight"].to(z.device)
    W_O = rearrange(weight, "d_model (head d_head) -> head d_head d_model", d_head=z.shape[-1])
    return per_head(z, pick(W_O, 0, part.heads))


def per_head(
    z: Float[Tensor, "batch pos head d_head"], W_O: Float[Tensor, "head d_head d_model"]
) -> Float[Tensor, "batch pos head d_model"]:
    """Each head's mixture through its output matrix."""
    return einsum(z, W_O, "batch pos head d_head, head d_head d_model -> batch pos head d_model")


def _norm_parts(recipe: Derived, part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the stream, and the two halves that its norm is made of."""
    x = pick(pick(recipe.sources["stream"], 0, part.rows), 1, part.positions)
    parts = kernels.layer_norm_parts if recipe.facts["centered"] else kernels.rms_norm_parts
    return x, *parts(x, recipe.facts["eps"])


def _normalized(recipe: Derived, part: Part) -> Float[Tensor, "batch pos d_model"]:
    x, first, scale = _norm_parts(recipe, part)
    return (first / scale if recipe.facts["centered"] else first).to(x.dtype)


def _scale(recipe: Derived, part: Part) -> Float[Tensor, "batch pos 1"]:
    _, _, scale = _norm_parts(recipe, part)
    return scale if recipe.facts["centered"] else scale.sqrt()


def _linear(recipe: Derived, part: Part) -> Float[Tensor, "batch pos d_model"]:
    x = pick(pick(recipe.sources["input"], 0, part.rows), 1, part.positions).flatten(2)
    weights = {role: weight.to(x.device) for role, weight in recipe.weights.items()}
    return F.linear(x, weights["weight"], weights.get("bias"))


def _of_scores(recipe: Derived) -> tuple[int, ...]:
    q, k = recipe.sources["q"], recipe.sources["k"]
    return len(q), q.shape[2], q.shape[1], k.shape[1]


KINDS = {
    "scores": Kind(_scores, _of_scores, {"q": 1, "allowed": 2}),
    "pattern": Kind(_pattern, _of_scores, {"q": 1, "allowed": 2}),
    "result": Kind(_result, lambda r: (*r.sources["z"].shape[:3], r.weights["weight"].shape[0]), {"z": 1}),
    "normalized": Kind(_normalized, lambda r: tuple(r.sources["stream"].shape), {"stream": 1}),
    "scale": Kind(_scale, lambda r: (*r.sources["stream"].shape[:2], 1), {"stream": 1}),
    "linear": Kind(_linear, lambda r: (*r.sources["input"].shape[:2], r.weights["weight"].shape[0]), {"input": 1}),
}
"""Every kind of value that is kept as a recipe."""
