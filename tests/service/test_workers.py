"""Several processes on one port: one learns, all serve the same, and one that dies comes back."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from service.client import Client
from service.errors import Refused
from service.settings import Settings
from tests.service import models

ROW = {"x": np.ones((1, 6), np.float32)}
N_CONNECTIONS = 8
"""The system spreads connections by a hash: that all of these meet one worker of two happens once in 128 times, and a
test then sees less, but does not fail."""


class Workers:
    """`calserve serve --workers 2`, and the lines it writes."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-m", "service", "serve", "--model-repository", str(root), "--device", "cpu"]
        command += ["--threads", "1", "--port", "0", "--metrics-port", "0", "--workers", "2", "--drain-seconds", "10"]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        self._lines: list[str] = []
        self._read = 0

    def line(self, pattern: str) -> re.Match[str]:
        """The next line that matches; lines before it count as read."""
        while True:
            while self._read < len(self._lines):
                self._read += 1
                if found := re.search(pattern, self._lines[self._read - 1]):
                    return found
            if not (text := self._process.stderr.readline()):  # type: ignore[union-attr]
                pytest.fail(f"no line has {pattern!r}:\n{''.join(self._lines)}")
            self._lines.append(text)

    def from_the_start(self) -> Workers:
        self._read = 0
        return self

    def pid_of(self, worker: int) -> int:
        return int(self.from_the_start().line(rf"worker {worker} is process (\d+)")[1])

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.from_the_start().line(r'workers on 127.0.0.1:([0-9]+)')[1]}"

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self) -> int:
        """The exit code. Returns when nobody holds the other end of stderr any more: neither server nor workers."""
        self._lines += (self._process.communicate(timeout=60)[1] or "").splitlines(keepends=True)
        return self._process.returncode


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], Workers]]:
    models.write(tmp_path / "models", "mlp", models.classifier())
    started: list[Workers] = []

    def start() -> Workers:
        started.append(Workers(tmp_path / "models"))
        return started[-1]

    yield start
    for workers in started:
        if workers._process.poll() is None:
            workers.send(signal.SIGTERM)
            workers.end()


def connections(stack: ExitStack, address: str) -> list[Client]:
    return [stack.enter_context(Client(address, show_progress=False)) for _ in range(N_CONNECTIONS)]


def fit(client: Client, kind: str = "temperature") -> str:
    rng = np.random.default_rng(0)
    return client.fit("mlp", kind, logits=rng.standard_normal((300, 4)), labels=rng.integers(0, 4, 300)).revision


def served(clients: list[Client]) -> set[str]:
    return {client.predict("mlp", ROW).calibrator_revision for client in clients}


def test_what_is_activated_through_one_worker_is_served_by_all_also_after_each_was_killed(
    start: Callable[[], Workers],
) -> None:
    workers = start()
    workers.line("all 2 workers serve")
    with ExitStack() as stack:
        clients = connections(stack, workers.address)
        revision = fit(clients[0])
        clients[1].activate("mlp", revision)
        for worker in (0, 1):
            workers.from_the_start().line(rf"worker {worker} .*{revision} is active")
        assert served(clients) == {revision}
        assert [[row.revision for row in client.list("mlp")] for client in clients] == [[revision]] * N_CONNECTIONS
        clients[2].rollback("mlp")
        for worker in (0, 1):
            workers.from_the_start().line(rf"worker {worker} .*none is active, before {revision}")
        assert served(clients) == {"none"}
        clients[3].activate("mlp", revision)

    for worker in (1, 0):
        os.kill(workers.pid_of(worker), signal.SIGKILL)
        workers.line(f"worker {worker} ended with -9; it is started again")
        workers.line("all 2 workers serve")
        with ExitStack() as stack:
            clients = connections(stack, workers.address)
            assert served(clients) == {revision}
            assert clients[0].list("mlp")[0].active
    with Client(workers.address, show_progress=False) as client:
        assert fit(client, "vector") == "vector-2"


def test_sigterm_ends_all_workers_with_zero(start: Callable[[], Workers]) -> None:
    workers = start()
    workers.line("all 2 workers serve")
    workers.send(signal.SIGTERM)
    assert workers.end() == 0


def test_workers_do_not_outlive_their_supervisor(start: Callable[[], Workers]) -> None:
    workers = start()
    workers.line("all 2 workers serve")
    workers.send(signal.SIGKILL)
    assert workers.end() == -signal.SIGKILL


def test_a_store_that_cannot_be_opened_ends_the_server_with_the_workers_code(
    start: Callable[[], Workers], tmp_path: Path
) -> None:
    store = tmp_path / "models.calserve"
    store.mkdir()
    (store / "catalogue.sqlite").write_bytes(b"no database" * 1000)
    assert start().end() == 3


@pytest.mark.parametrize("setting", [{"model_control": "explicit"}, {"shared_memory_prefix": "cal"}], ids=str)
def test_what_one_call_cannot_do_for_all_workers_is_refused_at_the_start(setting: dict[str, str]) -> None:
    with pytest.raises(Refused, match="are for one worker"):
        Settings(Path("models"), workers=2, **setting)  # type: ignore[arg-type]
