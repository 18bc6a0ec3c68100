"""Many interventions on one run, exact and far cheaper than as many forward passes."""

from llava_lens.sweep.edits import Edit, block_attention, hooks_of
from llava_lens.sweep.engine import Outcome, run_cells
from llava_lens.sweep.metrics import Metric, kl, log_prob, logit, logit_diff, prob, recovery
from llava_lens.sweep.rows import Row
from llava_lens.sweep.setting import Setting, settle

__all__ = [
    "Edit", "Metric", "Outcome", "Row", "Setting", "block_attention", "hooks_of", "kl", "log_prob", "logit",
    "logit_diff", "prob", "recovery", "run_cells", "settle",
]  # fmt: skip
