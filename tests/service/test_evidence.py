"""What the journal keeps for monitors: segments, and signals of each row beside its scores."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from calserve.open_inference import messages
from hypothesis import given, settings
from hypothesis import strategies as st

from service import cli, errors
from service.client import AsyncClient, Client
from service.inference.input_signals import MOST_NUMBERS, InputSignals
from service.inference.session import TensorSpec
from service.store.beside import MOST_SEGMENTS, OTHER_SEGMENT
from service.store.reading import Pairs, Reader
from tests.service import models
from tests.service.conftest import RunningServer
from tests.service.test_density import FIT, REFERENCE, library, logits_of
from tests.service.test_feedback import infer, metrics, serving

X, LOGITS, LABELS = models.labelled_rows(300, seed=3)
PROJECTED = "[monitor]\ninput_projections = 5\n"


def kept(server: RunningServer, client: Client, model: str = "mlp") -> list[Pairs]:
    """Everything in the journal, once all that was answered is there."""
    client.get_prediction(model, client.predict(model, X[:1]).prediction_id)
    return list(Reader(server.app._journal, model, "test", 0).read().pairs)


@pytest.fixture
def projecting(tmp_path: Path) -> Iterator[tuple[RunningServer, Client]]:
    models.write(tmp_path / "models", "mlp", models.classifier(), calserve_toml=PROJECTED)
    with serving(tmp_path / "models") as both:
        yield both


def test_rows_are_kept_under_the_segment_that_their_request_names(server: RunningServer, client: Client) -> None:
    async def others() -> str:
        async with AsyncClient(server.address, show_progress=False) as one, one.stream("mlp") as stream:
            answers = [await one.predict("mlp", X[:2], segment="web"), await stream.predict(X[:2], segment="São Paulo")]
        return answers[1].prediction_id

    for segment in ("android", "ios", "android", ""):
        for _ in range(2):  # read in full, then recognised
            client.predict("mlp", X[:2], segment=segment)
    last = asyncio.run(others())
    (part,) = kept(server, client)
    segments = [part.segment_of(row) for row in range(len(part))]
    expected = [name for name in ("android", "ios", "android", "") for _ in range(4)]
    assert segments == [*expected, "web", "web", "São Paulo", "São Paulo", ""]
    assert client.get_prediction("mlp", last, 1).segment == "São Paulo"


@pytest.mark.parametrize(
    "value", [{"int64_param": 3}, {"string_param": ""}, {"string_param": "x" * 65}, {"string_param": "a\nb"}]
)
def test_a_segment_that_is_no_short_word_is_refused(server: RunningServer, value: dict[str, object]) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        infer(server.address, parameters={"segment": messages.InferParameter(**value)})
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "parameter 'segment' must be a string of 1 to 64 printable characters" in (caught.value.details() or "")


def test_segments_beyond_the_most_that_are_told_apart_are_kept_as_others_and_counted(
    server: RunningServer, client: Client
) -> None:
    for number in range(MOST_SEGMENTS + 3):
        client.predict("mlp", X[:2], segment=f"s{number}")
    client.predict("mlp", X[:1], segment="s1")
    segments = [part.segment_of(row) for part in kept(server, client) for row in range(len(part))]
    named = [f"s{number}" for number in range(MOST_SEGMENTS) for _ in range(2)]
    assert segments == [*named, *[OTHER_SEGMENT] * 6, "s1", ""]
    assert metrics(server)['calserve_journal_other_segment_rows_total{model="mlp"}'] == 6


def test_density_is_kept_of_a_revision_that_has_it_whatever_the_caller_asks_for(
    server: RunningServer, client: Client
) -> None:
    revision = client.fit("mlp", "density_aware", reference=REFERENCE, **FIT)
    before = client.predict("mlp", X[:4])
    client.activate("mlp", revision.revision)
    whole, label_only = client.predict("mlp", X[:4]), client.predict("mlp", X[4:8], outputs=["label"])
    plain, after, *_ = kept(server, client)
    assert "density" not in before.outputs
    assert plain.signals == {}
    wanted = library().predict_further(logits_of(X[:8]), features=models.hidden(X[:8]))
    for name in ("density", "ood_score"):
        assert (after.signals[name][:4] == whole.outputs[name]).all()
        np.testing.assert_allclose(after.signals[name][:8], wanted[name], rtol=1e-4, atol=1e-5)
    assert client.get_prediction("mlp", label_only.prediction_id, 2).signals.keys() == {"density", "ood_score"}


def test_set_sizes_are_kept_at_the_revisions_own_level_only(server: RunningServer, client: Client) -> None:
    revision = client.fit("mlp", "split_conformal", inputs=X, labels=LABELS)
    client.activate("mlp", revision.revision)
    own, other = client.predict("mlp", X[:20]), client.predict("mlp", X[:20], confidence_level=0.5)
    (part,) = kept(server, client)
    assert part.signals["set_size"][:20].tolist() == own.outputs["set_size"].tolist()
    assert np.isnan(part.signals["set_size"][20:40]).all()
    assert other.outputs["set_size"].sum() < own.outputs["set_size"].sum()


def test_projections_of_the_inputs_are_kept_where_the_model_asks_for_them(
    projecting: tuple[RunningServer, Client],
) -> None:
    server, client = projecting
    client.predict("mlp", X[:9])
    client.predict("mlp", np.tile(X, (5, 1)), segment="many")  # more rows than a run takes
    client.predict("mlp", X[9:12], calibrator="none")
    (part,) = kept(server, client)
    names = ("input_mean", "input_spread", "input_1", "input_2", "input_3", "input_4", "input_5")
    assert tuple(part.signals) == names
    rows = np.concatenate([X[:9], np.tile(X, (5, 1)), X[9:12]])
    wanted = InputSignals([TensorSpec("x", "FP32", (-1, 6))], 5).of([rows])
    for name in names:
        np.testing.assert_allclose(part.signals[name][: len(rows)], wanted[name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(part.signals["input_mean"][:9], X[:9].mean(axis=1), rtol=1e-5, atol=1e-6)
    assert server.app._journal.queued_bytes == 0


def test_a_receipt_carries_segment_and_signals_past_a_journal_that_was_lost(tmp_path: Path) -> None:
    root = tmp_path / "models"
    models.write(root, "mlp", models.classifier(), calserve_toml=PROJECTED)
    with serving(root) as (_, client):
        prediction = client.predict("mlp", X[:3], segment="ios", receipt=True)
        stored = client.get_prediction("mlp", prediction.prediction_id, 2)
    for file in root.with_name("models.calserve").glob("journal.sqlite*"):
        file.unlink()
    with serving(root) as (_, client):
        assert client.label("mlp", [""], [1], rows=[2], receipts=[prediction.receipt]) == ["recorded"]
        again = client.get_prediction("mlp", prediction.prediction_id, 2)
    assert (again.segment, again.signals) == (stored.segment, pytest.approx(stored.signals, rel=1e-5))
    assert len(again.signals) == 7


def test_an_export_has_segments_and_signals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "models"
    models.write(root, "mlp", models.classifier(), calserve_toml=PROJECTED)
    with serving(root) as (_, client):
        client.predict("mlp", X[:2], segment="ios")
    cli.main(
        ["journal", "export", "mlp", "--out", str(tmp_path / "p.csv"), "--data-dir", str(tmp_path / "models.calserve")]
    )
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["segment"] for row in rows] == ["ios", "ios"]
    assert json.loads(rows[1]["signals"])["input_mean"] == pytest.approx(float(X[1].mean()), rel=1e-5)


REFUSED = {
    "unknown": ("[monitor]\nprojections = 3\n", r"\[monitor\]: 'projections' = 3; known keys: input_projections"),
    "too many": ("[monitor]\ninput_projections = 65\n", "'input_projections' = 65; .* a whole number from 0 to 64"),
    "no number": ("[monitor]\ninput_projections = true\n", "'input_projections' = True"),
    "no table": ('monitor = "yes"\n', "'monitor' = 'yes'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_model_cannot_ask_for_is_named(tmp_path: Path, case: str) -> None:
    text, reason = REFUSED[case]
    models.write(tmp_path / "models", "mlp", models.classifier(), calserve_toml=text)
    with serving(tmp_path / "models") as (_, client), pytest.raises(errors.NotReady, match=reason):
        client.predict("mlp", X)


@pytest.mark.parametrize("batch", ["N", 1])
def test_a_model_whose_inputs_have_no_projections_says_why(tmp_path: Path, batch: str | int) -> None:
    proto = models.classifier(batch=batch)
    if batch == "N":
        proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "width"
    config = "max_batch_size: 8" if batch == "N" else ""
    models.write(tmp_path / "models", "mlp", proto, calserve_toml=PROJECTED, config_pbtxt=config)
    reason = "the rows of its inputs do not stand alone" if batch == 1 else r"the inputs are x FP32 \[-1, -1\]"
    with serving(tmp_path / "models") as (_, client), pytest.raises(errors.NotReady, match=reason):
        client.predict("mlp", X)


def test_directions_are_the_same_in_every_process_and_see_every_input_of_numbers() -> None:
    specs = [
        TensorSpec("text", "BYTES", (-1, 1)), TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "UINT8", (-1, 2, 2)),
    ]  # fmt: skip
    signals = InputSignals(specs, 2)
    arrays = {"a": np.eye(3, dtype=np.float32), "b": np.arange(12, dtype=np.uint8).reshape(3, 2, 2)}
    found = signals.of(signals.sample({"text": np.array([[b"x"]] * 3), **arrays}))
    rows = np.concatenate([arrays["a"], arrays["b"].reshape(3, 4)], axis=1)
    np.testing.assert_allclose(found["input_mean"], rows.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found["input_spread"], rows.std(axis=1), rtol=1e-6)
    assert signals.bytes_a_row == 3 * 4 + 4
    recorded = [[-1.133893, -3.40168, -6.425396], [1.133893, 1.133893, 1.133893]]
    np.testing.assert_allclose([found["input_1"], found["input_2"]], recorded, rtol=1e-4)


@given(st.integers(1, 3), st.integers(1, 3 * MOST_NUMBERS), st.integers(1, 5))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_of_wide_inputs_a_part_is_looked_at_the_same_of_each_row(rows: int, width: int, count: int) -> None:
    signals = InputSignals([TensorSpec("x", "FP32", (-1, width)), TensorSpec("y", "INT64", (-1,))], count)
    values = np.random.default_rng(width).standard_normal((rows, width)).astype(np.float32)
    arrays = {"x": values, "y": np.arange(rows)}
    sample = signals.sample(arrays)
    seen = sum(part.shape[1] for part in sample)
    assert seen == min(width + 1, MOST_NUMBERS)
    assert sum(part.nbytes for part in sample) == rows * signals.bytes_a_row
    found = signals.of(sample)
    assert all(column.shape == (rows,) for column in found.values())
    alone = signals.of(signals.sample({name: array[-1:] for name, array in arrays.items()}))
    for name in signals.names:
        np.testing.assert_allclose(found[name][-1:], alone[name], rtol=1e-3, atol=1e-4)


def test_inputs_that_are_no_numbers_give_signals_that_are_none() -> None:
    signals = InputSignals([TensorSpec("x", "FP32", (-1, 2))], 1)
    found = signals.of([np.array([[np.nan, 1], [np.inf, -np.inf], [3e38, 3e38]], np.float32)])
    assert not np.isfinite([column[:2] for column in found.values()]).any()
