"""The Triton kernels on the device they were written for, by the same checks as everywhere."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from kernel_checks import CHECKS, OWN

from llava_lens import kernels

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*CHECKS, *OWN])
@torch.no_grad()
def test_a_kernel_equals_the_reference(name, dtype):
    with kernels.pinned("triton"):
        (CHECKS | OWN)[name](torch.device("cuda"), dtype)


@pytest.mark.parametrize("name", CHECKS)
@torch.no_grad()
def test_float64_is_plain_torchs(name):
    CHECKS[name](torch.device("cuda"), torch.float64)
