"""Champion and challenger over the wire: in shadow on live traffic, judged by labels, promoted."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

import calibrators
from service import cli, errors
from service.client import AsyncClient, Client, Shadow
from service.learning import gate, shadow_runs, shadows
from service.learning import shadow as shadow_of_learning
from service.learning.shadow import Judge
from service.store.shadows import read_shadows
from tests.service import models
from tests.service.conftest import RunningServer
from tests.service.test_durability import until
from tests.service.test_feedback import metrics, serving
from tests.service.test_lifecycle import Process
from tests.service.test_workers import Workers, connections

X, LOGITS, LABELS = models.labelled_rows(4000, seed=1)
STATIC, OTHER, ONLINE = "temperature-1", "vector-2", "online_temperature-3"
CLIPPED, DENSE = "feature_clipping-4", "density_aware-5"
AT_ONCE = {"online_wait_seconds": 0}


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shadows are looked after often, and run without rest."""
    for module in (shadows, shadow_runs):
        monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(shadow_runs, "GATHER_SECONDS", 0.01)
    monkeypatch.setattr(shadow_runs, "MOST_BUSY", 0.9)
    monkeypatch.setattr(shadow_of_learning, "HOLD_SECONDS", 1.0)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with its store, in which `mlp` has revisions and none is active."""
    root = tmp_path_factory.mktemp("fitted") / "models"
    models.write(root, "mlp", models.classifier())
    of_logits = {"logits": LOGITS[:1000], "labels": LABELS[:1000], "held_out_fraction": 0}
    of_inputs = {"inputs": X[:1000], "labels": LABELS[:1000], "held_out_fraction": 0}
    few = {"logits": LOGITS[:20], "labels": LABELS[:20], "held_out_fraction": 0}
    with serving(root) as (_, client):
        made = [
            client.fit("mlp", "temperature", **of_logits),
            client.fit("mlp", "vector", **of_logits),
            client.fit("mlp", "online_temperature", **few),
            client.fit("mlp", "feature_clipping", layer="h", **of_inputs),
            client.fit("mlp", "density_aware", **of_inputs),
        ]
    assert [one.revision for one in made] == [STATIC, OTHER, ONLINE, CLIPPED, DENSE]
    return root.parent


@pytest.fixture
def root(fitted: Path, tmp_path: Path) -> Path:
    shutil.copytree(fitted, tmp_path, dirs_exist_ok=True)
    return tmp_path / "models"


@pytest.fixture
def pair(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server that does not wait for labels, and its client."""
    with serving(root, **AT_ONCE) as (server, client):
        yield server, client


def teach(client: Client, rows: slice, *, model: str = "mlp") -> None:
    known, count = client.predict(model, X[rows]).prediction_id, len(X[rows])
    assert set(client.label(model, [known] * count, LABELS[rows], rows=range(count))) == {"recorded"}


def judged(client: Client, revision: str, labels: int, seconds: float = 20.0) -> Shadow:
    def found() -> Shadow | None:
        shadow = client.shadow("mlp", revision)
        return shadow if shadow.labels >= labels or shadow.outcome != "running" else None

    found_one: Shadow = until(found, seconds)
    return found_one


def half_brier(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return ((probabilities - np.eye(4)[labels]) ** 2).sum(axis=1) / 2


def come(client: Client, first: int, last: int, step: int = 500) -> None:
    """Predictions, and a label for each."""
    for start in range(first, last, step):
        teach(client, slice(start, min(last, start + step)))


def test_a_static_challenger_is_judged_by_what_it_would_have_served(pair: tuple[RunningServer, Client]) -> None:
    server, client = pair
    revision = STATIC
    begun = client.start_shadow("mlp", revision)
    assert (begun.champion, begun.share, begun.verdict, begun.labels) == ("none", 0, "undecided", 0)
    come(client, 1000, 4000)
    found = judged(client, revision, 3000)
    served, would_be = (client.probabilities("mlp", X[1000:], calibrator=name) for name in ("none", revision))
    gains = half_brier(served, LABELS[1000:]) - half_brier(would_be, LABELS[1000:])
    assert found.gain.value == pytest.approx(gains.mean(), abs=1e-5)
    assert (found.verdict, found.outcome, found.labels) == ("better", "running", 3000)
    assert 0 < found.gain.low < found.gain.value < found.gain.high
    assert client.predict("mlp", X[:1]).calibrator_revision == "none"
    told = metrics(server)
    own = f'model="mlp",revision="{revision}"'
    assert told[f"calserve_shadow_verdict{{{own}}}"] == 1
    assert told[f'calserve_shadow_labels_total{{{own},what="judged"}}'] == 3000
    assert told[f'calserve_shadow_gain{{bound="low",{own}}}'] == pytest.approx(found.gain.low)


def test_promoting_activates_a_challenger_that_is_shown_better_and_no_other(
    pair: tuple[RunningServer, Client],
) -> None:
    _, client = pair
    revision = STATIC
    with pytest.raises(errors.NotFound, match="is not in shadow"):
        client.promote("mlp", revision)
    client.start_shadow("mlp", revision)
    with pytest.raises(errors.Refused, match="is not shown better than none") as refused:
        client.promote("mlp", revision)
    assert refused.value.detail_reason == "NOT_SHOWN_BETTER"
    come(client, 0, 4000)
    judged(client, revision, 4000)
    ended = client.promote("mlp", revision)
    assert (ended.outcome, ended.verdict, ended.labels) == ("promoted", "better", 4000)
    assert client.predict("mlp", X[:1]).calibrator_revision == revision
    assert client.shadow("mlp", revision) == ended
    assert client.rollback("mlp") == "none"


def test_what_is_active_by_now_is_no_longer_what_the_challenger_was_compared_with(
    pair: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair
    revision, other = STATIC, OTHER
    client.start_shadow("mlp", revision)
    come(client, 0, 4000)
    assert judged(client, revision, 4000).verdict == "better"
    with monkeypatch.context() as held:
        held.setattr(Judge, "begin_anew", lambda *_: None)
        client.activate("mlp", other)
        with pytest.raises(errors.Stale, match=f"{other} is active, no longer none"):
            client.promote("mlp", revision)
    anew = until(lambda: (found := client.shadow("mlp", revision)).champion == other and found)
    assert (anew.labels, anew.verdict, anew.outcome) == (0, "undecided", "running")
    assert f"compared with {other} since that is active; before that with none" in anew.note
    teach(client, slice(0, 500))
    again = judged(client, revision, 500)
    assert (again.labels, again.champion) == (500, other)
    assert [row.champion for row in _rows(server)] == [other]


def _rows(server: RunningServer) -> list:
    with server.app._journal.reading() as connection:
        return read_shadows(connection)


def _activations(server: RunningServer) -> list[str]:
    digest = server.app.repository.get("mlp").digest
    return [row.revision for row in server.app._catalogue.activations("mlp", digest)]


def test_the_policy_promotes_what_is_better_once_and_tells_who_did_it(pair: tuple[RunningServer, Client]) -> None:
    server, client = pair
    revision = STATIC
    client.start_shadow("mlp", revision, policy="automatic", least_labels=3500)
    come(client, 0, 3000)
    early = judged(client, revision, 3000)
    assert (early.verdict, early.outcome) == ("better", "running")
    come(client, 3000, 4000)
    ended = until(lambda: (found := client.shadow("mlp", revision)).outcome == "promoted" and found)
    assert (ended.ended_by, ended.verdict, ended.labels >= 3500) == ("the policy", "better", True)
    assert client.predict("mlp", X[:1]).calibrator_revision == revision
    assert _activations(server) == [revision]
    client.rollback("mlp")
    server._run(server.app._shadows.look())
    assert client.predict("mlp", X[:1]).calibrator_revision == "none"


def test_the_policy_leaves_a_worse_challenger_where_it_is(pair: tuple[RunningServer, Client]) -> None:
    _, client = pair
    client.activate("mlp", STATIC)
    client.start_shadow("mlp", "none", policy="automatic", least_labels=1)
    come(client, 0, 4000)
    found = judged(client, "none", 4000)
    assert (found.verdict, found.outcome) == ("worse", "running")
    assert found.gain.high < 0


@pytest.mark.parametrize("activated", [False, True])
def test_a_crash_in_the_middle_of_a_promotion_promotes_once(
    root: Path, activated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process ends before the activation is written, or after it."""
    died = threading.Event()

    async def dies(*_: object, **__: object) -> None:
        died.set()
        await asyncio.Event().wait()  # until the server stops

    with serving(root, **AT_ONCE) as (server, client), monkeypatch.context() as dying:
        revision = STATIC
        if activated:
            dying.setattr(server.app._shadows, "_end", dies)
        else:
            dying.setattr(server.app._revisions, "activate", dies)
        client.start_shadow("mlp", revision, policy="automatic", least_labels=1)
        come(client, 0, 4000)
        assert died.wait(20)
        assert [row.promoting for row in _rows(server)] == ["the policy"]
        assert _activations(server) == [revision] * activated
    with serving(root, **AT_ONCE) as (server, client):
        ended = until(lambda: (found := client.shadow("mlp", revision)).outcome == "promoted" and found)
        assert (ended.ended_by, ended.verdict) == ("the policy", "better")
        assert _activations(server) == [revision]
        assert client.predict("mlp", X[:1]).calibrator_revision == revision


def test_a_server_killed_while_it_judges_and_promotes_comes_to_one_promotion(root: Path) -> None:
    process = Process(root, "--online-wait-seconds", "0")
    process.wait_until_ready()
    with Client(f"127.0.0.1:{process.port}", show_progress=False) as client:
        client.start_shadow("mlp", STATIC, policy="automatic", least_labels=1)
        come(client, 0, 4000)
        judged(client, STATIC, 1)
        process.send(signal.SIGKILL)
    assert process.end() == -signal.SIGKILL
    with serving(root, **AT_ONCE) as (server, client):
        ended = until(lambda: (found := client.shadow("mlp", STATIC)).outcome == "promoted" and found)
        assert (ended.ended_by, ended.verdict) == ("the policy", "better")
        assert _activations(server) == [STATIC]


def test_a_promotion_that_is_refused_is_left_to_people(
    pair: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair

    async def refused(*_: object, **__: object) -> None:
        raise errors.Refused("the graph disagrees")

    revision = STATIC
    monkeypatch.setattr(server.app._revisions, "activate", refused)
    client.start_shadow("mlp", revision, policy="automatic", least_labels=1)
    come(client, 0, 4000)
    found = until(lambda: (found := client.shadow("mlp", revision)).policy == "manual" and found)
    assert "could not be promoted by the policy" in found.note
    assert "the graph disagrees" in found.note


def test_a_revision_made_active_by_hand_ends_its_shadow(pair: tuple[RunningServer, Client]) -> None:
    _, client = pair
    revision = STATIC
    client.start_shadow("mlp", revision)
    client.activate("mlp", revision)
    ended = until(lambda: (found := client.shadow("mlp", revision)).outcome == "stopped" and found)
    assert ended.note == "it was made active by another call"


def test_a_restart_goes_on_with_the_numbers_that_there_were(root: Path) -> None:
    with serving(root, **AT_ONCE) as (_, client):
        revision = STATIC
        client.start_shadow("mlp", revision, level=0.9, least_labels=77)
        come(client, 0, 1000, 250)
        before = judged(client, revision, 1000)
    with serving(root, **AT_ONCE) as (server, client):
        until(lambda: server.app._shadows.states())
        assert client.shadow("mlp", revision) == before
        teach(client, slice(1000, 1500))
        after = judged(client, revision, 1500)
        assert (after.labels, after.level, after.least_labels) == (1500, 0.9, 77)
        (judge,) = server.app._shadows._judges.values()
        assert judge.replay().encode() == judge.comparison.encode()


def ran(client: Client, server: RunningServer, revision: str, rows: int) -> None:
    """Until so many rows were run on."""
    name = f'calserve_shadow_rows_total{{model="mlp",revision="{revision}",what="run"}}'
    until(lambda: metrics(server).get(name, 0) >= rows)


@pytest.mark.parametrize("revision", [CLIPPED, DENSE])
def test_a_challenger_that_looks_inside_the_model_is_run_on_live_traffic(
    pair: tuple[RunningServer, Client], revision: str
) -> None:
    server, client = pair
    assert client.start_shadow("mlp", revision, share=1.0).share == 1.0
    for start in range(1000, 1600, 60):
        teach(client, slice(start, start + 60))
        ran(client, server, revision, start - 940)
    found = judged(client, revision, 600)
    served, would_be = (client.probabilities("mlp", X[1000:1600], calibrator=name) for name in ("none", revision))
    gains = half_brier(served, LABELS[1000:1600]) - half_brier(would_be, LABELS[1000:1600])
    assert found.gain.value == pytest.approx(gains.mean(), abs=1e-5)
    assert (found.rows["judged"], found.rows["not_run"]) == (600, 0)
    (judge,) = server.app._shadows._judges.values()
    assert judge.replay().encode() == judge.comparison.encode()


def test_a_challenger_is_run_on_a_share_of_requests_chosen_by_chance(pair: tuple[RunningServer, Client]) -> None:
    """Of 300 requests of 2 rows about .3: less than 50 or more than 130 with probability below 1e-6."""
    _, client = pair
    revision = CLIPPED
    assert client.start_shadow("mlp", revision, share=0.3).share == 0.3
    come(client, 0, 600, 2)
    found = until(lambda: (s := client.shadow("mlp", revision)).labels + s.rows["not_run"] >= 600 and s)
    assert 100 < found.labels < 260
    assert found.labels + found.rows["not_run"] == 600


def test_what_finds_no_room_is_not_run_and_counted(
    pair: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = pair
    monkeypatch.setattr(shadow_runs, "MOST_ROWS", 20)
    revision = CLIPPED
    client.start_shadow("mlp", revision, share=1.0)
    client.predict("mlp", X[:50])
    client.predict("mlp", X[:5])
    ran(client, server, revision, 5)
    told = metrics(server)
    assert told[f'calserve_shadow_rows_total{{model="mlp",revision="{revision}",what="full"}}'] == 50
    assert told[f'calserve_shadow_rows_total{{model="mlp",revision="{revision}",what="run"}}'] == 5


def test_an_online_challenger_learns_in_shadow_and_serves_what_it_has_learned(
    pair: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("MARGIN", "MOVED"):  # every state would serve
        monkeypatch.setattr(gate, bound, np.inf)
    server, client = pair
    assert client.start_shadow("mlp", ONLINE).share == 1.0
    runs = server.app._shadow_runs._runs["mlp", ONLINE]
    come(client, 0, 2000)
    learner = until(lambda: server.app._online._learners.get(("mlp", ONLINE)))[0]
    until(lambda: learner.progress.counts["learned"] + learner.progress.counts["held_out"] == 2000)
    until(lambda: runs.online_state == learner.serving.number > 0)
    assert client.predict("mlp", X[:1]).online_state is None  # none of it serves
    for start in range(2000, 4000, 400):
        before = client.shadow("mlp", ONLINE).rows["judged"]
        teach(client, slice(start, start + 400))
        until(lambda seen=before: client.shadow("mlp", ONLINE).rows["judged"] > seen)
    come(client, 0, 4000)
    found = until(lambda: (s := client.shadow("mlp", ONLINE)).verdict == "better" and s)
    assert found.gain.low > 0
    assert client.promote("mlp", ONLINE).outcome == "promoted"
    # it goes on learning, so that another state may serve a moment later
    answer = until(lambda: (a := client.predict("mlp", X)).online_state == client.online_state("mlp").serving and a)
    assert answer.online_state
    artifact = _artifact(server, ONLINE, answer.online_state)
    np.testing.assert_allclose(answer.probabilities, calibrators.loads(artifact).predict_proba(LOGITS), atol=1e-5)
    assert server.app._online._learners["mlp", ONLINE][0] is learner  # it goes on learning
    assert client.replay_learning("mlp").equal


def _artifact(server: RunningServer, revision: str, number: int) -> bytes:
    found = server.app._shadow_runs._states.served("mlp", revision, -1)
    assert found is not None and found[0] == number
    return found[1]


def test_deleting_a_revision_ends_its_shadow_and_removes_all_that_it_learned(
    pair: tuple[RunningServer, Client],
) -> None:
    server, client = pair
    revision = ONLINE
    client.start_shadow("mlp", revision)
    come(client, 0, 1000, 100)
    learner = until(lambda: server.app._online._learners.get(("mlp", revision)))[0]
    until(lambda: learner.progress.counts["learned"] > 700)
    until(lambda: client.shadow("mlp", revision).labels > 0)
    client.delete("mlp", revision)
    assert client.shadows("mlp") == []
    assert not server.app._shadow_runs.runs()
    assert not server.app._online._learners
    with server.app._journal.reading() as connection:
        for table in ("online_states", "online_heads", "online_serving", "shadows", "shadow_packs"):
            assert (table, connection.execute(f"SELECT count(*) FROM {table}").fetchone()) == (table, (0,))  # noqa: S608
        for table in ("readers", "releases"):
            left = connection.execute(f"SELECT reader FROM {table} WHERE reader LIKE '%{revision}'").fetchall()  # noqa: S608
            assert left == []


def test_a_revision_that_cannot_be_deleted_stays_in_shadow(pair: tuple[RunningServer, Client]) -> None:
    _, client = pair
    first, second = STATIC, OTHER
    client.activate("mlp", first)
    client.activate("mlp", second)
    client.start_shadow("mlp", first)
    with pytest.raises(errors.Refused, match="active or would be after a roll-back"):
        client.delete("mlp", first)
    teach(client, slice(0, 200))
    assert judged(client, first, 200).labels == 200


def test_the_command_line_starts_shows_lists_stops_and_promotes(
    pair: tuple[RunningServer, Client], capsys: pytest.CaptureFixture[str]
) -> None:
    server, client = pair
    revision, at = STATIC, ("--address", server.address)

    def told(*arguments: str) -> str:
        cli.main(["shadow", *arguments, *at])
        return " ".join(capsys.readouterr().out.split())

    assert f"{revision} is in shadow beside none, computed from the logits" in told("start", "mlp", revision)
    come(client, 0, 4000)
    judged(client, revision, 4000)
    assert "verdict better, since" in told("show", "mlp", revision)
    assert "4,000" in told("list", "mlp")
    assert "better after 4000 labels" in told("stop", "mlp", revision)
    assert client.shadow("mlp", revision).outcome == "stopped"
    told("start", "mlp", revision, "--policy", "automatic", "--least-labels", "1000000")
    come(client, 0, 4000)
    judged(client, revision, 4000)
    assert f"{revision} is active, before none" in told("promote", "mlp", revision)
    assert "promoted by anybody" in told("show", "mlp", revision)
    assert "promoted" in told("list", "mlp")


def test_the_client_for_asyncio_does_the_same(pair: tuple[RunningServer, Client]) -> None:
    server, _ = pair
    revision = STATIC

    async def all_of_it() -> list[Shadow]:
        async with AsyncClient(server.address, show_progress=False) as other:
            begun = await other.start_shadow("mlp", revision)
            found = [begun, await other.shadow("mlp", revision), *await other.shadows("mlp")]
            with pytest.raises(errors.Refused, match="not shown better"):
                await other.promote("mlp", revision)
            return [*found, await other.stop_shadow("mlp", revision)]

    found = asyncio.run(all_of_it())
    assert [one.outcome for one in found] == ["running"] * 3 + ["stopped"]


@pytest.mark.parametrize(
    ("ask", "error", "match"),
    [
        (lambda c, _: c.start_shadow("mlp", "temperature-99"), errors.NotFound, "has no revision 'temperature-99'"),
        (lambda c, r: c.start_shadow("nobody", r), errors.NotFound, "nobody"),
        (lambda c, _: c.start_shadow("mlp", "none"), errors.Refused, "none is active: it cannot be in its own shadow"),
        (
            lambda c, r: c.start_shadow("mlp", r, policy="maybe"),
            errors.InvalidRequest,
            "manual or automatic, got 'maybe'",
        ),
        (lambda c, r: c.start_shadow("mlp", r, level=0.3), errors.InvalidRequest, "level must be from 0.5"),
        (lambda c, r: c.start_shadow("mlp", r, share=1.5), errors.InvalidRequest, "share must be from 0 to 1, got 1.5"),
        (
            lambda c, r: c.start_shadow("mlp", r, least_labels=-1),
            errors.InvalidRequest,
            "least_labels must be 1 or more",
        ),
        (lambda c, r: c.stop_shadow("mlp", r), errors.NotFound, "is not in shadow"),
        (lambda c, r: c.shadow("mlp", r), errors.NotFound, "is not in shadow"),
        (lambda c, r: [c.start_shadow("mlp", r) for _ in range(2)], errors.AlreadyExists, "is in shadow already"),
    ],
)
def test_what_cannot_be_in_shadow_is_refused_with_what_was_wrong(
    pair: tuple[RunningServer, Client], ask: Callable[[Client, str], object], error: type[Exception], match: str
) -> None:
    _, client = pair
    with pytest.raises(error, match=match):
        ask(client, STATIC)


def test_a_model_whose_predictions_are_not_kept_has_no_shadows(root: Path) -> None:
    with serving(root, journal="off") as (_, client):
        revision = STATIC
        with pytest.raises(errors.Refused, match="predictions of model 'mlp' are not kept"):
            client.start_shadow("mlp", revision)


def test_several_challengers_are_compared_at_once_up_to_a_bound(
    pair: tuple[RunningServer, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, client = pair
    monkeypatch.setattr(shadows, "MOST_SHADOWS", 2)
    revisions = [STATIC, OTHER]
    for revision in revisions:
        client.start_shadow("mlp", revision)
    with pytest.raises(errors.Refused, match="2 revisions of model 'mlp' are in shadow already"):
        client.start_shadow("mlp", DENSE)
    teach(client, slice(0, 500))
    assert [judged(client, revision, 500).labels for revision in revisions] == [500, 500]


def test_all_workers_run_what_is_in_shadow_and_one_judges(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "CALSERVE_ONLINE_WAIT_SECONDS", "0")
    workers = Workers(root)
    try:
        workers.line("all 2 workers serve")
        with ExitStack() as stack:
            clients = connections(stack, workers.address)
            revision = CLIPPED
            assert clients[-1].start_shadow("mlp", revision, share=1.0).outcome == "running"

            def runs_everywhere() -> bool:
                before = clients[0].shadow("mlp", revision).labels
                for client in clients:
                    teach(client, slice(0, 20))
                return clients[0].shadow("mlp", revision).labels - before >= 20 * len(clients)

            until(runs_everywhere, 60)
    finally:
        workers.send(signal.SIGTERM)
        workers.end()
