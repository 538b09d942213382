"""What the journal has around an alarm: what its cause is, and the rows since the change that can be fitted on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.drift.attribution import cause
from service.drift.detectors.base import Batch
from service.drift.monitors import INPUTS, MOST_PACKS, SCORES, Monitor
from service.drift.states import Alarm, Cause
from service.inference.model import ServedModel
from service.store.packs import logits_of
from service.store.reading import NO_LABEL, Reader

log = logging.getLogger(__name__)

MOST_VALUES = 5_000_000
"""Logits of the last rows that are looked at."""


class Window(NamedTuple):
    """Labelled rows since a change, in their order."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


def cause_of(alarm: Alarm, monitor: Monitor, model: ServedModel, ringing: Sequence[Monitor]) -> Cause | None:
    """What is behind the alarm of a monitor, beside others of which alarms are open.

    None if it cannot be told, which is no reason to stop.
    """
    watching = monitor.watching
    try:
        before, since = monitor.around(alarm.since_ms, MOST_VALUES)
        found = cause(
            watching.numbered(alarm.evidence),
            _with_inputs(before),
            _with_inputs(since),
            scores_rang=any(one.reads == SCORES for one in ringing),
            inputs_rang=any(one.reads == INPUTS for one in ringing),
            class_names=model.class_names,
        )
    except Exception:
        log.exception("the cause of %s of model %s could not be told", alarm.id, alarm.model)
        return None
    sentences = list(map(watching.named, found.evidence))
    return replace(found, where=watching.named(found.where), evidence=sentences)


def window_of(alarm: Alarm, reader: Reader, model: ServedModel) -> Window:
    """The labelled rows since the change that an alarm told, of the model file that is served."""
    logits = [np.empty((0, model.n_classes), np.float32)]
    labels = [np.empty(0, np.int64)]
    most_rows = MOST_VALUES // model.n_classes
    for part in reader.passed(MOST_PACKS, most_rows):
        rows = np.flatnonzero((part.times_ms >= alarm.since_ms) & (part.labels != NO_LABEL))
        if part.stream.digest == model.digest:
            logits.append(logits_of(part.kept.rows(rows), model.n_classes).astype(np.float32))
            labels.append(part.labels[rows])
    return Window(np.concatenate(logits)[-most_rows:], np.concatenate(labels)[-most_rows:])


def _with_inputs(batch: Batch) -> Batch:
    """The rows with what is known of the inputs alone."""
    return replace(batch, signals={name: values for name, values in batch.signals.items() if name.startswith("input")})
