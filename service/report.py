"""The revisions of a model judged on labelled rows, as one HTML page that needs no network and no explanation."""

from __future__ import annotations

from numpy.typing import ArrayLike

from calibrators import Calibrator
from calibrators.kinds.identity import Identity
from calibrators.metrics import scores
from calibrators.numerics import check_labels, check_logits
from calibrators.plots import html_report, reliability_diagram, telling_example
from service.client import Client, Inputs
from service.errors import InvalidRequest, NotFound

ITSELF = "the model itself"


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
    probabilities = {name: calibrator.predict_proba(z) for name, calibrator in fitted.items()}
    served = next((revision.revision for revision in revisions if revision.active), ITSELF)
    panels = dict.fromkeys((ITSELF, served))
    return html_report(
        model,
        {name: scores(p, y) for name, p in probabilities.items()},
        baseline=ITSELF,
        served=served,
        example=telling_example(probabilities[ITSELF], probabilities[served], y),
        n_calibration_rows=revisions[0].row_count,
        n_test_rows=len(y),
        figures=[reliability_diagram({name: probabilities[name]}, y) for name in panels],
    )
