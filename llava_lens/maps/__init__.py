"""Maps: how much each patch of a picture matters for an answer, by every known method, and how good those maps are."""

from llava_lens.maps.case import Case
from llava_lens.maps.evaluate import evaluate_maps
from llava_lens.maps.importance import METHODS, Method, importance_map
from llava_lens.maps.items import MapItem
from llava_lens.maps.masking import OPERATORS, Masking
from llava_lens.maps.randomise import randomised
from llava_lens.maps.report import MapReport

__all__ = [
    "METHODS", "OPERATORS", "Case", "MapItem", "MapReport", "Masking", "Method", "evaluate_maps", "importance_map",
    "randomised",
]  # fmt: skip
