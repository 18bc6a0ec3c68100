"""Parity: whether a model computes what its Hugging Face model does, and where it first does not."""

from llava_lens.parity.check import check_parity
from llava_lens.parity.report import Difference, Generation, ParityReport, Stage, Weight, Weights

__all__ = ["Difference", "Generation", "ParityReport", "Stage", "Weight", "Weights", "check_parity"]
