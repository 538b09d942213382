"""Records what other implementations say, for `test_golden.py` to compare with.

    python tests/calibrators/golden/record.py [libsvm] [dirichletcal] [venn-abers] [torchcp] [mapie] [crepes]
        [conformal-time-series]

writes one JSON file a tool into this folder: tool, version, command, date, input, expected. It needs the tools
(`benchmarks/peers.txt`); the tests need only the files. Inputs are rounded to six digits, so that they read back exactly.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
N_FOLDS = 5


def overconfident_rows(n_samples: int, n_classes: int) -> tuple[Any, Any]:
    """Labels drawn from softmax(z), rows of 2 z to six digits."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(n_samples, n_classes))
    return (2 * z).round(6), (z + rng.gumbel(size=z.shape)).argmax(axis=1)


# ---- LibSVM fits Platt's sigmoid to decision values that it cross-validates itself and does not show: they are made
# again here with its own machines on its own folds, which its use of the C library's rand() fixes.


def libsvm() -> dict[str, Any]:
    from libsvm.svmutil import svm_train

    logits, y = overconfident_rows(60, 2)
    positive_first = np.argsort(1 - y, kind="stable")  # the order in which LibSVM works
    rows = [[value] for value in (logits[:, 1] - logits[:, 0])[positive_first].tolist()]
    signs = np.where(y == 1, 1, -1)[positive_first]
    ctypes.CDLL(None).srand(1)
    model = svm_train(signs.tolist(), rows, "-t 0 -c 1 -b 1 -q")
    return {
        "input": {"decisions": _cross_validated_decisions(rows, signs), "signs": signs.tolist()},
        "expected": {"A": model.probA[0], "B": model.probB[0]},
    }


def _cross_validated_decisions(rows: list[Any], signs: Any) -> list[float]:
    from libsvm.svmutil import svm_predict, svm_train

    order, decisions = _shuffled(len(rows)), np.empty(len(rows))
    for fold in range(N_FOLDS):
        begin, end = fold * len(rows) // N_FOLDS, (fold + 1) * len(rows) // N_FOLDS
        held, kept = order[begin:end], order[:begin] + order[end:]
        model = svm_train(signs[kept].tolist(), [rows[i] for i in kept], "-t 0 -c 1 -q")
        _, _, values = svm_predict(signs[held].tolist(), [rows[i] for i in held], model, "-q")
        decisions[held] = np.ravel(values) * model.get_labels()[0]
    return [float(value) for value in decisions]


def _shuffled(n: int) -> list[int]:
    library = ctypes.CDLL(None)
    library.srand(1)
    order = list(range(n))
    for i in range(n):
        j = i + library.rand() % (n - i)
        order[i], order[j] = order[j], order[i]
    return order


# ---- the others take rows and give probabilities


def dirichletcal() -> dict[str, Any]:
    from dirichletcal.calib.fulldirichlet import FullDirichletCalibrator

    logits, y = overconfident_rows(150, 3)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    settings = {
        "none": {"reg_lambda": 0.0},
        "odir": {"reg_lambda": 0.05, "reg_mu": 0.02, "reg_norm": True, "ref_row": False},
        "l2": {"reg_lambda": 0.01, "ref_row": False},
    }
    fits = {name: FullDirichletCalibrator(**options).fit(p, y) for name, options in settings.items()}
    return {
        "settings": settings,
        "input": {"logits": logits.tolist(), "y": y.tolist()},
        "expected": {name: np.asarray(fit.predict_proba(p[:20])).tolist() for name, fit in fits.items()},
    }


def venn_abers() -> dict[str, Any]:
    from venn_abers import VennAbers

    logits, y = overconfident_rows(60, 2)
    positive = 1 / (1 + np.exp(logits[:, 0] - logits[:, 1]))
    p = np.stack([1 - positive, positive], axis=1)
    peer = VennAbers()
    peer.fit(p[:40], y[:40])
    merged, interval = peer.predict_proba(p[40:])
    return {
        "input": {"logits": logits.tolist(), "y": y[:40].tolist()},
        "expected": {"merged": merged[:, 1].tolist(), "p0": interval[:, 0].tolist(), "p1": interval[:, 1].tolist()},
    }


# ---- conformal prediction: 200 rows with scores of their labels, 30 more whose sets are asked for

CONFIDENCE_LEVELS = (0.8, 0.9, 0.95)


def _conformal_rows() -> tuple[Any, Any]:
    logits, y = overconfident_rows(230, 5)
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p.round(6), y


def torchcp() -> dict[str, Any]:
    import torch
    from torchcp.classification.predictor import ClassConditionalPredictor, SplitPredictor
    from torchcp.classification.score import APS, LAC, RAPS, Margin

    p, y = _conformal_rows()
    rows, labels = torch.tensor(p), torch.tensor(y)
    scores = {
        "lac": LAC(score_type="identity"),
        "aps": APS(score_type="identity", randomized=False),
        "raps": RAPS(score_type="identity", randomized=False, penalty=0.05, kreg=2),
        "margin": Margin(score_type="identity"),
    }
    expected: dict[str, Any] = {}
    for name, score in scores.items():
        expected[name] = {"scores": score(rows[200:].clone()).tolist()}
        for kind, cls in (("split", SplitPredictor), ("class_conditional", ClassConditionalPredictor)):
            sets = {}
            for level in CONFIDENCE_LEVELS:
                predictor = cls(score)
                predictor.calculate_threshold(rows[:200].clone(), labels[:200], 1 - level)
                sets[str(level)] = predictor.predict_with_logits(rows[200:].clone()).int().tolist()
            expected[name][kind] = sets
    return {"input": {"p": p.tolist(), "y": y.tolist()}, "expected": expected}


class _AsItIs:
    """A classifier for MAPIE whose probabilities are its input."""

    def __init__(self, n_classes: int) -> None:
        self.classes_ = np.arange(n_classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, *_: Any) -> Any:
        return self

    def predict(self, X: Any) -> Any:
        return X.argmax(axis=1)

    def predict_proba(self, X: Any) -> Any:
        return X


def mapie() -> dict[str, Any]:
    from mapie.classification import SplitConformalClassifier

    p, y = _conformal_rows()
    peer = SplitConformalClassifier(
        _AsItIs(p.shape[1]), confidence_level=list(CONFIDENCE_LEVELS), conformity_score="lac", prefit=True
    )
    peer.conformalize(p[:200], y[:200])
    sets = peer.predict_set(p[200:])[1]
    by_level = {str(level): sets[:, :, i].astype(int).tolist() for i, level in enumerate(CONFIDENCE_LEVELS)}
    return {"input": {"p": p.tolist(), "y": y.tolist()}, "expected": {"lac": {"split": by_level}}}


def crepes() -> dict[str, Any]:
    from crepes import ConformalClassifier

    p, y = _conformal_rows()
    alphas, all_alphas = 1 - p[:200][np.arange(200), y[:200]], 1 - p[200:]
    split = ConformalClassifier().fit(alphas)
    by_class = ConformalClassifier().fit(alphas, bins=y[:200])
    bins = np.tile(np.arange(p.shape[1]), (30, 1))
    sets: dict[str, Any] = {"split": {}, "class_conditional": {}}
    for level in CONFIDENCE_LEVELS:
        found = split.predict_set(all_alphas, confidence=level, smoothing=False)
        sets["split"][str(level)] = np.asarray(found).astype(int).tolist()
        found = np.stack(
            [
                by_class.predict_set(all_alphas[:, [k]], bins[:, k], confidence=level, smoothing=False)[:, 0]
                for k in range(p.shape[1])
            ],
            axis=1,
        )
        sets["class_conditional"][str(level)] = found.astype(int).tolist()
    return {"input": {"p": p.tolist(), "y": y.tolist()}, "expected": {"lac": sets}}


def conformal_time_series() -> dict[str, Any]:
    """The authors' conformal PID without its forecast, from a checkout of their repository (np.infty is np.inf by now)."""
    from core.methods import quantile_integrator_log

    scores = np.random.default_rng(0).random(400).round(6)
    options = {"alpha": 0.1, "lr": 0.05, "Csat": 0.3, "KI": 0.4, "T_burnin": 0}
    found = quantile_integrator_log(scores, **options)["q"]
    return {
        "version": "aangelopoulos/conformal-time-series 146054e",
        "settings": options,
        "input": {"scores": scores.tolist()},
        "expected": {"q": found.tolist()},
    }


TOOLS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "libsvm": ("libsvm-official", libsvm),
    "dirichletcal": ("dirichletcal", dirichletcal),
    "venn-abers": ("venn-abers", venn_abers),
    "torchcp": ("torchcp", torchcp),
    "mapie": ("mapie", mapie),
    "crepes": ("crepes", crepes),
    "conformal-time-series": ("", conformal_time_series),
}


def main() -> None:
    for name in sys.argv[1:] or TOOLS:
        package, record = TOOLS[name]
        provenance = {
            "tool": package or name,
            "version": version(package) if package else "",
            "command": f"python tests/calibrators/golden/record.py {name}",
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(provenance | record()) + "\n")


if __name__ == "__main__":
    main()
