"""From answers to the journal: whatever order the answers of whatever runs are given in, each row is kept as it was."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from calibrators.graph import LOGITS
from service.inference.batcher import Answer, Run
from service.inference.input_signals import InputSignals
from service.inference.model import ServedModel
from service.inference.session import TensorSpec
from service.learning.journalling import PROBABILITIES, Journalling
from service.store.labels import Result
from service.store.reading import Reader
from tests.service.journals import MODEL, N_CLASSES, Kept

REVISIONS = ("temperature-1", "vector-1", "density_aware-1")


class Model:
    name, version, digest, n_classes, is_classifier, journal = MODEL, "1", "digest", N_CLASSES, True, ""

    def __init__(self, input_signals: InputSignals | None) -> None:
        self.input_signals = input_signals


def run_of(rng: np.random.Generator, number: int, rows: int) -> Run:
    logits, probabilities = rng.standard_normal((2, rows, N_CLASSES)).astype(np.float32)
    outputs = {LOGITS: logits, PROBABILITIES: probabilities}
    if number % 3 == 2:
        outputs["density"] = rng.random(rows).astype(np.float64)
    snapshot: Any = SimpleNamespace(
        revision=REVISIONS[number % 3], online_state=number, sets=None, session=SimpleNamespace(provider="CPU")
    )
    return Run(list(outputs), list(outputs.values()), snapshot, rows, (0, 0))


def divided(rng: np.random.Generator, run: Run) -> list[Answer]:
    """The rows of a run among requests, in their order."""
    assert run.rows is not None
    ends = [0, *np.flatnonzero(rng.random(run.rows - 1) < 0.6) + 1, run.rows]
    return [Answer(run, int(start), int(stop)) for start, stop in pairwise(ends)]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_every_row_is_kept_as_its_run_gave_it(tmp_path: Path, *, shuffled: bool, with_inputs: bool) -> None:
    rng = np.random.default_rng(3)
    answers = [answer for number in range(12) for answer in divided(rng, run_of(rng, number, int(rng.integers(1, 9))))]
    if shuffled:
        answers = [answers[place] for place in rng.permutation(len(answers))]
    signals = InputSignals([TensorSpec("input", "FP32", (-1, 3))], 1) if with_inputs else None
    segments = [("", "ios", "android")[number] for number in rng.integers(3, size=len(answers))]
    inputs = [rng.standard_normal((answer.stop - answer.start, 3)).astype(np.float32) for answer in answers]
    kept = Kept(tmp_path)
    try:
        journal = Journalling(kept.journal, "async").of(cast(ServedModel, Model(signals)))
        assert journal is not None
        ids = []
        for number, (answer, segment, given) in enumerate(zip(answers, segments, inputs, strict=True)):
            sample = signals.sample({"input": given}) if signals else ()
            prediction_id, _ = journal.keep(answer, b"own-%d" % number, segment, sample)
            ids.append(prediction_id.decode())
        kept.flush()
        parts = Reader(kept.journal, MODEL, "learner", 0).read(10**6).pairs
        rows = [(part, row) for part in parts for row in range(len(part.numbers))]
        for number, (answer, segment, given) in enumerate(zip(answers, segments, inputs, strict=True)):
            for own_row in range(answer.stop - answer.start):
                part, row = rows.pop(0)
                assert (part.numbers[row], part.rows[row]) == (number, own_row)
                assert (part.kept.logits[row] == answer.part(LOGITS)[own_row]).all()
                assert (part.kept.probabilities[row] == answer.part(PROBABILITIES)[own_row]).all()
                assert (part.revision, part.states[row]) == (
                    answer.run.snapshot.revision,
                    answer.run.snapshot.online_state,
                )
                assert part.segment_of(row) == segment
                said = part.signals_of(row)
                assert ("density" in said) == ("density" in answer.run.arrays)
                if "density" in said:
                    assert said["density"] == pytest.approx(answer.part("density")[own_row])
                if with_inputs:
                    assert said["input_mean"] == pytest.approx(given[own_row].mean(), abs=1e-6)
        assert not rows
        assert kept.label_one(ids[5], 1) == kept.label_one("own-7", 1) == Result.RECORDED
    finally:
        kept.close()
