"""The arithmetic of a forward pass on plain tensors, one signature per operation.

`reference` repeats Hugging Face's operations one for one, so its results are bit-equal to Hugging Face's.
"""

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
    "attention_pattern",
    "attention_scores",
    "layer_norm_parts",
    "mix_values",
    "repeat_heads",
    "rms_norm_parts",
    "rotate",
    "upcast",
]
