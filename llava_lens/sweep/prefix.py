"""The positions in front that many runs share: their keys and values, held once."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from llava_lens import kernels
from llava_lens.kv_cache import KVCache
from llava_lens.layers import Attention, Mask

CAUSAL = Mask(causal=True)


class SharedPrefix(KVCache):
    """One layer's keys and values `[kv_head, prefix, d_head]` of the clean run, which every run of a batch looks at.

    `visible` says which of their own positions the queries may see. `own` are keys and values of more rows than there
    are queries, where only some rows go on. `whole` is the mask of all rows, for where there is no prefix.
    """

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        visible: Bool[Tensor, "query own"],
        own: tuple[Tensor, Tensor] | None = None,
        whole: Mask = CAUSAL,
    ):
        super().__init__(0)
        self.k, self.v, self.visible, self.own, self.whole = k, v, visible, own, whole

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Mix the values of the prefix and of each run's own positions."""
        if not self.k.shape[1] and self.own is None:
            return attention.attend(q, k, v, self.whole)
        k, v = (k, v) if self.own is None else self.own
        if not (attention.hook_attn_scores.live or attention.hook_pattern.live):
            return kernels.attention_after(q, self.k, self.v, k, v, attention.scale, self.visible)
        scores = kernels.scores_after(q, self.k, k, attention.scale, self.visible)
        scores, _ = attention.hook_attn_scores.look(scores)
        pattern, _ = attention.hook_pattern.look(kernels.attention_pattern(scores))
        return kernels.mix_after(pattern, self.v, v)
