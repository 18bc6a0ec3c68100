"""Analyses: functions from a cache, or a model and inputs, to `Scores`."""

from llava_lens.analysis.ablate import ablate
from llava_lens.analysis.account import attribution_names
from llava_lens.analysis.asking import ask
from llava_lens.analysis.attribution import log_prob_increase, mean_attention, names_for
from llava_lens.analysis.attribution_patch import Screened, attribution_patch
from llava_lens.analysis.direct import direct_logit_attribution
from llava_lens.analysis.edges import edge_attribution
from llava_lens.analysis.heads import head_output, key_input, value_input
from llava_lens.analysis.knockout import blocked, knock_out
from llava_lens.analysis.lens import logit_lens, names_for_lens, tower_lens, visual_words
from llava_lens.analysis.metrics import Metric, kl, log_prob, logit, logit_diff, prob, recovery
from llava_lens.analysis.neurons import QueryNeurons, ValueNeurons, head_query_neurons, query_neurons, value_neurons
from llava_lens.analysis.patch import back_patch, patch
from llava_lens.analysis.paths import path_patch
from llava_lens.analysis.scores import Entry, Scores, stacked
from llava_lens.analysis.steer import generate_with, run_with_edits, steer, steering, steering_vector
from llava_lens.analysis.tower import tower_attribution
from llava_lens.analysis.trace import causal_trace
from llava_lens.analysis.where import Patches
from llava_lens.analysis.words import Lens

__all__ = [
    "Entry", "Lens", "Metric", "Patches", "QueryNeurons", "Scores", "Screened", "ValueNeurons", "ablate", "ask",
    "attribution_names", "attribution_patch", "back_patch", "blocked", "causal_trace", "direct_logit_attribution",
    "edge_attribution", "generate_with", "head_output", "head_query_neurons", "key_input", "kl", "knock_out",
    "log_prob", "log_prob_increase", "logit", "logit_diff", "logit_lens", "mean_attention", "names_for",
    "names_for_lens", "patch", "path_patch", "prob", "query_neurons", "recovery", "run_with_edits", "stacked", "steer",
    "steering", "steering_vector", "tower_attribution", "tower_lens", "value_input", "value_neurons", "visual_words",
]  # fmt: skip
