"""Plain torch against the reference in float64; who serves a call: pins, Triton missing or broken, custom ops."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from kernel_checks import CHECKS
from torch import Tensor

from llava_lens import kernels
from llava_lens.errors import LensError
from llava_lens.kernels import dispatch, fast, reference

OPS = torch.ops.llava_lens


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, for the choice alone."""

    is_cuda = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


def on_gpu(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(2, dtype=dtype).as_subclass(OnGpu)


@pytest.fixture
def forget(monkeypatch):
    """What was found out about Triton, and Triton itself, are forgotten before and after."""
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "llava_lens.kernels.triton", raising=False)
    dispatch.own_kernels.cache_clear()
    yield
    dispatch.own_kernels.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CHECKS)
@torch.no_grad()
def test_plain_torch_equals_the_reference(name, dtype):
    CHECKS[name](torch.device("cpu"), dtype)


@torch.no_grad()
def test_a_product_that_adds_is_the_sum_of_both():
    x, z, weight = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 5).double(), torch.randn(8, 5).double()
    torch.testing.assert_close(kernels.add_linear(x, z, weight), x + z @ weight.T)


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import llava_lens; print(before, 'triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_choice_is_made_by_device_and_dtype(monkeypatch):
    own = ModuleType("own")
    monkeypatch.setattr(dispatch, "own_kernels", lambda: own)
    monkeypatch.setattr(torch.version, "hip", None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert dispatch.chosen(on_gpu(dtype)) is own
        assert dispatch.chosen(torch.zeros(2, dtype=dtype)) is fast
    assert dispatch.chosen(on_gpu(torch.float64)) is fast
    with kernels.pinned("fast"):
        assert dispatch.chosen(on_gpu()) is fast
        with kernels.pinned("triton"):
            assert dispatch.chosen(on_gpu()) is own
        assert dispatch.chosen(on_gpu()) is fast
    assert dispatch.chosen(on_gpu()) is own
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert dispatch.chosen(on_gpu()) is fast


def test_a_pin_holds_until_it_is_left_even_by_an_error():
    with pytest.raises(ZeroDivisionError), kernels.pinned("fast"):
        raise ZeroDivisionError
    assert dispatch._pin.get() is None
    with pytest.raises(LensError, match="no kernels called 'tritn'; choose 'fast' or 'triton'; nearest: 'triton'"):
        kernels.pinned("tritn").__enter__()


def test_without_triton_plain_torch_serves(monkeypatch, forget):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert dispatch.own_kernels() is None and dispatch.chosen(on_gpu()) is fast
    with kernels.pinned("triton"), pytest.raises(LensError, match="pinned to 'triton', which is not installed"):
        kernels.quick_gelu(torch.zeros(2))


@pytest.mark.parametrize("broken", ["raise OSError('no libcuda')", "import a_part_that_is_not_there"])
def test_a_triton_that_cannot_be_imported_raises_with_its_reason(broken, tmp_path, monkeypatch, forget):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    reason = "no libcuda" if "libcuda" in broken else "a_part_that_is_not_there"
    for _ in range(2):  # it does not fall back the second time
        with pytest.raises(LensError, match=f"Triton is installed but could not be imported: .*{reason}.*pinned"):
            dispatch.chosen(on_gpu())
    assert dispatch.chosen(torch.zeros(2)) is fast


def test_a_kernel_that_fails_raises_with_its_reason(monkeypatch):
    def fails(*_):
        raise RuntimeError("ptxas died")

    def runs_out(*_):
        raise torch.OutOfMemoryError("no room")

    own = SimpleNamespace(quick_gelu=fails, layer_norm=runs_out, interpreted=lambda: True)
    monkeypatch.setattr(dispatch, "chosen", lambda x: own)
    with pytest.raises(
        LensError, match=r"kernel quick_gelu failed on \[2, 3\] torch.float32: RuntimeError: ptxas died"
    ):
        kernels.quick_gelu(torch.zeros(2, 3))
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        kernels.layer_norm(torch.zeros(2, 3), torch.ones(3), torch.ones(3), 1e-5)


def test_triton_without_a_gpu_is_refused(monkeypatch):
    own = SimpleNamespace(interpreted=lambda: False)
    monkeypatch.setattr(dispatch, "own_kernels", lambda: own)
    with kernels.pinned("triton"), pytest.raises(LensError, match=r"the tensors are on cpu; .*TRITON_INTERPRET=1"):
        kernels.quick_gelu(torch.zeros(2))


def examples() -> dict[str, tuple]:
    x, w = torch.randn(2, 3, 24), torch.randn(24)
    table, log_p = torch.randn(5, 9), torch.randn(9).log_softmax(-1)
    product, angle = torch.randn(2, 3, 6 * 8), torch.randn(1, 1, 3, 8)
    k, seen = torch.randn(2, 2, 7, 8), torch.rand(2, 7) > 0.5
    return {
        "rms_norm": (x, w, 1e-5),
        "add_rms_norm": (x, x.flip(0), w, 1e-5, torch.empty_like(x)),
        "layer_norm": (x[..., :12], w[:12], w[12:], 1e-5),
        "add_layer_norm": (x.transpose(0, 1), x.transpose(0, 1), w, w, 1e-5),
        "rotate_": (product[..., :32].unflatten(-1, (4, 8)), angle.cos(), angle.sin()),
        "swiglu": (product[..., :24], product[..., 24:]),
        "quick_gelu": (x.transpose(1, 2),),
        "last_row_pattern": (torch.randn(2, 4, 8), k, 0.3, seen),
        "increase_from_table": (torch.randn(4, 5), table, log_p, 3, log_p.exp()),
    }


@pytest.mark.parametrize("name", list(examples()))
def test_every_operation_is_a_custom_op(name):
    given = examples()[name]
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(OPS, name).default, given, test_utils=kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(examples()))
def test_every_custom_op_can_be_compiled(name):
    torch.library.opcheck(getattr(OPS, name).default, examples()[name])


@torch.no_grad()
def test_keywords_reach_an_operation_on_both_ways():
    q, k, _, seen = examples()["last_row_pattern"]
    direct = kernels.last_row_pattern(q=q, k=k, scale=0.3, seen=seen)
    assert torch.equal(direct, fast.last_row_pattern(q, k, 0.3, seen))
    assert torch.equal(direct, OPS.last_row_pattern(q=q, k=k, scale=0.3, seen=seen))


def test_a_gradient_is_refused_not_forgotten():
    x = torch.randn(2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"llava_lens\W+quick_gelu.* no autograd formula"):
        kernels.quick_gelu(x).sum().backward()


def test_the_reference_in_float64_is_hugging_faces_activation():
    from transformers.activations import QuickGELUActivation

    x = torch.randn(50).double()
    torch.testing.assert_close(fast.quick_gelu(x), QuickGELUActivation()(x), rtol=1e-14, atol=0)
    assert reference.upcast(x) is x
