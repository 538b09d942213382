"""What every test may use."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import onnxruntime
import pytest

from tests import browser

ONLY_ERRORS = 3
LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    default = Path(__file__).parents[2] / "shared" / "data"
    parser.addoption("--shared-data", type=Path, default=default, help="folder of recorded logits and labels")
    text = "fail what looks at pages in a browser where there is none, which else is left out"
    parser.addoption("--need-browser", action="store_true", help=text)
    text = "fail what runs a client in Node.js where there is none with grpc-js, which else is skipped"
    parser.addoption("--need-node", action="store_true", help=text)
    text = "a Python that has the package kserve, for its client (`python -m venv V && V/bin/pip install kserve`)"
    parser.addoption("--kserve", metavar="PYTHON", help=text)
    parser.addoption("--front", choices=("auto", "h2", "grpc"), help="the front of every server that a test starts")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--front"):
        os.environ["CALSERVE_FRONT"] = config.getoption("--front")
    onnxruntime.set_default_logger_severity(ONLY_ERRORS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a browser where there is none; `pytest_terminal_summary` says so."""
    if browser.FOUND or config.getoption("--need-browser"):
        return
    left_out = [item for item in items if item.get_closest_marker("browser")]
    items[:] = [item for item in items if not item.get_closest_marker("browser")]
    config.hook.pytest_deselected(items=left_out)
    config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(LEFT_OUT, 0):
        words = f"NOT RUN: {left_out} tests that look at pages in a browser. {browser.HOW_TO_GET_ONE}"
        terminalreporter.write_line(words, yellow=True)


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
