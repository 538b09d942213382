"""The drift detectors of other libraries, in a Python that has them; `benchmarks.drift` starts this file there.

    python benchmarks/drift_peers.py STREAMS.npz NAMES

STREAMS.npz holds sets of streams, each (n_streams, len(SIGNALS), n_rows), and `reference` (len(SIGNALS), 2000), rows
from before. Printed is one line of JSON for each detector of NAMES and each set: where it rang in each stream, begun
anew after each alarm, and the rows that it read in a second.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

SIGNALS = ("residual", "brier", "wrong", "confidence")
"""Of a row: (1 + correct - confidence) / 2, (correct - confidence)^2, 1 - correct, confidence."""

PATIENCE = 20.0
"""Seconds of a detector, after which it is given no further stream."""

Step = Callable[[float], bool]
"""Reads a value; whether it rings, after which it has begun anew."""


def main() -> None:
    given = dict(np.load(sys.argv[1]))
    reference = given.pop("reference")
    for name in sys.argv[2].split(";"):
        make, signal = PEERS[name]
        which = SIGNALS.index(signal)
        try:
            for which_set, streams in given.items():
                rang, speed = run(partial(make, reference[which]), streams[:, which])
                print(json.dumps({"name": name, "set": which_set, "rang": rang, "rows_per_second": speed}), flush=True)
        except ImportError as absent:
            print(f"{name}: {absent}", file=sys.stderr)


def run(make: Callable[[], Step], streams: Any) -> tuple[list[list[int]], float]:
    rang, spent, rows = [], 0.0, 0
    for stream in streams:
        step = make()
        begun = time.thread_time()
        rang.append([t for t, x in enumerate(stream.tolist()) if step(x)])
        spent, rows = spent + time.thread_time() - begun, rows + len(stream)
        if spent > PATIENCE:
            break
    return rang, rows / spent


def river(name: str, _: Any, **parameters: Any) -> Step:
    from river import drift

    detector = getattr(drift, name, None) or getattr(drift.binary, name)
    made = detector(**parameters)

    def step(x: float) -> bool:
        made.update(x)
        return bool(made.drift_detected)  # it resets itself at the next value

    return step


def frouros(name: str, _: Any) -> Step:
    from frouros.detectors import concept_drift

    made = getattr(concept_drift, name)(config=getattr(concept_drift, f"{name}Config")())

    def step(x: float) -> bool:
        made.update(value=x)
        if not made.status["drift"]:
            return False
        made.reset()
        return True

    return step


def alibi(name: str, reference: Any) -> Step:
    made = alibi_detector(name, tuple(reference))
    made.reset_state()

    def step(x: float) -> bool:
        if not made.predict(np.array([x]))["data"]["is_drift"]:
            return False
        made.reset_state()
        return True

    return step


@cache
def alibi_detector(name: str, reference: tuple[float, ...]) -> Any:
    """For one false alarm in a thousand rows: its thresholds are simulated, which reaches no further in useful time."""
    from alibi_detect import cd

    values = np.array(reference, np.int64 if name == "FETDriftOnline" else np.float64)
    return getattr(cd, name)(values, ert=1000, window_sizes=[100, 200], n_bootstraps=2000, verbose=False)


PEERS: dict[str, tuple[Callable[..., Step], str]] = {
    "river ADWIN, residual": (partial(river, "ADWIN"), "residual"),
    "river ADWIN, Brier": (partial(river, "ADWIN"), "brier"),
    "river PageHinkley, residual": (partial(river, "PageHinkley"), "residual"),
    "river DDM, errors": (partial(river, "DDM"), "wrong"),
    "river HDDM_A, errors": (partial(river, "HDDM_A"), "wrong"),
    "frouros PageHinkley, Brier": (partial(frouros, "PageHinkley"), "brier"),
    "frouros CUSUM, Brier": (partial(frouros, "CUSUM"), "brier"),
    "frouros HDDMA, errors": (partial(frouros, "HDDMA"), "wrong"),
    "alibi-detect FET, errors": (partial(alibi, "FETDriftOnline"), "wrong"),
    "alibi-detect CVM, confidence": (partial(alibi, "CVMDriftOnline"), "confidence"),
}

if __name__ == "__main__":
    main()
