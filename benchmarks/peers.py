"""Other libraries' calibrators behind one shape: fit on logits and labels, then (n_samples, n_classes) probabilities.

None is a dependency. Each runs as its authors publish it, on what it takes: logits where it can, else their softmax.
A tool that cannot be imported is named with the reason. `peers.txt` beside this file pins what was compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from calibrators.numerics import softmax

Logits = NDArray[np.float64]
Labels = NDArray[np.int64]

BINARY = 2
ANY = 1_000_000


class Fitted(Protocol):
    def predict_proba(self, logits: Logits, /) -> NDArray[Any]: ...


Fit = Callable[[Logits, Labels], Fitted]


@dataclass(frozen=True)
class Peer:
    """One method of one tool; `most_classes` is what it is defined for or ends in minutes with."""

    name: str
    fit: Fit
    most_classes: int = ANY


@dataclass(frozen=True)
class Served:
    """A fitted peer: how logits become its probabilities."""

    predict: Callable[[Logits], NDArray[Any]]

    def predict_proba(self, logits: Logits, /) -> NDArray[Any]:
        return np.asarray(self.predict(logits))


def find() -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be imported here, and of each other tool why not."""
    found: list[Peer] = []
    absent: dict[str, str] = {}
    for tool, methods in TOOLS.items():
        try:
            found += methods()
        except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError beside another build of torch
            absent[tool] = f"{type(error).__name__}: {error}"
    return found, absent


class Given(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn ships no types
    """A fitted classifier whose scores are its inputs, for the tools that calibrate estimators."""

    def __init__(self, n_classes: int = 2) -> None:
        self.n_classes = n_classes

    @property
    def classes_(self) -> NDArray[np.int64]:
        return np.arange(self.n_classes)

    def fit(self, X: Logits, y: Labels) -> Given:
        del X, y
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def decision_function(self, X: Logits) -> Logits:
        return X[:, 1] - X[:, 0] if self.n_classes == BINARY else X

    def predict_proba(self, X: Logits) -> Logits:
        return softmax(X)

    def predict(self, X: Logits) -> Labels:
        return np.asarray(X.argmax(axis=1))


# ---- the tools


def _scikit_learn() -> Iterator[Peer]:
    def fit_by(method: str) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            rows = np.arange(len(y))  # the classifier is given: one "fold" of all rows
            given = FrozenEstimator(Given(logits.shape[1]))
            peer = CalibratedClassifierCV(given, method=method, cv=[(rows, rows)], ensemble=False).fit(logits, y)
            return Served(peer.predict_proba)

        return fit

    for method in ("temperature", "sigmoid", "isotonic"):
        yield Peer(f"scikit-learn {method}", fit_by(method))


def _betacal() -> Iterator[Peer]:
    from betacal import BetaCalibration

    def fit(logits: Logits, y: Labels) -> Fitted:
        peer = BetaCalibration("abm").fit(softmax(logits)[:, 1], y)
        return Served(lambda z: peer.predict(softmax(z)[:, 1]))

    yield Peer("betacal abm", fit, BINARY)


def _venn_abers() -> Iterator[Peer]:
    from venn_abers import VennAbersCalibrator

    def fit_by(form: str) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            known = {"p_cal": softmax(logits), "y_cal": y, "va_type": form}
            return Served(lambda z: VennAbersCalibrator().predict_proba(p_test=softmax(z), **known))

        return fit

    yield Peer("venn-abers one_vs_one", fit_by("one_vs_one"), 10)
    yield Peer("venn-abers one_vs_all", fit_by("one_vs_all"))


def _dirichletcal() -> Iterator[Peer]:
    from dirichletcal.calib.fulldirichlet import FullDirichletCalibrator

    def fit_by(strength: float | None) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            options = {} if strength is None else {"reg_lambda": strength, "reg_mu": strength}
            peer = FullDirichletCalibrator(**options).fit(softmax(logits), y)
            return Served(lambda z: peer.predict_proba(softmax(z)))

        return fit

    yield Peer("dirichletcal", fit_by(None), 10)
    for strength in (1e-3, 1e-2):
        yield Peer(f"dirichletcal ODIR {strength:g}", fit_by(strength), 20)


def _mapie() -> Iterator[Peer]:
    from mapie.calibration import TopLabelCalibrator

    def fit_by(method: str) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            peer = TopLabelCalibrator(Given(logits.shape[1]), calibrator=method, cv="prefit").fit(logits, y)
            return Served(lambda z: with_confidence(softmax(z), np.nanmax(peer.predict_proba(z), axis=1)))

        return fit

    for method in ("sigmoid", "isotonic"):
        yield Peer(f"mapie top-label {method}", fit_by(method))


def with_confidence(probabilities: NDArray[Any], confidence: NDArray[Any]) -> NDArray[Any]:
    """Rows in which the top class has this confidence and the others keep their proportions."""
    top = probabilities.argmax(axis=1)[:, None]
    others = probabilities.copy()
    np.put_along_axis(others, top, 0.0, axis=1)
    others *= ((1 - confidence) / np.maximum(others.sum(axis=1), np.finfo(float).tiny))[:, None]
    np.put_along_axis(others, top, confidence[:, None], axis=1)
    return others


def _uncertainty_calibration() -> Iterator[Peer]:
    import calibration

    def fit_by(kind: Any) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            peer = kind(len(y), num_bins=10)
            peer.train_calibration(softmax(logits), y)
            return Served(lambda z: peer.calibrate(softmax(z)))

        return fit

    for name in ("Histogram", "PlattBinner"):
        kind = getattr(calibration, f"{name}MarginalCalibrator")
        yield Peer(f"uncertainty-calibration {name}", fit_by(kind))


def _netcal() -> Iterator[Peer]:
    from netcal import binning, scaling

    def fit_by(kind: Any) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            peer = kind()
            peer.fit(softmax(logits), y)
            return Served(lambda z: peer.transform(softmax(z)))

        return fit

    yield Peer("netcal LogisticCalibration", fit_by(scaling.LogisticCalibration), 100)
    yield Peer("netcal BetaCalibration", fit_by(scaling.BetaCalibration), 20)
    yield Peer("netcal TemperatureScaling", fit_by(scaling.TemperatureScaling))
    for kind in (binning.HistogramBinning, binning.IsotonicRegression, binning.BBQ):
        yield Peer(f"netcal {kind.__name__}", fit_by(kind))
    yield Peer("netcal ENIR", fit_by(binning.ENIR), 10)


def _probmetrics() -> Iterator[Peer]:
    from probmetrics.calibrators import get_calibrator

    def fit_by(method: str) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            peer = get_calibrator(method).fit(softmax(logits), y)
            return Served(lambda z: peer.predict_proba(softmax(z)))

        return fit

    for method in ("temp-scaling", "ts-mix", "guo-ts", "isotonic", "cir", "svs"):
        yield Peer(f"probmetrics {method}", fit_by(method))
    yield Peer("probmetrics sms", fit_by("sms"))
    yield Peer("probmetrics ivap", fit_by("ivap"))
    for method in ("beta", "quadratic-scaling", "platt-logits"):
        yield Peer(f"probmetrics {method}", fit_by(method), BINARY)


def _torch_uncertainty() -> Iterator[Peer]:
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from torch_uncertainty import post_processing

    def fit_by(kind: Any, *, takes_classes: bool) -> Fit:
        def fit(logits: Logits, y: Labels) -> Fitted:
            peer = kind(logits.shape[1]) if takes_classes else kind()
            rows = TensorDataset(torch.from_numpy(logits).float(), torch.from_numpy(y))
            peer.fit(DataLoader(rows, batch_size=len(y)), progress=False)
            return Served(lambda z: peer(torch.from_numpy(z).float()).softmax(dim=1).detach().numpy())

        return fit

    for name in ("TemperatureScaler", "HistogramBinningScaler", "IsotonicRegressionScaler", "BBQScaler"):
        yield Peer(f"torch-uncertainty {name}", fit_by(getattr(post_processing, name), takes_classes=False))
    for name in ("VectorScaler", "MatrixScaler", "DirichletScaler"):
        yield Peer(f"torch-uncertainty {name}", fit_by(getattr(post_processing, name), takes_classes=True))


TOOLS: dict[str, Callable[[], Iterator[Peer]]] = {
    "scikit-learn": _scikit_learn,
    "betacal": _betacal,
    "venn-abers": _venn_abers,
    "dirichletcal": _dirichletcal,
    "mapie": _mapie,
    "uncertainty-calibration": _uncertainty_calibration,
    "netcal": _netcal,
    "probmetrics": _probmetrics,
    "torch-uncertainty": _torch_uncertainty,
}
