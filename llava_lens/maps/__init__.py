"""Maps: how much each patch of a picture matters for an answer, by every known method, and how good those maps are."""

from llava_lens.maps.case import Case
from llava_lens.maps.importance import METHODS, Method, importance_map
from llava_lens.maps.masking import OPERATORS, Masking

__all__ = ["METHODS", "OPERATORS", "Case", "Masking", "Method", "importance_map"]
