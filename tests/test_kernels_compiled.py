"""The Triton kernels compiled for sm_90 without a GPU, just as LLaVA-1.5-7B launches them: nothing spills.

Unusual: tensors have no data (device `meta`) and launches are recorded, so what is compiled here is what would run.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

if find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on, which compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava_lens.kernels.triton import activations, increase, norms, pattern, rotary

BF16, F32 = torch.bfloat16, torch.float32
POINTERS = {F32: "*fp32", BF16: "*bf16", torch.bool: "*i1"}


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def angles() -> tuple[Tensor, Tensor]:
    return empty(1, 1, 616, 128), empty(1, 1, 616, 128)


def moved(cells: int, table: Tensor) -> None:
    p = empty(32064, dtype=F32)
    increase.increase_from_table(empty(cells, len(table), dtype=table.dtype), table, p, 7, p)


def ways() -> dict[str, Callable[[], Any]]:
    stream, tower = empty(1, 616, 4096), empty(1, 577, 1024)
    gain, channels, product = empty(4096), empty(1024), empty(1, 616, 22016)
    return {
        "rms_norm": lambda: norms.rms_norm(stream, gain, 1e-5),
        "add_rms_norm": lambda: norms.add_rms_norm(stream, stream, gain, 1e-5, normalized=stream),
        "layer_norm": lambda: norms.layer_norm(tower, channels, channels, 1e-5),
        "add_layer_norm": lambda: norms.add_layer_norm(tower, tower, channels, channels, 1e-5),
        "rotate_": lambda: rotary.rotate_(empty(1, 616, 12288)[..., :4096].unflatten(-1, (32, 128)), *angles()),
        "swiglu": lambda: activations.swiglu(product[..., :11008], product[..., 11008:]),
        "quick_gelu": lambda: activations.quick_gelu(empty(1, 577, 4096)),
        "last_row": lambda: pattern.last_row_pattern(
            empty(1, 32, 128), empty(1, 32, 616, 128), 0.1, empty(1, 616, dtype=torch.bool)
        ),
        "increase_bf16": lambda: moved(616, empty(128, 32064)),
        "increase_few_bf16": lambda: moved(40, empty(128, 32064)),
        "increase_f32": lambda: moved(616, empty(128, 32064, dtype=F32)),
        "increase_of_streams_f32": lambda: moved(40, empty(32064, 4096, dtype=F32).T),
    }


def compiled(kernel: Any, given: tuple[Any, ...], warps: int, constants: dict[str, Any]) -> Any:
    """What Triton's own launcher would compile: ones and None are constants, sixteens are known to be divisible."""
    signature, fixed, known = {}, dict(constants), {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, given, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            fixed[name] = value
        elif isinstance(value, Tensor):
            signature[name], known[i,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                known[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(fixed, "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=known)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@pytest.mark.parametrize("name", list(ways()))
def test_a_kernel_compiles_for_hopper_and_spills_nothing(name, monkeypatch, tmp_path):
    launches = []
    for module in (norms, rotary, activations, pattern, increase):
        monkeypatch.setattr(module, "launch", lambda *given, **options: launches.append((given, options)))
    ways()[name]()
    ((kernel, _, *given), options), *others = launches
    assert not others
    made = compiled(kernel, tuple(given), options.pop("warps"), options)
    (tmp_path / "cubin").write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", tmp_path / "cubin"], capture_output=True, text=True, check=True).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    assert found["STACK"] == found["LOCAL"] == 0, "registers are spilled to local memory"
    assert 0 < found["REG"] <= 255
    if name.startswith("increase"):
        products = set(re.findall(r"wgmma\.mma_async\S+", made.asm["ptx"]))
        assert products and all(".tf32.tf32" in x if name.endswith("f32") else ".bf16.bf16" in x for x in products)
