"""The sixth step of the examples: what it sends, what comes of it, and how that is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from examples import step6_drift
from examples.step1_prepare import Prepared
from examples.step6_drift import MODEL, MONITOR, WINDOW_ROWS, Rows, Story, Window
from service.client import Client
from service.inference.repository import ModelFolder
from tests.service.conftest import RunningServer, settings_for

NAMES = np.array(["ant", "bee", "cat", "dog", "eel"])


@pytest.fixture
def data(tmp_path: Path) -> Prepared:
    """Rows of four formats, more of some than of others; none of `bee`."""
    root = tmp_path / "models"
    root.mkdir()
    labels = np.repeat([0, 2, 3, 4], [10, 40, 30, 20])
    is_test = np.arange(100) % 2 == 0
    return Prepared(root, root / "none", np.zeros((100, 1), np.int32), labels, NAMES, is_test)


@pytest.fixture
def client(data: Prepared) -> Iterator[Client]:
    """Of a server that has the step's model."""
    step6_drift.write(data)
    server = RunningServer(settings_for(data.model_repository))
    with Client(server.address, show_progress=False) as client:
        yield client
    server.stop()


def true_rows(count: int = 1500) -> Rows:
    """Of four classes, as often right as said."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((count, 4)) + np.array([0.0, 0.0, 1.0, 0.0])
    return Rows(logits.astype(np.float32), (logits + rng.gumbel(size=logits.shape)).argmax(axis=1))


def test_the_model_has_the_formats_with_most_rows_by_name(data: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step6_drift.formats(data).tolist() == [0, 2, 3, 4]
    monkeypatch.setattr(step6_drift, "MOST_FORMATS", 2)
    step6_drift.write(data)
    step6_drift.write(data)  # as after another run
    assert ModelFolder.read(data.model_repository / MODEL).class_names == ("cat", "dog")
    logits = np.arange(500, dtype=np.float32).reshape(100, 5)
    met = step6_drift.rows(data, logits, data.labels)
    np.testing.assert_array_equal(met.logits, logits[10:80, 2:4])
    np.testing.assert_array_equal(met.labels, np.repeat([0, 1], [40, 30]))


def test_the_alarm_comes_after_the_change_and_names_it_and_what_is_fitted_since_serves(client: Client) -> None:
    """Of other seeds one in 10,000 at most would ring in the calm: .02 x 500 / 100,000."""
    met = true_rows()
    story = step6_drift.watch(client, met, calm=1, drifted=6)
    assert step6_drift.pushed(met) == 2
    assert story.windows[0].happened == "silence"
    assert 0 < story.delay <= 2 * WINDOW_ROWS
    assert story.alarm is not None and story.alarm.cause is not None
    assert (story.alarm.monitor, story.alarm.cause.where) == (MONITOR, "class 2 (dog)")
    assert story.is_promoted
    assert [revision.revision for revision in client.list(MODEL) if revision.active] == [story.challenger]
    assert story.windows[-1].revision == story.challenger
    assert story.windows[-1].served < 0.5 * story.windows[1].served
    assert {alarm.monitor for alarm in client.alarms(MODEL) if alarm.acknowledge_time is None} == {MONITOR}
    text = "\n".join(step6_drift.told(story))
    assert f"silent for {WINDOW_ROWS} labels, and rang {story.delay} labels after the change" in text
    assert "class 2 (dog)" in text
    assert "and serves" in text


def test_a_story_without_an_alarm_says_so() -> None:
    story = Story("seldom", calm=1, windows=[Window(0.1, 0.1, "vector-1", "silence")])
    assert list(step6_drift.told(story)) == ["No alarm came with a cause."]


def test_windows_between_change_and_promotion_stand_out() -> None:
    windows = [Window(0.1, 0.1, name) for name in ("vector-1", "vector-1", "vector-2")]
    shown = step6_drift.table(Story("seldom", calm=1, windows=windows, challenger="vector-2"))
    assert [row.style for row in shown.rows] == [None, "red", None]
