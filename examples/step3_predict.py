"""Third step: ask for predictions with a stock Triton client, as production does. Nothing changed but the numbers.

python -m examples.step3_predict
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from examples.step1_prepare import load
from examples.step2_fit import MODEL

BATCH = 64
OUTPUTS = ("calserve/logits", "target_label", "probabilities")  # `target_label` is what the model itself says


@dataclass(frozen=True)
class Served:
    """What came back: logits, the model's own probabilities, the calibrated ones, and the revisions that made these."""

    logits: NDArray[np.float32]
    own: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    revisions: set[str]


def predict(address: str, inputs: NDArray[np.int32]) -> Served:
    """Send all rows in batches. Outputs are named only to have the logits too, which nobody gets unasked."""
    client = triton.InferenceServerClient(address)
    wanted = [triton.InferRequestedOutput(name) for name in OUTPUTS]
    answers: list[list[NDArray[np.float32]]] = []
    revisions = set()
    for start in track(range(0, len(inputs), BATCH), description="tritonclient: sending the test half"):
        batch = inputs[start : start + BATCH]
        tensor = triton.InferInput("bytes", list(batch.shape), "INT32")
        tensor.set_data_from_numpy(batch)
        result = client.infer(MODEL, [tensor], outputs=wanted)
        answers.append([result.as_numpy(name) for name in OUTPUTS])
        revisions.add(result.get_response().parameters["calibrator_revision"].string_param)
    client.close()
    return Served(*map(np.concatenate, zip(*answers, strict=True)), revisions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where step 1 put its files (default: demo)")
    parser.add_argument("--address", default="127.0.0.1:8001", help="the server")
    arguments = parser.parse_args()
    data = load(arguments.out)
    served = predict(arguments.address, data.inputs[data.is_test])
    console = Console()
    right = served.probabilities.argmax(axis=1) == data.labels[data.is_test]
    console.print(f"computed by {', '.join(served.revisions)}; right {right.mean():.1%} of the time")
    console.print(f"the model itself says   {served.own.max(axis=1).mean():.1%} on average")
    console.print(f"calibrated, it says     {served.probabilities.max(axis=1).mean():.1%}")


if __name__ == "__main__":
    main()
