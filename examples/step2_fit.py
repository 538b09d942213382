"""Second step: fit calibrators on labelled rows, judge them on others, and make the best one serve.

calserve serve --model-repository demo/models &
python -m examples.step2_fit
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from calibrators.metrics import Estimate
from examples.step1_prepare import Prepared, load
from service.client import Client, Revision
from service.console import ranking_table, scores_table

MODEL = "magika"
KINDS = ("temperature", "platt", "isotonic", "auto")  # auto compares all that suit the data, and takes the best
AUTO_SECONDS = 60
ITSELF = "the model itself"


def fit(client: Client, data: Prepared, logits: NDArray[np.float32]) -> dict[str, Revision]:
    """A revision of each kind, fitted on the calibration half, whose logits the server has computed once for all."""
    labels = data.labels[~data.is_test]
    revisions = {}
    for kind in KINDS:
        params = {"budget_seconds": AUTO_SECONDS} if kind == "auto" else {}
        revision = client.fit(MODEL, kind, logits=logits, labels=labels, **params)
        revisions[f"auto: {revision.kind}" if kind == "auto" else kind] = revision
    return revisions


def judge(
    client: Client, revisions: Mapping[str, Revision], logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, dict[str, Estimate]]:
    """Scores of the model itself and of each kind on the rows of the test half, which no fit has seen."""
    scores: dict[str, dict[str, Estimate]] = {}
    for kind, revision in revisions.items():
        evaluation = client.evaluate(MODEL, revision.revision, logits=logits, labels=labels)
        scores[ITSELF], scores[kind] = evaluation.before, evaluation.after
    return {name: scores[name] for name in (ITSELF, *revisions)}


def best(revisions: Mapping[str, Revision]) -> str:
    """The kind with the lowest log loss on the rows its own fit held out: the test half has no say in the choice."""
    return min(revisions, key=lambda kind: revisions[kind].held_out.after["log_loss"].value)  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where step 1 put its files (default: demo)")
    parser.add_argument("--address", default="127.0.0.1:8001", help="the server")
    arguments = parser.parse_args()
    console, data = Console(), load(arguments.out)
    with Client(arguments.address) as client:
        revisions = fit(client, data, client.logits(MODEL, data.inputs[~data.is_test]))
        for revision in revisions.values():
            if revision.ranking:
                console.print(ranking_table(revision.ranking))
        chosen = best(revisions)
        logits, labels = client.logits(MODEL, data.inputs[data.is_test]), data.labels[data.is_test]
        console.print(scores_table("on the test half", judge(client, revisions, logits, labels).items(), chosen))
        client.activate(MODEL, revisions[chosen].revision)
        console.print(f"[bold]{revisions[chosen].revision}[/] serves now")


if __name__ == "__main__":
    main()
