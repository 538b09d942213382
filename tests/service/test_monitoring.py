"""Monitors of a server: predictions and labels come, an alarm goes out with its cause, and what was asked for is done."""

from __future__ import annotations

import asyncio
import io
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar

import numpy as np
import pytest
from rich.console import Console

import service.learning.monitoring
from service import cli, errors
from service import watching as terminal
from service.client import Alarm, AsyncClient, Client, Monitor
from service.drift import states
from service.learning import policies
from service.rpc.tokens import Role, add
from service.settings import Settings
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_durability import until
from tests.service.test_feedback import metrics, serving
from tests.service.test_lifecycle import Process
from tests.service.test_workers import Workers, connections

QUICK = {"reference_rows": 500, "false_alarm_probability": 0.1}
X, LOGITS, LABELS = models.labelled_rows(6000, seed=11)


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.learning.monitoring, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(service.learning.monitoring, "FEW_ROWS", 1)


@pytest.fixture
def watched(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server without default monitors."""
    with serving(root, monitors="own", monitor_wait_seconds=0, online_wait_seconds=0) as (server, client):
        yield server, client


def come(client: Client, x: np.ndarray, labels: np.ndarray | None = None, step: int = 500) -> None:
    """Predictions, and their labels."""
    for start in range(0, len(x), step):
        known, count = client.predict("mlp", x[start : start + step]).prediction_id, len(x[start : start + step])
        if labels is not None:
            own = labels[start : start + step]
            assert set(client.label("mlp", [known] * count, own, rows=range(count))) == {"recorded"}


def drifted(rows: slice, scale: float = 3.0) -> np.ndarray:
    """Inputs on which the model is much surer of itself."""
    return (scale * X[rows]).astype(np.float32)


def monitor_after(client: Client, name: str, rows: int) -> Monitor:
    """The monitor when it has read so many rows."""
    return until(lambda: (found := client.monitor("mlp", name)).rows >= rows and found)


def alarm_of(client: Client, name: str, is_enough: Callable[[Alarm], object] = lambda _: True) -> Alarm:
    def found() -> Alarm | None:
        return next((a for a in client.alarms("mlp") if a.monitor == name and is_enough(a)), None)

    return until(found)


def ended(client: Client, name: str) -> Alarm:
    """The alarm when its policy is carried out."""
    return alarm_of(client, name, lambda alarm: not alarm.outcome.startswith("pending"))


def test_a_change_is_told_to_who_watches_acknowledged_and_told_again(watched: tuple[RunningServer, Client]) -> None:
    server, client = watched
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    heard: SimpleQueue[Alarm] = SimpleQueue()
    begun = threading.Event()

    def listen() -> None:
        with Client(server.address) as other, pytest.raises(errors.CalserveError):
            begun.set()
            for alarm in other.watch_alarms("mlp"):
                heard.put(alarm)

    listener = threading.Thread(target=listen)
    listener.start()
    assert begun.wait(10)
    come(client, X[:1000])
    assert monitor_after(client, "scores", 500).alarms == ()
    come(client, drifted(slice(0, 500)))
    alarm = heard.get(timeout=20)
    assert (alarm.model, alarm.monitor, alarm.watched, alarm.revision) == ("mlp", "scores", "raw", "none")
    assert alarm.statistic >= alarm.threshold
    assert alarm.outcome == "told"
    assert alarm.change_time <= alarm.time <= alarm.notice_time
    assert client.monitor("mlp", "scores").alarms == (alarm.alarm,)
    seen = client.acknowledge("mlp", alarm.alarm)
    assert (seen.acknowledged_by, seen.acknowledge_time is not None) == ("somebody", True)
    while heard.get(timeout=20).acknowledge_time is None:
        pass
    assert client.acknowledge("mlp", alarm.alarm) == seen
    assert client.monitor("mlp", "scores").alarms == ()
    come(client, drifted(slice(500, 1000)))
    later = heard.get(timeout=20)
    assert later.alarm == "alarm-2"
    server.stop()
    listener.join(30)
    assert not listener.is_alive()


def test_one_alarm_at_a_time_however_long_the_change_lasts(watched: tuple[RunningServer, Client]) -> None:
    _, client = watched
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 3000)))
    alarm = alarm_of(client, "scores", lambda alarm: alarm.repeats > 5)
    assert [alarm.alarm] == [one.alarm for one in client.alarms()]


def test_after_an_alarm_that_is_acknowledged_as_the_new_normal_it_does_not_ring_again(
    watched: tuple[RunningServer, Client],
) -> None:
    _, client = watched
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 500)))
    client.acknowledge("mlp", alarm_of(client, "scores").alarm, rebaseline=True)
    assert not client.monitor("mlp", "scores").ready
    come(client, drifted(slice(500, 3000)))
    assert monitor_after(client, "scores", 1500).ready
    assert len(client.alarms("mlp")) == 1


def test_a_monitor_is_made_shown_changed_and_deleted(watched: tuple[RunningServer, Client]) -> None:
    _, client = watched
    made = client.create_monitor("mlp", "scores", "score_shift", policy="suspend", cooldown_rows=10, **QUICK)
    assert (made.watched, made.policy, made.cooldown_rows, made.is_default) == ("served", "suspend", 10, False)
    assert made.params == QUICK
    assert client.monitors("mlp") == [made] == [client.monitor("mlp", "scores")]
    with pytest.raises(errors.AlreadyExists, match="has a monitor 'scores'"):
        client.create_monitor("mlp", "scores", "score_shift")
    come(client, X[:700])
    read = monitor_after(client, "scores", 200)
    assert read.history
    changed = client.update_monitor("mlp", "scores", policy="refit", cooldown_rows=0)
    assert (changed.policy, changed.cooldown_rows, changed.rows) == ("refit", 0, read.rows)
    anew = client.update_monitor("mlp", "scores", params={"reference_rows": 300})
    assert (anew.params, anew.rows, anew.ready) == ({"reference_rows": 300}, 0, False)
    client.delete_monitor("mlp", "scores")
    assert client.monitors("mlp") == []
    for ask in (client.monitor, client.delete_monitor):
        with pytest.raises(errors.NotFound, match="has no monitor 'scores'"):
            ask("mlp", "scores")
    assert client.create_monitor("mlp", "scores", "score_shift").rows == 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "Big Name"}, "a monitor's name is"),
        ({"name": ""}, "a monitor's name is"),
        ({"detector": "crystal_ball"}, "unknown kind 'crystal_ball'; kinds are"),
        ({"reference_rows": 0}, "reference_rows must be a number at least 1"),
        ({"colour": 1}, "got .'colour'."),
        ({"signals": [1]}, "params_json must be a JSON object of numbers and texts"),
        ({"cooldown_rows": -1}, "cooldown_rows must be in 0..10000000, got -1"),
        ({"baseline_rows": 1 << 40}, "baseline_rows must be in"),
        ({"watched": "nothing"}, "watched must be one of raw, served, got 'nothing'"),
        ({"policy": "panic"}, "policy must be one of tell, suspend, roll_back, refit"),
    ],
)
def test_a_monitor_that_cannot_be_is_told_why(watched: tuple[RunningServer, Client], fields: dict, words: str) -> None:
    _, client = watched
    asked = {"name": "a", "detector": "score_shift", **fields}
    with pytest.raises(errors.InvalidRequest, match=words):
        client.create_monitor("mlp", **asked)
    assert client.monitors("mlp") == []


def test_what_else_cannot_be_is_told(watched: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch) -> None:
    _, client = watched
    with pytest.raises(errors.NotFound):
        client.create_monitor("nobody", "a", "score_shift")
    with pytest.raises(errors.InvalidRequest, match="update_mask must name some of params_json"):
        client.update_monitor("mlp", "a")
    with pytest.raises(errors.NotFound, match="model 'mlp' has no alarm 'alarm-9'"):
        client.acknowledge("mlp", "alarm-9")
    with pytest.raises(errors.InvalidRequest, match="after must be an alarm's name"):
        next(iter(client.watch_alarms("mlp", after="yesterday")))
    with pytest.raises(errors.InvalidRequest, match="page_size must be in"):
        client.alarms(most=-1)
    monkeypatch.setattr(service.learning.monitoring, "MOST_MONITORS", 1)
    client.create_monitor("mlp", "a", "score_shift")
    with pytest.raises(errors.Refused, match="a model has 1 monitors at most"):
        client.create_monitor("mlp", "b", "score_shift")


def test_a_server_without_monitors_says_so(root: Path) -> None:
    with serving(root, monitors="off") as (_, client):
        for ask in (client.monitors, client.monitor_report, lambda name: next(iter(client.watch_alarms(name)))):
            with pytest.raises(errors.Refused, match="it runs with --monitors off"):
                ask("mlp")


def test_settings_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="monitors must be one of default, own, off, got 'on'"):
        Settings(tmp_path, monitors="on")
    with pytest.raises(errors.Refused, match="monitor_wait_seconds must be zero or more"):
        Settings(tmp_path, monitor_wait_seconds=-1)


def test_a_monitor_of_what_is_served_begins_anew_with_another_revision_and_one_of_the_model_does_not(
    watched: tuple[RunningServer, Client],
) -> None:
    _, client = watched
    for name in ("served", "raw"):
        client.create_monitor("mlp", name, "score_shift", watched=name, **QUICK)
    come(client, X[:800])
    for name in ("served", "raw"):
        monitor_after(client, name, 300)
    client.activate("mlp", client.fit("mlp", "temperature", logits=LOGITS[:500], labels=LABELS[:500]).revision)
    until(lambda: not client.monitor("mlp", "served").ready)
    assert client.monitor("mlp", "raw").rows == 300
    come(client, X[800:2000])
    assert monitor_after(client, "served", 700).rows == 700
    assert monitor_after(client, "raw", 1500).rows == 1500
    assert client.alarms() == []


def test_a_server_that_is_killed_goes_on_where_it_was_and_comes_to_the_same_alarms(root: Path) -> None:
    process = Process(root, "--monitors", "own")
    process.wait_until_ready()
    with Client(f"127.0.0.1:{process.port}", show_progress=False) as client:
        client.create_monitor("mlp", "scores", "score_shift", watched="raw", cooldown_rows=100, **QUICK)
        come(client, X[:1000])
        come(client, drifted(slice(0, 1000)), step=100)
        alarm = alarm_of(client, "scores")
        process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    with serving(root, monitors="own") as (server, client):
        same = client.alarms("mlp")[-1]
        assert (same.alarm, same.time, same.statistic, same.change_time) == (
            alarm.alarm, alarm.time, alarm.statistic, alarm.change_time
        )  # fmt: skip
        come(client, drifted(slice(1000, 1500)), step=100)
        until(lambda: client.alarms("mlp")[0].repeats > alarm.repeats)
        monitor = server.app._monitoring._watched["mlp", "scores"].monitor

        def replayed() -> bool:
            is_same, rings = monitor.replay()
            return is_same and len(rings) == 1 + client.alarms("mlp")[0].repeats

        until(replayed)


def test_metrics_say_where_each_monitor_is(watched: tuple[RunningServer, Client]) -> None:
    server, client = watched
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 500)))
    alarm_of(client, "scores")
    of_monitor = '{model="mlp",monitor="scores"}'
    told = until(lambda: (m := metrics(server))[f"calserve_monitor_rows_total{of_monitor}"] == 1100 and m)
    assert told[f"calserve_monitor_threshold{of_monitor}"] == 6
    assert 0 <= told[f"calserve_monitor_statistic{of_monitor}"] < 6
    assert told[f"calserve_alarms_total{of_monitor}"] == 1
    assert told[f"calserve_alarms_open{of_monitor}"] == 1


def test_a_reader_that_comes_back_hears_what_it_missed(watched: tuple[RunningServer, Client]) -> None:
    server, client = watched
    for name in ("a", "b"):
        client.create_monitor("mlp", name, "score_shift", watched="raw", **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 500)))
    alarm_of(client, "a"), alarm_of(client, "b")

    async def heard(after: str, count: int) -> list[str]:
        async with AsyncClient(server.address) as other:
            alarms = other.watch_alarms("mlp", after=after)
            return [(await anext(alarms)).alarm for _ in range(count)]

    assert asyncio.run(heard("alarm-0", 2)) == ["alarm-1", "alarm-2"]
    assert asyncio.run(heard("alarm-1", 1)) == ["alarm-2"]


def test_who_may_do_what(root: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.toml"
    operator, narrow, other = (
        add(tokens, name, roles, of, None)
        for name, roles, of in (
            ("ann", [Role.OPERATE], ["*"]), ("bob", [Role.OPERATE], ["other"]), ("eve", [Role.INFER], ["*"])
        )
    )  # fmt: skip
    with serving(root, monitors="own", token_file=tokens) as (server, _), ExitStack() as stack:
        ann, bob, eve = (
            stack.enter_context(Client(server.address, token=token)) for token in (operator, narrow, other)
        )
        ann.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
        for client in (bob, eve):
            for ask in (client.monitors, client.alarms, client.monitor_report):
                with pytest.raises(errors.Forbidden):
                    ask("mlp")
            with pytest.raises(errors.Forbidden):
                client.create_monitor("mlp", "b", "score_shift")
        with pytest.raises(errors.Forbidden, match="name one of them"):
            bob.alarms()
        assert ann.alarms() == []


# ---- the default set


@pytest.fixture
def calibrated(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server with the default monitors, on which the model is calibrated well."""
    with serving(root, monitors="off") as (_, client):
        client.activate("mlp", client.fit("mlp", "temperature", logits=LOGITS, labels=LABELS).revision)
    with serving(root, monitor_wait_seconds=0) as (server, client):
        yield server, client


DEFAULTS = ["missing_labels", "raw_calibration", "raw_scores", "served_calibration"]


def test_every_model_is_watched_without_being_asked_and_silent_while_nothing_changes(
    calibrated: tuple[RunningServer, Client],
) -> None:
    server, client = calibrated
    assert [monitor.name for monitor in client.monitors("mlp") if monitor.is_default] == DEFAULTS
    come(client, X, LABELS)
    until(lambda: client.monitor("mlp", "served_calibration").rows == 6000)
    until(lambda: all(monitor.ready for monitor in client.monitors("mlp")))
    report = client.monitor_report("mlp")
    assert report.alarms == ()
    assert "together the default monitors of a model ring falsely within the first 100,000 rows" in report.false_alarms
    assert {monitor.name: monitor.rows for monitor in report.monitors} == {
        "served_calibration": 6000, "raw_calibration": 4000, "raw_scores": 4000, "missing_labels": 5000
    }  # fmt: skip
    right = client.predict("mlp", X).outputs["label"] == LABELS
    until(lambda: client.monitor_report("mlp").nowcasts["accuracy_without_labels"].labels >= 6000)
    now = client.monitor_report("mlp").nowcasts
    for name in ("accuracy_without_labels", "accuracy"):
        assert now[name].valid
        assert now[name].low < right[-2000:].mean() < now[name].high
    assert now["calibration_error"].low < 0.02
    assert metrics(server)['calserve_nowcast_accuracy_valid{model="mlp"}'] == 1


def test_labels_that_no_longer_follow_the_probabilities_ring_and_the_cause_is_told(
    calibrated: tuple[RunningServer, Client],
) -> None:
    _, client = calibrated
    come(client, X[:4000], LABELS[:4000])
    noisy = np.where(np.arange(2000) % 3 == 0, np.random.default_rng(6).integers(0, 4, 2000), LABELS[4000:])
    come(client, X[4000:], noisy, step=100)
    for name in ("served_calibration", "raw_calibration"):
        told = lambda alarm: alarm.cause and alarm.cause.kind != "unknown"  # noqa: E731
        alarm = alarm_of(client, name, told)
        assert alarm.cause.kind in ("temperature", "concept")  # of the inputs nothing is known
        assert alarm.revision == "temperature-1"
    assert {alarm.monitor for alarm in client.alarms("mlp")} == {"served_calibration", "raw_calibration"}
    come(client, X[:300], LABELS[:300])
    now = until(lambda: (told := client.monitor_report("mlp").nowcasts)["accuracy"].valid and told)
    assert now["accuracy"].labels <= 2300  # those since the alarm
    assert not now["accuracy_without_labels"].valid
    assert "an alarm rings" in now["accuracy_without_labels"].why_not


def test_inputs_are_watched_where_something_of_them_is_kept(tmp_path: Path) -> None:
    models.write(tmp_path / "models", "mlp", models.classifier(), calserve_toml="[monitor]\ninput_projections = 4\n")
    with serving(tmp_path / "models") as (_, client):
        assert "raw_inputs" in [monitor.name for monitor in client.monitors("mlp")]
        come(client, X[:2500])
        monitor_after(client, "raw_inputs", 500)
        come(client, X[2500:3500] + np.float32(0.7))
        assert alarm_of(client, "raw_inputs").evidence.keys() <= {
            "input_mean", "input_spread", "input_1", "input_2", "input_3", "input_4"
        }  # fmt: skip


def test_what_was_changed_of_the_default_set_stays_so(root: Path) -> None:
    with serving(root) as (_, client):
        client.delete_monitor("mlp", "raw_scores")
        client.update_monitor("mlp", "missing_labels", policy="suspend", cooldown_rows=3)
    with serving(root) as (_, client):
        assert [monitor.name for monitor in client.monitors("mlp")] == [
            name for name in DEFAULTS if name != "raw_scores"
        ]
        changed = client.monitor("mlp", "missing_labels")
        assert (changed.policy, changed.cooldown_rows, changed.is_default) == ("suspend", 3, True)
    with serving(root, monitors="own") as (_, client):
        assert len(client.monitors("mlp")) == 3  # they are there, and go on
        client.create_monitor("mlp", "raw_scores", "score_shift")


# ---- policies


@pytest.fixture
def online(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server with two activations: a temperature, then what learns online."""
    with serving(root, monitors="own", monitor_wait_seconds=0, online_wait_seconds=0) as (server, client):
        for kind in ("temperature", "online_temperature"):
            client.activate("mlp", client.fit("mlp", kind, logits=LOGITS[:500], labels=LABELS[:500]).revision)
        yield server, client


def ring(client: Client, policy: str, labels: np.ndarray | None = None) -> None:
    """Make a monitor of that policy ring."""
    client.create_monitor("mlp", policy, "score_shift", watched="raw", policy=policy, **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 1000)), labels)


def test_learning_is_suspended_when_asked_for(online: tuple[RunningServer, Client]) -> None:
    _, client = online
    ring(client, "suspend")
    alarm = ended(client, "suspend")
    assert alarm.outcome == "online_temperature-2 learns nothing until it is resumed; its state 0 serves"
    assert client.online_state("mlp").suspended
    assert not client.resume_learning("mlp").suspended
    come(client, drifted(slice(1000, 2000)))
    alarm_of(client, "suspend", lambda alarm: alarm.repeats)
    assert not client.online_state("mlp").suspended  # it was done, once


def test_the_revision_before_serves_when_asked_for_and_it_is_left_once(online: tuple[RunningServer, Client]) -> None:
    server, client = online
    ring(client, "roll_back")
    alarm = ended(client, "roll_back")
    assert alarm.outcome == "temperature-1 is active, before online_temperature-2"
    assert (alarm.revision, client.models()[0].active_revision) == ("online_temperature-2", "temperature-1")
    again = server._run(
        server.app._monitoring._policies.carry_out(stored(server, alarm), lambda: pytest.fail("no fit"))
    )
    assert again == alarm.outcome  # as after a crash between the roll-back and its being written down
    assert client.models()[0].active_revision == "temperature-1"


def stored(server: RunningServer, alarm: Alarm) -> states.Alarm:
    return server.app._monitoring.alarms.get("mlp", alarm.alarm)


def test_what_cannot_be_done_is_told(watched: tuple[RunningServer, Client]) -> None:
    _, client = watched
    for policy in ("suspend", "roll_back"):
        client.create_monitor("mlp", policy, "score_shift", watched="raw", policy=policy, **QUICK)
    come(client, X[:600])
    come(client, drifted(slice(0, 500)))
    assert "not done: none, which is active on model 'mlp', does not learn" in ended(client, "suspend").outcome
    assert "not done: model 'mlp': nothing was ever activated" in ended(client, "roll_back").outcome


def test_a_calibrator_is_fitted_on_the_rows_since_the_change_once_there_are_enough(
    watched: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "REFIT_ROWS", 900)
    server, client = watched
    labels = (client.logits("mlp", drifted(slice(0, 1000))) / 3 + gumbel(1000)).argmax(axis=1)
    client.create_monitor("mlp", "refit", "score_shift", watched="raw", policy="refit", **QUICK)
    come(client, X[:600], LABELS[:600])
    come(client, drifted(slice(0, 500)), labels[:500])
    waiting = alarm_of(client, "refit", lambda alarm: "labelled rows since" in alarm.outcome)
    assert waiting.outcome.startswith("pending: ")
    come(client, drifted(slice(500, 1000)), labels[500:])
    alarm = ended(client, "refit")
    assert alarm.outcome == "temperature-1 was fitted on rows since the change; it was put in shadow beside what served"
    assert client.models()[0].active_revision == "none"
    shadow = client.shadow("mlp", "temperature-1")
    assert (shadow.outcome, shadow.champion, shadow.started_by) == ("running", "none", alarm.alarm)
    assert client.get("mlp", "temperature-1").row_count in (1000, 1100)  # rows of a request were predicted at one time
    assert 2.4 < client.calibrator("mlp", "temperature-1").temperature_ < 3.8  # 900 rows: about four standard errors
    again = server._run(server.app._monitoring._policies.carry_out(stored(server, alarm), lambda: pytest.fail("again")))
    assert again == alarm.outcome
    assert len(client.list("mlp")) == 1


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (None, "it was put in shadow beside what served"),
        (errors.AlreadyExists("it is in shadow"), "it was put in shadow beside what served"),
        (errors.Refused("it may not be"), "it is not active, and not in shadow: it may not be"),
    ],
)
def test_what_was_fitted_is_compared_in_shadow_where_that_can_be(
    watched: tuple[RunningServer, Client], error: errors.CalserveError | None, words: str
) -> None:
    class Shadows:
        begun: ClassVar[list[tuple[str, str, str]]] = []

        async def start(self, model: str, revision: str, *, by: str) -> object:
            self.begun.append((model, revision, by))
            if error is not None:
                raise error
            return None

    server, client = watched
    server.app._monitoring._policies._shadows = Shadows()
    Shadows.begun.clear()
    ring(client, "refit", LABELS[:1000])
    assert ended(client, "refit").outcome.endswith(f"was fitted on rows since the change; {words}")
    assert Shadows.begun == [("mlp", "temperature-1", "alarm-1")]


def gumbel(count: int) -> np.ndarray:
    return np.random.default_rng(5).gumbel(size=(count, 4))


def test_a_policy_that_was_not_carried_out_before_a_crash_is_carried_out_after_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_power(*_: object) -> str:
        return "pending"

    with monkeypatch.context() as patch, serving(root, monitors="own", monitor_wait_seconds=0) as (_, client):
        patch.setattr(policies.Policies, "carry_out", no_power)
        client.activate("mlp", client.fit("mlp", "temperature", logits=LOGITS[:500], labels=LABELS[:500]).revision)
        ring(client, "roll_back")
        assert alarm_of(client, "roll_back").outcome == "pending"
    with serving(root, monitors="own") as (_, client):
        assert ended(client, "roll_back").outcome == "none is active, before temperature-1"
        assert client.models()[0].active_revision == "none"


def test_who_acknowledges_an_alarm_first_calls_its_policy_off(
    watched: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = watched
    ring(client, "refit")
    waiting = alarm_of(client, "refit", lambda alarm: "0 of 500 labelled rows" in alarm.outcome)
    client.acknowledge("mlp", waiting.alarm)
    assert ended(client, "refit").outcome == "not done: the alarm was acknowledged before"


# ---- causes


def test_the_cause_is_told_and_told_better_when_labels_have_come(watched: tuple[RunningServer, Client]) -> None:
    _, client = watched
    labels = (client.logits("mlp", drifted(slice(0, 2000))) / 3 + gumbel(2000)).argmax(axis=1)
    client.create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
    come(client, X[:1500], LABELS[:1500])
    come(client, drifted(slice(0, 2000)), labels, step=100)
    alarm = alarm_of(client, "scores", lambda alarm: alarm.cause and alarm.cause.kind != "unknown")
    assert alarm.cause.kind == "temperature"
    assert "Fit `temperature`" in alarm.cause.action
    assert any("labels since the change" in sentence for sentence in alarm.cause.evidence)


def test_who_listens_is_told_once_with_the_cause_and_at_the_next_start_again_while_nobody_has_seen_it(
    root: Path,
) -> None:
    told: list[states.Alarm] = []
    with serving(root, monitors="own") as (server, client):
        server.app._monitoring.listeners.append(told.append)
        ring(client, "tell")
        (alarm,) = until(lambda: list(told))
        assert alarm.cause is not None
        assert alarm_of(client, "tell", lambda found: found.repeats).alarm == alarm.id
    assert len(told) == 1
    server = RunningServer(settings_for(root, monitors="own"), wait=False)
    server.app._monitoring.listeners.append(told.append)
    server._started.result(timeout=120)
    try:
        assert [one.id for one in until(lambda: told[1:])] == [alarm.id]
        with Client(server.address) as client:
            client.acknowledge("mlp", alarm.id)
    finally:
        server.stop()


# ---- several workers, the command line


def test_monitors_are_the_learners_and_any_worker_may_be_asked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALSERVE_MONITORS", "own")
    workers = Workers(root)
    try:
        workers.line("all 2 workers serve")
        with ExitStack() as stack:
            clients = connections(stack, workers.address)
            clients[0].create_monitor("mlp", "scores", "score_shift", watched="raw", **QUICK)
            for client in clients:
                assert client.monitor("mlp", "scores").name == "scores"
            streams = [client.watch_alarms("mlp", after="alarm-0") for client in clients]
            for client in clients:
                come(client, X[:600])
            until(lambda: clients[0].monitor("mlp", "scores").ready)
            for client in clients:
                come(client, drifted(slice(0, 500)))
            assert {next(stream).alarm for stream in streams} == {"alarm-1"}
    finally:
        workers.send(signal.SIGTERM)
        workers.end()


def test_the_command_line_does_the_same(
    watched: tuple[RunningServer, Client], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = watched

    def said(*words: str) -> str:
        cli.main([*words, "--address", server.address])
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.setenv("COLUMNS", "160")
    made = said(
        "monitor", "create", "mlp", "scores", "score_shift", "--watched", "raw", "--param", "reference_rows=500"
    )
    assert "scores watches from now on; it rings falsely within 100,000 rows with probability 0.1 at most" in made
    assert "gathers its reference" in said("monitor", "list", "mlp")
    assert "policy refit, cool-down 5 rows" in said(
        "monitor", "update", "mlp", "scores", "--policy", "refit", "--cooldown-rows", "5"
    )
    come(client, X[:600])
    come(client, drifted(slice(0, 1000)))
    alarm_of(client, "scores", lambda alarm: alarm.repeats and "0 of 500" in alarm.outcome)
    shown = said("monitor", "show", "mlp", "scores")
    assert "of 6.00" in shown and "'reference_rows': 500" in shown
    told = said("watch", "mlp", "--once")
    assert "of 6.00" in told and "alarm-1" in told and "pending: 0 of 500 labelled rows" in told
    assert " open " in said("alarms", "list")
    assert "alarm-1 was seen by somebody; scores begins anew" in said("alarms", "acknowledge", "mlp", "alarm-1")
    assert "seen by somebody" in said("alarms", "list", "mlp", "--most", "1")
    assert "scores is deleted" in said("monitor", "delete", "mlp", "scores")


def test_the_terminal_is_drawn_again_until_it_is_interrupted(watched: tuple[RunningServer, Client]) -> None:
    _, client = watched
    client.create_monitor("mlp", "first", "score_shift")
    console, pauses = Console(file=io.StringIO(), force_terminal=True, width=120), []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        client.create_monitor("mlp", "second", "score_shift")

    terminal.watch(client, "mlp", console, pause)
    drawn = console.file.getvalue()
    assert drawn.index("first") < drawn.index("second")
