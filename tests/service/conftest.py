"""A real server in this process, on its own thread and event loop, with a repository of small models."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from onnx import TensorProto

from service.app import App
from service.client import Client
from service.settings import Settings
from tests.service import models
from tests.service.gpu import FakeGpu

ECHO_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BF16": TensorProto.BFLOAT16,
    "BYTES": TensorProto.STRING,
}


class RunningServer:
    """An App on a thread of its own; `address` is where it listens."""

    def __init__(self, settings: Settings, *, wait: bool = True) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")
        self._thread.start()
        try:
            self.app = self._run(self._build(settings))
            self._started = asyncio.run_coroutine_threadsafe(self.app.start(), self._loop)
            if wait:
                self._started.result(timeout=120)
        except BaseException:
            self._end()
            raise

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    def stop(self) -> None:
        """Drain and end; a second call does nothing."""
        if self._thread.is_alive():
            self._started.result(timeout=120)
            self._run(self.app.stop())
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _build(self, settings: Settings) -> App:
        return App(settings)

    def _run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(timeout=120)


def settings_for(root: Path, **values: object) -> Settings:
    common = {"port": 0, "metrics_port": 0, "device": "cpu", "threads": 1, "drain_seconds": 5}
    front = os.environ.get("CALSERVE_FRONT", "auto")  # see the option --front
    return Settings(model_repository=root, **{**common, "front": front, **values})


def write_models(root: Path) -> None:
    models.write(
        root, "mlp", models.classifier(), labels_txt="ant\nbee\ncat\ndog\n", calserve_toml='labels = "labels.txt"\n'
    )
    models.write(root, "binary", models.classifier(n_classes=1, activation="Sigmoid", output="p"))
    models.write(root, "reserved", models.classifier(output="probabilities"))
    models.write(root, "mean", models.regressor())
    for word, element_type in ECHO_TYPES.items():
        models.write(root, f"echo_{word}", models.echo(element_type))


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One server for the tests that change nothing on it."""
    root = tmp_path_factory.mktemp("shared") / "models"
    write_models(root)
    server = RunningServer(settings_for(root))
    yield server
    server.stop()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the model `mlp`, for a server of the test's own."""
    models.write(tmp_path / "models", "mlp", models.classifier())
    return tmp_path / "models"


@pytest.fixture
def server(root: Path) -> Iterator[RunningServer]:
    """A server of the test's own on `root`, with an empty store."""
    server = RunningServer(settings_for(root))
    yield server
    server.stop()


@pytest.fixture
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.address, show_progress=False) as client:
        yield client


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """A GPU for onnxruntime to find."""
    return FakeGpu(monkeypatch)
