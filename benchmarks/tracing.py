"""nnsight on Hugging Face's model, where it is installed: values saved in the course of one traced forward.

Unusual: nnsight reads the source of the `with` block that it traces, so what it saves is spelt out here in full.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.twins import sharing
from llava_lens import Inputs

MISSING = None if find_spec("nnsight") else "nnsight is not installed"
"""Why it has to be left out, if it has to be."""


class Traced:
    """Hugging Face's model with eager attention, whose patterns can be read, behind nnsight."""

    def __init__(self, hf: Any):
        from nnsight import NNsight  # pyright: ignore[reportMissingImports]

        self.model: Any = NNsight(sharing(hf, "eager"))
        self.layers: Any = self.model.model.language_model.layers

    @torch.inference_mode()
    def last_rows(self, inputs: Inputs) -> Tensor:
        """The last position's pattern in every layer, `[layer, batch, head, key]`."""
        with self.model.trace(**inputs.for_hf(), logits_to_keep=1, use_cache=False):
            found: Any = [layer.self_attn.output[1][:, :, -1] for layer in self.layers]
            rows = found.save()
        return torch.stack(rows)

    @torch.inference_mode()
    def five(self, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
        """The last logits, and what `benchmarks.cases.cached.handful` names."""
        middle = self.layers[len(self.layers) // 2]
        with self.model.trace(**inputs.for_hf(), logits_to_keep=1, use_cache=False):
            resid_pre = middle.input.save()
            z = middle.self_attn.o_proj.input.save()
            pattern = middle.self_attn.output[1].save()
            mlp_out = middle.mlp.output.save()
            resid_post = self.layers[-1].output.save()
            logits = self.model.output.logits.save()
        return logits[:, -1], [resid_pre, z, pattern, mlp_out, resid_post]
