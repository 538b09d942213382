"""Runs on made-up rows before the first request: at every batch size that matters, and to learn what a row costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.inference import datatypes
from service.inference.session import Session, TensorSpec

RUNS_PER_SIZE = 5
"""Timed runs of one batch size; the shortest counts, since nothing makes a run faster than it is."""

NO_CHEAPER = 0.1
"""A row that costs no more than this above the cheapest one costs the same: timings differ by as much by chance."""

AROUND_A_RUN_SECONDS = 1e-4
"""What a run costs besides, in the server that gathers it, answers it, writes and reads again."""

SLOW_ROW_SECONDS, NOT_WORTH_WAITING = 0.002, 0.3
"""Rows that take so long share a run if that saves more than this: each waits for the others of its run."""


@dataclass(frozen=True)
class Costs:
    """What runs took.

    Attributes
    ----------
    seconds : rows in a run -> seconds that it took
    """

    seconds: Mapping[int, float]

    @property
    def knee(self) -> int:
        """The fewest rows of a run beyond which a row gets no cheaper to serve, of the sizes that were measured; of
        slow rows, not cheaper by enough."""
        row = {rows: (seconds + AROUND_A_RUN_SECONDS) / rows for rows, seconds in self.seconds.items()}
        saved = NO_CHEAPER if min(row.values()) < SLOW_ROW_SECONDS else NOT_WORTH_WAITING
        return min(rows for rows, cost in row.items() if cost <= (1 + saved) * min(row.values()))


def warm_up_sizes(most: int) -> list[int]:
    """1, 2, 4 ... and `most`, in the order to run them: the largest first, so that what a provider keeps for it, memory
    or an engine for a range of sizes, does for the others."""
    powers = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return [most, *powers]


def warm_up(session: Session, outputs: Sequence[str], parameters: Mapping[str, NDArray[Any]], most: int) -> None:
    """Run `session` at each of the sizes that matter up to `most` rows; on a device with CUDA graphs, capture them.

    Raises
    ------
    InvalidRequest
        if the graph cannot compute made-up inputs
    """
    own_inputs = [spec for spec in session.inputs if spec.name not in parameters]
    batched = all(spec.shape[:1] == (-1,) for spec in own_inputs)
    for rows in warm_up_sizes(most if batched else 1):
        session.warm_up(outputs, made_up(own_inputs, rows), parameters)


def row_costs(
    run: Callable[[int], object],
    most: int,
    *,
    budget_seconds: float = 0.3,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Time `run(rows)` at 1, 4, 16 ... rows up to `most`, for as long as the budget is expected to last.

    One row is always timed. A size is left out, with those above it, when two runs of it would outlast the budget if
    its rows cost what those of the size before did.
    """
    end, seconds, rows = clock() + budget_seconds, {1: _shortest(run, 1, clock, clock() + budget_seconds / 2)}, 4
    while rows <= most and 2 * 4 * seconds[rows // 4] <= end - clock():
        seconds[rows] = _shortest(run, rows, clock, clock() + (end - clock()) / 2)
        rows *= 4
    return Costs(seconds)


def _shortest(run: Callable[[int], object], rows: int, clock: Callable[[], float], end: float) -> float:
    """Seconds of the shortest run that counts: the first does not, unless it leaves no time for another."""
    times: list[float] = []
    while len(times) <= RUNS_PER_SIZE and (not times or clock() + times[-1] <= end):
        begun = clock()
        run(rows)
        times.append(clock() - begun)
    return min(times[1:] or times)


def made_up(specs: Iterable[TensorSpec], rows: int) -> dict[str, NDArray[Any]]:
    """Inputs of `rows` rows: seeded normal numbers for floats, zeros for integers (the safest index), empty strings."""
    return {spec.name: _made_up(spec, rows) for spec in specs}


def _made_up(spec: TensorSpec, rows: int) -> NDArray[Any]:
    batch = [rows] if spec.shape[:1] == (-1,) else list(spec.shape[:1])
    shape = batch + [1 if size < 0 else size for size in spec.shape[1:]]
    if spec.datatype == "BYTES":
        return np.full(shape, b"", dtype=object)
    dtype = datatypes.NUMPY[spec.datatype]
    if dtype.kind == "f":
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype=dtype)
