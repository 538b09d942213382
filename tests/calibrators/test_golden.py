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

from calibrators.conformal import Thresholds, create_score
from calibrators.conformal.online import ConformalPID
from calibrators.conformal.score import members
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
    assert names == ["conformal-time-series", "crepes", "dirichletcal", "libsvm", "mapie", "torchcp", "venn-abers"]
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


# ---- conformal prediction, 200 rows to calibrate on and 30 to make sets of

PARAMETERS = {"raps": {"penalty": 0.05, "free_ranks": 2}}
SHARES = {"aps": 1.0, "raps": 1.0}
"""TorchCP without randomness counts the whole of the label's own mass."""


def conformal_sets(record: dict[str, Any], name: str, level: float, *, by_class: bool) -> Array:
    p, y = (np.array(record["input"][key]) for key in ("p", "y"))
    score = create_score(name, PARAMETERS.get(name))
    shares = np.full(len(p), SHARES[name]) if name in SHARES else None
    cut = None if shares is None else shares[200:]
    scores = score.of_labels(p[:200], y[:200], None if shares is None else shares[:200])
    thresholds = Thresholds.of(scores, group=y[:200] if by_class else None).at(level)
    rows = p[200:].astype(np.float32)
    return members(rows, score.cuts(rows, thresholds, cut), allow_empty=True)


PEERS = [
    *(("torchcp", score, kind) for score in ("lac", "margin") for kind in ("split", "class_conditional")),
    *(("crepes", "lac", kind) for kind in ("split", "class_conditional")),
    ("mapie", "lac", "split"),
]
AT_LEVELS = [(*peer, level) for peer in PEERS for level in (0.8, 0.9, 0.95)] + [
    # At higher levels some thresholds are 1, which every last label's whole mass ties with: TorchCP leaves these ties to
    # the rounding of its sums, here they are in.
    ("torchcp", score, kind, 0.8)
    for score in ("aps", "raps")
    for kind in ("split", "class_conditional")
]


@pytest.mark.parametrize(("peer", "name", "kind", "level"), AT_LEVELS)
def test_sets_are_those_of_other_implementations(peer: str, name: str, kind: str, level: float) -> None:
    record = recorded(peer)
    found = conformal_sets(record, name, level, by_class=kind == "class_conditional")
    np.testing.assert_array_equal(found, np.array(record["expected"][name][kind][str(level)], dtype=bool))


@pytest.mark.parametrize("name", ["lac", "aps", "raps", "margin"])
def test_scores_are_torchcps(name: str) -> None:
    record = recorded("torchcp")
    p = np.array(record["input"]["p"])[200:]
    score = create_score(name, PARAMETERS.get(name))
    shares = np.full(len(p), SHARES[name]) if name in SHARES else None
    found = np.stack([score.of_labels(p, np.full(len(p), k), shares) for k in range(p.shape[1])], axis=1)
    np.testing.assert_allclose(found + (name == "lac"), record["expected"][name]["scores"], atol=1e-6)


def test_the_controlled_threshold_is_the_authors() -> None:
    """They give the first score no part in the integral, and scale no step by the range of scores: it is 1 here."""
    record = recorded("conformal-time-series")
    settings, scores = record["settings"], np.array(record["input"]["scores"])
    learner = ConformalPID(
        1 - settings["alpha"],
        scores=[0.0, 1.0],
        step=settings["lr"],
        strength=settings["KI"],
        saturation=settings["Csat"],
        window=len(scores) + 2,
    )
    learner.state["control"] = np.array([record["expected"]["q"][1], 0.0, 0.0])
    found = []
    for score in scores[1:]:
        found.append(learner.threshold)
        learner.update(score)
    np.testing.assert_allclose(found, record["expected"]["q"][1:], atol=1e-12)
