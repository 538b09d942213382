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
OWN_OUTPUT = "target_label"  # what the model itself calls its probabilities


@dataclass(frozen=True)
class Served:
    """What came back: the model's own probabilities and the calibrated ones, and the revisions that computed them."""

    own: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    revisions: set[str]


def predict(address: str, inputs: NDArray[np.int32]) -> Served:
    """Send all rows in batches."""
    client = triton.InferenceServerClient(address)
    own, probabilities, revisions = [], [], set()
    for start in track(range(0, len(inputs), BATCH), description="tritonclient: sending the test half"):
        batch = inputs[start : start + BATCH]
        tensor = triton.InferInput("bytes", list(batch.shape), "INT32")
        tensor.set_data_from_numpy(batch)
        result = client.infer(MODEL, [tensor])
        own.append(result.as_numpy(OWN_OUTPUT))
        probabilities.append(result.as_numpy("probabilities"))
        revisions.add(result.get_response().parameters["calibrator_revision"].string_param)
    client.close()
    return Served(np.concatenate(own), np.concatenate(probabilities), revisions)


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
