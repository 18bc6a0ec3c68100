"""The workbench for opening up LLaVA: which patches, heads, layers and neurons produced the answer.

Unusual: the names below are imported when first used, so that `llava-lens --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_lens.cache import LlavaCache
    from llava_lens.config import LlavaConfig
    from llava_lens.explanation import Explanation, explain
    from llava_lens.hooks import hook_table, reader
    from llava_lens.inputs import Inputs
    from llava_lens.model import HookedLlava
    from llava_lens.models import HookedMLLM
    from llava_lens.parity import ParityReport, check_parity

__version__ = "0.1.0"
__all__ = [
    "Explanation", "HookedLlava", "HookedMLLM", "Inputs", "LlavaCache", "LlavaConfig", "ParityReport", "check_parity",
    "explain", "hook_table", "reader",
]  # fmt: skip

HOMES = {
    "Explanation": "explanation",
    "HookedLlava": "model",
    "HookedMLLM": "models",
    "Inputs": "inputs",
    "LlavaCache": "cache",
    "LlavaConfig": "config",
    "ParityReport": "parity",
    "check_parity": "parity",
    "explain": "explanation",
    "hook_table": "hooks",
    "reader": "hooks",
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module 'llava_lens' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f"llava_lens.{HOMES[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
