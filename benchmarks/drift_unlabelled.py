"""Drift without labels: false alarms over chance references, delays, speed; causes told; now-casts held to the truth.

    OMP_NUM_THREADS=1 python -m benchmarks.drift_unlabelled [--seeds 20] [--references 300]

All on the streams of `benchmarks.drift_streams`, causes on those of `benchmarks.drift` too: 4,000 rows before a change.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from benchmarks import drift
from benchmarks.drift_streams import CHANGES, stream
from service.drift.attribution import cause
from service.drift.detectors.base import Array, Batch
from service.drift.detectors.score_shift import ScoreShift
from service.drift.nowcasts import Nowcasts

SIGNALS = ("confidence", "predicted_class", "confidence,margin,entropy,predicted_class", "input_0,ood_score")
CAUSES = ("none", "benign covariate", "temperature 2", "label noise", "input noise", "label shift", "one class")
N_BEFORE, N_AFTER = 4000, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--references", type=int, default=300)
    asked = parser.parse_args()
    false_alarms(asked.references)
    delays(asked.seeds)
    causes(asked.seeds)
    causes_of_logits(asked.seeds)
    nowcasts(asked.seeds)
    speed()


def rows(logits: Array, **signals: Array) -> Batch:
    n = len(logits)
    return Batch(logits, np.full(n, -1), np.zeros(n, dtype=np.int64), signals)


def false_alarms(references: int) -> None:
    print(f"Share of {references} references that ring within 100,000 rows of their own law; .10 is allowed")
    laws: dict[str, Callable[[np.random.Generator, int], Batch]] = {
        "number": lambda rng, n: rows(np.zeros((n, 2)), a=rng.random(n)),
        "predicted_class": lambda rng, n: rows(np.eye(10)[rng.integers(10, size=n)]),
    }
    for m in (500, 2000, 20_000):
        for name, law in laws.items():
            shares = []
            for slack in ("none", "normal", "exact"):
                made = (law(np.random.default_rng(seed), m + 100_000) for seed in range(references))
                signal = "a" if name == "number" else name
                rang = [ScoreShift(signal, reference_rows=m, slack=slack).update(batch) is not None for batch in made]
                shares.append(f"{slack} {np.mean(rang):.3f}")
            print(f"  {m:>6,} rows  {name:<16} {'  '.join(shares)}", flush=True)


def delays(seeds: int) -> None:
    print(f"\nRows until it rings, mean of {seeds} streams (in how many, if not in all)")
    for signals in SIGNALS:
        for slack, m in (("none", 2000), ("normal", 2000), ("exact", 2000), ("normal", 4000)):
            told = [f"{change} {_mean(_delays(change, seeds, signals, slack, m))}" for change in CHANGES]
            print(f"  {signals}, slack {slack}, reference {m:,}: {', '.join(told)}", flush=True)


def _delays(change: str, seeds: int, signals: str, slack: str, m: int) -> list[float]:
    found = []
    for seed in range(seeds):
        batch = stream(change, N_BEFORE + N_AFTER, N_BEFORE, 1000 + seed)
        rang = ScoreShift(signals, slack=slack, reference_rows=m).update(batch)
        found.append(np.nan if rang is None else rang + 1.0 - N_BEFORE)
    return found


def _mean(found: Sequence[float]) -> str:
    (rang,) = np.nonzero(np.isfinite(found))
    if not len(rang):
        return "-"
    return f"{np.mean(np.array(found)[rang]):,.0f}" + (f" ({len(rang)})" if len(rang) < len(found) else "")


def causes(seeds: int) -> None:
    for n in (1000, 400, 250):
        print(f"\nCauses told of {seeds} streams, {n} labels since the change: with signals of the inputs | without")
        for change in CAUSES:
            told, blind = Counter[str](), Counter[str]()
            for seed in range(seeds):
                batch = stream(change, N_BEFORE + n, N_BEFORE, 100 + seed)
                reference, since = batch.rows(slice(0, N_BEFORE)), batch.rows(slice(N_BEFORE, None))
                told[cause({}, reference, since).kind] += 1
                blind[cause({}, replace(reference, signals={}), replace(since, signals={})).kind] += 1
            print(f"  {change:<18} {dict(told)} | {dict(blind)}", flush=True)


def causes_of_logits(seeds: int, n: int = 1000) -> None:
    print(f"\nThe same on {seeds} streams of `benchmarks.drift`, of logits alone, {n} labels since the change")
    for change in drift.CHANGES:
        told = Counter[str]()
        for seed in range(seeds):
            batch = drift.changing(change, seed)
            before, since = slice(drift.CHANGE - N_BEFORE, drift.CHANGE), slice(drift.CHANGE, drift.CHANGE + n)
            told[cause({}, batch.rows(before), batch.rows(since)).kind] += 1
        print(f"  {change:<18} {dict(told)}", flush=True)


def nowcasts(seeds: int) -> None:
    print(f"\nAccuracy of 2,000 rows, {5 * seeds} streams: truth, mean error and share of intervals that hold it")
    for change in CAUSES:
        many = stream(change, 100_000, 1, 0)
        truth = float((many.logits.argmax(axis=1) == many.labels).mean())
        errors, held = np.zeros((5 * seeds, 2)), np.zeros((5 * seeds, 2))
        for seed in range(5 * seeds):
            batch = stream(change, 3000, 1000, 100 + seed)
            now = Nowcasts()
            now.read_labels(batch.rows(slice(0, 1000)))
            now.read(batch)
            without = now.accuracy_without_labels(ringing=False)
            now.begin_cohort()
            now.read_labels(batch.rows(slice(1000, 1300)))
            for k, told in enumerate((without, now.accuracy())):
                errors[seed, k] = told.estimate - truth
                held[seed, k] = told.low <= truth <= told.high
        (error, error_few), (share, share_few) = errors.mean(axis=0), held.mean(axis=0)
        few = f"300 labels {error_few:+.3f} {share_few:.2f}"
        print(f"  {change:<18} {truth:.3f}   no labels {error:+.3f} {share:.2f}   {few}", flush=True)


def speed() -> None:
    print("\nRows a second, one thread")
    rng, n = np.random.default_rng(0), 500_000
    for signals, n_classes in (("a", 2), ("confidence", 2), ("confidence", 10), (SIGNALS[2], 10)):
        batch = rows(rng.normal(size=(n, n_classes)), a=rng.normal(size=n))
        detector, best = ScoreShift(signals), 0.0
        detector.update(batch.rows(slice(0, 2000)))
        for _ in range(3):
            start = time.perf_counter()
            detector.update(batch)
            best = max(best, n / (time.perf_counter() - start))
        print(f"  {signals}, {n_classes} classes: {best / 1e6:.1f} million", flush=True)


if __name__ == "__main__":
    main()
