"""The arithmetic of a forward pass on plain tensors, one signature per operation.

`reference` repeats Hugging Face's operations one for one, so its results are bit-equal to Hugging Face's; `prefix` is
the attention of many runs behind one shared prefix, close to it up to rounding.
"""

from llava_lens.kernels.prefix import attention_after, behind, mix_after, scores_after
from llava_lens.kernels.reference import (
    attention,
    attention_pattern,
    attention_scores,
    layer_norm_parts,
    mix_values,
    repeat_heads,
    rms_norm_parts,
    rotate,
    upcast,
)

__all__ = [
    "attention",
    "attention_after",
    "attention_pattern",
    "attention_scores",
    "behind",
    "layer_norm_parts",
    "mix_after",
    "mix_values",
    "repeat_heads",
    "rms_norm_parts",
    "rotate",
    "scores_after",
    "upcast",
]
