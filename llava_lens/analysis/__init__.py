"""Analyses: functions from a cache, or a model and inputs, to `Scores`."""

from llava_lens.analysis.attribution.account import attribution_names
from llava_lens.analysis.attribution.direct import direct_logit_attribution
from llava_lens.analysis.attribution.log_prob import log_prob_increase, mean_attention, names_for
from llava_lens.analysis.attribution.tower import tower_attribution
from llava_lens.analysis.interventions.ablate import ablate
from llava_lens.analysis.interventions.asking import ask
from llava_lens.analysis.interventions.attribution_patch import Screened, attribution_patch
from llava_lens.analysis.interventions.edges import edge_attribution
from llava_lens.analysis.interventions.knockout import blocked, knock_out
from llava_lens.analysis.interventions.metrics import Metric, kl, log_prob, logit, logit_diff, prob, recovery
from llava_lens.analysis.interventions.patch import back_patch, patch
from llava_lens.analysis.interventions.paths import path_patch
from llava_lens.analysis.interventions.steer import generate_with, run_with_edits, steer, steering, steering_vector
from llava_lens.analysis.interventions.trace import causal_trace
from llava_lens.analysis.interventions.where import Patches
from llava_lens.analysis.lenses.heads import head_output, key_input, value_input
from llava_lens.analysis.lenses.lens import logit_lens, names_for_lens, tower_lens, visual_words
from llava_lens.analysis.lenses.neurons import (
    QueryNeurons,
    ValueNeurons,
    head_query_neurons,
    query_neurons,
    value_neurons,
)
from llava_lens.analysis.lenses.words import Lens
from llava_lens.analysis.scores import Entry, Scores, stacked

__all__ = [
    "Entry", "Lens", "Metric", "Patches", "QueryNeurons", "Scores", "Screened", "ValueNeurons", "ablate", "ask",
    "attribution_names", "attribution_patch", "back_patch", "blocked", "causal_trace", "direct_logit_attribution",
    "edge_attribution", "generate_with", "head_output", "head_query_neurons", "key_input", "kl", "knock_out",
    "log_prob", "log_prob_increase", "logit", "logit_diff", "logit_lens", "mean_attention", "names_for",
    "names_for_lens", "patch", "path_patch", "prob", "query_neurons", "recovery", "run_with_edits", "stacked", "steer",
    "steering", "steering_vector", "tower_attribution", "tower_lens", "value_input", "value_neurons", "visual_words",
]  # fmt: skip
