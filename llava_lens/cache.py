"""The activations of one forward pass, by TransformerLens's keys, for both towers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformer_lens import ActivationCache

if TYPE_CHECKING:
    from llava_lens.inputs import Inputs


class LlavaCache(ActivationCache):
    """An `ActivationCache` of the decoder; the tower's activations are in `.vision`, the inputs in `.inputs`."""

    def __init__(
        self, cache_dict: dict[str, Tensor], model: Any, has_batch_dim: bool = True, inputs: Inputs | None = None
    ):
        super().__init__(cache_dict, model, has_batch_dim)
        self.inputs = inputs
