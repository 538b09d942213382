"""The main job on a real model, explained as it goes: `make demo`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from rich.console import Console

import calibrators
from calibrators.metrics import Estimate
from calibrators.plots import (
    classwise_chart,
    comparison_chart,
    html_report,
    reliability_chart,
    reliability_diagram,
    risk_coverage_chart,
    telling_example,
)
from examples import step1_prepare, step2_fit, step3_predict, step4_sets, step5_labels, step6_drift
from examples.step1_prepare import Prepared
from examples.step2_fit import ITSELF, MODEL
from service import passthrough
from service.client import Client
from service.console import ranking_table, scores_table

OUT = Path("demo")
START_SECONDS = 60
CHECKED_ROWS = 8 * step3_predict.BATCH
LISTENING = re.compile(r"gRPC on ([^\s,]+)")
THREADS = len(os.sched_getaffinity(0))
console = Console()


def main() -> None:
    begun = time.monotonic()
    say("A deployed classifier says 0.93. Can you trust it? Here is a real one, its lies, and their cure.")

    step(1, "a real model, and labelled rows of what it meets in production")
    data = step1_prepare.prepare(OUT, console=console)

    step(2, "the server wraps the model; calibrators are fitted on half of the rows")
    if not (data.model_repository / step5_labels.MODEL).exists():
        passthrough.write(data.model_repository, step5_labels.MODEL, step5_labels.N_CLASSES)
    step6_drift.write(data)
    with server(data.model_repository) as address, Client(address, show_progress=True) as client:
        client.wait_until_ready()
        logits = client.logits(MODEL, data.inputs[~data.is_test])
        revisions = step2_fit.fit(client, data, logits)
        say("What auto compared, each row predicted by a fit that had not seen it:")
        for revision in revisions.values():
            if revision.ranking:
                console.print(ranking_table(revision.ranking))
        chosen = step2_fit.best(revisions)
        client.activate(MODEL, revisions[chosen].revision)
        say(f"{revisions[chosen].revision} had the lowest log loss on the rows that its fit held out; it serves now.")

        step(3, "a stock tritonclient asks, and gets calibrated probabilities")
        served = step3_predict.predict(address, data.inputs[data.is_test])
        expected = fused_probabilities(data, client.calibrator(MODEL, revisions[chosen].revision))
        same = np.array_equal(served.probabilities[: len(expected)], expected)
        if served.revisions != {revisions[chosen].revision} or not same:
            sys.exit("The served probabilities are not those of the fused graph.")
        rows = len(served.probabilities)
        say(
            f"{rows} answers, each computed by {revisions[chosen].revision}; those to the first {len(expected)} were "
            "computed again by plain onnxruntime from the fused ONNX graph, and are the same bit for bit."
        )

        say("All that was fitted, judged on these rows, which no fit has seen:")
        scores = step2_fit.judge(client, revisions, served.logits, data.labels[data.is_test])
        console.print(scores_table(f"on {rows} rows, with 95% intervals", scores.items(), chosen))

        step(4, "sets of answers that hold the right one as often as asked")
        sets = step4_sets.fit(client, data, logits)
        console.print(step4_sets.table(step4_sets.judge(client, sets, data)))
        say("One fit; the level is a parameter of the request. Sets are small where the model knows, large where not.")

        step(5, "labels stream in, the model drifts, the calibrator learns")
        say("Beside magika stands a model without a network: its logits are made here, and after a while mean less.")
        with Client(address, show_progress=False) as quiet:
            console.print(step5_labels.table(step5_labels.watch(quiet)))
        gain = client.online_state(step5_labels.MODEL).gain
        say(
            f"Learning bettered half the Brier score by {gain.value:.4f} against the calibrator as it was fitted, "
            f"by {gain.low:.4f} to {gain.high:.4f} at 95%, whenever one looks."
        )

        step(6, "the probabilities stop being true: the alarm, its cause, the cure")
        drift(address, data, np.concatenate([logits, served.logits]))

    step(7, "pictures")
    write_report(data, served, scores, chosen)
    say(f"done in {time.monotonic() - begun:.0f} seconds; the server has stopped")


def drift(address: str, data: Prepared, logits: NDArray[np.float32]) -> None:
    """Of magika's logits on the calibration half, then on the test half."""
    say(
        f"Another model without a network, {step6_drift.MODEL}, is handed magika's scores of "
        f"{len(step6_drift.formats(data))} formats. Then, by mistake, one of them comes {step6_drift.PUSH:g} too high."
    )
    met = step6_drift.rows(data, logits, np.concatenate([data.labels[~data.is_test], data.labels[data.is_test]]))
    with Client(address, show_progress=False) as client:
        story = step6_drift.watch(client, met)
        page = step6_drift.save_page(client, OUT)
    console.print(step6_drift.table(story))
    for line in step6_drift.told(story):
        say(line)
    say(f"The page that the server shows of it, as one file: [bold]{page}[/]")


def say(text: str) -> None:
    console.print(text, highlight=False)


def step(number: int, text: str) -> None:
    console.rule(f"[bold]{number}[/]  {text}", align="left", style="dim")


@contextmanager
def server(model_repository: Path) -> Iterator[str]:
    """`calserve serve` on free ports, with an empty store; stopped by SIGTERM at the end. Gives its gRPC address."""
    command = ["serve", "--model-repository", str(model_repository), "--port", "0", "--metrics-port", "0"]
    command += ["--threads", str(THREADS)]  # of each model, as only one is asked at a time
    log = OUT / "server.log"
    store = OUT / f"store-{int(time.time())}"
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "service", *command, "--data-dir", str(store)], stderr=file)  # noqa: S603
    try:
        address = _address(process, log)
        say(f"calserve {' '.join(command)}   [dim]listening on {address}, log in {log}[/]")
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=START_SECONDS)
    if code != 0:
        sys.exit(f"The server ended with exit code {code}; see {log}.")


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """Where the server says that it listens."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if found := LISTENING.search(line):
                return found[1]
        time.sleep(0.05)
    sys.exit(f"The server did not start; see {log}.")


def fused_probabilities(data: Prepared, calibrator: calibrators.Calibrator) -> NDArray[np.float32]:
    """What plain onnxruntime computes of the first rows from model and calibrator in one graph, in the same batches."""
    fused = calibrators.fuse(data.model_path.read_bytes(), calibrator)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    session = ort.InferenceSession(fused.to_bytes(), options, providers=["CPUExecutionProvider"])
    inputs = data.inputs[data.is_test][:CHECKED_ROWS]
    batches = (inputs[start : start + step3_predict.BATCH] for start in range(0, len(inputs), step3_predict.BATCH))
    return np.concatenate([session.run(["probabilities"], {"bytes": batch})[0] for batch in batches])


def write_report(
    data: Prepared, served: step3_predict.Served, scores: dict[str, dict[str, Estimate]], chosen: str
) -> None:
    """The reliability diagram before and after, as a picture and inside a report that needs no explanation."""
    labels = data.labels[data.is_test]
    both = {"Before": served.own, "After": served.probabilities}
    reliability_diagram(both, labels).savefig(OUT / "reliability.png", dpi=160)
    page = html_report(
        "magika on fragments of files",
        scores,
        baseline=ITSELF,
        served=chosen,
        example=telling_example(served.own, served.probabilities, labels),
        n_calibration_rows=int((~data.is_test).sum()),
        n_test_rows=len(labels),
        charts=[
            reliability_chart(both, labels),
            comparison_chart(scores),
            classwise_chart(served.probabilities, labels, class_names=data.class_names.tolist()),
            risk_coverage_chart(both, labels),
        ],
    )
    (OUT / "report.html").write_text(page)
    say(f"reliability diagram: [bold]{OUT / 'reliability.png'}[/]   report: [bold]{OUT / 'report.html'}[/]")


if __name__ == "__main__":
    main()
