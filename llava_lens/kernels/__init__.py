"""The arithmetic of a forward pass on plain tensors, one signature per operation.

`reference` repeats Hugging Face's operations one for one, so its results are bit-equal to Hugging Face's; `prefix` is
the attention of many runs behind one shared prefix, close to it up to rounding. `fast` has fewer steps, with the same
results up to rounding; `triton` has them as GPU kernels, and `dispatch` chooses between the two in every call.
"""

from llava_lens.kernels.dispatch import (
    add_layer_norm,
    add_rms_norm,
    increase_from_table,
    last_row_pattern,
    layer_norm,
    pinned,
    quick_gelu,
    rms_norm,
    rotate_,
    swiglu,
)
from llava_lens.kernels.fast import add_linear, shift
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
    "increase_from_table",
    "last_row_pattern",
    "layer_norm",
    "layer_norm_parts",
    "mix_after",
    "mix_values",
    "pinned",
    "quick_gelu",
    "repeat_heads",
    "rms_norm",
    "rms_norm_parts",
    "rotate",
    "rotate_",
    "scores_after",
    "shift",
    "swiglu",
    "upcast",
]
