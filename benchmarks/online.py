"""Online calibration: the published runs reproduced, six made streams, many classes, and labels a second.

    OMP_NUM_THREADS=1 python -m benchmarks.online [--ops-data DIR] [--runs 3] [--seeds 8] [--only streams,speed]

`--ops-data` is a folder with bank.csv and the authors' results_bank_0.npy and results_beta_scaling_bank_0.npy (Gupta,
Ramdas, ICML 2023; repository AIgen/df-posthoc-calibration): their forests are grown again, seed by seed, which takes
ten seconds each, and every calibration error is compared with theirs. The streams are made here; the constants of
`calibrators.online.experts` were chosen on other seeds of the same.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_softmax, softmax
from sklearn.ensemble import RandomForestClassifier

import calibrators
from calibrators.metrics import log_loss
from calibrators.online import calibeating, experts, newton

Array = NDArray[Any]
Drift = Callable[[Array, Array], Array]

FIRST_SEED = 100
PUBLISHED = {
    "BM": 0.03159,
    "OPS": 0.03018,
    "TOPS": 0.00688,
    "HOPS": 0.01784,
    "OBS": 0.01847,
    "TOBS": 0.00771,
    "HOBS": 0.01622,
}
"""Mean calibration error of 100 runs on bank, iid, as the paper prints it."""

N_ROWS, REFIT_EVERY = 30_000, 100
DRIFTS: dict[str, Drift] = {
    "true already": lambda s, _: s,
    "overconfident": lambda s, _: 0.5 * s,
    "two jumps": lambda s, t: np.where(t < 1 / 3, s, np.where(t < 2 / 3, 0.5 * s - 0.5, 0.8 * s + 0.7)),
    "gradual": lambda s, t: (1 - 0.6 * t) * s + 0.6 * t,
    "cycle": lambda s, t: (1 - 0.3 * np.abs(np.sin(12 * np.pi * t))) * s + 0.9 * np.sin(12 * np.pi * t),
    "no sigmoid": lambda s, _: np.where(s > 0, 0.35 * s, s) + 0.9 * np.sin(1.5 * s) * (np.abs(s) < 4),
}

N_CLASSES, N_MANY, CHANGE = 10, 20_000, 8_000
CHANGES = ("none", "temperature", "priors", "two classes", "inputs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops-data", type=Path)
    parser.add_argument("--runs", type=int, default=3, help="of the published hundred")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--only", default="published,streams,classes,speed")
    asked = parser.parse_args()
    parts: dict[str, Callable[[], None]] = {
        "published": partial(published, asked.ops_data, min(asked.runs, 100)),
        "streams": partial(streams, asked.seeds),
        "classes": partial(many_classes, asked.seeds),
        "speed": speed,
    }
    for name in asked.only.split(","):
        parts[name]()


# ---- the published runs


def published(folder: Path | None, runs: int) -> None:
    if folder is None:
        return
    recorded = np.load(folder / "results_bank_0.npy")[:, :, -1]
    recorded_beta = np.load(folder / "results_beta_scaling_bank_0.npy")[:, :, -1]
    print("Published: bank, iid, calibration error over labels 1,000 to 11,000")
    worst, errors = dict.fromkeys(PUBLISHED, 0.0), []
    for seed in range(runs):
        ours = _run(folder / "bank.csv", seed)
        theirs = dict(zip(ours, recorded[seed][[0, 3, 4, 5]], strict=False))
        theirs |= dict(zip(("OBS", "TOBS", "HOBS"), recorded_beta[seed][[1, 4, 5]], strict=True))
        errors.append(ours)
        worst = {name: max(worst[name], abs(ours[name] - theirs[name])) for name in worst}
        print(f"  seed {seed}: largest difference so far {max(worst.values()):.1e}", flush=True)
    for name, value in PUBLISHED.items():
        mean = np.mean([error[name] for error in errors])
        print(
            f"  {name:5} mean of {runs} run(s) {mean:.5f}   published mean of 100 {value:.5f}   "
            f"largest difference to a saved run {worst[name]:.1e}"
        )


def _run(file: Path, seed: int) -> dict[str, float]:
    """One run of the authors' experiment: calibration error by method. The draws are in the order that theirs are."""
    np.random.seed(seed)  # noqa: NPY002  # theirs are of the global generator
    x, y = _bank(file)
    forest = RandomForestClassifier(n_estimators=1000).fit(x[:1000], y[:1000])
    p, y = forest.predict_proba(x[1000:])[:, 1], y[1000:]
    state = np.random.get_state()  # noqa: NPY002
    said = {"BM": p}
    for letter, learner in (("P", newton.online_platt), ("B", newton.online_beta)):
        np.random.set_state(state)  # noqa: NPY002
        forecasts = learner(p, y)
        said[f"O{letter}S"] = forecasts
        said[f"TO{letter}S"] = calibeating.tracked(forecasts, y)
        said[f"HO{letter}S"] = calibeating.hedged(forecasts, y, np.random.uniform(size=len(y)))  # noqa: NPY002
    return {name: _calibration_error(q[1000:], y[1000:]) for name, q in said.items()}


def _bank(file: Path) -> tuple[Array, Array]:
    """12,000 shuffled rows: numbers as they are, then one column for each word of a column but its first."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    names = [name for name in rows[0] if name not in ("ID", "y")]
    words = [name for name in names if not rows[0][name].lstrip("-").isdigit()]
    columns = [np.array([int(row[name]) for row in rows]) for name in names if name not in words]
    for name in words:
        values = np.array([row[name] for row in rows])
        columns += [values == value for value in np.unique(values)[1:]]
    y = np.array([row["y"] == "yes" for row in rows]).astype(np.int64)
    chosen = np.random.permutation(len(rows))[:12_000]  # noqa: NPY002
    return np.column_stack(columns).astype(object)[chosen], y[chosen]


def _calibration_error(p: Array, y: Array) -> float:
    bins = calibeating.bins_of(p)
    each = (np.sum(bins == k) * abs(p[bins == k].mean() - y[bins == k].mean()) for k in np.unique(bins))
    return float(sum(each) / len(y))


# ---- six streams of two classes


def streams(seeds: int) -> None:
    print(f"\nTwo classes, {N_ROWS} labels, {seeds} seeds: excess Brier score / log loss over the truth, x 1e4")
    table: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, drift in DRIFTS.items():
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            scores, y, truth = _stream(drift, seed)
            for method, p in _binary_methods(scores, y):
                table.setdefault(method, {}).setdefault(name, []).append(_excess(p, truth))
    print(" " * 22 + "".join(f"{name:>16}" for name in DRIFTS))
    for method, found in table.items():
        means = (np.mean(values, axis=0) for values in found.values())
        print(f"{method:22}" + "".join(f"{brier:8.2f}/{loss:7.2f}" for brier, loss in means))


def _stream(drift: Drift, seed: int) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(-0.3, 2.0, size=N_ROWS)
    truth = expit(drift(scores, np.arange(N_ROWS) / N_ROWS))
    return scores, (rng.random(N_ROWS) < truth).astype(np.int64), truth


def _excess(p: Array, truth: Array) -> tuple[float, float]:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    divergence = truth * np.log(truth / p) + (1 - truth) * np.log((1 - truth) / (1 - p))
    return 1e4 * float(np.mean((p - truth) ** 2)), 1e4 * float(np.mean(divergence))


def _binary_methods(scores: Array, y: Array) -> Iterator[tuple[str, Array]]:
    model, logits = expit(scores), np.column_stack([np.zeros(len(scores)), scores])
    published = newton.online_platt(model, y)
    yield "the model", model
    yield "OPS (published)", published
    yield "TOPS (published)", calibeating.tracked(published, y)
    yield "HOPS (published)", calibeating.hedged(published, y, np.random.default_rng(0).random(len(y)))
    yield "refit on all past", _refitted(scores, y, len(y))
    yield "refit on last 1,000", _refitted(scores, y, 1000)
    yield "refit on last 500", _refitted(scores, y, 500)
    for kind in ("online_platt", "online_beta"):
        yield kind, calibrators.create(kind).learn(logits, y)[:, 1]  # type: ignore[attr-defined]


def _refitted(scores: Array, y: Array, window: int) -> Array:
    """Platt's map fitted again every REFIT_EVERY labels on the last `window` of them, by Newton's method."""
    said, theta = expit(scores), np.array([1.0, 0.0])
    for now in range(REFIT_EVERY, len(y), REFIT_EVERY):
        past = slice(max(0, now - window), now)
        x = np.column_stack([scores[past], np.ones(now - past.start)])
        for _ in range(6):
            p = expit(x @ theta)
            hessian = (x.T * (p * (1 - p))) @ x + 1e-3 * np.eye(2)
            theta = theta - np.linalg.solve(hessian, x.T @ (p - y[past]))
        said[now : now + REFIT_EVERY] = expit(theta[0] * scores[now : now + REFIT_EVERY] + theta[1])
    return said


# ---- many classes


def many_classes(seeds: int) -> None:
    print(f"\n{N_CLASSES} classes, {N_MANY} labels, a change at {CHANGE}: log loss after it, {seeds} seeds")
    table: dict[str, dict[str, list[float]]] = {}
    for change in CHANGES:
        for seed in range(FIRST_SEED, FIRST_SEED + seeds):
            logits, y = _many(change, seed)
            for method, p in _multiclass_methods(logits, y):
                table.setdefault(method, {}).setdefault(change, []).append(log_loss(p[CHANGE:], y[CHANGE:]))
    print(" " * 40 + "".join(f"{change:>13}" for change in CHANGES))
    for method, found in table.items():
        print(f"{method:40}" + "".join(f"{np.mean(values):13.4f}" for values in found.values()))


def _many(change: str, seed: int) -> tuple[Array, Array]:
    """Gaussian classes, and the logits that are right before the change."""
    rng = np.random.default_rng(seed)
    after = np.arange(N_MANY) >= CHANGE
    y = rng.integers(0, N_CLASSES, size=N_MANY)
    if change == "priors":
        y[after] = rng.choice(N_CLASSES, size=after.sum(), p=rng.dirichlet(np.full(N_CLASSES, 0.5)))
    noise = np.where(after & (change == "inputs"), 1.6, 1.0)[:, None]
    logits = 2.05 * (2.05 * np.eye(N_CLASSES)[y] + noise * rng.normal(size=(N_MANY, N_CLASSES)))
    if change == "temperature":
        logits[after] *= 2
    if change == "two classes":
        logits[after, :2] += 2.0, -2.0
    return logits, y


def _multiclass_methods(logits: Array, y: Array) -> Iterator[tuple[str, Array]]:
    yield "the model", softmax(logits, axis=1)
    yield "online Newton step, full matrix (K^2)", _full_newton(logits, y)
    for kind in ("online_temperature", "online_platt"):
        yield kind, calibrators.create(kind).learn(logits, y)  # type: ignore[attr-defined]


def _full_newton(logits: Array, y: Array, gamma: float = 0.1, ridge: float = 0.01) -> Array:
    """Temperature and biases by the online Newton step with its whole matrix, started at the identity."""
    z = logits - logits.mean(axis=1, keepdims=True)
    n_classes = z.shape[1]
    theta, inverse, said = np.append(np.zeros(n_classes), 1.0), np.eye(n_classes + 1) / ridge, np.empty(z.shape)
    for t in range(len(z)):
        said[t] = np.exp(log_softmax(theta[-1] * z[t] + theta[:-1]))
        error = said[t] - np.eye(n_classes)[y[t]]
        gradient = np.append(error, error @ z[t])
        pulled = inverse @ gradient
        inverse -= np.outer(pulled, pulled) / (1 + gradient @ pulled)
        theta = theta - inverse @ gradient / gamma
    return np.clip(said, 1e-12, 1)


# ---- speed


def speed(rounds: int = 5) -> None:
    print("\nLabels a second, one thread, the best of five rounds of its own time")
    cases = [("online_platt", 2, 100_000), ("online_beta", 2, 100_000), ("online_temperature", 2, 100_000)]
    cases += [("online_platt", 10, 20_000), ("online_beta", 10, 20_000), ("online_temperature", 10, 50_000)]
    cases += [("online_temperature", 1000, 1_000)]
    rng, works = np.random.default_rng(0), {}
    for kind, n_classes, n in cases:
        logits, y = rng.normal(size=(n, n_classes)), rng.integers(0, n_classes, size=n)
        learn = calibrators.create(kind).learn  # type: ignore[attr-defined]
        works[f"{kind} K={n_classes}"] = partial(learn, logits, y), n
    scores, labels = rng.normal(size=200_000), rng.integers(0, 2, size=200_000).astype(np.float64)
    state, weight = experts.start(beta=False), np.ones(len(labels))
    works["its learner alone"] = partial(experts.learn, state, scores, labels, weight, beta=False), len(labels)
    works["OPS (published)"] = partial(newton.online_platt, expit(scores), labels), len(labels)
    for name, (work, n) in works.items():
        work()  # compiled before it is timed
        print(f"  {name:28}{_per_second(work, n, rounds):12,.0f}")


def _per_second(work: Callable[[], object], n: int, rounds: int) -> float:
    spent = []
    for _ in range(rounds):
        begun = time.thread_time()
        work()
        spent.append(time.thread_time() - begun)
    return n / min(spent)


if __name__ == "__main__":
    main()
