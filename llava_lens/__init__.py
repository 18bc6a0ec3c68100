"""The workbench for opening up LLaVA: which patches, heads, layers and neurons produced the answer."""

from llava_lens.cache import LlavaCache
from llava_lens.config import LlavaConfig
from llava_lens.hooks import hook_table, reader
from llava_lens.inputs import Inputs
from llava_lens.model import HookedLlava

__version__ = "0.1.0"
__all__ = ["HookedLlava", "Inputs", "LlavaCache", "LlavaConfig", "hook_table", "reader"]
