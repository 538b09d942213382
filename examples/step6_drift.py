"""Sixth step: what was true stops being true; an alarm says so, and why; what is fitted on the labels since serves.

python -m examples.step6_drift --write
calserve serve --model-repository demo/models &
python -m examples.step6_drift
"""

from __future__ import annotations

import argparse
import shutil
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from calibrators.metrics import expected_calibration_error
from calibrators.numerics import softmax
from examples import step2_fit
from examples.step1_prepare import Prepared, load
from service import passthrough
from service.client import Alarm, Client, Shadow

MODEL, MONITOR, KIND = "scanner", "served_calibration", "vector"
MOST_FORMATS = 20
WINDOW_ROWS, BATCH = 500, 25
CALM, DRIFTED = 4, 8
PUSH = 5.0
REFIT_ROWS = 500  # that the policy waits for
SETTLE_SECONDS, PAUSE_SECONDS = 60.0, 0.05


class Rows(NamedTuple):
    """What magika says of rows, (n_samples, n_formats), and what they are."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


class Window(NamedTuple):
    """Calibration error of the model itself and of what was served, by which revision, and what came of its labels."""

    raw: float
    served: float
    revision: str
    happened: str = ""


@dataclass
class Story:
    """What happened: windows, the first `calm` of them before the change; the alarm as it stands at the end, and how
    many labels after the change it rang; the other monitors that rang; the revision that the alarm's policy made, and
    whether that made it ring."""

    promise: str
    calm: int
    windows: list[Window] = field(default_factory=list)
    alarm: Alarm | None = None
    delay: int = 0
    others: list[str] = field(default_factory=list)
    challenger: str = ""
    is_promoted: bool = False
    has_rung_again: bool = False


def formats(data: Prepared) -> NDArray[np.intp]:
    """The classes of the formats with most rows, ascending."""
    counts = np.bincount(data.labels, minlength=len(data.class_names))
    most = np.argsort(-counts, kind="stable")[:MOST_FORMATS]
    return np.sort(most[counts[most] > 0])


def write(data: Prepared) -> None:
    """A model without a network: another program hands it magika's scores of these formats."""
    names = data.class_names[formats(data)].tolist()
    shutil.rmtree(data.model_repository / MODEL, ignore_errors=True)  # it may be of the formats of another day
    passthrough.write(data.model_repository, MODEL, len(names), labels="".join(f"{name}\n" for name in names).encode())


def rows(data: Prepared, logits: NDArray[np.float32], labels: NDArray[np.int64]) -> Rows:
    """Of magika's logits those of the formats, on rows of the formats."""
    classes = formats(data)
    known = np.isin(labels, classes)
    return Rows(np.ascontiguousarray(logits[known][:, classes]), np.searchsorted(classes, labels[known]))


def pushed(met: Rows) -> int:
    """The class whose score is handed over too high after the change: the one that the model names most."""
    return int(np.bincount(met.logits.argmax(axis=1)).argmax())


def watch(client: Client, met: Rows, *, calm: int = CALM, drifted: int = DRIFTED, seed: int = 0) -> Story:
    """Fit on what the model meets, so that it is true; then predictions come and their labels, in windows, and from
    one window on the score of one class is handed over too high.

    Rows are drawn from those that were fitted on: of other files the fits are off by more than the monitor tolerates
    (step 2 says by how much), so that it would ring at once, and be right.
    """
    revision = client.fit(MODEL, KIND, logits=met.logits, labels=met.labels)
    client.activate(MODEL, revision.revision)
    client.update_monitor(MODEL, MONITOR, policy="refit")
    return _Stream(client, met, calm, np.random.default_rng(seed)).story(drifted)


class _Stream:
    """Sends windows, and waits after each for what comes of it."""

    def __init__(self, client: Client, met: Rows, calm: int, rng: np.random.Generator) -> None:
        self._client, self._met, self._rng = client, met, rng
        self._sent: list[str] = []  # ids of the predictions, of BATCH rows each
        self._before = {alarm.alarm for alarm in client.alarms(MODEL)}
        self._story = Story(client.monitor_report(MODEL).false_alarms, calm)

    def story(self, drifted: int) -> Story:
        turns = self._turns()
        calm = self._story.calm
        for number in track(range(calm + drifted), description="predictions, then their labels, in windows"):
            window = self._send(drifted=number >= calm)
            self._story.windows.append(window._replace(happened=next(turns)))
        self._story.alarm = next(iter(self._alarms()), None)
        self._acknowledge_the_rest()
        return self._story

    def _send(self, *, drifted: bool) -> Window:
        chosen = self._rng.integers(len(self._met.labels), size=WINDOW_ROWS)
        logits, labels = self._met.logits[chosen], self._met.labels[chosen]
        if drifted:
            logits[:, pushed(self._met)] += PUSH
        batches = np.split(logits, WINDOW_ROWS // BATCH)
        predictions = [self._client.predict(MODEL, {"logits": batch}) for batch in batches]
        ids = [prediction.prediction_id for prediction in predictions]
        self._client.label(MODEL, np.repeat(ids, BATCH).tolist(), labels, rows=np.tile(np.arange(BATCH), len(ids)))
        self._sent += ids
        served = np.concatenate([prediction.probabilities for prediction in predictions])
        errors = (float(expected_calibration_error(said, labels)) for said in (softmax(logits), served))
        return Window(*errors, predictions[-1].calibrator_revision)

    def _turns(self) -> Iterator[str]:
        """What comes of the windows, one after the other."""
        while not self._has_rung():
            yield "silence"
        yield self._alarm()
        while not self._has_enough_to_fit():
            yield "labels are gathered"
        yield self._fit()
        for labels in count(WINDOW_ROWS, WINDOW_ROWS):
            shadow = self._judged(labels)
            gain = f"in shadow it gains {shadow.gain.value:.3f} ({shadow.gain.low:.3f} to {shadow.gain.high:.3f})"
            if shadow.verdict == "better":
                break
            yield gain
        self._client.promote(MODEL, shadow.revision)
        self._story.is_promoted = True
        yield f"{gain}: it is promoted"
        promoted_at = len(self._sent)
        while True:
            self._story.has_rung_again = self._has_rung(promoted_at, 2)
            yield "it has rung again" if self._story.has_rung_again else "silence"

    def _has_rung(self, since: int = 0, times: int = 1) -> bool:
        """As soon as the monitor has read what was sent since then."""
        rows = BATCH * (len(self._sent) - since)
        self._until(lambda: len(self._alarms()) >= times or self._client.monitor(MODEL, MONITOR).rows >= rows)
        return len(self._alarms()) >= times

    def _alarm(self) -> str:
        alarm, drifted = self._alarms()[0], self._sent[self._story.calm * WINDOW_ROWS // BATCH :]
        rang_after = bisect_right(drifted, alarm.time, key=lambda name: self._client.get_prediction(MODEL, name).time)
        self._story.delay = BATCH * rang_after
        return f"the alarm, {self._story.delay} labels after the change" if rang_after else "an alarm too many"

    def _has_enough_to_fit(self) -> bool:
        """As the alarm dates the change."""
        drifted = BATCH * len(self._sent) - self._story.calm * WINDOW_ROWS
        return drifted - self._story.delay + self._alarms()[0].change_rows >= REFIT_ROWS

    def _fit(self) -> str:
        self._until(lambda: not self._alarms()[0].outcome.startswith("pending"))
        running = [shadow.revision for shadow in self._client.shadows(MODEL) if shadow.outcome == "running"]
        if not running:
            raise RuntimeError(f"the alarm's policy came to nothing: {self._alarms()[0].outcome}")
        self._story.challenger = running[0]
        return f"{self._story.challenger} is fitted on the labels since"

    def _judged(self, labels: int) -> Shadow:
        """How the challenger stands when so many labels were compared."""
        self._until(lambda: self._client.shadow(MODEL, self._story.challenger).labels >= labels)
        return self._client.shadow(MODEL, self._story.challenger)

    def _acknowledge_the_rest(self) -> None:
        """What the model itself says has changed for good: its monitors take that for what is usual from now on."""
        for alarm in self._client.alarms(MODEL):
            if alarm.monitor != MONITOR and alarm.acknowledge_time is None:
                self._client.acknowledge(MODEL, alarm.alarm, rebaseline=True)
                self._story.others.append(alarm.monitor)

    def _alarms(self) -> list[Alarm]:
        """Of the monitor that acts, in their order."""
        alarms = self._client.alarms(MODEL)[::-1]
        return [alarm for alarm in alarms if alarm.monitor == MONITOR and alarm.alarm not in self._before]

    def _until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SETTLE_SECONDS
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"nothing came of {WINDOW_ROWS} labels in {SETTLE_SECONDS:g} seconds")
            time.sleep(PAUSE_SECONDS)


def table(story: Story) -> Table:
    title = f"calibration error in windows of {WINDOW_ROWS} labels; the scores change before window {story.calm}"
    shown = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("window", "the model itself", "served", "by"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shown.add_column("what came of it")
    for number, window in enumerate(story.windows):
        cells = f"{window.raw:.3f}", f"{window.served:.3f}", window.revision, window.happened
        is_wrong = number >= story.calm and window.revision != story.challenger
        shown.add_row(str(number), *cells, style="red" if is_wrong else None)
    return shown


def told(story: Story) -> Iterator[str]:
    """What was promised, what rang, why, and what became of it, in words."""
    if story.alarm is None or story.alarm.cause is None:
        yield "No alarm came with a cause."
        return
    if story.delay:
        calm = f"{story.calm * WINDOW_ROWS:,} labels"
        yield f"{MONITOR} was silent for {calm}, and rang {story.delay} labels after the change."
    else:
        yield f"{MONITOR} rang before anything had changed, which is rare."
    yield f"What is promised: {story.promise}."
    cause = story.alarm.cause
    where = f" in {cause.where}" if cause.where else ""
    yield f"The cause: {cause.kind.replace('_', ' ')}{where}."
    yield from (f"  · {sentence}" for sentence in cause.evidence)
    yield f"What to do: {cause.action}"
    if story.others:
        others = " and ".join(story.others)
        yield f"{others} rang too, which watch the model itself, and were told that this is usual from now on."
    if story.is_promoted:
        yield f"{story.challenger}, fitted on the labels since, was shown better in shadow, and serves."
    if story.has_rung_again:
        yield f"{MONITOR} has rung again: what is fitted on so few labels is itself off by more than it tolerates."


def save_page(client: Client, out: Path) -> Path:
    """The model's page, as one file."""
    path = out / "drift.html"
    path.write_text(client.page(MODEL, since="1h"))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="where step 1 put its files (default: demo)")
    parser.add_argument("--address", default="127.0.0.1:8001", help="the server")
    parser.add_argument("--write", action="store_true", help=f"only put the model {MODEL!r} in the repository")
    arguments = parser.parse_args()
    console, data = Console(), load(arguments.out)
    if arguments.write:
        write(data)
        return
    with Client(arguments.address) as client:
        logits = client.logits(step2_fit.MODEL, data.inputs)
        story = watch(client, rows(data, logits, data.labels))
        console.print(table(story))
        for line in told(story):
            console.print(line, highlight=False)
        console.print(f"the page as it is now: {save_page(client, arguments.out)}")


if __name__ == "__main__":
    main()
