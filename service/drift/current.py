"""The now-casts of what one model serves, fed from its journal: rows when they are answered, labels behind a watermark.

Labels of mistakes tend to come later than others. So of a row the label is read when no row before it is waited for any
more, and one that comes after its row was passed is not read at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from service.drift.detectors.base import Batch
from service.drift.nowcasts import Nowcast, Nowcasts
from service.drift.summary import LEAST_PROBABILITY
from service.store.journal import Journal
from service.store.packs import probabilities_of
from service.store.reading import Follower, Pairs

LOOK_BACK_ROWS = 20_000


class Current:
    """Now-casts of the revision that answered last; another one begins anew. One call at a time."""

    def __init__(self, journal: Journal, model: str, wait_seconds: float) -> None:
        self._behind = Follower(journal, model, LOOK_BACK_ROWS, wait_seconds)
        self._revision = ""
        self._nowcasts = Nowcasts()
        self._alarms = 0

    def read(self, parts: Sequence[Pairs], most_rows: int) -> bool:
        """Rows that were answered, and what labels may be read by now; whether there are more."""
        for part in parts:
            if part.revision != self._revision:
                self._revision = part.revision
                self._nowcasts.reset()
            self._nowcasts.read(_batch(part))
        cohort = self._behind.read(most_rows)
        for part in cohort.pairs:
            if part.revision == self._revision:
                self._nowcasts.read_labels(_batch(part))
        return bool(cohort.pairs)

    def said(self, alarms: int, *, ringing: bool) -> dict[str, Nowcast]:
        """The figures; a new alarm, of which `alarms` counts all, parts the labels before it from those after."""
        if alarms != self._alarms:
            self._nowcasts.begin_cohort()
            self._alarms = alarms
        without = self._nowcasts.accuracy_without_labels(ringing=ringing)
        return {"accuracy": without if without.valid else self._nowcasts.accuracy(), "without labels": without}


def _batch(part: Pairs) -> Batch:
    probabilities = probabilities_of(part.kept, part.stream.class_count).astype(np.float64)
    return Batch(np.log(np.maximum(probabilities, LEAST_PROBABILITY)), part.labels, part.segments)
