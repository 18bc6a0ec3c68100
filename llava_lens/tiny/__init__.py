"""A small LLaVA that is trained, and the scenes whose every fact is known that it was trained on."""

from pathlib import Path

from llava_lens.tiny.pairs import Pair, color_pairs
from llava_lens.tiny.questions import Question, questions
from llava_lens.tiny.scenes import Scene, SceneObject, render_scene
from llava_lens.tiny.vocabulary import COLORS, SHAPES

CHECKPOINT = Path(__file__).parent / "checkpoint"
BEFORE_TUNING = Path(__file__).parent / "before_tuning"

__all__ = [
    "BEFORE_TUNING", "CHECKPOINT", "COLORS", "SHAPES", "Pair", "Question", "Scene", "SceneObject", "color_pairs",
    "questions", "render_scene",
]  # fmt: skip
