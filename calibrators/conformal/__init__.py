"""Conformal prediction: nonconformity scores, thresholds, and what is made of both.

The kinds that are served are in `calibrators.kinds`: `split_conformal`, `class_conditional_conformal`,
`clustered_conformal`. Here are their parts, and what has no place in a served revision because it needs more than a
row: thresholds for groups that the caller names (`Thresholds.of`), for shifted inputs (`weighted`), for risks other
than missing the label (`risk`), for declining to answer (`selective`), and the online learners (`online`).
"""

from calibrators.conformal.risk import controlled, false_negative_rates, set_sizes
from calibrators.conformal.scores import create_score
from calibrators.conformal.selective import Selection, select
from calibrators.conformal.thresholds import Thresholds
from calibrators.conformal.weighted import domain_weights, weighted_thresholds

__all__ = [
    "Selection",
    "Thresholds",
    "controlled",
    "create_score",
    "domain_weights",
    "false_negative_rates",
    "select",
    "set_sizes",
    "weighted_thresholds",
]
