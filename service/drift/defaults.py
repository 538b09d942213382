"""The monitors that every model has without being asked: few, and seldom wrong together.

    served_calibration    labels against the probabilities that were served
    raw_calibration       labels against the model's own, as they were calibrated in the first rows: an online revision
                          hides drift from a monitor behind it
    raw_scores            the model's confidence and predicted class against their first rows, without labels
    missing_labels        labels that stay away: the first two then see nothing
    raw_inputs            what is kept of the inputs against its first rows, where anything is

Each is given an equal part of one budget (Bonferroni), so that with probability FALSE_ALARM at most any of them rings
falsely within the first HORIZON_ROWS rows that each reads, whatever their dependence; and REFERENCE_ERROR besides for
references that are unlike their source. Calibration that is off by up to TOLERANCE a class does not ring; so of
raw_calibration it holds while what the fit of its baseline misses, and what the model is off beyond that fit, is less.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.drift.missing_labels import MissingLabels
from service.drift.states import RAW, SERVED, MonitorSpec

FALSE_ALARM, HORIZON_ROWS = 0.1, 100_000
REFERENCE_ERROR = 0.005
TOLERANCE = 0.02
BASELINE_ROWS = 2000
COOLDOWN_ROWS = 1000
PROMISE = (
    f"together the default monitors of a model ring falsely within the first {HORIZON_ROWS:,} rows that each reads "
    f"with probability {FALSE_ALARM:g} at most, and {3 * REFERENCE_ERROR:g} for references unlike their source"
)
INPUTS = "raw_inputs"
_DETECTORS: dict[str, tuple[str, str, dict[str, float | str], int]] = {
    "served_calibration": ("recalibration", SERVED, {"tolerance": TOLERANCE}, 0),
    "raw_calibration": ("recalibration", RAW, {"tolerance": TOLERANCE}, BASELINE_ROWS),
    "raw_scores": (
        "score_shift",
        RAW,
        {"signals": "confidence,predicted_class", "reference_error": REFERENCE_ERROR},
        0,
    ),
    MissingLabels.kind: (MissingLabels.kind, RAW, {"reference_error": REFERENCE_ERROR}, 0),
    INPUTS: ("score_shift", RAW, {"reference_error": REFERENCE_ERROR}, 0),
}


def default_monitors(model: str, inputs: Sequence[str] = ()) -> list[MonitorSpec]:
    """Of one model, of whose inputs these signals are kept."""
    budget = {"horizon": HORIZON_ROWS, "false_alarm_probability": FALSE_ALARM / len(_DETECTORS)}
    return [
        MonitorSpec(
            model,
            name,
            detector,
            watched,
            {**parameters, **budget, **({"signals": ",".join(inputs)} if name == INPUTS else {})},
            cooldown_rows=COOLDOWN_ROWS,
            is_default=True,
            baseline_rows=baseline,
        )
        for name, (detector, watched, parameters, baseline) in _DETECTORS.items()
        if inputs or name != INPUTS
    ]
