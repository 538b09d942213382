"""The revisions of a model judged on labelled rows, as one HTML page that needs no network and no explanation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from calibrators import Calibrator
from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.kinds.identity import Identity
from calibrators.metrics import scores
from calibrators.numerics import Array, check_labels, check_logits
from calibrators.plots import (
    Chart,
    classwise_chart,
    comparison_chart,
    html_report,
    reliability_chart,
    risk_coverage_chart,
    set_chart,
    telling_example,
    temperature_chart,
)
from service.client import Client, Inputs, Revision
from service.errors import InvalidRequest, NotFound

ITSELF = "the model itself"

SET_LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Confidence levels at which prediction sets are judged."""


def html(
    client: Client, model: str, *, labels: ArrayLike, logits: ArrayLike | None = None, inputs: Inputs | None = None
) -> str:
    """Compare every revision with the model itself on rows of the caller's, which should be rows of no fit.

    Raises
    ------
    errors.InvalidRequest, errors.NotFound
        for rows that cannot be used, or a model without revisions
    """
    if (logits is None) == (inputs is None):
        raise InvalidRequest("pass either logits or inputs")
    try:
        z = check_logits(client.logits(model, inputs) if inputs is not None else logits)  # type: ignore[arg-type]
        y = check_labels(labels, n_samples=len(z), n_classes=z.shape[1])
    except (ValueError, TypeError) as error:
        raise InvalidRequest(str(error)) from error
    revisions = client.list(model)
    if not revisions:
        raise NotFound(f"model {model!r} has no revisions to report on; fit one first")
    fitted: dict[str, Calibrator] = {ITSELF: Identity.of(z.shape[1])}
    fitted |= {revision.revision: client.calibrator(model, revision.revision) for revision in reversed(revisions)}
    probabilities = {
        name: _probabilities(client, model, name, calibrator, z, inputs) for name, calibrator in fitted.items()
    }
    served = next((revision.revision for revision in revisions if revision.active), ITSELF)
    compared = {name: probabilities[name] for name in dict.fromkeys((ITSELF, served))}
    class_names = _class_names(client, model)
    judged = {name: scores(p, y) for name, p in probabilities.items()}
    return html_report(
        model,
        judged,
        baseline=ITSELF,
        served=served,
        example=telling_example(probabilities[ITSELF], probabilities[served], y),
        n_calibration_rows=revisions[0].row_count,
        n_test_rows=len(y),
        charts=[
            reliability_chart(compared, y),
            comparison_chart(judged),
            classwise_chart(probabilities[served], y, class_names=class_names),
            risk_coverage_chart(compared, y),
            # Rows of one class have no best temperature.
            *([temperature_chart(z, y)] if len(np.unique(y)) > 1 else []),
            *_set_chart(fitted[served], probabilities[served], y, class_names),
            *_ranking_chart(revisions, served),
        ],
    )


def _class_names(client: Client, model: str) -> Sequence[str] | None:
    """What the model's folder calls its classes, if it does."""
    return next((one.class_names for one in client.models() if one.model == model), ()) or None


def _probabilities(
    client: Client, model: str, revision: str, calibrator: Calibrator, z: Array, inputs: Inputs | None
) -> Array:
    """Of rows with these logits; of a kind that acts before the model, as the server computes them from the inputs."""
    if "views" not in calibrator.needs:
        return calibrator.predict_proba(z)
    if inputs is None:
        raise InvalidRequest(f"revision {revision} reads views, which are made from the model's inputs: pass inputs")
    return client.probabilities(model, inputs, calibrator=revision)


def _set_chart(calibrator: Calibrator, p: Array, y: Array, class_names: Sequence[str] | None) -> list[Chart]:
    """What the sets of the revision that serves hold, if it makes any."""
    if not isinstance(calibrator, ConformalCalibrator):
        return []
    shares = np.random.default_rng(0).random(len(p)) if calibrator.randomised else None
    levels = sorted({*SET_LEVELS, calibrator.confidence_level})
    by_level = {level: calibrator.sets(p, level, shares=shares) for level in levels}
    return [set_chart(by_level, y, confidence_level=calibrator.confidence_level, class_names=class_names)]


def _ranking_chart(revisions: Sequence[Revision], served: str) -> list[Chart]:
    """What "auto" compared when it made the revision that serves, or else the newest that it made."""
    ranked = sorted((one for one in revisions if one.ranking), key=lambda one: one.revision != served)
    if not ranked:
        return []
    candidates = ranked[0].ranking
    chart = comparison_chart(
        {one.kind: one.scores for one in candidates if not one.skipped},
        heading=f"What auto compared for {ranked[0].revision}",
        judged_on="The scores are of the rows of that fit, each predicted by a fit that had not seen it.",
        skipped={one.kind: one.skipped for one in candidates if one.skipped},
    )
    return [chart]
