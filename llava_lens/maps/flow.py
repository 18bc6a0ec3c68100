"""Our own map: what flows from each patch to the answer through all layers, seen where the answer is still undecided.

Unusual: the direct maps miss the way image → question → last position, and plain gradients die where the answer is
sure. Here gradients pass through values alone, with attention, norms and gates held as observed, so that they carry
what was moved; and a second look at the dimmed picture, where the answer is not yet decided, says what it hangs on.
"""

from __future__ import annotations

from collections.abc import Callable
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
    return pull(case, case.stream, lambda logits: aim(case, logits))[case.patches]


def flow(case: Case, *, dim: float = 0.3) -> Float[Tensor, " patch"]:
    """The geometric mean of two value paths: at the whole picture, and at the dimmed one.

    The first is `value_path`. The second is the gradient of the score, again through values alone, at the picture whose
    image tokens keep only the share `dim` of what tells them from their mean, along the whole picture's difference from
    that mean. Both are taken as shares of what speaks for the answer: a patch counts that carries it, and on which it
    hangs. `dim` is between 0 and 1.
    """
    if not 0 < dim <= 1:
        raise LensError(f"dim={dim}; expected more than 0, up to 1")
    case.count(forward=1, backward=1)
    mean = masked_streams(case, ~case.all_kept())
    dimmed = mean + dim * (case.stream - mean)
    hangs = pull(case, dimmed, lambda logits: case.measure(logits).score[0], case.stream - mean)
    return (shares(value_path(case)) * shares(hangs[case.patches])).sqrt()


def shares(values: Float[Tensor, " patch"]) -> Float[Tensor, " patch"]:
    """Each patch's part of what is above zero; all zero where nothing is."""
    above = values.clamp(min=0)
    return above / above.sum().clamp(min=torch.finfo(above.dtype).tiny)


def aim(case: Case, logits: Float[Tensor, "1 d_vocab"]) -> Float[Tensor, ""]:
    """The answer's logit, over that of the second answer where there is one."""
    logits = upcast(logits)[0]
    return logits[case.token] if case.versus is None else logits[case.token] - logits[case.versus]


def pull(
    case: Case,
    stream: Float[Tensor, "1 pos d_model"],
    target: Callable[[Tensor], Tensor],
    along: Float[Tensor, "1 pos d_model"] | None = None,
) -> Float[Tensor, " pos"]:
    """A target's gradient at a stream, through values alone, times the stream or what is given, for every position."""
    with on_graph(), case.model.hooks(fwd_hooks=held(case.model)):
        x = stream.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(target(case.from_stream(x)), x)
    return (upcast(gradient) * upcast(x.detach() if along is None else along))[0].sum(-1)


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
