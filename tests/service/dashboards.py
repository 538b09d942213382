"""A page with something to show: models that are honest, that drifted, that wait for labels; monitors and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.kinds.split_conformal import SplitConformal
from calibrators.numerics import softmax
from service.drift.nowcasts import Nowcast
from service.drift.states import RAW, SERVED, Alarm, Cause, MonitorSpec, MonitorState
from service.drift.summary import Summary, Tally
from service.store.journal_tables import StreamRow
from service.store.packs import Kept
from service.store.reading import NO_LABEL, Pairs
from service.web.facts import ModelFacts, RevisionFacts, ShadowFacts, Sources

NOW_MS = 1_790_000_000_000
HOUR_MS = 3_600_000
CLASSES = ("python", "javascript", "rust", "go", "markdown", "<b>html</b>", "css", "sql", "shell", "yaml")


def pairs(
    logits: np.ndarray,
    probabilities: np.ndarray,
    labels: np.ndarray,
    times_ms: np.ndarray,
    revision: str = "temperature-3",
    segments: Sequence[str] = (),
) -> Pairs:
    rows, classes = logits.shape
    stream = StreamRow(1, "m", "1", "digest", classes, 0.0)
    kept = Kept.of(logits.astype(np.float32), probabilities.astype(np.float32))
    nothing = np.zeros(rows, np.int64)
    names, places = np.unique(np.array(segments or [""] * rows), return_inverse=True)
    return Pairs(stream, revision, times_ms.astype(np.int64), nothing.astype(np.uint32), kept, labels.astype(np.int64),
                 nothing, np.arange(rows), nothing, tuple(names.tolist()), places, {})  # fmt: skip


def traffic(
    seed: int, rows: int, *, hours: float = 24.0, truth: float = 2.0, drift: float = 1.0, labelled: float = 0.4
) -> Pairs:
    """Rows whose logits are `truth` times too large, by `drift` more in the last third; a calibrator divides by `truth`."""
    rng = np.random.default_rng(seed)
    at = np.sort(rng.random(rows))
    too_large = np.where(at < 2 / 3, truth, truth * drift)[:, None]
    honest = 2.2 * rng.standard_normal((rows, len(CLASSES)))
    honest[:, 0] += 0.8
    logits = too_large * honest
    labels = (rng.random((rows, 1)) > softmax(honest).cumsum(axis=1)).sum(axis=1).clip(max=len(CLASSES) - 1)
    late = rng.random(rows) > labelled * np.where(at > 0.97, 0.3, 1.0)
    labels = np.where(late, NO_LABEL, labels)
    segments = np.where(rng.random(rows) < 0.3, "eu", "us").tolist()
    return pairs(logits, softmax(logits / truth), labels, NOW_MS - HOUR_MS * hours * (1 - at), segments=segments)


def sets_of(part: Pairs, confidence_level: float = 0.9) -> ConformalCalibrator:
    """What makes sets of the rows as they were served."""
    labelled = np.flatnonzero(part.labels != NO_LABEL)
    logits = np.log(part.kept.probabilities[labelled].astype(np.float64) + 1e-30)
    return SplitConformal(confidence_level=confidence_level).fit(logits, part.labels[labelled])


def tally(part: Pairs, *, sets: Any = None) -> Tally:
    counted = Tally(part.stream.class_count, 7 * 24 * HOUR_MS)
    counted.age(NOW_MS)
    counted.add(part, sets)
    return counted


REVISIONS = tuple(
    RevisionFacts(f"{kind}-{number}", kind, NOW_MS - age * HOUR_MS, rows, losses, fits=True)
    for number, kind, age, rows, losses in (
        (3, "temperature", 20, 8000, (0.9127, 0.7012)),
        (2, "online_temperature", 90, 6000, (0.9127, 0.7044)),
        (1, "isotonic", 200, 2000, (0.9127, 0.7461)),
    )
)
FACTS = ModelFacts("magika", "1", CLASSES, "temperature-3", "online_temperature-2", 0.9, REVISIONS)


def monitor(
    name: str, watched: str, detector: str, *, top: float, alarms: Sequence[str] = (), ready: bool = True
) -> MonitorState:
    rng = np.random.default_rng(len(name))
    times = np.linspace(NOW_MS - 24 * HOUR_MS, NOW_MS, 200)
    level = np.where(np.arange(200) < 133, 0.9, np.linspace(0.9, top, 200) ** 1.0) + 0.25 * rng.standard_normal(200)
    history = [(int(time), max(0.0, float(value))) for time, value in zip(times, level, strict=True)]
    spec = MonitorSpec("magika", name, detector, watched, is_default=True)
    return MonitorState(spec, ready, history[-1][1], 6.0, 30_123, 210, 12, alarms, history,
                        "rings falsely within 100,000 labelled rows with probability 0.025 at most")  # fmt: skip


MONITORS = (
    monitor("calibration-raw", RAW, "e_detector", top=5.9),
    monitor("calibration-served", SERVED, "e_detector", top=6.3, alarms=("a-2",)),
    monitor("classes-served", SERVED, "e_detector", top=2.2),
    monitor("confidence-served", SERVED, "score_shift", top=1.6),
    monitor("inputs", RAW, "score_shift", top=1.0, ready=False),
)
ALARM = Alarm(
    "a-2", "magika", "calibration-served", SERVED, NOW_MS - 7 * HOUR_MS, NOW_MS - 6 * HOUR_MS, NOW_MS - 8 * HOUR_MS, 412, 6.1,
    6.0, "temperature-3", Cause("temperature", "", ("A temperature of 1.8 explains 412 labels better by 31 nats.",
    "What it is asked has not changed: the inputs look as before."), "Fit again on the labels since the change, or roll back."),
    "tell", "told", "", 0,
)  # fmt: skip
OLD = replace(ALARM, id="a-1", monitor="confidence-served", time_ms=NOW_MS - 90 * HOUR_MS, since_ms=NOW_MS - 91 * HOUR_MS,
              cause=Cause("covariate", "segment <eu>", (), "Nothing."), acknowledged_by="anna", acknowledged_ms=NOW_MS, outcome="told")  # fmt: skip
SHADOWS = (
    ShadowFacts("vector-6", "temperature-3", 31, (0.02, -0.4, 0.44), "undecided", automatic_from=500),
    ShadowFacts(
        "beta-4", "temperature-3", 2210, (-0.03, -0.051, -0.009), "worse", ended="stopped", ended_ms=NOW_MS - HOUR_MS
    ),
    ShadowFacts("class_prior-5", "temperature-3", 1500, (0.0389, 0.0101, 0.0677), "better"),
    ShadowFacts(
        "temperature-3", "none", 900, (0.05, 0.02, 0.08), "better", ended="promoted", ended_ms=NOW_MS - 40 * HOUR_MS
    ),
)
NOW = Nowcast(
    0.862, 0.851, 0.873, False, 2000, 412, "The labels say that the confidence is not the accuracy now: an alarm rings."
)


def sources(models: Sequence[tuple[ModelFacts, Tally | None]], **more: Any) -> Sources:
    tallies = {facts.name: counted for facts, counted in models}

    def summary(name: str, since_ms: int, until_ms: int) -> Summary | None:
        counted = tallies[name]
        return counted.summary(since_ms, until_ms) if counted else None

    return Sources(lambda: [facts for facts, _ in models], summary, **more)


def drifted() -> Sources:
    """Five models, one of which drifted."""
    part = traffic(1, 40_000, drift=1.8)
    return sources(
        [
            (FACTS, tally(part, sets=sets_of(traffic(5, 4000)))),
            (
                replace(FACTS, name="resnet-50", active="none", before="", confidence_level=None),
                tally(traffic(2, 9000, truth=1)),
            ),
            (
                replace(FACTS, name="sentiment", confidence_level=None, active="isotonic-1"),
                tally(traffic(13, 20_000, drift=1.4)),
            ),
            (replace(FACTS, name="new", active="none", before="", revisions=(), confidence_level=None), None),
            (replace(FACTS, name="waits for labels", confidence_level=None), tally(traffic(4, 900, labelled=0.0))),
        ],
        monitors=lambda name: MONITORS if name == "magika" else (),
        alarms=lambda name: (ALARM, OLD) if name == "magika" else (),
        accuracy=lambda name: NOW if name == "magika" else None,
        shadows=lambda name: SHADOWS if name == "magika" else (),
    )
