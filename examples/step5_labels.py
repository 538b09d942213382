"""Fifth step: labels come after the predictions, what the model says drifts, and the calibrator learns.

calserve passthrough stream --classes 4 --model-repository demo/models
calserve serve --model-repository demo/models &
python -m examples.step5_labels
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calibrators.metrics import expected_calibration_error, log_loss
from calibrators.numerics import softmax
from service.client import Client

MODEL, N_CLASSES = "stream", 4
WINDOWS, WINDOW_ROWS, DRIFTS_AT = 14, 500, 4
FIRST_ROWS = 1000
SETTLE_SECONDS = 20.0


class Window(NamedTuple):
    """Calibration error and log loss in one window, by whose probabilities."""

    error: dict[str, float]
    loss: dict[str, float]
    state: int


def draw(rng: np.random.Generator, rows: int, drifted: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """What a model says of rows, and what they are. After the drift it is twice as sure, and likes class 0 too well."""
    logits = 1.5 * rng.standard_normal((rows, N_CLASSES))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    said = 2.0 * logits + np.array([1.5, 0, 0, 0]) if drifted else 1.3 * logits
    return said.astype(np.float32), labels


def watch(client: Client, seed: int = 0) -> list[Window]:
    """Fit one calibrator that stays and one that learns; then predictions come, and their labels, in windows."""
    rng = np.random.default_rng(seed)
    logits, labels = draw(rng, FIRST_ROWS, drifted=False)
    fixed = client.fit(MODEL, "temperature", logits=logits, labels=labels)
    learning = client.fit(MODEL, "online_temperature", logits=logits, labels=labels)
    client.activate(MODEL, learning.revision)
    stays = client.calibrator(MODEL, fixed.revision)
    windows = []
    for number in track(range(WINDOWS), description="predictions, then their labels, in windows"):
        logits, labels = draw(rng, WINDOW_ROWS, drifted=number >= DRIFTS_AT)
        prediction = client.predict(MODEL, {"logits": logits})
        said = {
            "the model itself": softmax(logits),
            "fixed": stays.predict_proba(logits),
            "learning": prediction.probabilities,
        }
        errors = {name: float(expected_calibration_error(p, labels)) for name, p in said.items()}
        losses = {name: float(log_loss(p, labels)) for name, p in said.items()}
        windows.append(Window(errors, losses, prediction.online_state or 0))
        client.label(MODEL, [prediction.prediction_id] * WINDOW_ROWS, labels, rows=np.arange(WINDOW_ROWS))
        settle(client, (number + 1) * WINDOW_ROWS)
    return windows


def settle(client: Client, labels: int) -> None:
    """Wait until the server has dealt with so many labels, a few milliseconds."""
    end = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < end:
        rows = client.online_state(MODEL).rows
        if rows["learned"] + rows["held_out"] >= labels:
            return
    raise TimeoutError(f"{labels} labels were not learned in {SETTLE_SECONDS:g} seconds")


def table(windows: list[Window]) -> Table:
    title = f"calibration error in windows of {WINDOW_ROWS} labels, log loss behind it; the model drifts at {DRIFTS_AT}"
    shown = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    names = list(windows[0].error)
    for heading in ("window", *names, "state"):
        shown.add_column(heading, justify="right")
    for number, window in enumerate(windows):
        best = min(names, key=lambda name: window.loss[name])
        cells = (f"{window.error[name]:.3f}  {window.loss[name]:.3f}" for name in names)
        marked = (f"[bold]{cell}[/]" if name == best else cell for name, cell in zip(names, cells, strict=True))
        shown.add_row(str(number), *marked, str(window.state))
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--address", default="127.0.0.1:8001", help="the server")
    arguments = parser.parse_args()
    with Client(arguments.address, show_progress=False) as client:
        Console().print(table(watch(client)))


if __name__ == "__main__":
    main()
