"""Gradient-weighted attention carried through the layers: Chefer et al.'s relevancy, for the decoder and the tower.

Unusual: only the last row of the product is wanted, so it is carried down from the top, layer by layer, together with
the gradient. One decoder layer at a time is on the autograd graph and holds its patterns; the layers are run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.gradients import on_graph
from llava_lens.errors import LensError
from llava_lens.inputs import shown
from llava_lens.kernels import upcast
from llava_lens.maps.case import Case

THROUGH = ("decoder", "tower", "both")


def relevancy(case: Case, *, through: str = "decoder") -> Float[Tensor, " patch"]:
    """`R ← R + mean_h relu(∇A ∘ A) R` from `R = I`, with `∇A` the answer's logit's (arXiv 2103.15679, eqs. 5 and 6).

    "decoder": the last position's row at the image tokens. "tower": the tower's rows, averaged over the image tokens
    that the decoder gets. "both": the decoder's row carried through the tower's, `Σ_token R_decoder · R_tower`, as
    LVLM-Interpret's parts are chained (arXiv 2404.03118). With a second answer the gradient is that of the difference
    of logits. A tower read at several layers counts as the mean of their relevancies.
    """
    if through not in THROUGH:
        raise LensError(f"through={through!r}; expected {', '.join(map(repr, THROUGH))}")
    case.count(forward=2, backward=1)
    with on_graph():
        if through == "decoder":
            return decoder(case, case.stream)[0][case.patches]
        patterns: dict[str, Tensor] = {}
        with kept_patterns(case, "vision.", case.model.cfg.vision.n_layers, patterns):
            x = case.model.embed_inputs(case.inputs)
        row, gradient = decoder(case, x)
        tokens = case.roles.positions("image", case.image).to(row.device)
        if through == "tower":
            row = row.new_full(row.shape, 1 / len(tokens))
        return tower(case, x, gradient, patterns, row[tokens])


def decoder(case: Case, x: Float[Tensor, "1 pos d"]) -> tuple[Float[Tensor, " pos"], Float[Tensor, "1 pos d"]]:
    """The last position's row of the relevancies, and the logit's gradient at the stream that enters the decoder."""
    model, streams = case.model, [x.detach()]
    with torch.no_grad():
        for layer in range(model.cfg.n_layers):
            streams.append(case.through_blocks(streams[-1], layer, layer + 1))
    end = streams.pop().clone().requires_grad_()
    logits = upcast(model.read_out(end[:, -1:])[0, -1])
    aim = logits[case.token] - (0 if case.versus is None else logits[case.versus])
    (gradient,) = torch.autograd.grad(aim, end)
    row = torch.zeros(x.shape[1], dtype=upcast(x[:0]).dtype, device=x.device)
    row[-1] = 1.0
    for layer in reversed(range(model.cfg.n_layers)):
        before, patterns = streams.pop().clone().requires_grad_(), {}
        with kept_patterns(case, "", layer + 1, patterns, layer):
            after = case.through_blocks(before, layer, layer + 1)
        (pattern,) = patterns.values()
        gradient, at_pattern = torch.autograd.grad(after, (before, pattern), gradient)
        row = row + row @ weighted(pattern[0], at_pattern[0])
    return row, gradient


def tower(
    case: Case, x: Tensor, gradient: Tensor, patterns: dict[str, Tensor], token: Float[Tensor, " token"]
) -> Float[Tensor, " patch"]:
    """Weights of the image tokens carried through the tower's relevancies back to its patches.

    A token that several patches are merged into gives each an equal share, and gets back the sum of theirs.
    """
    cfg = case.model.cfg.seeing(case.inputs.pixels).vision
    grads = torch.autograd.grad(x, list(patterns.values()), gradient, allow_unused=True) if patterns else ()
    start = int(cfg.class_token and not cfg.keep_class_token)
    numbers = shown(case.inputs, 0, case.model.cfg)[case.image][1]
    read = torch.tensor([[start + patch for patch in cfg.patches_of(number)] for number in numbers])
    row = torch.zeros(cfg.n_ctx, dtype=token.dtype, device=token.device)
    weights = list(zip(patterns.values(), grads, strict=True))
    for layer in range(cfg.n_layers, -1, -1):
        row[read] += token[:, None] / cfg.merge**2 * (list(cfg.feature_layers).count(layer) / len(cfg.feature_layers))
        if layer and weights[layer - 1][1] is not None:
            pattern, at_pattern = weights[layer - 1]
            row = row + row @ weighted(pattern[case.image], at_pattern[case.image])
    return row[read[int(cfg.keep_class_token) :]].sum(-1)


def weighted(pattern: Float[Tensor, "head query key"], gradient: Tensor) -> Float[Tensor, "query key"]:
    """`mean_h relu(∇A ∘ A)`, in float32 or better."""
    return (upcast(gradient) * upcast(pattern.detach())).clamp(min=0).mean(0)


def kept_patterns(
    case: Case, prefix: str, stop: int, patterns: dict[str, Tensor], first: int = 0
) -> AbstractContextManager[Any]:
    """Make the patterns of some layers nodes of the graph, collected in order; the forward goes on from them."""

    def keep(act: Tensor, hook: Any) -> Tensor:
        patterns[hook.name] = act = act if act.requires_grad else act.requires_grad_()
        return act.view_as(act)  # another tensor, so that the pattern lies on the path from here on

    names = [f"{prefix}blocks.{layer}.attn.hook_pattern" for layer in range(first, stop)]
    hooks: list[tuple[str, Callable[..., Tensor]]] = [(name, keep) for name in names]
    return case.model.hooks(fwd_hooks=hooks)
