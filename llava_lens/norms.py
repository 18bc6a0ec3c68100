"""The two norms of the towers, with the same hooks: `hook_scale`, what the stream is divided by, and `hook_normalized`.

Unusual: `hook_normalized` sits before gain and bias in both, and what the fast norm does not form is computed only when
somebody listens.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from llava_lens import derived, kernels
from llava_lens.config import TowerConfig
from llava_lens.hooks import Hook, splice
from llava_lens.regions import Region

Stream = Float[Tensor, "batch pos d_model"]


class RMSNorm(nn.Module):
    """`weight ∘ x / rms(x)`, Llama's; `hook_scale` is the root mean square."""

    def __init__(self, cfg: TowerConfig):
        super().__init__()
        self.eps = cfg.eps
        self.weight = nn.Parameter(torch.ones(cfg.d_model))
        self.hook_scale = Hook("batch pos 1")
        self.hook_normalized = Hook("batch pos d_model")
        self.norm = Region(self.hook_scale, self.hook_normalized)

    @property
    def w(self) -> Float[Tensor, " d_model"]:
        """The gain."""
        return self.weight

    @property
    def b(self) -> Float[Tensor, " d_model"]:
        """The bias, zeros."""
        return torch.zeros_like(self.weight)

    def forward(self, x: Stream) -> Stream:
        if self.norm.open(x, self.weight):
            out, _ = kernels.rms_norm(x, self.weight, self.eps)
            return self.told(x, out)
        normalized, mean_square = kernels.rms_norm_parts(x, self.eps)
        if not self.norm.live:
            return self.weight * normalized.to(x.dtype)
        normalized, touched = self.scaled(x, normalized, mean_square)
        normalized = normalized.to(x.dtype)
        if touched or self.hook_normalized.needs_value:
            normalized = self.hook_normalized(normalized)
        else:
            self.hook_normalized.offer(lambda: derived.norm("normalized", x, self.eps, False))
        return self.weight * normalized

    def scaled(self, x: Stream, normalized: Tensor, mean_square: Tensor) -> tuple[Tensor, bool]:
        """The normalized stream after listeners have seen, and perhaps changed, what it is divided by; and if so."""
        if not self.hook_scale.needs_value:
            self.hook_scale.offer(lambda: derived.norm("scale", x, self.eps, False))
            return normalized, False
        scale = mean_square.sqrt()
        seen, touched = self.hook_scale.look(scale)
        return (splice(normalized, kernels.upcast(x) / seen, scale, seen) if touched else normalized), touched

    def after_adding(self, x: Stream, branch: Stream) -> tuple[Stream, Stream]:
        """The stream with a branch added, and its norm, in one step, of which nobody is told; `told` does that."""
        total, out, _ = kernels.add_rms_norm(x, branch, self.weight, self.eps)
        return total, out

    def told(self, x: Stream, out: Stream) -> Stream:
        """The norm's output after listeners were told what is inside; where nobody may write."""
        if not self.norm.live:
            return out
        for kind, hook in (("scale", self.hook_scale), ("normalized", self.hook_normalized)):
            recipe_of = partial(derived.norm, kind, x, self.eps, False)
            if hook.needs_value:
                hook(recipe_of().form())
            else:
                hook.offer(recipe_of)
        return out


class LayerNorm(RMSNorm):
    """`weight ∘ (x - mean) / std + bias`, CLIP's; `hook_scale` is the standard deviation."""

    def __init__(self, cfg: TowerConfig):
        super().__init__(cfg)
        self.bias = nn.Parameter(torch.zeros(cfg.d_model))

    @property
    def b(self) -> Float[Tensor, " d_model"]:
        """The bias."""
        return self.bias

    def forward(self, x: Stream) -> Stream:
        return self.told(x, F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps))

    def after_adding(self, x: Stream, branch: Stream) -> tuple[Stream, Stream]:
        return kernels.add_layer_norm(x, branch, self.weight, self.bias, self.eps)

    def told(self, x: Stream, out: Stream) -> Stream:
        """The norm's output after listeners have seen, and perhaps changed, what is inside."""
        if not self.norm.live:
            return out
        scale_of, normalized_of = (partial(derived.norm, kind, x, self.eps, True) for kind in ("scale", "normalized"))
        if not (self.hook_scale.needs_value or self.hook_normalized.needs_value):
            self.hook_scale.offer(scale_of)
            self.hook_normalized.offer(normalized_of)
            return out
        centered, scale = kernels.layer_norm_parts(x, self.eps)
        before = (centered / scale).to(x.dtype)
        seen, touched_scale = self.hook_scale.look(scale, scale_of)
        after = (centered / seen).to(x.dtype) if touched_scale else before
        after, touched = self.hook_normalized.look(after, None if touched_scale else normalized_of)
        if not (touched or touched_scale):
            return out
        return splice(out, after * self.weight + self.bias, before, after)


def adds_as_it_norms(kind: type[nn.Module]) -> bool:
    """Whether `after_adding` is of the class that the norm's `forward` is of, and so says the same."""
    owners = [next((c for c in kind.__mro__ if name in vars(c)), None) for name in ("forward", "after_adding")]
    return owners[0] is owners[1]
