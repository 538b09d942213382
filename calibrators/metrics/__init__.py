"""Calibration errors, proper scores and their parts, tests of calibration, selective prediction, intervals.

Everything takes probabilities (n_samples, n_classes), or sets of labels of that shape, and integer labels (n_samples,),
as numpy arrays, torch tensors or nested lists.
"""

from calibrators.metrics.binned import calibration_errors_by_bins, debiased_squared_error, top_label_calibration_error
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
from calibrators.metrics.decomposition import BrierDecomposition, brier_decomposition, nll_gap
from calibrators.metrics.intervals import Estimate, bootstrap
from calibrators.metrics.kernel import mmce, skce_test
from calibrators.metrics.proper import accuracy, brier_score, log_loss
from calibrators.metrics.selective import RiskCoverageCurve, aurc, risk_coverage_curve
from calibrators.metrics.sets import (
    CoverageCurve,
    Stratum,
    class_coverage,
    coverage,
    coverage_curve,
    coverage_gap,
    local_coverage,
    mean_set_size,
    set_size_counts,
    size_stratified_coverage,
)
from calibrators.metrics.significance import CalibrationTest, hosmer_lemeshow, spiegelhalter_z
from calibrators.metrics.smooth import kde_calibration_error, smooth_calibration_error
from calibrators.metrics.summary import score_differences, scores

__all__ = [
    "BrierDecomposition",
    "CalibrationTest",
    "CoverageCurve",
    "Estimate",
    "ReliabilityCurve",
    "RiskCoverageCurve",
    "Stratum",
    "accuracy",
    "adaptive_calibration_error",
    "aurc",
    "bootstrap",
    "brier_decomposition",
    "brier_score",
    "calibration_errors_by_bins",
    "check_probabilities",
    "class_coverage",
    "classwise_calibration_error",
    "coverage",
    "coverage_curve",
    "coverage_gap",
    "debiased_squared_error",
    "expected_calibration_error",
    "hosmer_lemeshow",
    "kde_calibration_error",
    "ks_error",
    "local_coverage",
    "log_loss",
    "maximum_calibration_error",
    "mean_set_size",
    "mmce",
    "nll_gap",
    "reliability_curve",
    "risk_coverage_curve",
    "score_differences",
    "scores",
    "set_size_counts",
    "size_stratified_coverage",
    "skce_test",
    "smooth_calibration_error",
    "spiegelhalter_z",
    "top_label_calibration_error",
]
