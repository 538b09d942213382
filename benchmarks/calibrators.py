"""This library and every installed peer on the same logits, in one process with one thread.

    OMP_NUM_THREADS=1 python -m benchmarks.calibrators [--only CIFAR] [--kinds temperature,auto] [--out results.txt]

For each data set: held-out log loss, Brier score, ECE (15 bins), adaptive, class-wise and smooth error, accuracy, and
how many rows came true at a probability of zero; then rows a second of fit and transform, each also as a multiple of
the softmax floor: `plain_softmax` of the same rows, timed in turn with what it is compared to. Seconds are those in
which the main thread works, so a busy machine does not stretch them. At the end, the goals and which of them are met.

Peers are found by import, none is a dependency:

    pip install --ignore-requires-python --no-deps dirichletcal==0.5.3
    pip install -c constraints.txt -r benchmarks/peers.txt

A peer that is absent is named with the reason; one that raises is listed with its message; zeros on a class that came
true give an infinite log loss.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import io
import logging
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

import calibrators
from benchmarks import peers
from benchmarks.datasets import DEFAULT_FOLDER, DataSet, load
from benchmarks.peers import Fit, Fitted, Logits, Peer
from calibrators import auto
from calibrators.metrics import (
    accuracy,
    adaptive_calibration_error,
    brier_score,
    classwise_calibration_error,
    expected_calibration_error,
    log_loss,
    smooth_calibration_error,
)
from calibrators.metrics.proper import log_losses

METRICS: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
    "log loss": log_loss,
    "Brier": brier_score,
    "ECE": expected_calibration_error,
    "adaptive": adaptive_calibration_error,
    "class-wise": classwise_calibration_error,
    "smooth": smooth_calibration_error,
    "accuracy": accuracy,
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h

TIMING_SECONDS = 0.1
LEAST_ROUNDS = 5
QUICK_FIT_SECONDS = 0.5
AUTO_SECONDS = 1200
"""Budget of `auto`, ten times its default: it is by the clock, and what is chosen must not hang on a busy machine."""

LINEAR = ("temperature", "class_prior", "vector", "structured_vector")
BINNED = ("isotonic", "histogram_binning", "scaling_binning", "bbq")
MOST_SOFTMAXES = dict.fromkeys(LINEAR, 1.5) | dict.fromkeys(BINNED, 6.0)
"""Goal: a transform of many classes (100 and more) in so many times the softmax of its rows."""

RESAMPLES = 400

MOST_OVER_BEST_PEER = 1.01
MOST_OVER_TEMPERATURE = 1.003
LEAST_ROWS_PER_SECOND = 150_000
"""Goal: rows a second of a temperature fit at 100 classes."""


@dataclass(frozen=True)
class Result:
    """One calibrator on one data set; `failed` says why there are no scores. Speeds are rows a second."""

    name: str
    ours: bool
    scores: dict[str, float]
    zeros: int = 0
    fit_speed: float = math.nan
    fit_per_softmax: float = math.nan
    transform_speed: float = math.nan
    transform_per_softmax: float = math.nan
    failed: str = ""
    losses: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    """Log loss of each test row."""


# ---- one calibrator on one data set


def ours(only: list[str], *, time_ordered: bool) -> Iterator[Peer]:
    for kind in calibrators.kinds():
        if (not only or kind in only) and not calibrators.create(kind).fit_needs:  # logits are all that there is
            yield Peer(kind, fit_by(kind))
    if not only or "auto" in only:
        options: dict[str, Any] = {"budget_seconds": AUTO_SECONDS, "time_ordered": time_ordered}
        yield Peer("auto", lambda z, y: auto.select(z, y, **options).calibrator)


def fit_by(kind: str) -> Fit:
    return lambda z, y: calibrators.create(kind).fit(z, y)


def run(candidate: Peer, data: DataSet, *, is_ours: bool, limit_seconds: float) -> Result:
    """Fit on the calibration rows, score on the test rows; a peer may fail in any way, and the table says so."""
    if data.n_classes > candidate.most_classes:
        return Result(candidate.name, is_ours, {}, failed=f"not run beyond {candidate.most_classes} classes")
    try:
        with time_limit(math.inf if candidate.name == "auto" else limit_seconds), silence():
            fitted, seconds = timed_fit(candidate.fit, data)
            begun = time.thread_time()
            probabilities = as_rows(fitted.predict_proba(data.test_logits), data.n_classes)
            first_transform = time.thread_time() - begun
    except Exception as error:
        return Result(candidate.name, is_ours, {}, failed=f"raised {type(error).__name__}: {error}"[:150])
    with silence():
        transform, floor = in_turn(lambda: fitted.predict_proba(data.test_logits), data.test_logits, first_transform)
    fit_floor = floor * len(data.labels) / len(data.test_labels)
    return Result(
        candidate.name,
        is_ours,
        {metric: function(probabilities, data.test_labels) for metric, function in METRICS.items()},
        zeros=int((probabilities[np.arange(len(probabilities)), data.test_labels] == 0).sum()),
        fit_speed=len(data.labels) / seconds,
        fit_per_softmax=seconds / fit_floor,
        transform_speed=len(data.test_labels) / transform,
        transform_per_softmax=transform / floor,
        losses=log_losses(probabilities, data.test_labels),
    )


def as_rows(probabilities: NDArray[Any], n_classes: int) -> NDArray[np.float64]:
    """(n, K) float64 rows that sum to one, as the metrics want them; some peers give one column, or loose sums."""
    p = np.asarray(probabilities, dtype=np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], axis=1)
    if p.shape[1] != n_classes:
        raise ValueError(f"{p.shape[1]} columns for {n_classes} classes")
    sums: NDArray[np.float64] = p.sum(axis=1, keepdims=True)
    if not (sums > 0).all():
        raise ValueError(f"{np.count_nonzero(~(sums > 0))} rows of probabilities sum to zero or are not numbers")
    return np.asarray(p / sums)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError in the main thread once the process has worked so long."""

    def over(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done in {seconds:g} s")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, 0 if math.isinf(seconds) else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---- timing


def plain_softmax(logits: Logits) -> Logits:
    """The floor: what any transform of logits must do at least, in the four numpy calls that do it."""
    p: Logits = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def keep_freed_memory() -> None:
    """Freed memory stays with the process, where the C library is glibc and lets us say so.

    Else it depends on what ran before whether large arrays are new pages of the system, and a softmax costs 2.4 to 12
    nanoseconds a number: the floor would move more than what is measured against it.
    """
    with contextlib.suppress(AttributeError, OSError):
        c_library = ctypes.CDLL(None)
        c_library.mallopt(M_MMAP_THRESHOLD, 1 << 25)
        c_library.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def timed_fit(fit: Fit, data: DataSet) -> tuple[Fitted, float]:
    """The fit and its seconds; a quick one is made three times, so that no import or compilation is counted."""
    times: list[float] = []
    while not times or (len(times) < 3 and times[-1] < QUICK_FIT_SECONDS):
        begun = time.thread_time()
        fitted = fit(data.logits, data.labels)
        times.append(time.thread_time() - begun)
    return fitted, min(times)


def in_turn(work: Callable[[], object], logits: Logits, first: float) -> tuple[float, float]:
    """Median seconds of the work and of one softmax, made in turn; work of over a second is not made again."""
    rounds: list[tuple[float, float]] = []
    end = time.thread_time() + TIMING_SECONDS
    while len(rounds) < LEAST_ROUNDS or time.thread_time() < end:
        begun = time.thread_time()
        plain_softmax(logits)
        between = time.thread_time()
        if first < 1:
            work()
        rounds.append((time.thread_time() - between, between - begun))
    transform, floor = np.median(rounds, axis=0)
    return (transform if first < 1 else first), floor


# ---- what is printed


def show(data: DataSet, results: list[Result], console: Console) -> None:
    table = Table(title=f"{data.name}: {len(data.labels)} rows to fit on, {len(data.test_labels)} to test on")
    table.add_column("calibrator", no_wrap=True)
    for heading in (*METRICS, "zeros", "fit rows/s", "/ softmax", "transform rows/s", "/ softmax"):
        table.add_column(heading, justify="right")
    for result in sorted((r for r in results if not r.failed), key=lambda result: result.scores["log loss"]):
        table.add_row(
            result.name,
            *(f"{result.scores[metric]:.4f}" for metric in METRICS),
            str(result.zeros or ""),
            f"{result.fit_speed:,.0f}",
            f"{result.fit_per_softmax:.1f}",
            f"{result.transform_speed:,.0f}",
            f"{result.transform_per_softmax:.1f}",
            style="bold" if result.ours else None,
        )
    console.print(table)
    for result in results:
        if result.failed:
            console.print(f"  {result.name}: {result.failed}", style="dim", markup=False)


@dataclass(frozen=True)
class Standing:
    """The log loss of `auto` on one data set, over that of the best peer in hindsight and of temperature scaling.

    `interval` is that of `to_peer`, 95 % by bootstrap of the test rows. `to_chosen` is what is left when the peer may
    not be chosen by the rows that score it: the median, over random halvings of the test rows, of the ratio on one half
    to the peer that is best on the other.
    """

    data_set: str
    peer: str
    to_peer: float
    interval: tuple[float, float]
    to_chosen: float
    to_temperature: float


def standings(found: dict[str, list[Result]]) -> list[Standing]:
    listed = []
    for name, results in found.items():
        own = {result.name: result.losses for result in results if result.ours and not result.failed}
        rivals = {result.name: result.losses for result in results if not result.ours and not result.failed}
        if "auto" in own and rivals:
            best = min(rivals, key=lambda peer: float(rivals[peer].mean()))
            to_peer = float(own["auto"].mean() / rivals[best].mean())
            to_temperature = float(own["auto"].mean() / own["temperature"].mean()) if "temperature" in own else math.nan
            interval = ratio_interval(own["auto"], rivals[best])
            to_chosen = ratio_to_chosen(own["auto"], np.stack(list(rivals.values())))
            listed.append(Standing(name, best, to_peer, interval, to_chosen, to_temperature))
    return listed


def ratio_interval(losses: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[float, float]:
    """95 % interval of the ratio of mean losses on the same rows, by bootstrap."""
    rng = np.random.default_rng(0)
    draws = (rng.integers(0, len(losses), len(losses)) for _ in range(RESAMPLES))
    low, high = np.quantile([losses[rows].mean() / others[rows].mean() for rows in draws], [0.025, 0.975])
    return float(low), float(high)


def ratio_to_chosen(losses: NDArray[np.float64], rivals: NDArray[np.float64]) -> float:
    """Median ratio of the mean loss on half of the rows to that of the rival (m, n_rows) best on the other half."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        choosing, scoring = np.array_split(rng.permutation(len(losses)), 2)
        chosen = rivals[rivals[:, choosing].mean(axis=1).argmin()]
        ratios.append(losses[scoring].mean() / chosen[scoring].mean())
    return float(np.median(ratios))


def show_standings(listed: list[Standing], console: Console) -> None:
    table = Table(title="held-out log loss of auto, as a ratio")
    table.add_column("data set")
    for heading in ("to the best peer in hindsight", "95 %", "which", "to one chosen on other rows", "to temperature"):
        table.add_column(heading, justify="right")
    for standing in listed:
        low, high = standing.interval
        ratios = f"{standing.to_peer:.4f}", f"{low:.3f}-{high:.3f}", standing.peer, f"{standing.to_chosen:.4f}"
        table.add_row(standing.data_set, *ratios, f"{standing.to_temperature:.4f}")
    console.print(table)


def goals(listed: list[Standing], slow: dict[str, float], fit_speed: dict[str, float]) -> Iterator[str]:
    """Each goal with what was measured, and what falls short of it."""

    def beyond(limit: float, ratios: dict[str, float]) -> str:
        over = [f"{name} {ratio:.4f}" for name, ratio in ratios.items() if ratio > limit]
        return f"{len(ratios) - len(over)} of {len(ratios)}; over: {', '.join(over) or 'none'}"

    to_peer = {standing.data_set: standing.to_peer for standing in listed}
    to_temperature = {standing.data_set: standing.to_temperature for standing in listed}
    yield f"auto at or below the best peer in hindsight (wanted: 8 in 10): {beyond(1.0, to_peer)}"
    yield f"auto at most 1 % above the best peer (wanted: all): {beyond(MOST_OVER_BEST_PEER, to_peer)}"
    yield f"auto at most .3 % above temperature (wanted: all): {beyond(MOST_OVER_TEMPERATURE, to_temperature)}"
    shares = {name: ratio for name, ratio in slow.items() if ratio > 1}
    yield (
        f"transforms within 1.5 softmax (linear) or 6 (isotonic, binning) at 100 classes and more: "
        f"{len(slow) - len(shares)} of {len(slow)}; as a share of what is allowed: "
        + (", ".join(f"{name} {ratio:.2f}" for name, ratio in shares.items()) or "none over")
    )
    for name, speed in fit_speed.items():
        yield f"temperature fit (wanted: {LEAST_ROWS_PER_SECOND:,} rows/s at K=100), {name}: {speed:,.0f} rows/s"


def transform_shares(found: dict[str, list[Result]], n_classes: dict[str, int]) -> dict[str, float]:
    """Transform time over what the goal allows, by kind and data set, of the sets with many classes."""
    return {
        f"{result.name} K={n_classes[name]}": result.transform_per_softmax / MOST_SOFTMAXES[result.name]
        for name, results in found.items()
        for result in results
        if n_classes[name] >= 100 and result.name in MOST_SOFTMAXES and not result.failed
    }


def temperature_speeds(found: dict[str, list[Result]], n_classes: dict[str, int]) -> dict[str, float]:
    """Rows a second of the temperature fit on the sets of 100 classes."""
    return {
        name: result.fit_speed
        for name, results in found.items()
        for result in results
        if result.name == "temperature" and n_classes[name] == 100
    }


# ---- the command


def main() -> None:
    arguments = parse()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    keep_freed_memory()
    console = Console(record=True, width=190)
    rivals, absent = ([], {}) if arguments.no_peers else peers.find()
    for tool, reason in absent.items():
        console.print(f"absent: {tool} ({reason})", markup=False)
    found: dict[str, list[Result]] = {}
    n_classes: dict[str, int] = {}
    with threadpool_limits(1):
        for data in load(arguments.shared_data, arguments.only):
            n_classes[data.name] = data.n_classes
            found[data.name] = compare(data, arguments.kinds.split(","), rivals, arguments.limit_seconds)
            show(data, found[data.name], console)
    show_standings(standings(found), console)
    for line in goals(standings(found), transform_shares(found, n_classes), temperature_speeds(found, n_classes)):
        console.print(line, markup=False)
    if arguments.out:
        arguments.out.write_text(console.export_text())


def compare(data: DataSet, kinds: list[str], rivals: list[Peer], limit_seconds: float) -> list[Result]:
    own = ours([kind for kind in kinds if kind], time_ordered=data.time_ordered)
    return [
        *(run(kind, data, is_ours=True, limit_seconds=limit_seconds) for kind in own),
        *(run(peer, data, is_ours=False, limit_seconds=limit_seconds) for peer in rivals),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shared-data", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--only", default="", help="part of a data set's name")
    parser.add_argument("--kinds", default="", help="of ours, comma-separated (default: all, and auto)")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--limit-seconds", type=float, default=60, help="of a fit and a first transform, but of auto")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
