"""Metrics for interventions: `patch(…, metric=logit_diff("red", "blue"))`."""

from llava_lens.sweep.metrics import Metric, kl, log_prob, logit, logit_diff, prob, recovery

__all__ = ["Metric", "kl", "log_prob", "logit", "logit_diff", "prob", "recovery"]
