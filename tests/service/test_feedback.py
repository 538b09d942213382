"""Labels over the wire: a prediction is served, its label comes later by id, and both are found again."""

from __future__ import annotations

import asyncio
import json
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import grpc
import numpy as np
import pytest
from calserve.open_inference import messages
from calserve.v1 import feedback_service_pb2 as pb
from grpc_health.v1 import health_pb2

import service.store.journal
import service.store.writer
from service import cli, errors
from service.client import AsyncClient, Client, Retries
from service.rpc.feedback_service import MOST_LABELS
from service.rpc.tokens import Role, add
from service.rpc.wire import FEEDBACK_SERVICE, HEALTH_SERVICE, INFERENCE_SERVICE, Stub
from service.settings import Settings
from service.store.reading import Reader
from tests.service import models, power_cut
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_durability import until
from tests.service.test_lifecycle import Process
from tests.service.test_workers import Workers, connections

X, LOGITS, _ = models.labelled_rows(20, seed=3)
FOREVER = 1e9


@contextmanager
def serving(root: Path, **values: object) -> Iterator[tuple[RunningServer, Client]]:
    server = RunningServer(settings_for(root, **values))
    try:
        with Client(server.address, show_progress=False, retries=Retries(most=0)) as client:
            yield server, client
    finally:
        server.stop()


def infer(address: str, **fields: object) -> messages.ModelInferResponse:
    """One request by hand, one row."""
    request = messages.ModelInferRequest(model_name="mlp", raw_input_contents=[X[:1].tobytes()], **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[1, 6])
    with grpc.insecure_channel(address) as channel:
        return Stub(channel, INFERENCE_SERVICE).ModelInfer(request)


def metrics(server: RunningServer) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.app.metrics_port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_prediction_is_labelled_by_its_id_and_found_again_with_its_label(client: Client) -> None:
    prediction = client.predict("mlp", X)
    assert client.label("mlp", [prediction.prediction_id] * 20, np.arange(20) % 4, rows=range(20)) == ["recorded"] * 20
    stored = client.get_prediction("mlp", prediction.prediction_id, 7)
    assert (stored.probabilities == prediction.probabilities[7]).all()
    assert np.allclose(stored.logits, LOGITS[7], atol=1e-4)
    assert (stored.label, stored.predicted) == (3, prediction.outputs["label"][7])
    assert stored.confidence == prediction.outputs["confidence"][7]
    assert (stored.calibrator_revision, stored.online_state, stored.class_count) == ("none", 0, 4)
    assert stored.model_digest == client.models()[0].digest
    assert stored.classes.tolist() == [0, 1, 2, 3]


def test_what_is_read_of_the_journal_is_what_was_served_by_which_revision(
    server: RunningServer, client: Client
) -> None:
    rng = np.random.default_rng(0)
    client.fit("mlp", "temperature", logits=rng.standard_normal((300, 4)), labels=rng.integers(0, 4, 300))
    before = client.predict("mlp", X)
    client.activate("mlp", "temperature-1")
    after, named = client.predict("mlp", X), client.predict("mlp", X, calibrator="none")
    parts = Reader(server.app._journal, "mlp", "test", 0)
    until(lambda: sum(map(len, parts.read().pairs)) == 60)
    served = [before, after, named]
    assert [part.revision for part in parts.read().pairs] == ["none", "temperature-1", "none"]
    for part, prediction in zip(parts.read().pairs, served, strict=True):
        assert (part.kept.probabilities == prediction.probabilities).all()
        assert (part.labels == -1).all()


def test_every_way_to_ask_for_a_prediction_gives_an_id_that_labels_can_name(
    server: RunningServer, client: Client
) -> None:
    async def ids() -> list[str]:
        async with AsyncClient(server.address, show_progress=False) as other, other.stream("mlp") as stream:
            answers = [
                await other.predict("mlp", X[:2]),
                *await asyncio.gather(*(stream.predict(X[:2]) for _ in range(5))),
            ]
        return [answer.prediction_id for answer in answers]

    typed = messages.ModelInferRequest(model_name="mlp")
    tensor = typed.inputs.add(name="x", datatype="FP32", shape=[1, 6])
    tensor.contents.fp32_contents.extend(X[0].tolist())
    with grpc.insecure_channel(server.address) as channel:
        answer = Stub(channel, INFERENCE_SERVICE).ModelInfer(typed)
    given = [
        *asyncio.run(ids()),
        client.predict("mlp", X, outputs=["label"]).prediction_id,
        client.predict("mlp", np.tile(X, (20, 1))).prediction_id,
        answer.parameters["prediction_id"].string_param,
    ]
    assert len(set(given)) == 9
    assert client.label("mlp", given, [1] * 9) == ["recorded"] * 9


def test_what_no_label_could_prove_wrong_is_not_kept(client: Client) -> None:
    assert client.predict("mlp", X, outputs=["calserve/logits"]).prediction_id == ""
    assert client.predict("mlp", X, outputs=["scores"]).prediction_id == ""
    assert client.predict("mlp", X[:0]).prediction_id == ""


def test_a_label_may_name_its_class_and_the_callers_own_id(tmp_path: Path) -> None:
    models.write(
        tmp_path / "models",
        "mlp",
        models.classifier(),
        labels_txt="ant\nbee\ncat\ndog\n",
        calserve_toml='labels = "labels.txt"\n',
    )
    with serving(tmp_path / "models") as (server, client):
        infer(server.address, id="my-own")
        assert client.label("mlp", ["my-own"], ["wasp"]) == ["invalid_class"]
        assert client.label("mlp", ["my-own"], ["cat"]) == ["recorded"]
        assert client.label("mlp", ["my-own", "my-own"], [2, 1]) == ["duplicate", "conflict"]
        assert client.get_prediction("mlp", "my-own").label == 2
        assert metrics(server)['calserve_labels_total{result="conflict"}'] == 1


def test_unknown_models_and_ids_and_other_models_ids_are_told_the_same(server: RunningServer, client: Client) -> None:
    known = client.predict("mlp", X).prediction_id
    assert client.label("nobody", [known], [0]) == ["unknown"]
    assert client.label("mlp", ["x" * 24, "", "nothing"], [0, 0, 0]) == ["unknown"] * 3
    texts = set()
    for model, name, row in (("mlp", "x" * 24, 0), ("nobody", known, 0), ("mlp", known, 20), ("mlp", known, -1)):
        with pytest.raises(errors.NotFound) as caught:
            client.get_prediction(model, name, row)
        texts.add(caught.value.message)
    assert len(texts) == 1


def test_labels_without_a_class_or_too_many_at_once_are_refused(server: RunningServer, client: Client) -> None:
    known = client.predict("mlp", X).prediction_id
    with grpc.insecure_channel(server.address) as channel:
        feedback = Stub(channel, FEEDBACK_SERVICE)
        answer = feedback.RecordLabels(pb.RecordLabelsRequest(model="mlp", labels=[pb.Label(prediction_id=known)]))
        assert answer.results == [pb.LABEL_RESULT_INVALID_CLASS]
        too_many = pb.RecordLabelsRequest(model="mlp", labels=[pb.Label()] * (MOST_LABELS + 1))
        with pytest.raises(grpc.RpcError) as caught:
            feedback.RecordLabels(too_many)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(errors.InvalidRequest, match="different numbers of labels"):
        client.label("mlp", [known], [1, 2])


def test_a_stream_of_labels_is_answered_at_its_end_one_by_one(server: RunningServer, client: Client) -> None:
    ids = [client.predict("mlp", X).prediction_id for _ in range(3)]
    requests = [
        pb.RecordLabelsRequest(
            model="mlp", labels=[pb.Label(prediction_id=i, row=r, class_index=0) for r in (0, 5, 20)]
        )
        for i in ids
    ]
    with grpc.insecure_channel(server.address) as channel:
        answer = Stub(channel, FEEDBACK_SERVICE).ImportLabels(iter(requests))
    assert answer.results == 3 * [pb.LABEL_RESULT_RECORDED, pb.LABEL_RESULT_RECORDED, pb.LABEL_RESULT_UNKNOWN]


def test_predictions_and_labels_are_there_after_a_restart(root: Path) -> None:
    with serving(root) as (_, client):
        known = client.predict("mlp", X).prediction_id
        client.label("mlp", [known], [1])
    with serving(root) as (_, client):
        assert client.label("mlp", [known, known], [1, 1], rows=[0, 1]) == ["duplicate", "recorded"]
        assert client.get_prediction("mlp", known).label == 1


def flooded(address: str, stop: Callable[[int], object]) -> dict[tuple[str, int], int]:
    """The labels that were acknowledged to several callers until the server went away; `stop` is told how many are."""
    history: dict[tuple[str, int], int] = {}

    def caller(seed: int) -> None:
        with Client(address, show_progress=False, timeout_seconds=10, retries=Retries(most=0)) as client:
            try:
                for turn in range(1000):
                    known, label = client.predict("mlp", X).prediction_id, (seed + turn) % 4
                    if client.label("mlp", [known] * 3, [label] * 3, rows=range(3)) == ["recorded"] * 3:
                        history.update({(known, row): label for row in range(3)})
                    stop(len(history))
            except errors.CalserveError:
                pass  # it is gone

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(caller, range(4)))
    return history


def test_a_killed_server_has_every_label_that_it_acknowledged(root: Path) -> None:
    history: dict[tuple[str, int], int] = {}
    for _ in range(2):
        process = Process(root)
        process.wait_until_ready()
        kill = partial(process.send, signal.SIGKILL)
        history |= flooded(f"127.0.0.1:{process.port}", lambda count, kill=kill: count >= 150 and kill())
        assert process.end() == -signal.SIGKILL
        assert len(history) >= 150
    with serving(root) as (server, client):
        ids, rows = zip(*history, strict=True)
        assert set(client.label("mlp", ids, list(history.values()), rows=rows)) == {"duplicate"}
        with server.app._journal.reading() as connection:
            (count,) = connection.execute("SELECT count(*) FROM labels").fetchone()
        assert len(history) <= count <= len(history) + 2 * 4 * 3  # each caller may have had one call on its way


def test_a_receipt_stands_in_for_a_journal_that_was_lost(root: Path) -> None:
    store = root.with_name("models.calserve")
    with serving(root) as (_, client):
        prediction, plain = client.predict("mlp", X, receipt=True), client.predict("mlp", X)
        assert plain.receipt == ""
    for file in store.glob("journal.sqlite*"):
        file.unlink()
    with serving(root) as (_, client):
        known, receipt = prediction.prediction_id, prediction.receipt
        assert client.label("mlp", [known, ""], [1, 2], rows=[0, 1], receipts=[receipt, receipt]) == ["recorded"] * 2
        stored = client.get_prediction("mlp", known, 1)
        assert stored.label == 2
        assert (stored.probabilities == prediction.probabilities[1]).all()
        assert client.label("mlp", [known], [1], receipts=[receipt]) == ["duplicate"]
        forged = receipt[:40] + ("A" if receipt[40] != "A" else "B") + receipt[41:]
        assert client.label("mlp", [""] * 3, [1] * 3, receipts=[forged, receipt[:10], "?"]) == ["unknown"] * 3
        assert client.label("other", [""], [1], receipts=[receipt]) == ["unknown"]


def test_a_model_may_be_kept_out_of_the_journal_or_kept_before_it_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.journal, "FLUSH_SECONDS", FOREVER)
    root = tmp_path / "models"
    for mode in ("off", "sync"):
        models.write(root, mode, models.classifier(), calserve_toml=f'journal = "{mode}"\n')
    models.write(root, "mlp", models.classifier())
    with serving(root) as (_, client):
        assert client.predict("off", X).prediction_id == ""
        client.predict("mlp", X)
        journal = sqlite3.connect(root.with_name("models.calserve") / "journal.sqlite")
        count = "SELECT coalesce(sum(rows), 0) FROM packs JOIN streams ON streams.stream = packs.stream WHERE model = ?"
        assert journal.execute(count, ("mlp",)).fetchone() == (0,)
        client.predict("sync", X)
        assert journal.execute(count, ("sync",)).fetchone() == (20,)
        journal.close()


def test_a_mode_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="journal must be one of off, async, sync, got 'maybe'"):
        Settings(tmp_path, journal="maybe")
    models.write(tmp_path / "models", "mlp", models.classifier(), calserve_toml='journal = "maybe"\n')
    with serving(tmp_path / "models") as (server, _):
        assert "journal must be one of" in server.app.repository.failures["mlp"]


def test_with_the_journal_off_nothing_is_kept(root: Path) -> None:
    with serving(root, journal="off") as (server, client):
        assert client.predict("mlp", X).prediction_id == ""
        assert "prediction_id" not in infer(server.address).parameters


def test_a_receipt_parameter_that_is_no_boolean_is_refused(server: RunningServer) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(server.address, parameters={"receipt": messages.InferParameter(string_param="yes")})
    assert "parameter 'receipt' must be true or false" in (caught.value.details() or "")


def feedback_health(server: RunningServer) -> int:
    with grpc.insecure_channel(server.address) as channel:
        request = health_pb2.HealthCheckRequest(service=FEEDBACK_SERVICE.full_name)
        return Stub(channel, HEALTH_SERVICE).Check(request).status


def test_a_full_disk_refuses_labels_with_its_reason_and_inference_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.store.writer, "RETRY_SECONDS", 0.05)
    root = tmp_path / "models"
    models.write(root, "mlp", models.classifier())
    models.write(root, "sync", models.classifier(), calserve_toml='journal = "sync"\n')
    with power_cut.recorded(tmp_path) as disk, serving(root) as (server, client):
        known = client.predict("mlp", X).prediction_id
        assert client.label("mlp", [known], [1]) == ["recorded"]
        disk.fail = lambda kind, name: power_cut.FULL if kind == "write" and "journal" in name else 0
        with pytest.raises(errors.NotReady) as caught:
            client.label("mlp", [known], [1], rows=[1])
        assert caught.value.detail_reason == "STORE_READ_ONLY"
        answers = [client.predict("mlp", X) for _ in range(20)]
        assert {answer.prediction_id for answer in answers} == {""}
        with pytest.raises(errors.NotReady) as caught:
            client.predict("sync", X)
        assert caught.value.detail_reason == "STORE_READ_ONLY"
        told = metrics(server)
        assert told["calserve_store_writable"] == 0
        assert told['calserve_journal_lost_rows_total{model="mlp",why="disk"}'] >= 400
        until(lambda: feedback_health(server) == health_pb2.HealthCheckResponse.NOT_SERVING)
        assert told["calserve_ready"] == 1
        disk.fail = lambda *_: 0
        until(lambda: metrics(server)["calserve_store_writable"])
        assert client.label("mlp", [known], [1], rows=[1]) == ["recorded"]
        assert client.predict("mlp", X).prediction_id
        until(lambda: feedback_health(server) == health_pb2.HealthCheckResponse.SERVING)


def test_a_damaged_journal_keeps_the_server_from_starting_until_it_is_mended(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = root.with_name("models.calserve")
    with serving(root) as (_, client):
        ids = [client.predict("mlp", X).prediction_id for _ in range(2)]
        client.label("mlp", ids, [1, 2])
    journal = sqlite3.connect(store / "journal.sqlite")
    journal.execute("UPDATE labels SET label = 3 WHERE label = 2")
    journal.commit()
    journal.close()
    command = [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert done.returncode == 3
    assert "1 labels of the journal are damaged" in " ".join(done.stderr.split())
    for command in (("journal", "verify"), ("doctor",)):
        with pytest.raises(SystemExit) as caught:
            cli.main([*command, "--data-dir", str(store)])
        assert caught.value.code == 3
        assert "1 labels of the journal are damaged" in capsys.readouterr().out
    cli.main(["journal", "prune", "--damaged", "--data-dir", str(store)])
    cli.main(["doctor", "--data-dir", str(store)])
    assert "the store is what was written" in capsys.readouterr().out
    with serving(root) as (_, client):
        assert client.label("mlp", ids, [1, 2]) == ["duplicate", "recorded"]


def test_the_journal_by_command_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = ("--data-dir", str(root.with_name("models.calserve")))
    with serving(root) as (server, client):
        predictions = [client.predict("mlp", X) for _ in range(3)]
        lines = [f"{prediction.prediction_id},{row},{row % 4}" for prediction in predictions for row in range(5)]
        (tmp_path / "labels.csv").write_text("\n".join(["prediction_id,row,label", *lines, lines[0]]))
        cli.main(["label", "mlp", "--csv", str(tmp_path / "labels.csv"), "--address", server.address])
        said = capsys.readouterr().out
        assert "recorded" in said and "15" in said and "duplicate" in said
    cli.main(["journal", "inspect", *at])
    assert "60" in capsys.readouterr().out
    cli.main(["journal", "export", "mlp", "--out", str(tmp_path / "pairs.csv"), *at])
    assert "60 rows" in " ".join(capsys.readouterr().out.split())
    rows = (tmp_path / "pairs.csv").read_text().splitlines()
    assert rows[0].startswith("prediction_id,row,time_ms,")
    assert rows[1].startswith(predictions[0].prediction_id + ",0,")
    assert json.loads(rows[1].rpartition(',"[')[2].join(("[", "")).strip('"')) == pytest.approx(
        predictions[0].probabilities[0]
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SystemExit):
        cli.main(["journal", "export", "mlp", "--out", str(tmp_path / "pairs.parquet"), *at])
    assert "needs pyarrow" in capsys.readouterr().err
    cli.main(["journal", "prune", "--days", "0", *at])
    cli.main(["journal", "inspect", *at])
    assert "60" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("id,label\na,1\n", "the first line must name the columns"),
        ("prediction_id,label\na,one\n", "line 2: label must be a whole number"),
        ("prediction_id,label\na,1\nb\n", "line 3: 2 columns wanted, got 1"),
        ("", "got nothing"),
    ],
)
def test_a_file_of_labels_that_cannot_be_used_is_refused(
    shared_server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, text: str
) -> None:
    (tmp_path / "labels.csv").write_text(content)
    with pytest.raises(SystemExit) as caught:
        cli.main(["label", "mlp", "--csv", str(tmp_path / "labels.csv"), "--address", shared_server.address])
    assert caught.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_looking_makes_no_journal_and_mending_waits_for_the_server_to_end(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (("journal", "inspect"), ("journal", "verify")):
        with pytest.raises(SystemExit):
            cli.main([*command, "--data-dir", str(root)])
        assert "holds no journal" in capsys.readouterr().err
    with serving(root), pytest.raises(SystemExit):
        cli.main(["journal", "prune", "--data-dir", str(root.with_name("models.calserve"))])
    assert "another calserve server holds this data directory" in " ".join(capsys.readouterr().err.split())


def test_a_producer_is_known_by_its_token(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    tokens = {role: add(file, f"the-{role}", [role], ["*"], 1) for role in (Role.INFER, Role.LABEL)}
    server = RunningServer(settings_for(root, token_file=file))
    with (
        Client(server.address, token=tokens[Role.INFER]) as caller,
        Client(server.address, token=tokens[Role.LABEL]) as producer,
    ):
        known = caller.predict("mlp", {"x": X}).prediction_id
        with pytest.raises(errors.Forbidden):
            caller.label("mlp", [known], [1])
        assert producer.label("mlp", [known], [1]) == ["recorded"]
    with server.app._journal.reading() as connection:
        query = "SELECT name FROM labels JOIN producers ON producers.producer = labels.producer"
        assert connection.execute(query).fetchall() == [("the-label",)]
    server.stop()


def test_labels_find_their_predictions_through_whichever_worker(tmp_path: Path) -> None:
    models.write(tmp_path / "models", "mlp", models.classifier())
    workers = Workers(tmp_path / "models")
    try:
        workers.line("all 2 workers serve")
        with ExitStack() as stack:
            clients = connections(stack, workers.address)
            ids = [client.predict("mlp", X).prediction_id for client in clients]
            for client, known in zip(reversed(clients), ids, strict=True):
                assert client.label("mlp", [known] * 2, [1, 1], rows=[0, 19]) == ["recorded"] * 2

            def label_of(known: str) -> Callable[[], bool]:
                def found() -> bool:
                    try:
                        return clients[0].get_prediction("mlp", known, 19).label == 1
                    except errors.NotFound:  # the other worker has not written it yet
                        return False

                return found

            for known in ids:
                until(label_of(known))
    finally:
        workers.send(signal.SIGTERM)
        workers.end()
