"""Calibration errors, proper scores and their intervals.

Everything takes probabilities (n_samples, n_classes) and integer labels (n_samples,), as numpy arrays, torch tensors or
nested lists.
"""

from calibrators.metrics.calibration import (
    ReliabilityCurve,
    adaptive_calibration_error,
    classwise_calibration_error,
    expected_calibration_error,
    ks_error,
    maximum_calibration_error,
    reliability_curve,
)
from calibrators.metrics.checks import check_probabilities
from calibrators.metrics.intervals import Estimate, bootstrap
from calibrators.metrics.proper import accuracy, brier_score, log_loss
from calibrators.metrics.summary import score_differences, scores

__all__ = [
    "Estimate",
    "ReliabilityCurve",
    "accuracy",
    "adaptive_calibration_error",
    "bootstrap",
    "brier_score",
    "check_probabilities",
    "classwise_calibration_error",
    "expected_calibration_error",
    "ks_error",
    "log_loss",
    "maximum_calibration_error",
    "reliability_curve",
    "score_differences",
    "scores",
]
