"""Explanations: what an answer came from, all at once."""

from llava_lens.explanation.explain import explain
from llava_lens.explanation.result import Explanation

__all__ = ["Explanation", "explain"]
