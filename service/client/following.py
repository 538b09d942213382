"""Following a long-running operation on a progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calserve.v1 import calibrator_service_pb2 as pb
from calserve.v1 import resources_pb2 as resources
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from service import errors

POLL_SECONDS = 10.0


def progress_bars(show: bool | None) -> Progress:
    """Bars on standard output's terminal; None: if it is one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns)
    progress.disable = not (progress.console.is_terminal if show is None else show)
    return progress


def sending(progress: Progress, what: str, total: int) -> Callable[[int, int], None]:
    """A bar for rows that are sent; to be told how many are, and of how many to compare with the total is not known."""
    bar = progress.add_task(f"{what}: sending rows", total=total)

    def sent(rows: int, compared: int) -> None:
        reference = f", {compared} of the reference" if compared else ""
        progress.update(bar, completed=rows, description=f"{what}: sending rows{reference}")

    return sent


class Following:
    """One operation on its bar: asks for the next change while it runs, then gives its result or raises its error."""

    def __init__(self, progress: Progress, what: str, operation: resources.Operation) -> None:
        self._progress, self._what = progress, what
        self._task = progress.add_task(what, total=100)
        self.saw(operation)

    def saw(self, operation: resources.Operation) -> None:
        self.operation = operation
        done, stage = round(100 * operation.progress), operation.stage
        self._progress.update(self._task, completed=done, description=f"{self._what}: {stage}")

    @property
    def running(self) -> bool:
        return bool(self.operation.state == resources.Operation.STATE_RUNNING)

    def wait_request(self) -> Any:
        """Answered as soon as there is progress, at the latest after POLL_SECONDS."""
        operation = self.operation
        request = pb.WaitOperationRequest(operation=operation.operation, until_progress_above=operation.progress)
        request.timeout.FromMilliseconds(int(1000 * POLL_SECONDS))
        return request

    def result(self) -> resources.Operation:
        operation = self.operation
        if operation.state != resources.Operation.STATE_SUCCEEDED:
            text = operation.error_message or f"{self._what} was cancelled"
            raise errors.Refused(text, reason=operation.error_reason)
        self._progress.update(self._task, completed=100, description=f"{self._what}: done")
        return operation
