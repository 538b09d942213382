"""Records what other implementations say, for `test_golden.py` to compare with.

    python tests/calibrators/golden/record.py [libsvm] [dirichletcal] [venn-abers]

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


TOOLS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "libsvm": ("libsvm-official", libsvm),
    "dirichletcal": ("dirichletcal", dirichletcal),
    "venn-abers": ("venn-abers", venn_abers),
}


def main() -> None:
    for name in sys.argv[1:] or TOOLS:
        package, record = TOOLS[name]
        provenance = {
            "tool": package,
            "version": version(package),
            "command": f"python tests/calibrators/golden/record.py {name}",
            "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        }
        (FOLDER / f"{name}.json").write_text(json.dumps(provenance | record()) + "\n")


if __name__ == "__main__":
    main()
