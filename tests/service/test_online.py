"""The loop: labels arrive, the active online revision learns, what it learned is served under its number."""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

import service.store.online_states
from calibrators.online.learner import OnlineCalibrator
from service import cli, errors
from service.client import Client, OnlineState
from service.learning import gate
from service.learning.online import Learner
from service.learning.progress import Progress, held_out
from service.settings import Settings
from service.store.journal import Journal
from service.store.reading import NO_LABEL, Reader
from tests.service import models
from tests.service.conftest import RunningServer
from tests.service.test_durability import until
from tests.service.test_feedback import flooded, metrics, serving
from tests.service.test_lifecycle import Process
from tests.service.test_workers import Workers, connections

REVISION = "online_temperature-1"
N_FITTED = 20
"""So few rows leave the revision nearly as overconfident as the model: what is learned then is no matter of chance."""
X, LOGITS, LABELS = models.labelled_rows(4000, seed=1)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its store, in which an online revision of `mlp` is active."""
    root = tmp_path_factory.mktemp("fitted") / "models"
    models.write(root, "mlp", models.classifier())
    with serving(root) as (_, client):
        rows = {"logits": LOGITS[:N_FITTED], "labels": LABELS[:N_FITTED]}
        client.activate("mlp", client.fit("mlp", "online_temperature", **rows, held_out_fraction=0).revision)
    return root.parent


@pytest.fixture
def root(fitted: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    return tmp_path / "models"


@pytest.fixture
def learning(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server that does not wait for labels."""
    with serving(root, online_wait_seconds=0) as (server, client):
        yield server, client


@pytest.fixture
def open_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every state serves."""
    for bound in ("MARGIN", "MOVED"):
        monkeypatch.setattr(gate, bound, np.inf)


def teach(client: Client, rows: slice, labels: np.ndarray = LABELS) -> None:
    known, count = client.predict("mlp", X[rows]).prediction_id, len(X[rows])
    assert set(client.label("mlp", [known] * count, labels[rows], rows=range(count))) == {"recorded"}


def learned(client: Client, rows: int) -> OnlineState:
    """The state when so many labels are dealt with."""

    def state() -> OnlineState | None:
        found = client.online_state("mlp")
        return found if sum(found.rows[what] for what in ("learned", "held_out", "over_quota")) >= rows else None

    return until(state)


def taught(client: Client, rows: int, step: int = 500) -> OnlineState:
    """The same of so many rows, labelled in several messages."""
    before = sum(client.online_state("mlp").rows[what] for what in ("learned", "held_out"))
    for start in range(0, rows, step):
        teach(client, slice(start, start + step))
    return learned(client, before + rows)


def log_loss(probabilities: np.ndarray, labels: np.ndarray) -> float:
    return float(-np.log(probabilities[np.arange(len(labels)), labels]).mean())


def calibrator_of(client: Client) -> OnlineCalibrator:
    calibrator = client.calibrator("mlp", REVISION)
    assert isinstance(calibrator, OnlineCalibrator)
    return calibrator


@pytest.mark.usefixtures("open_gate")
def test_labels_change_what_is_served_and_it_is_what_the_library_learns(
    learning: tuple[RunningServer, Client],
) -> None:
    server, client = learning
    before = client.predict("mlp", X)
    assert before.online_state == 0
    state = taught(client, 2000)
    after = client.predict("mlp", X)
    assert after.online_state == state.serving == state.newest > 0
    assert log_loss(after.probabilities[2000:], LABELS[2000:]) < log_loss(before.probabilities[2000:], LABELS[2000:])
    library = calibrator_of(client)
    for part in Reader(server.app._journal, "mlp", f"online/{REVISION}", 0).passed(1000):
        rows = (part.labels != NO_LABEL) & ~held_out(part)
        if rows.any():
            library.learn(part.kept.logits[rows], part.labels[rows])
    np.testing.assert_allclose(after.probabilities, library.predict_proba(LOGITS), atol=1e-5)


def test_with_the_gate_too_what_overconfident_predictions_teach_is_served(
    learning: tuple[RunningServer, Client],
) -> None:
    _, client = learning
    before = client.predict("mlp", X)
    state = taught(client, 4000)
    assert state.gain.low < 0 < state.gain.value < state.gain.high  # so few labels do not prove it
    after = client.predict("mlp", X)
    assert 0 < after.online_state == state.serving
    assert log_loss(after.probabilities, LABELS) < log_loss(before.probabilities, LABELS)


@pytest.mark.usefixtures("open_gate")
def test_every_answer_is_computed_by_the_state_that_it_names(learning: tuple[RunningServer, Client]) -> None:
    server, client = learning
    for start in range(0, 1000, 50):
        teach(client, slice(start, start + 50))
    learned(client, 1000)
    client.predict("mlp", X[:50])
    reader = Reader(server.app._journal, "mlp", f"online/{REVISION}", 0)
    progress = Progress.begin(calibrator_of(client), 10_000)
    states, answers = {0: copy.deepcopy(progress.calibrator)}, 0
    for cohort in reader.replay():
        progress.take(cohort, client.models()[0].digest)
        states[cohort.number] = copy.deepcopy(progress.calibrator)
    for part in reader.passed(1000):
        for number in np.unique(part.states).tolist():
            kept = part.kept.rows(np.flatnonzero(part.states == number))
            np.testing.assert_allclose(kept.probabilities, states[number].predict_proba(kept.logits), atol=1e-5)
            answers += 1
    assert answers >= 3


def test_a_restart_goes_on_from_the_state_and_a_replay_comes_to_the_same_bits(root: Path) -> None:
    with serving(root, online_wait_seconds=0) as (_, client):
        before, probabilities = taught(client, 1000), client.predict("mlp", X).probabilities
    with serving(root, online_wait_seconds=1e6) as (server, client):
        assert (client.predict("mlp", X).probabilities == probabilities).all()
        assert client.predict("mlp", X).online_state == before.serving
        state = client.online_state("mlp")
        assert (state.newest, state.rows) == (before.newest, before.rows)
        replay = client.replay_learning("mlp")
        assert replay.equal
        assert (replay.steps, replay.learned) == (state.newest, state.rows["learned"])
        learner = server.app._online._learners["mlp", REVISION][0]
        learner.progress.calibrator.theta_[-1, 0] = np.nextafter(learner.progress.calibrator.theta_[-1, 0], 9.0)
        assert not client.replay_learning("mlp").equal


def test_a_server_killed_while_it_learns_comes_to_the_state_of_one_that_was_not(root: Path) -> None:
    process = Process(root, "--online-wait-seconds", "1e6")
    process.wait_until_ready()
    kill = partial(process.send, signal.SIGKILL)
    flooded(f"127.0.0.1:{process.port}", lambda count: count >= 300 and kill())
    assert process.end() == -signal.SIGKILL
    with serving(root, online_wait_seconds=0) as (server, client):
        row = server.app._catalogue.revision("mlp", REVISION)
        learned(client, 300)
        assert client.replay_learning("mlp").equal
        until(lambda: not server.app._online._learners["mlp", REVISION][0]._reader.read())
        undisturbed = Learner(server.app._journal, replace(row, number=99), calibrator_of(client), 0, 10_000)
        undisturbed.load()
        while undisturbed.step():
            pass
        state = client.online_state("mlp")
        assert state.rows == undisturbed.progress.counts
        killed = server.app._online._learners["mlp", REVISION][0]
        assert killed.progress.encode() == undisturbed.progress.encode()


@pytest.mark.usefixtures("open_gate")
def test_learning_can_be_set_back_to_any_state_that_is_kept(
    learning: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service.store.online_states, "KEEP_SECONDS", 0.0)
    server, client = learning
    at = ("--address", server.address)
    fitted = client.predict("mlp", X).probabilities
    first = taught(client, 500)
    probabilities = client.predict("mlp", X).probabilities
    later = taught(client, 1000)
    assert {first.serving, later.serving} <= {kept.online_state for kept in later.kept}
    cli.main(["online", "rollback", "mlp", str(first.serving), *at])
    assert f"state {first.serving} of {REVISION} serves" in capsys.readouterr().out
    answer = client.predict("mlp", X)
    assert answer.online_state == first.serving
    assert (answer.probabilities == probabilities).all()
    further = taught(client, 500)
    assert further.serving > later.newest
    assert client.replay_learning("mlp").equal
    client.roll_back_online_state("mlp", 0)
    answer = client.predict("mlp", X)
    assert (answer.online_state, (answer.probabilities == fitted).all()) == (0, True)
    with pytest.raises(errors.NotFound, match="state 999999 of revision online_temperature-1 is not kept"):
        client.roll_back_online_state("mlp", 999_999)
    assert client.predict("mlp", X).online_state == 0
    taught(client, 500)
    cli.main(["online", "replay", "mlp", *at])
    assert "bit for bit" in capsys.readouterr().out


@pytest.mark.usefixtures("open_gate")
def test_states_that_follow_each_other_fast_are_thinned_out(learning: tuple[RunningServer, Client]) -> None:
    _, client = learning
    states = [taught(client, 50, 50) for _ in range(5)]
    assert len({state.serving for state in states}) > 2
    assert len(states[-1].kept) <= 3


def test_learning_that_is_suspended_goes_on_later_with_what_has_come(
    learning: tuple[RunningServer, Client], capsys: pytest.CaptureFixture[str]
) -> None:
    server, client = learning
    before = taught(client, 500)
    cli.main(["online", "suspend", "mlp", "--address", server.address])
    teach(client, slice(0, 500))
    state = client.online_state("mlp")
    assert state.suspended
    assert state.rows == before.rows
    assert metrics(server)[f'calserve_online_suspended{{model="mlp",revision="{REVISION}"}}'] == 1
    cli.main(["online", "resume", "mlp", "--address", server.address])
    assert not learned(client, 1000).suspended
    client.suspend_learning("mlp")
    probabilities = client.predict("mlp", X[:50]).probabilities
    teach(client, slice(500, 1000))
    cli.main(["online", "resume", "mlp", "--skip-waiting", "--address", server.address])
    assert learned(client, 1500).waiting == 0
    assert (client.predict("mlp", X[:50]).probabilities == probabilities).all()
    assert client.replay_learning("mlp").equal
    cli.main(["online", "show", "mlp", "--address", server.address])
    assert f"revision {REVISION}" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("open_gate")
def test_only_an_active_revision_that_learns_has_a_learner(learning: tuple[RunningServer, Client]) -> None:
    server, client = learning
    state = taught(client, 500)
    probabilities = client.predict("mlp", X).probabilities
    client.activate("mlp", "none")
    with pytest.raises(errors.Refused, match="none, which is active on model 'mlp', does not learn online"):
        client.online_state("mlp")
    until(lambda: not server.app._online._learners)
    assert client.predict("mlp", X).online_state is None
    named = client.predict("mlp", X, calibrator=REVISION)
    assert (named.probabilities == probabilities).all()
    client.rollback("mlp")
    assert client.predict("mlp", X).online_state == state.serving
    assert client.online_state("mlp").newest >= state.newest
    server._run(server.app._loading.load("mlp"))
    answer = client.predict("mlp", X)
    assert (answer.probabilities == probabilities).all()
    assert taught(client, 500).serving > state.serving
    server._run(server.app._loading.unload("mlp"))
    until(lambda: not server.app._online._learners)


@pytest.mark.usefixtures("open_gate")
def test_what_is_exported_is_what_serves(learning: tuple[RunningServer, Client]) -> None:
    _, client = learning
    taught(client, 1000)
    session = ort.InferenceSession(client.export("mlp"), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run(["probabilities"], {"x": X})
    np.testing.assert_allclose(probabilities, client.predict("mlp", X).probabilities, atol=1e-6)


@pytest.mark.usefixtures("open_gate")
def test_the_metrics_say_what_became_of_labels_and_how_long_it_took(learning: tuple[RunningServer, Client]) -> None:
    server, client = learning
    state = taught(client, 500)
    client.predict("mlp", X[:7])
    told = until(lambda: {k: v for k, v in metrics(server).items() if f'{{model="mlp",revision="{REVISION}"' in k})
    own = f'model="mlp",revision="{REVISION}"'
    assert told[f"calserve_online_state{{{own}}}"] == state.serving
    assert told[f'calserve_online_rows_total{{{own},what="learned"}}'] == state.rows["learned"] > 350
    assert told[f'calserve_online_rows_total{{{own},what="held_out"}}'] == 500 - state.rows["learned"]
    assert told[f'calserve_online_states_total{{{own},what="published"}}'] == state.published
    assert told[f"calserve_online_waiting_labels{{{own}}}"] == 0
    assert 0 < told[f"calserve_online_seconds_sum{{{own}}}"] < 10 * told[f"calserve_online_seconds_count{{{own}}}"]
    assert 0 < state.seconds < 10


def test_all_workers_serve_what_one_has_learned(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CALSERVE_ONLINE_WAIT_SECONDS", "0")
    workers = Workers(root)
    try:
        workers.line("all 2 workers serve")
        with ExitStack() as stack:
            clients = connections(stack, workers.address)
            for client in clients:
                teach(client, slice(0, 100))
            state = learned(clients[0], 800)
            assert state.serving
            until(lambda: {c.predict("mlp", X[:1]).online_state for c in clients} == {state.serving}, 5)
            back = clients[0].roll_back_online_state("mlp", 0)
            assert back.serving == 0
            until(lambda: {c.predict("mlp", X[:1]).online_state for c in clients} == {0}, 5)
    finally:
        workers.send(signal.SIGTERM)
        workers.end()


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="online_wait_seconds must be zero or more, got -1"):
        Settings(tmp_path, online_wait_seconds=-1)
    with pytest.raises(errors.Refused, match="online_quota_labels must be positive"):
        Settings(tmp_path, online_quota_labels=0)


@pytest.mark.usefixtures("open_gate")
def test_a_damaged_state_is_told(root: Path) -> None:
    with serving(root, online_wait_seconds=0) as (_, client):
        taught(client, 500)
    journal = Journal(root.with_name("models.calserve"))
    journal.start()
    journal.writer.write_now(lambda c: c.execute("UPDATE online_states SET learned = learned + 1"))
    journal.close()
    with pytest.raises(errors.Damaged, match="table online_states"):
        Journal(root.with_name("models.calserve"))
