"""Our own map: what flows from each patch to the answer through all layers, while the answer is still undecided.

Unusual: the direct maps miss the way image → question → last position, and gradients die where the answer is sure. Here
gradients pass through values alone, with attention, norms and gates held as observed, so that they carry what is moved;
and they are taken at dimmed pictures, on the way from no picture to the whole one, where the answer hangs on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from llava_lens.analysis.interventions.gradients import on_graph
from llava_lens.errors import LensError
from llava_lens.kernels import upcast
from llava_lens.maps.case import Case
from llava_lens.maps.masking import masked_streams

Hooks = list[tuple[str, Callable[..., Tensor]]]


def value_path(case: Case) -> Float[Tensor, " patch"]:
    """`<∂ logit / ∂ e, e>` for each patch's image token `e`, through values only, over all layers.

    Attention patterns, norm scales and the MLPs' activations are held at their observed values, and what a gated MLP
    multiplies is shared evenly between its factors; so this is the account of what was moved, not of what would change
    (the rules are those of AttnLRP, arXiv 2402.05602). With a second answer, of the difference of the logits.
    """
    case.count(forward=1, backward=1)
    gradient = pull(case, case.stream, lambda logits: aim(case, logits))
    return by_token(gradient, case.stream)[case.patches]


def flow(case: Case, *, dims: Sequence[float | int] = (0.3, 0.6)) -> Float[Tensor, " patch"]:
    """`<∂ p / ∂ e, e − mean>` of the answer's probability `p`, through values only, averaged over dimmed pictures.

    In a dimmed picture the image tokens keep only a share (each of `dims`, above 0, up to 1) of what tells them from
    their mean. Values only: as in `value_path`, held at what is observed in the dimmed run. With a second answer, of
    the difference of the logits. All dimmed pictures run as one batch.
    """
    if not dims or not all(0 < dim <= 1 for dim in dims):
        raise LensError(f"dims={tuple(dims)}; expected one share or more, each above 0 and up to 1")
    case.count(forward=len(dims), backward=len(dims))
    mean = masked_streams(case, ~case.all_kept())
    content = case.stream - mean
    gradient = pull(case, torch.cat([mean + dim * content for dim in dims]), lambda logits: undecided(case, logits))
    return by_token(gradient, content)[case.patches] / len(dims)


def undecided(case: Case, logits: Float[Tensor, "run d_vocab"]) -> Float[Tensor, ""]:
    """The answer's probability, or its lead over a second answer; of all runs together."""
    runs = case.measure(logits)
    return (runs.prob if case.versus is None else runs.score).sum()


def aim(case: Case, logits: Float[Tensor, "1 d_vocab"]) -> Float[Tensor, ""]:
    """The answer's logit, over that of the second answer where there is one."""
    logits = upcast(logits)[0]
    return logits[case.token] if case.versus is None else logits[case.token] - logits[case.versus]


def pull(
    case: Case, stream: Float[Tensor, "run pos d_model"], target: Callable[[Tensor], Tensor]
) -> Float[Tensor, "run pos d_model"]:
    """A target's gradient at streams that enter the decoder, through values alone."""
    with on_graph(), case.model.hooks(fwd_hooks=held(case.model)):
        x = stream.detach().clone().requires_grad_()
        return torch.autograd.grad(target(case.from_stream(x)), x)[0]


def by_token(
    gradient: Float[Tensor, "run pos d_model"], along: Float[Tensor, "1 pos d_model"]
) -> Float[Tensor, " pos"]:
    """Gradients times what stands at each position, added up over runs."""
    return (upcast(gradient) * upcast(along)).sum((0, -1))


def held(model: Any) -> Hooks:
    """Hooks of the decoder that let gradients through values alone; no activation changes but by rounding."""
    hooks: Hooks = [("ln_final.hook_scale", constant)]
    for layer in range(model.cfg.n_layers):
        block = f"blocks.{layer}."
        hooks += [(block + name, constant) for name in ("ln1.hook_scale", "attn.hook_pattern", "ln2.hook_scale")]
        hooks += _held_mlp(model, block + "mlp.")
    return hooks


def constant(act: Tensor, hook: Any) -> Tensor:
    """The same activation, for which no gradient goes on."""
    return act.detach()


def _held_mlp(model: Any, mlp: str) -> Hooks:
    """An MLP as linear as observed: its activation a factor, a product shared evenly between both sides."""
    act, gated = model.get_submodule(mlp[:-1]).act, mlp + "hook_pre_linear" in model.hook_dict
    seen: dict[str, Tensor] = {}

    def see(x: Tensor, hook: Any) -> Tensor:
        seen[hook.name] = x
        return x

    def linear(post: Tensor, hook: Any) -> Tensor:
        pre = seen.pop(mlp + "hook_pre")
        known = pre.detach()
        factor = torch.where(known == 0, 0.0, act(known) / known)
        made = factor * pre
        if gated:
            side = seen.pop(mlp + "hook_pre_linear")
            made = (made * side.detach() + made.detach() * side) / 2
        return post.detach() + (made - made.detach())

    names = [mlp + "hook_pre", *([mlp + "hook_pre_linear"] if gated else [])]
    return [*((name, see) for name in names), (mlp + "hook_post", linear)]
