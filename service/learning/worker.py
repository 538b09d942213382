"""The process that fits: `python -m service.learning.worker FOLDER`.

Reads a job's folder, writes its result there, and prints one JSON line for each step of progress. It knows no network
and no store; killing it at any moment leaves either a whole result or none.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from sklearn.base import clone
from sklearn.model_selection import train_test_split

import calibrators
from calibrators import auto
from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.differentiable import DifferentiableModel
from calibrators.kinds.identity import Identity
from calibrators.metrics import Estimate, coverage, mean_set_size, scores
from service.learning.job import ARTIFACT, AUTO, GOLDEN, INPUT, MODEL, RESULT, JobSpec, Rows
from service.store.files import write_whole

GOLDEN_ROWS, GOLDEN_BYTES = 32, 4 << 20
LEVEL = 0.95
NICENESS = 10
_PR_SET_PDEATHSIG = 1

Report = Callable[[float, str], None]


class JobError(Exception):
    """The job cannot be done; the text is for the caller."""


def run(folder: Path, report: Report) -> None:
    """Do the job in `folder` and write its result there."""
    spec = JobSpec.read(folder)
    report(0.05, "reading rows")
    result = (fit if spec.action == "fit" else evaluate)(folder, spec, _rows(folder, spec), report)
    write_whole(folder / RESULT, json.dumps(result).encode())
    report(1.0, "done")


def _rows(folder: Path, spec: JobSpec) -> Rows:
    rows = Rows.read(folder, spec)
    if len(rows) == 0:
        raise JobError("the calibration set has no rows")
    return rows


def fit(folder: Path, spec: JobSpec, rows: Rows, report: Report) -> dict[str, Any]:
    """Score a fit on the rows it has not seen, then fit the like of it on all rows: that is the revision.

    A reference may be gigabytes, so neither it nor what is made of it is held longer than it is wanted.
    """
    held_out, through = None, _model_of(folder, spec)
    if spec.held_out_fraction > 0:
        like, held_out, ranking = _scored(spec, rows, through, report)
        report(0.7, f"fitting {like.kind} on all {len(rows)} rows")
        calibrator = fit_rows(like, rows, through, lambda share, text: report(0.7 + 0.2 * share, text))
    else:
        calibrator, ranking = fit_kind(spec, rows, through, lambda share, text: report(0.1 + 0.8 * share, text))
    rows = replace(rows, reference=None)
    report(0.9, "writing the revision")
    result = {
        "kind": calibrator.kind,
        "params_json": json.dumps(calibrator.get_params(), sort_keys=True, separators=(",", ":")),
        "row_count": len(rows),
        "class_count": spec.n_classes,
        "held_out": held_out,
        "notes": calibrator.notes,
        "ranking": ranking,
    }
    artifact = calibrators.dumps(calibrator)
    del calibrator
    write_whole(folder / ARTIFACT, artifact)
    write_whole(folder / GOLDEN, golden_rows(calibrators.loads(artifact), rows, through))
    return result


def _scored(
    spec: JobSpec, rows: Rows, through: DifferentiableModel | None, report: Report
) -> tuple[calibrators.Calibrator, dict[str, Any], list[dict[str, Any]]]:
    """How a fit on part of the rows does on the others: an unfitted calibrator like it, its scores, the ranking."""
    in_order = bool(json.loads(spec.params_json).get("time_ordered"))
    fitted_on, unseen = held_out_of(rows, split_in_time if in_order else split, spec)
    scored, ranking = fit_kind(spec, fitted_on, through, lambda share, text: report(0.1 + 0.5 * share, text))
    report(0.6, f"scoring on {len(unseen)} rows")
    return clone(scored), compare(scored, _as_served(scored, unseen, through), spec.seed), ranking


def fit_kind(
    spec: JobSpec, rows: Rows, through: DifferentiableModel | None, report: Report
) -> tuple[calibrators.Calibrator, list[dict[str, Any]]]:
    """A fitted calibrator of the kind; of kind "auto" the best, and how the candidates ranked."""
    params = json.loads(spec.params_json)
    if spec.kind != AUTO:
        report(0.0, f"fitting on {len(rows)} rows")
        return fit_rows(calibrators.create(spec.kind, **params), rows, through, report), []
    selection = auto.select(
        rows.logits, rows.labels, sample_weight=rows.weights, seed=spec.seed, progress=report, **params
    )
    return selection.calibrator, [_ranked(candidate) for candidate in selection.candidates]


def fit_rows(
    calibrator: calibrators.Calibrator, rows: Rows, through: DifferentiableModel | None, report: Report
) -> calibrators.Calibrator:
    beside = rows.beside | _beside(rows, through) | ({"progress": report} if through else {})
    return calibrator.fit(rows.logits, rows.labels, **beside)


def _model_of(folder: Path, spec: JobSpec) -> DifferentiableModel | None:
    """The model that the kind is fitted through, if it is."""
    file = folder / MODEL
    tensor = json.loads(spec.params_json).get("tensor")
    return DifferentiableModel(file.read_bytes(), spec.n_classes, tensor) if file.exists() else None


def _beside(rows: Rows, through: DifferentiableModel | None) -> dict[str, Any]:
    """What a fit is given beside the logits: the signals, or the model's inputs and the model."""
    if through is None:
        return {name: signal for name, signal in rows.signals.items() if name != "logits"}
    inputs = {name: rows.signals[f"{INPUT}{place}"] for place, name in enumerate(through.inputs)}
    return {"inputs": inputs, "model": through}


def _as_served(calibrator: calibrators.Calibrator, rows: Rows, through: DifferentiableModel | None) -> Rows:
    """The rows with those signals that the calibrator reads when serving."""
    return replace(rows, signals={"logits": rows.logits} | calibrator.read_when_serving(_beside(rows, through)))


def _ranked(candidate: auto.Candidate) -> dict[str, Any]:
    return {**asdict(candidate), "scores": _plain(candidate.scores)}


def evaluate(folder: Path, spec: JobSpec, rows: Rows, report: Report) -> dict[str, Any]:
    """Compare the artifact in the folder with the model's own probabilities."""
    calibrator = calibrators.loads((folder / ARTIFACT).read_bytes())
    report(0.2, f"scoring on {len(rows)} rows")
    return {"evaluation": compare(calibrator, rows, spec.seed)}


def held_out_of(
    rows: Rows, divide: Callable[[Rows, float, int], tuple[Rows, Rows]], spec: JobSpec
) -> tuple[Rows, Rows]:
    """Rows to fit on and rows held out. Shifted rows are fitted on, every one: the scores are of rows as they come."""
    if rows.shifted is None:
        return divide(rows, spec.held_out_fraction, spec.seed)
    ordinary, moved = (rows.take(np.flatnonzero(rows.shifted == value)) for value in (0, 1))
    fitted_on, unseen = divide(ordinary, spec.held_out_fraction, spec.seed)
    return fitted_on.and_(moved), unseen


def split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to fit on and rows held out, each class shared out alike where it has two rows or more."""
    n_held_out = max(1, round(fraction * len(rows)))
    counts = np.bincount(rows.labels)
    # Stratifying needs two rows of a class; lone rows are one stratum of their own.
    stratum = np.where(counts[rows.labels] < 2, -1, rows.labels)
    sizes = np.unique(stratum, return_counts=True)[1]
    stratified = sizes.min() >= 2 and len(sizes) <= min(n_held_out, len(rows) - n_held_out)
    try:
        fitted_on, unseen = train_test_split(
            np.arange(len(rows)), test_size=n_held_out, random_state=seed, stratify=stratum if stratified else None
        )
    except ValueError:
        raise JobError(f"{len(rows)} rows are too few to hold out {fraction:.0%} of them for the scores") from None
    return rows.take(np.sort(fitted_on)), rows.take(np.sort(unseen))


def split_in_time(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Rows to fit on and, of rows in order of time, the last ones held out."""
    del seed
    n_fitted_on = len(rows) - max(1, round(fraction * len(rows)))
    return rows.take(np.arange(n_fitted_on)), rows.take(np.arange(n_fitted_on, len(rows)))


def compare(calibrator: calibrators.Calibrator, rows: Rows, seed: int) -> dict[str, Any]:
    """Scores of the model's own probabilities and of the calibrated ones on the same rows."""
    before = Identity.of(rows.logits.shape[1]).predict_proba(rows.logits)
    after = calibrator.predict_proba(**rows.signals)
    sets = _of_sets(calibrator, after, rows.labels, seed)
    return {
        "row_count": len(rows),
        "level": LEVEL,
        "before": _plain(scores(before, rows.labels, level=LEVEL, seed=seed)),
        "after": _plain(scores(after, rows.labels, level=LEVEL, seed=seed) | sets),
    }


def _of_sets(calibrator: calibrators.Calibrator, p: np.ndarray, y: np.ndarray, seed: int) -> dict[str, Estimate]:
    """How often the calibrator's sets, if it makes any, hold the label at its own level, and their mean size."""
    if not isinstance(calibrator, ConformalCalibrator):
        return {}
    shares = np.random.default_rng(seed).random(len(p)) if calibrator.randomised else None
    sets = calibrator.sets(p, shares=shares)
    return {"set_coverage": coverage(sets, y, level=LEVEL), "mean_set_size": Estimate(mean_set_size(sets))}


def golden_rows(calibrator: calibrators.Calibrator, rows: Rows, through: DifferentiableModel | None) -> bytes:
    """Rows of the calibration set, by the names of their signals, and the probabilities that this fit gives them, for
    checks at activation: of what acts before the model the inputs too, as many as `GOLDEN_BYTES` hold."""
    inputs = [name for name in rows.signals if name.startswith(INPUT) and "views" in calibrator.needs]
    bytes_per_row = sum(rows.signals[name][:1].nbytes for name in inputs)
    count = min(GOLDEN_ROWS, max(1, GOLDEN_BYTES // max(1, bytes_per_row)))
    chosen = rows.take(np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64)))
    served = _as_served(calibrator, chosen, through)
    signals = {name: np.asarray(signal, dtype=np.float32) for name, signal in served.signals.items()}
    probabilities = {"probabilities": calibrator.predict_proba(**signals)}
    return safetensors.numpy.save(signals | probabilities | {name: chosen.signals[name] for name in inputs})


def _plain(estimates: dict[str, Estimate]) -> list[list[Any]]:
    """[name, value, low, high] of each; no interval is None, because JSON has no NaN."""
    return [
        [name, estimate.value, *(None if np.isnan(end) else end for end in (estimate.low, estimate.high))]
        for name, estimate in estimates.items()
    ]


def _report(progress: float, stage: str) -> None:
    sys.stdout.write(json.dumps({"progress": progress, "stage": stage}) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Exit code 0: a result, or an error that the caller can mend, is in the folder."""
    folder, memory_bytes = Path(sys.argv[1]), int(sys.argv[2])
    os.nice(NICENESS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the server
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    try:
        run(folder, _report)
    except (JobError, ValueError, TypeError, ImportError, MemoryError) as error:
        text = str(error) or "the fit needs more memory than a fit may use"
        write_whole(folder / RESULT, json.dumps({"error": text}).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
