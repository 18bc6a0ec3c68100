"""The library's own GPU kernels: the functions of `fast.py`, same names and signatures, written in Triton.

Unusual: nothing here is imported before the first call that needs it. Arithmetic inside is float32; float64 is refused
(`dispatch` gives it to `fast.py`). Results are contiguous, whatever the layout of what was given.
"""

from llava_lens.kernels.triton.activations import quick_gelu, swiglu
from llava_lens.kernels.triton.increase import increase_from_table
from llava_lens.kernels.triton.layout import interpreted
from llava_lens.kernels.triton.norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llava_lens.kernels.triton.pattern import last_row_pattern
from llava_lens.kernels.triton.rotary import rotate_

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "increase_from_table",
    "interpreted",
    "last_row_pattern",
    "layer_norm",
    "quick_gelu",
    "rms_norm",
    "rotate_",
    "swiglu",
]
