"""A journal with predictions in it, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.store.journal import Journal, OpenStream
from service.store.labels import Labels, NewLabel, NewLabels, Result
from service.store.packs import Answered

MODEL, N_CLASSES = "m", 4


def answered(seed: int = 0, rows: int = 1, **changes: Any) -> Answered:
    logits, probabilities = scores(seed, rows, int(changes.pop("n_classes", N_CLASSES)))
    values = {"time_ms": 1_700_000_000_000 + seed, "revision": "temperature-1", "state": 0} | changes
    return Answered.one(logits=logits, probabilities=probabilities, **values)


def scores(seed: int, rows: int, n_classes: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits and probabilities."""
    logits = np.random.default_rng(seed).standard_normal((rows, n_classes)).astype(np.float32)
    exponentials = np.exp(logits)
    return logits, (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


class Kept:
    """A journal at work on a folder, one stream of it, and what was told of it."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.journal = Journal(folder, **options)
        self.journal.start()
        self.labels = Labels(self.journal)
        self.stream = self.open_stream()

    def open_stream(self, model: str = MODEL) -> OpenStream:
        return self.journal.open_stream(model, "1", "digest", N_CLASSES)

    def predict(self, *requests: Answered, stream: OpenStream | None = None) -> list[str]:
        """The ids of predictions, which may not be on the disk yet."""
        ids = [(stream or self.stream).append(request, len(request.kept)).decode() for request in requests]
        assert all(ids)
        return ids

    def flush(self) -> None:
        self.journal.writer.write_now(self.journal.write_waiting)

    def label(self, labels: Sequence[NewLabel], model: str = MODEL, producer: str = "") -> list[Result]:
        return self.journal.writer.write_now(lambda c: self.labels.record(c, model, producer, NewLabels.of(labels)))

    def label_one(self, prediction_id: str, label: int, row: int = 0, **changes: Any) -> Result:
        return self.label([NewLabel(prediction_id, row, label)], **changes)[0]

    def recorded(self) -> dict[tuple[int, int, int], int]:
        """Every label: stream, number, row -> class."""
        with self.journal.reading() as connection:
            rows = connection.execute("SELECT stream, number, row, label FROM labels").fetchall()
        assert len({row[:3] for row in rows}) == len(rows)
        return {row[:3]: row[3] for row in rows}

    def close(self) -> None:
        self.journal.close()
