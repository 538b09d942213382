"""Other libraries' prediction sets behind one shape: calibrate on probabilities and labels, then sets of other rows.

None is a dependency; `peers.txt` pins what was compared. Each variant is one that covers as it claims: randomised where
there is a choice. TorchCP draws a number for each label of a row, MAPIE for each row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Sets = Callable[[Array], Array]
Peer = Callable[[Array, Array, float], Sets]
"""(probabilities, labels, confidence level) -> what makes sets of other rows' probabilities."""


def torchcp() -> dict[str, Peer]:
    import torch
    from torchcp.classification.predictor import SplitPredictor
    from torchcp.classification.score import APS, LAC, RAPS, SAPS, TOPK, Margin

    def of(make: Callable[[], Any]) -> Peer:
        def calibrate(p: Array, y: Array, level: float) -> Sets:
            predictor = SplitPredictor(make())
            predictor.calculate_threshold(torch.tensor(p), torch.tensor(y), 1 - level)
            return lambda rows: np.asarray(predictor.predict_with_logits(torch.tensor(rows)), dtype=bool)

        return calibrate

    own = {"score_type": "identity"}
    return {
        "lac": of(lambda: LAC(**own)),
        "aps": of(lambda: APS(**own)),
        "raps": of(lambda: RAPS(**own, penalty=0.01, kreg=5)),
        "saps": of(lambda: SAPS(**own, weight=0.2)),
        "margin": of(lambda: Margin(**own)),
        "top_k": of(lambda: TOPK(**own)),
    }


class _AsItIs:
    """A classifier for MAPIE whose probabilities are its input."""

    def __init__(self, n_classes: int) -> None:
        self.classes_ = np.arange(n_classes)

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def fit(self, *_: Any) -> Any:
        return self

    def predict(self, X: Array) -> Array:
        return X.argmax(axis=1)

    def predict_proba(self, X: Array) -> Array:
        return X / X.sum(axis=1, keepdims=True)


def mapie() -> dict[str, Peer]:
    from mapie.classification import SplitConformalClassifier

    def of(score: str) -> Peer:
        def calibrate(p: Array, y: Array, level: float) -> Sets:
            model = _AsItIs(p.shape[1])
            peer = SplitConformalClassifier(model, confidence_level=level, conformity_score=score, prefit=True)
            peer.conformalize(p, y)
            return lambda rows: np.asarray(peer.predict_set(rows)[1][:, :, 0], dtype=bool)

        return calibrate

    return {"lac": of("lac"), "aps": of("aps")}


def crepes() -> dict[str, Peer]:
    from crepes import ConformalClassifier

    def calibrate(p: Array, y: Array, level: float) -> Sets:
        peer = ConformalClassifier().fit(1 - p[np.arange(len(y)), y])
        return lambda rows: np.asarray(peer.predict_set(1 - rows, confidence=level, smoothing=False), dtype=bool)

    return {"lac": calibrate}


def find() -> tuple[dict[str, dict[str, Peer]], dict[str, str]]:
    """Tools that can be imported here, and of the others why not."""
    found, absent = {}, {}
    for name, load in (("TorchCP", torchcp), ("MAPIE", mapie), ("crepes", crepes)):
        try:
            found[name] = load()
        except ImportError as error:
            absent[name] = str(error)
    return found, absent
