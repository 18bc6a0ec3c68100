"""Analyses: functions from a cache, or a model and inputs, to `Scores`."""

from llava_lens.analysis.attribution import log_prob_increase, mean_attention, names_for
from llava_lens.analysis.explanation import Explanation, explain
from llava_lens.analysis.scores import Entry, Scores

__all__ = ["Entry", "Explanation", "Scores", "explain", "log_prob_increase", "mean_attention", "names_for"]
