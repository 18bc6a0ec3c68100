"""What start-up brings in: no library that `import transformer_lens` does not bring in by itself."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import llava_lens

HEAVY = (
    *("accelerate", "circuitsvis", "matplotlib", "pandas", "scipy", "skimage", "sklearn", "sympy", "torchvision"),
    *("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torch.distributed.tensor"),
    *("torch.fx.experimental.symbolic_shapes", "transformers.core_model_loading", "transformers.generation.utils"),
    *("transformers.image_processing_utils", "transformers.integrations.accelerate", "transformers.modeling_utils"),
    *("transformers.models.llama.modeling_llama", "transformers.models.llava.modeling_llava"),
    "transformers.processing_utils",
)
"""Modules that take tenths of a second or more to import, and that only what is asked for later may need."""
STEPS = {
    "transformer_lens": "import transformer_lens",
    "llava_lens": "from llava_lens import *\nfrom llava_lens import analysis",
    "the rest": "import llava_lens.explanation, llava_lens.maps, llava_lens.page, llava_lens.plots, llava_lens.sweep",
    "a load": "model = HookedLlava.tiny()",
    "an answer": "model('what color is the circle ?')\nmodel.generate('what color is the circle ?', max_new_tokens=2)",
    "a picture": "import numpy\nmodel.prepare('what color is the circle ?', numpy.zeros((8, 8, 3), numpy.uint8))",
}
"""Run one after the other in one process; what each adds to `sys.modules` is its own."""


def in_fresh_process(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def modules() -> dict[str, set[str]]:
    """Step → the modules that it imported."""
    listed = "".join(f"{code}\nseen.append(list(sys.modules))\n" for code in STEPS.values())
    seen = in_fresh_process(f"import json, sys\nseen = [list(sys.modules)]\n{listed}print(json.dumps(seen))")
    return {step: set(after) - set(before) for step, before, after in zip(STEPS, seen, seen[1:], strict=False)}


def heavy(names: set[str]) -> set[str]:
    return {name for name in HEAVY if name in names}


@pytest.mark.parametrize("step", ["llava_lens", "the rest"])
def test_nothing_heavy_is_imported(modules: dict[str, set[str]], step: str) -> None:
    assert any(name.startswith("llava_lens") for name in modules["llava_lens"])
    assert heavy(modules[step]) == set()


def test_loading_and_a_picture_bring_in_what_they_need(modules: dict[str, set[str]]) -> None:
    """Else the names above would be those of another version, and the test above would guard nothing."""
    needed = {"sympy", "torch._dynamo", "transformers.core_model_loading", "transformers.modeling_utils"}
    assert needed <= heavy(modules["a load"] | modules["a picture"])


def test_the_bare_package_imports_no_library() -> None:
    roots = in_fresh_process(
        "import json, sys\nbefore = set(sys.modules)\nimport llava_lens\nnames = dir(llava_lens)\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    assert set(roots) <= {"llava_lens", *sys.stdlib_module_names}


def test_the_public_names_are_listed_and_found() -> None:
    assert set(llava_lens.__all__) <= set(dir(llava_lens))
    assert all(getattr(llava_lens, name) is not None for name in llava_lens.__all__)
    with pytest.raises(AttributeError, match="no attribute 'HookedLava'"):
        llava_lens.HookedLava  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
