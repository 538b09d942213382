"""Kinds against what other implementations said; `golden/record.py` recorded it.

Elsewhere: betacal in test_beta.py, SVS and SMS of probmetrics in test_linear_maps.py, relplot and
uncertainty-calibration in test_metrics_more.py, scikit-learn, as installed, in test_temperature.py, test_platt.py,
test_isotonic.py and test_venn_abers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calibrators.kinds.dirichlet import DirichletCalibration
from calibrators.kinds.platt import PlattScaling
from calibrators.kinds.venn_abers import VennAbers

Array = NDArray[Any]
GOLDEN = Path(__file__).parent / "golden"
PROVENANCE = {"tool", "version", "command", "date", "input", "expected"}


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text())
    return content


def binary(scores: Array) -> Array:
    return np.column_stack([np.zeros_like(scores), scores])


def test_every_record_says_where_it_comes_from() -> None:
    names = sorted(path.stem for path in GOLDEN.glob("*.json"))
    assert names == ["dirichletcal", "libsvm", "venn-abers"]
    for name in names:
        assert recorded(name).keys() >= PROVENANCE
        assert recorded(name)["command"].endswith(f" {name}")


def test_platt_is_libsvms_sigmoid_on_smoothed_targets() -> None:
    """LibSVM says 1 / (1 + exp(A f + B))."""
    record = recorded("libsvm")
    decisions, signs = (np.array(record["input"][name]) for name in ("decisions", "signs"))
    fitted = PlattScaling().fit(binary(decisions), (signs == 1).astype(int))
    assert float(fitted.slope_[1]) == pytest.approx(-record["expected"]["A"], abs=1e-8)
    assert float(fitted.intercept_[1]) == pytest.approx(-record["expected"]["B"], abs=1e-8)


@pytest.mark.parametrize(
    ("name", "fitted"),
    [
        ("none", DirichletCalibration(strength=0, bias_strength=0)),
        ("odir", DirichletCalibration(strength=0.05, bias_strength=0.02)),
        ("l2", DirichletCalibration("l2", strength=0.01)),
    ],
)
def test_dirichlet_is_the_authors_package(name: str, fitted: DirichletCalibration) -> None:
    record = recorded("dirichletcal")
    logits, y = (np.array(record["input"][key]) for key in ("logits", "y"))
    served = fitted.fit(logits, y).predict_proba(logits[:20])
    np.testing.assert_allclose(served, record["expected"][name], atol=1e-8)


def test_venn_abers_is_the_authors_package() -> None:
    record = recorded("venn-abers")
    logits, y = (np.array(record["input"][key]) for key in ("logits", "y"))
    calibrator = VennAbers().fit(logits[:40], y)
    p0, p1 = (bound[:, 1] for bound in calibrator.predict_interval(logits[40:]))
    np.testing.assert_allclose(p0, record["expected"]["p0"], atol=1e-6)
    np.testing.assert_allclose(p1, record["expected"]["p1"], atol=1e-6)
    np.testing.assert_allclose(calibrator.predict_proba(logits[40:])[:, 1], record["expected"]["merged"], atol=1e-6)
