"""Analyses: functions from a cache, or a model and inputs, to `Scores`."""

from llava_lens.analysis.ablate import ablate
from llava_lens.analysis.asking import ask
from llava_lens.analysis.attribution import log_prob_increase, mean_attention, names_for
from llava_lens.analysis.attribution_patch import Screened, attribution_patch
from llava_lens.analysis.edges import edge_attribution
from llava_lens.analysis.explanation import Explanation, explain
from llava_lens.analysis.knockout import blocked, knock_out
from llava_lens.analysis.metrics import Metric, kl, log_prob, logit, logit_diff, prob, recovery
from llava_lens.analysis.patch import back_patch, patch
from llava_lens.analysis.paths import path_patch
from llava_lens.analysis.scores import Entry, Scores, stacked
from llava_lens.analysis.steer import generate_with, run_with_edits, steer, steering, steering_vector
from llava_lens.analysis.trace import causal_trace
from llava_lens.analysis.where import Patches

__all__ = [
    "Entry", "Explanation", "Metric", "Patches", "Scores", "Screened", "ablate", "ask", "attribution_patch",
    "back_patch", "blocked", "causal_trace", "edge_attribution", "explain", "generate_with", "kl", "knock_out",
    "log_prob", "log_prob_increase", "logit", "logit_diff", "mean_attention", "names_for", "patch", "path_patch",
    "prob", "recovery", "run_with_edits", "stacked", "steer", "steering", "steering_vector",
]  # fmt: skip
