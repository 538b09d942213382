"""Fourth step: ask for sets of answers that hold the right one as often as wanted. One fit serves every level.

python -m examples.step4_sets
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table

from calibrators.metrics import Estimate, coverage, mean_set_size
from examples.step1_prepare import Prepared, load
from examples.step2_fit import MODEL
from service.client import Client, Revision

BASE = "platt"
LEVELS = (0.8, 0.9, 0.99)
BATCH, JUDGED_ROWS = 64, 512


class Judged(NamedTuple):
    """What sets of one level are worth: how often they hold the right answer, and how many answers they hold."""

    level: float
    coverage: Estimate
    mean_size: float


def fit(client: Client, data: Prepared, logits: NDArray[np.float32]) -> Revision:
    """A revision that makes sets, on the calibration half."""
    return client.fit(MODEL, "split_conformal", base=BASE, logits=logits, labels=data.labels[~data.is_test])


def judge(client: Client, revision: Revision, data: Prepared) -> list[Judged]:
    """Each level by itself, on rows of the test half: the level is a parameter of the request."""
    inputs, labels = data.inputs[data.is_test][:JUDGED_ROWS], data.labels[data.is_test][:JUDGED_ROWS]
    judged = []
    for level in LEVELS:
        sets = np.concatenate(
            [
                client.predict(
                    MODEL,
                    inputs[start : start + BATCH],
                    outputs=["prediction_set"],
                    calibrator=revision.revision,
                    confidence_level=level,
                ).prediction_set
                for start in range(0, len(inputs), BATCH)
            ]
        )
        judged.append(Judged(level, coverage(sets, labels), mean_set_size(sets)))
    return judged


def table(judged: Iterable[Judged]) -> Table:
    title = f"sets, on {JUDGED_ROWS} rows, with 95% intervals"
    shown = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("asked for", "held the right answer", "answers in a set"):
        shown.add_column(heading, justify="right")
    for level, held, size in judged:
        shown.add_row(f"{level:.0%}", f"{held.value:.1%}  ({held.low:.1%} to {held.high:.1%})", f"{size:.1f}")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where step 1 put its files (default: demo)")
    parser.add_argument("--address", default="127.0.0.1:8001", help="the server")
    arguments = parser.parse_args()
    data = load(arguments.out)
    with Client(arguments.address) as client:
        revision = fit(client, data, client.logits(MODEL, data.inputs[~data.is_test]))
        Console().print(table(judge(client, revision, data)))


if __name__ == "__main__":
    main()
