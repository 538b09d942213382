"""What every test may use."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest

ONLY_ERRORS = 3


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.addoption("--shared-data", type=Path, default=default, help="folder of recorded logits and labels")


def pytest_configure() -> None:
    onnxruntime.set_default_logger_severity(ONLY_ERRORS)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A test that failed may leave a server behind, whose threads must not keep the run from ending."""
    left = [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if left and reporter is not None and reporter.stats.keys() & {"failed", "error"}:
        sys.stdout.flush()
        os._exit(1)


@pytest.fixture(scope="session")
def shared_data(request: pytest.FixtureRequest) -> Path:
    """The folder of recorded logits and labels; tests that need it are skipped where it is absent."""
    folder: Path = request.config.getoption("--shared-data")
    if not folder.is_dir():
        pytest.skip(f"no recorded data at {folder} (see --shared-data)")
    return folder
