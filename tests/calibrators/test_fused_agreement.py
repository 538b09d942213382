"""The fused graph in float32 against `predict_proba` in float64, every kind, at many classes.

test_contract.py holds the same over many fits of up to 12 classes. Sums of a thousand terms, wide tables and matrices of
a million numbers are here: a fit, then batches of any size and scale through its one session.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import onnxruntime
import pytest
from _pytest.mark import ParameterSet
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import calibrators
from calibrators import Calibrator
from calibrators.graph import stage
from tests.calibrators.fits import fit, served_beside

Array = NDArray[Any]

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "adaptive_temperature": [{}, {"form": "sorted"}],
    "beta": [{}, {"form": "am"}, {"form": "ab"}],
    "histogram_binning": [{}, {"strategy": "equal_width"}, {"top_label": True}],
    "isotonic": [{}, {"method": "accuracy_preserving"}],
    "vector": [{"penalty": 1.0}],  # not chosen by cross-validation: it costs seconds and serves the same arithmetic
}
FULL_MATRICES = ("dirichlet", "matrix")
"""Kinds whose fit of a million numbers takes seconds: their arrays are drawn."""

STEPS = {"bbq", "histogram_binning", "scaling_binning", "venn_abers"}
"""Step functions: a row so near an edge that float32 puts its log-odds into the next cell differs by a step. At 1,000
classes 4 rows in 10,000 are."""


def cases() -> Iterator[ParameterSet]:
    for kind in calibrators.kinds():
        for params, n_classes in product(VARIANTS.get(kind, [{}]), (40, 1000)):
            yield pytest.param(kind, params, n_classes, id=f"{kind}{params or ''}-{n_classes}")


def fitted(kind: str, params: dict[str, Any], n_classes: int, seed: int) -> Calibrator:
    """120 rows of overconfident logits and labels among eight classes, so most classes are unseen."""
    rng = np.random.default_rng(seed)
    logits = 1.5 * rng.normal(size=(120, n_classes))
    y = (logits[:, :8] + rng.gumbel(size=(120, 8))).argmax(axis=1)
    y[:2] = 0, 1
    return fit(kind, params, 2 * logits, y)


def drawn(kind: str, n_classes: int, seed: int) -> Calibrator:
    """A map that halves a logit, adds a little of every other, and leans."""
    rng = np.random.default_rng(seed)
    weight = 0.5 * np.eye(n_classes) + rng.normal(scale=0.3 / np.sqrt(n_classes), size=(n_classes, n_classes))
    learned = {"weight": weight, "bias": rng.normal(size=n_classes), "n_classes": np.int64(n_classes)}
    return calibrators.create(kind).set_tensors({name: np.asarray(array) for name, array in learned.items()})


@pytest.mark.parametrize(("kind", "params", "n_classes"), list(cases()))
def test_the_graph_agrees_to_the_declared_tolerance(kind: str, params: dict[str, Any], n_classes: int) -> None:
    calibrator = drawn(kind, n_classes, 0) if kind in FULL_MATRICES else fitted(kind, params, n_classes, 0)
    proto = stage(calibrator).proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, providers=["CPUExecutionProvider"])

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        n_rows=st.sampled_from([1, 2, 7, 33, 130]),
        scale=st.sampled_from([0.01, 1.0, 5.0, 25.0]),
        offset=st.sampled_from([0.0, -60.0, 60.0]),
        seed=st.integers(0, 10_000),
    )
    @example(n_rows=33, scale=25.0, offset=0.0, seed=6)
    def check(n_rows: int, scale: float, offset: float, seed: int) -> None:
        unseen = scale * np.random.default_rng(seed).normal(size=(n_rows, n_classes)) + offset
        logits = np.clip(unseen, -100, 100).astype(np.float32)
        more = served_beside(calibrator, logits)
        served = session.run(["probabilities"], {"logits": logits, **more})[0]
        difference = np.abs(served - calibrator.predict_proba(logits.astype(np.float64), **more)).max(axis=1)
        assert np.count_nonzero(difference > calibrator.float32_atol) <= (kind in STEPS), difference.max()

    check()
