"""The Triton kernels' logic without a GPU: Triton's interpreter runs them once, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from kernel_checks import CHECKS, OWN

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
SCRIPT = Path(__file__).with_name("kernel_checks.py")


@cache
def failures() -> dict[str, dict[str, str]]:
    """dtype → check → what went wrong. The interpreter cuts bfloat16 off where a GPU rounds, so float16 stands in."""
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16"])
@pytest.mark.parametrize("name", [*CHECKS, *OWN])
def test_an_interpreted_kernel_equals_the_reference(name, dtype):
    assert name not in failures()[dtype], failures()[dtype][name]
