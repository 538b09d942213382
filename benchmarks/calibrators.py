"""This library and every installed peer on the same logits, in one process with one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.calibrators [--only CIFAR] [--kinds temperature,auto] [--out results.md]

For each data set: held-out log loss, Brier score, ECE (15 bins), adaptive and class-wise error, accuracy; fit in
rows/s, transform as a multiple of one softmax pass over the same rows. Peers are found by import and left out if absent
(`pip install probmetrics numba netcal venn-abers`); none is a dependency. Timings are ratios of one run, side by side.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import calibrators
from benchmarks.datasets import DEFAULT_FOLDER, DataSet, load
from calibrators import auto
from calibrators.metrics import (
    accuracy,
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    log_loss,
)
from calibrators.numerics import softmax

METRICS: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "log loss": log_loss,
    "Brier": brier_score,
    "ECE": expected_calibration_error,
    "adaptive": adaptive_calibration_error,
    "class-wise": classwise_calibration_error,
    "accuracy": accuracy,
}
TRANSFORM_SECONDS = 0.3
SLOW_PEERS = {"probmetrics sms": 250, "probmetrics ivap": 50}
"""Most classes for which a peer ends in minutes."""


class Fitted(Protocol):
    def predict_proba(self, logits: NDArray[np.float64], /) -> NDArray[Any]: ...


Fit = Callable[[NDArray[np.float64], NDArray[np.int64]], Fitted]


@dataclass(frozen=True)
class Result:
    """One calibrator on one data set; `failed` says why there are no scores."""

    name: str
    scores: dict[str, float]
    fit_rows_per_second: float = math.nan
    transform_per_softmax: float = math.nan
    failed: str = ""


@dataclass(frozen=True)
class OnProbabilities:
    """A peer that takes probabilities and keeps its fit."""

    peer: Any
    predict: str = "predict_proba"

    def predict_proba(self, logits: NDArray[np.float64], /) -> NDArray[Any]:
        return np.asarray(getattr(self.peer, self.predict)(softmax(logits)))


def ours(only: list[str]) -> Iterator[tuple[str, Fit]]:
    for kind in calibrators.kinds():
        if not only or kind in only:
            yield kind, lambda z, y, kind=kind: calibrators.create(kind).fit(z, y)
    if not only or "auto" in only:
        yield "auto", lambda z, y: auto.select(z, y).calibrator


def peers() -> Iterator[tuple[str, Fit]]:
    """What is installed of the peers, each as published."""
    with contextlib.suppress(ImportError):
        from probmetrics.calibrators import get_calibrator

        def probmetrics(method: str) -> Fit:
            return lambda z, y: OnProbabilities(get_calibrator(method).fit(softmax(z), y))

        for method in ("temp-scaling", "guo-ts", "isotonic", "svs", "sms", "ivap"):
            yield f"probmetrics {method}", probmetrics(method)
        for method in ("beta", "quadratic-scaling", "platt-logits"):
            yield f"probmetrics {method} (binary)", probmetrics(method)
    with contextlib.suppress(ImportError):
        from netcal.binning import BBQ, HistogramBinning
        from netcal.scaling import TemperatureScaling

        def netcal(make: Callable[[], Any]) -> Fit:
            def fit(z: NDArray[np.float64], y: NDArray[np.int64]) -> Fitted:
                peer = make()
                peer.fit(softmax(z), y)
                return OnProbabilities(peer, "transform")

            return fit

        for kind in (TemperatureScaling, HistogramBinning, BBQ):
            yield f"netcal {kind.__name__}", netcal(kind)


def run(name: str, fit: Fit, data: DataSet, softmax_seconds: float) -> Result:
    """Fit on the calibration rows, score on the test rows."""
    if data.n_classes > SLOW_PEERS.get(name, data.n_classes) or ("(binary)" in name and data.n_classes > 2):
        return Result(name, {}, failed="not run at this number of classes")
    begun = time.perf_counter()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            fitted = fit(data.logits, data.labels)
        seconds = time.perf_counter() - begun
        probabilities = _both_columns(fitted.predict_proba(data.test_logits))
        scores = {metric: function(probabilities, data.test_labels) for metric, function in METRICS.items()}
    except Exception as error:  # peers fail in their own ways, and the table says so
        return Result(name, {}, failed=f"{type(error).__name__}: {error}"[:60])
    transform = best_seconds(lambda: fitted.predict_proba(data.test_logits))
    return Result(name, scores, len(data.labels) / seconds, transform / softmax_seconds)


def best_seconds(work: Callable[[], object]) -> float:
    """The fastest of as many runs as fit in the time given, three at least."""
    times: list[float] = []
    end = time.perf_counter() + TRANSFORM_SECONDS
    while len(times) < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def _both_columns(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """(n, K) float64 rows that sum to one, as the metrics want them; some peers give one column, or float32 sums."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)
    return p / p.sum(axis=1, keepdims=True)


def show(data: DataSet, results: list[Result], console: Console) -> None:
    table = Table(title=f"{data.name}: {len(data.labels)} rows to fit on, {len(data.test_labels)} to test on")
    table.add_column("calibrator", no_wrap=True)
    for heading in (*METRICS, "fit rows/s", "transform / softmax"):
        table.add_column(heading, justify="right")
    done = sorted((r for r in results if not r.failed), key=lambda result: result.scores["log loss"])
    for result in done:
        values = [f"{result.scores[metric]:.4f}" for metric in METRICS]
        style = None if result.name.startswith(("probmetrics", "netcal")) else "bold"
        table.add_row(
            result.name,
            *values,
            f"{result.fit_rows_per_second:,.0f}",
            f"{result.transform_per_softmax:.1f}",
            style=style,
        )
    console.print(table)
    for result in results:
        if result.failed:
            console.print(f"  {result.name}: {result.failed}", style="dim", markup=False)


def summarise(found: dict[str, list[Result]], console: Console) -> None:
    """auto against the best peer in hindsight and against temperature scaling, by ratio of log losses."""
    table = Table(title="held-out log loss of auto, as a ratio")
    for heading in ("data set", "to the best peer in hindsight", "to temperature scaling"):
        table.add_column(heading, justify="right" if heading != "data set" else "left")
    for name, results in found.items():
        losses = {result.name: result.scores["log loss"] for result in results if not result.failed}
        of_peers = {peer: loss for peer, loss in losses.items() if peer.startswith(("probmetrics", "netcal"))}
        if "auto" in losses and of_peers:
            best = min(of_peers, key=of_peers.__getitem__)
            to_temperature = losses["auto"] / losses["temperature"] if "temperature" in losses else math.nan
            table.add_row(name, f"{losses['auto'] / of_peers[best]:.4f} ({best})", f"{to_temperature:.4f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--only", default="", help="part of a data set's name")
    parser.add_argument("--kinds", default="", help="of ours, comma-separated (default: all, and auto)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console(record=True, width=160)
    chosen = [kind for kind in arguments.kinds.split(",") if kind]
    found: dict[str, list[Result]] = {}
    for data in load(arguments.shared_data, arguments.only):
        floor = best_seconds(lambda data=data: softmax(data.test_logits))
        fits = [*ours(chosen), *([] if arguments.no_peers else peers())]
        found[data.name] = [run(name, fit, data, floor) for name, fit in fits]
        show(data, found[data.name], console)
    summarise(found, console)
    if arguments.out:
        arguments.out.write_text(console.export_text())


if __name__ == "__main__":
    main()
