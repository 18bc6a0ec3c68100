"""Whether parts still make up what the run cached: sums formed again from the model's weights.

Unusual: before a sum is split, what was split is rebuilt, so that changed weights or an edited activation raise instead
of shifting every number.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens.analysis.attribution.needs import CHANGED, slack
from llava_lens.analysis.attribution.query import Place
from llava_lens.errors import LensError
from llava_lens.layers import bias_of


def beside(weight: Tensor, like: Tensor) -> Tensor:
    """A weight in the precision of the activation it meets, and on its device."""
    return weight.detach().to(like)


def rebuilt(
    x: Float[Tensor, "*rows d_in"], linear: nn.Linear, seen: Float[Tensor, "*rows d_out"], dtype: torch.dtype, what: str
) -> None:
    """Raise `LensError` where `x` through a linear layer is not what the run made of it, beyond rounding in `dtype`."""
    length, weight = torch.linalg.vector_norm, beside(linear.weight, x)
    missed = length(x @ weight.T + beside(bias_of(linear), x) - seen, dim=-1)
    typical = length(x, dim=-1) * length(weight) / x.shape[-1] ** 0.5 + length(seen, dim=-1)
    if bool((missed > slack(dtype) * typical).any()):
        raise LensError(f"{what}: {CHANGED}")


def heads_add_up(place: Place, layer: int, z: Float[Tensor, "head d_head"]) -> None:
    """Raise `LensError` where what the heads mixed is not what a layer's attention added at the query."""
    _add_up(place, layer, "hook_attn_out", z.flatten(), place.cache.model.blocks[layer].attn.o_proj, "heads")


def neurons_add_up(place: Place, layer: int, post: Float[Tensor, " neuron"]) -> None:
    """Raise `LensError` where the neurons are not what a layer's MLP added at the query."""
    _add_up(place, layer, "hook_mlp_out", post, place.cache.model.blocks[layer].mlp.out_proj, "neurons")


def _add_up(place: Place, layer: int, name: str, x: Tensor, linear: nn.Linear, what: str) -> None:
    dtype = place.entry(f"blocks.{layer}.{name}").dtype
    said = f"the {what} of layer {layer} do not sum to the cached {name} (by='layer' reads the outputs as they were)"
    rebuilt(x, linear, place.at(layer, name), dtype, said)
