"""The rooms: every module imports only from lower floors, and outside libraries only where they belong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import llava_lens

ROOT = Path(llava_lens.__file__).parent
FLOORS = {
    "errors": 0,
    "pictures": 1,
    "activations": 1,
    "config": 2,
    "hooks": 1,
    "kernels": 1,
    "images": 2,
    "roles": 3,
    "prompt": 4,
    "inputs": 5,
    "preparation": 6,
    "shards": 2,
    "checkpoint": 3,
    "rename": 3,
    "weights": 4,
    "derived": 2,
    "entries": 3,
    "facts": 0,
    "kv_cache": 2,
    "rotary": 3,
    "packing": 2,
    "regions": 3,
    "norms": 4,
    "layers": 5,
    "plan": 6,
    "keys": 0,
    "record": 6,
    "footprint": 7,
    "cache_file": 7,
    "stack_cache": 7,
    "cache": 8,
    "vision": 7,
    "projector": 7,
    "hooked": 9,
    "surface": 7,
    "reading": 8,
    "graphs": 6,
    "draft": 7,
    "generate": 8,
    "model": 10,
    "parity": 11,
    "sweep": 11,
    "analysis": 12,
    "models": 13,
    "maps": 13,
    "explanation": 14,
    "plots": 15,
    "page": 16,
    "cli": 17,
    "__main__": 18,
}
"""Module or folder → floor. `tiny` holds data and its training and may look anywhere; nothing but `model` looks in."""
HOMES = {
    "transformer_lens": {"hooks", "record", "stack_cache", "cache", "hooked", "surface"},
    "transformers": {"activations", "config", "images", "prompt", "checkpoint", "generate", "cli", "tiny", "models"},
    "matplotlib": {"plots"},
    "triton": {"kernels"},
}


def imports(path: Path) -> set[tuple[str, bool]]:
    """Absolute names of everything a module imports, and whether at its top (not inside a function)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the full name"
            names = [node.module or ""]
            if node.module == "llava_lens":
                names = [f"llava_lens.{alias.name}" for alias in node.names]
            found |= {(name, id(node) in top) for name in names}
    return found


def module_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


MODULES = [path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_lower_floors(path):
    here = module_name(path)
    if here == "tiny":
        return
    assert here in FLOORS, f"{here} has no floor yet: give it one in FLOORS"
    for name, _ in imports(path):
        parts = name.split(".")
        if parts[0] == "llava_lens" and len(parts) > 1 and parts[1] not in (here, "tiny"):
            assert FLOORS[parts[1]] < FLOORS[here], f"{here} (floor {FLOORS[here]}) imports {name}"
        if parts[:2] == ["llava_lens", "tiny"]:
            assert here in ("model", "analysis", "maps", "cli"), f"{here} looks into tiny"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_libraries_stay_in_their_rooms(path):
    here = module_name(path)
    for name, at_top in imports(path):
        library = name.split(".")[0]
        assert library not in HOMES or here in HOMES[library], f"{here} imports {library}"
        assert not (library in ("matplotlib", "pandas", "skimage", "gradio") and at_top), (
            f"{here} imports {library} at the top"
        )


def test_files_stay_readable():
    long = {path.name: n for path in MODULES if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"files far over 300 lines: {long}"
