"""Gradients of the score at pixels or image tokens, taken once or along the way from a picture without content.

Unusual: attributions along the way must add up to what the whole picture changes; how far they miss is the closure.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from llava_lens.analysis.interventions.gradients import on_graph
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.maps.case import MAX_BYTES, Case
from llava_lens.maps.masking import masked_pictures, masked_streams

Places = Float[Tensor, "run ..."]
ALL_GRAPHS = 16
"""A batch of runs on the graph may take this many times what one without it may: its activations are its purpose."""


def gradient(case: Case, *, at: str = "pixels") -> Float[Tensor, " patch"]:
    """Gradient × input, summed over each patch: over its pixel values, or over its image token's entries."""
    x, _ = ends(case, at)
    grads, _ = slopes(case, at, upcast(x), upcast(x), torch.ones(1), MAX_BYTES)
    case.count(forward=1, backward=1)
    return by_patch(case, at, grads * upcast(x))


def integrated_gradients(
    case: Case, *, at: str = "pixels", of: str = "score", steps: int = 64, max_bytes: int = MAX_BYTES
) -> Float[Tensor, " patch"]:
    """`(x − x') · ∫ ∇f(x' + α (x − x')) dα`, summed over each patch (arXiv 1703.01365, eq. 1), in `steps` midpoints.

    `x'` is the picture masked everywhere: in its mean colour, or with the mean of its image tokens. `f` is the score
    explained, or with `of="prob"` the answer's probability, as in the paper. `closure` is how far the sum misses
    `f(x) − f(x')`, and the notes give both.
    """
    if steps < 1:
        raise LensError(f"steps={steps}; expected 1 or more")
    if of not in ("score", "prob"):
        raise LensError(f"of={of!r}; expected 'score' or 'prob'")
    case.counted = "probability" if of == "prob" else None
    x, start = (upcast(end) for end in ends(case, at))
    alphas = (torch.arange(steps) + 0.5) / steps
    mean, _ = slopes(case, at, start, x, alphas, max_bytes, of)
    found = by_patch(case, at, (x - start) * mean)
    run, dtype = runner(case, at), ends(case, at)[0].dtype
    with torch.no_grad():
        change = getattr(case.whole, of)[0] - getattr(case.measure(run(start.to(dtype))), of)[0]
    case.count(forward=steps + 1, backward=steps)
    case.notes |= {"sum": float(found.sum()), "change": float(change)}
    case.closure = abs(float(found.sum()) - float(change))
    return found


def ends(case: Case, at: str) -> tuple[Places, Places]:
    """What the model is given, and the same with every patch masked; one run each."""
    if at not in ("pixels", "embedding"):
        raise LensError(f"at={at!r}; expected 'pixels' or 'embedding'")
    if at == "pixels":
        return case.picture[None], masked_pictures(case, ~case.all_kept())
    return case.stream, masked_streams(case, ~case.all_kept())


def runner(case: Case, at: str) -> Callable[[Tensor], Float[Tensor, "run d_vocab"]]:
    """From inputs of several runs to their logits."""
    return case.from_pictures if at == "pixels" else case.from_stream


def slopes(
    case: Case, at: str, start: Places, end: Places, alphas: Float[Tensor, " step"], max_bytes: int, of: str = "score"
) -> tuple[Places, float]:
    """The gradient averaged over points between two inputs, in float32 or better; and the mean of what it is of."""
    run, dtype = runner(case, at), ends(case, at)[0].dtype
    total, value = torch.zeros_like(start), 0.0
    parts = alphas.split(case.runs_at_once(at == "pixels", graph=True, max_bytes=ALL_GRAPHS * max_bytes))
    for part in tqdm(parts, desc="gradients", leave=False, disable=not case.progress or len(parts) < 2):
        weights = part.to(start).reshape(-1, *[1] * (start.ndim - 1))
        with on_graph():
            x = (start + weights * (end - start)).to(dtype).requires_grad_()
            score = getattr(case.measure(run(x)), of).sum()
            (grads,) = torch.autograd.grad(score, x)
        total += upcast(grads).sum(0, keepdim=True)
        value += float(score.detach())
    return total / len(alphas), value / len(alphas)


def by_patch(case: Case, at: str, values: Places) -> Float[Tensor, " patch"]:
    """Sums over each patch; pixels that no patch covers, and what is not an image token, are left out."""
    if at == "embedding":
        return values[0, case.patches].sum(-1)
    covered = values[0][:, *case.area]
    patches = reduce(covered, "channel (row y) (col x) -> row col", "sum", y=case.side, x=case.side)
    return rearrange(patches, "row col -> (row col)")
