"""How often sets held the label, counted from the journal as labels come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import calibrators
from calibrators.conformal.calibrator import ConformalCalibrator
from calibrators.numerics import softmax
from service.learning import coverage
from service.learning.coverage import Watch
from service.store.labels import NewLabel, Result
from service.store.packs import MOST_PROBABLE, Answered, Kept, probabilities_of
from tests.service import journals, models
from tests.service.journals import MODEL, N_CLASSES
from tests.service.test_durability import until
from tests.service.test_feedback import metrics, serving

REVISION = "split_conformal-1"


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[journals.Kept]:
    opened = journals.Kept(tmp_path, queue_bytes=1 << 30)
    yield opened
    opened.close()


def rows(n: int, seed: int, n_classes: int = N_CLASSES) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((n, n_classes))
    return logits.astype(np.float32), (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)


def conformal(**params: object) -> ConformalCalibrator:
    calibrator = calibrators.create("split_conformal", base="identity", **params).fit(*rows(2000, seed=0))
    assert isinstance(calibrator, ConformalCalibrator)
    return calibrator


def watch_of(kept: journals.Kept, calibrator: ConformalCalibrator, wait_seconds: float = 0) -> Watch:
    watch = Watch(kept.journal, MODEL, REVISION, calibrator, wait_seconds)
    watch.load()
    return watch


def come(kept: journals.Kept, logits: np.ndarray, labels: np.ndarray, revision: str = REVISION) -> None:
    """Predictions, and a label for each."""
    now, p = int(1000 * time.time()), softmax(logits)
    ids = kept.predict(*(Answered.one(now, revision, 0, logits[i : i + 1], p[i : i + 1]) for i in range(len(p))))
    told = kept.label([NewLabel(name, 0, int(label)) for name, label in zip(ids, labels, strict=True)])
    assert set(told) == {Result.RECORDED}


def test_what_is_counted_is_whether_the_librarys_sets_hold_the_labels(kept: journals.Kept) -> None:
    calibrator, (logits, labels) = conformal(score="aps"), rows(1500, seed=1)
    come(kept, logits, labels)
    come(kept, *rows(40, seed=2), revision="temperature-7")  # another's
    watch = watch_of(kept, calibrator)
    assert np.isnan(watch.state.recent)
    while watch.step():
        pass
    held = calibrator.sets(softmax(logits))[np.arange(1500), labels]
    state = watch.state
    assert (state.covered, state.missed) == (held.sum(), 1500 - held.sum())
    assert state.recent == held[-coverage.WINDOW :].mean()
    assert state.covered / 1500 == pytest.approx(0.9, abs=0.04)  # five standard errors of both samples


def test_a_restart_goes_on_and_counts_nothing_twice(kept: journals.Kept) -> None:
    calibrator, (logits, labels) = conformal(), rows(300, seed=1)
    come(kept, logits[:200], labels[:200])
    first = watch_of(kept, calibrator)
    assert first.step() and not first.step()
    again = watch_of(kept, calibrator)
    assert again.state == first.state and not again.step()
    come(kept, logits[200:], labels[200:])
    assert again.step()
    held = calibrator.sets(softmax(logits))[np.arange(300), labels]
    assert (again.state.covered, again.state.recent) == (held.sum(), held.mean())


def test_a_drift_shows_in_the_recent_labels(kept: journals.Kept) -> None:
    calibrator, watch = conformal(), watch_of(kept, conformal())
    come(kept, *rows(1000, seed=3))
    come(kept, rows(600, seed=5)[0], rows(600, seed=6)[1])  # the labels of other rows
    while watch.step():
        pass
    assert watch.state.recent < 0.6 < watch.state.covered / 1600 < calibrator.confidence_level


def test_randomised_sets_cover_as_asked(kept: journals.Kept) -> None:
    calibrator = conformal(score="aps", randomised=True)
    come(kept, *rows(1500, seed=1))
    watch = watch_of(kept, calibrator)
    while watch.step():
        pass
    assert watch.state.covered / 1500 == pytest.approx(0.9, abs=0.04)


def test_of_many_classes_those_not_kept_share_what_is_left() -> None:
    logits, _ = rows(20, seed=0, n_classes=200)
    p = softmax(logits)
    found = probabilities_of(Kept.of(logits, p), 200)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    most = np.argsort(-p, axis=1)[:, :MOST_PROBABLE]
    np.testing.assert_array_equal(np.take_along_axis(found, most, 1), np.take_along_axis(p, most, 1))
    assert (np.array([len(set(row)) for row in found]) <= MOST_PROBABLE + 1).all()


def test_a_server_tells_the_coverage_of_what_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "LOOK_SECONDS", 0.01)
    models.write(tmp_path / "models", "mlp", models.classifier())
    x, logits, labels = models.labelled_rows(600, seed=0)
    with serving(tmp_path / "models", online_wait_seconds=0) as (server, client):
        revision = client.fit("mlp", "split_conformal", logits=logits[:400], labels=labels[:400]).revision
        client.activate("mlp", revision)
        prediction = client.predict("mlp", x[400:])
        known = [prediction.prediction_id] * 200
        assert set(client.label("mlp", known, labels[400:], rows=range(200))) == {"recorded"}
        held = int(prediction.prediction_set[np.arange(200), labels[400:]].sum())
        of_revision = f'{{model="mlp",revision="{revision}"'
        name = f'calserve_set_labels_total{{held="yes",model="mlp",revision="{revision}"}}'
        found = until(lambda: (told := metrics(server)) and told.get(name) == held and told)
        assert found[f"calserve_set_coverage{of_revision}}}"] == held / 200
        assert found[f"calserve_set_confidence_level{of_revision}}}"] == 0.9
        client.activate("mlp", "none")
        until(lambda: f"calserve_set_coverage{of_revision}}}" not in metrics(server))
