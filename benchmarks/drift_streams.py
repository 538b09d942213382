"""Streams that change in a known way: rows of ten classes, with one input and how far they are from any class.

The classes are normal clouds of unit variance around ten centres, and the logits are the exact ones, so before the
change the model is calibrated, with an accuracy of .715. `benchmarks.drift` draws logits alone, as others drew those of
their figures; what reads no label needs inputs that a change is in, and these are here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from service.drift.detectors.base import Batch

Array = NDArray[Any]

N_CLASSES, N_INPUTS, N_SEGMENTS = 10, 8, 5
CENTRES = 0.96 * np.random.default_rng(7).normal(size=(N_CLASSES, N_INPUTS))
RAMP = 5000
"""Rows that a gradual change takes."""


def stream(change: str, n_rows: int, change_at: int, seed: int) -> Batch:
    """Rows of which the first `change_at` are as a model wants them and the others are not.

    Parameters
    ----------
    change : one of `CHANGES`
    """
    rng = np.random.default_rng(seed)
    before = _rows(rng, change_at)
    after = CHANGES[change](rng, n_rows - change_at)
    x, logits, labels, segments = (np.concatenate(pair) for pair in zip(before, after, strict=True))
    far = ((x[:, None] - CENTRES) ** 2).sum(axis=2).min(axis=1)
    return Batch(logits, labels, segments, {"input_0": x[:, 0], "ood_score": far})


Rows = tuple[Array, Array, Array, Array]
"""Inputs, logits, labels, segments."""


def _rows(rng: np.random.Generator, n: int, prior: Array | None = None) -> Rows:
    labels = rng.choice(N_CLASSES, size=n, p=prior)
    x = CENTRES[labels] + rng.normal(size=(n, N_INPUTS))
    return x, _logits(x), labels, rng.integers(N_SEGMENTS, size=n)


def _logits(x: Array) -> Array:
    return np.asarray(x @ CENTRES.T - np.einsum("kd,kd->k", CENTRES, CENTRES) / 2)


def _temperature(factor: float) -> Callable[[np.random.Generator, int], Rows]:
    """Logits are sharpened."""

    def after(rng: np.random.Generator, n: int) -> Rows:
        x, logits, labels, segments = _rows(rng, n)
        return x, factor * logits, labels, segments

    return after


def _label_noise(rng: np.random.Generator, n: int) -> Rows:
    """Inputs and logits are what they were, and the labels are drawn from flatter probabilities."""
    x, logits, _, segments = _rows(rng, n)
    return x, logits, (logits / 1.5 + rng.gumbel(size=logits.shape)).argmax(axis=1), segments


def _gradual(rng: np.random.Generator, n: int) -> Rows:
    x, logits, labels, segments = _rows(rng, n)
    return x, logits * (1 + np.minimum(np.arange(n) / RAMP, 1))[:, None], labels, segments


def _input_noise(rng: np.random.Generator, n: int) -> Rows:
    x, _, labels, segments = _rows(rng, n)
    x = x + 0.7 * rng.normal(size=x.shape)
    return x, _logits(x), labels, segments


def _segment(rng: np.random.Generator, n: int) -> Rows:
    """Logits of one of five segments are sharpened."""
    x, logits, labels, segments = _rows(rng, n)
    return x, np.where(segments == 1, 2.0, 1.0)[:, None] * logits, labels, segments


def _covariate(rng: np.random.Generator, n: int) -> Rows:
    """Other inputs come, on which the model is as good as its word: a choice of rows by their inputs alone."""
    x, logits, labels, segments = _rows(rng, 6 * n)
    weight = np.exp(0.4 * x[:, 0] + 1.5 * softmax(logits, axis=1).max(axis=1))
    chosen = rng.choice(6 * n, size=n, replace=False, p=weight / weight.sum())
    return x[chosen], logits[chosen], labels[chosen], segments[chosen]


def _label_shift(rng: np.random.Generator, n: int) -> Rows:
    """Some classes become frequent, others rare, and look as they did."""
    prior = np.exp(-0.2 * np.arange(N_CLASSES))
    return _rows(rng, n, prior / prior.sum())


def _one_class(rng: np.random.Generator, n: int) -> Rows:
    """The logit of one class is raised."""
    x, logits, labels, segments = _rows(rng, n)
    logits[:, 3] += 1.7
    return x, logits, labels, segments


CHANGES: dict[str, Callable[[np.random.Generator, int], Rows]] = {
    "none": _rows,
    "temperature 1.5": _temperature(1.5),
    "temperature 2": _temperature(2.0),
    "temperature 0.67": _temperature(0.67),
    "label noise": _label_noise,
    "gradual": _gradual,
    "input noise": _input_noise,
    "one segment": _segment,
    "benign covariate": _covariate,
    "label shift": _label_shift,
    "one class": _one_class,
}
