"""The arithmetic of a forward pass on plain tensors, one signature per operation.

`reference` repeats Hugging Face's operations one for one, so its results are bit-equal to Hugging Face's; `prefix` is
the attention of many runs behind one shared prefix, close to it up to rounding.
"""

from llava_lens.kernels.fast import (
    add_layer_norm,
    add_linear,
    add_rms_norm,
    last_row_pattern,
    layer_norm,
    quick_gelu,
    rms_norm,
    rotate_,
    swiglu,
)
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
    "add_layer_norm",
    "add_linear",
    "add_rms_norm",
    "attention",
    "attention_after",
    "attention_pattern",
    "attention_scores",
    "behind",
    "last_row_pattern",
    "layer_norm",
    "layer_norm_parts",
    "mix_after",
    "mix_values",
    "quick_gelu",
    "repeat_heads",
    "rms_norm",
    "rms_norm_parts",
    "rotate",
    "rotate_",
    "scores_after",
    "swiglu",
    "upcast",
]
