"""The loop: labels arrive, the active online revision learns, what it learned is served under its number."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from calserve.v1 import online_service_pb2 as pb

import calibrators
from service import cli, errors
from service.client import Client, OnlineState
from service.learning.progress import Progress
from service.store.reading import Reader
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_durability import until
from tests.service.test_feedback import metrics, serving

X, LOGITS, LABELS = models.labelled_rows(4000, seed=1)
FEW = 200


@pytest.fixture
def learning(root: Path) -> Iterator[tuple[RunningServer, Client]]:
    """A server whose model has an online revision active, which does not wait for labels."""
    with serving(root, online_wait_seconds=0) as (server, client):
        activated(client)
        yield server, client


def activated(client: Client, kind: str = "online_temperature") -> str:
    revision = client.fit("mlp", kind, logits=LOGITS[:FEW], labels=LABELS[:FEW], held_out_fraction=0).revision
    client.activate("mlp", revision)
    return revision


def teach(client: Client, rows: slice, labels: np.ndarray = LABELS) -> None:
    known = client.predict("mlp", X[rows]).prediction_id
    count = len(X[rows])
    assert set(client.label("mlp", [known] * count, labels[rows], rows=range(count))) == {"recorded"}


def learned(client: Client, rows: int) -> OnlineState:
    """The state once so many labels are learned or held out."""

    def state() -> OnlineState | None:
        found = client.online_state("mlp")
        return found if sum(found.rows[what] for what in ("learned", "held_out")) == rows else None

    return until(state)


def test_labels_change_what_is_served_and_each_answer_names_the_state(learning: tuple[RunningServer, Client]) -> None:
    server, client = learning
    before = client.predict("mlp", X)
    assert before.online_state == 0
    for start in range(0, 2000, 500):
        teach(client, slice(start, start + 500))
    state = learned(client, 2000)
    after = client.predict("mlp", X)
    print(state)
    assert after.online_state == state.serving > 0
    rows = slice(2000, 4000)
    losses = [-np.log(p.probabilities[rows][np.arange(2000), LABELS[rows]]).mean() for p in (before, after)]
    assert losses[1] < losses[0]
