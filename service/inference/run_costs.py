"""What runs of a model take, learned from those that were made."""

from __future__ import annotations

import math
from typing import Any

MOST_FORMS = 64
"""Forms of inputs whose costs are kept."""
PAUSE, LEAST_NS = 4, 10_000
"""A run that took so many times what is known, or more, met a pause of the machine, and counts as no more than that."""


class Costs:
    """What runs take, by the form of their inputs: an image of twice the side is another run."""

    def __init__(self) -> None:
        self._by_form: dict[Any, RunCosts] = {}

    def of(self, inputs: Any) -> RunCosts:
        """Of a lane's inputs. Forms are callers' choices, so they are bounded and then forgotten."""
        costs = self._by_form.get(inputs)
        if costs is None:
            if len(self._by_form) >= MOST_FORMS:
                self._by_form.clear()
            costs = self._by_form[inputs] = RunCosts()
        return costs

    def forget(self) -> None:
        """Another revision serves, whose runs may cost more than the event loop can wait for."""
        self._by_form.clear()


class RunCosts:
    """What a run takes, nanoseconds, by the power of two of its rows, learned from the runs that were made."""

    def __init__(self) -> None:
        self._ns: dict[int, float] = {}

    def expected_ns(self, rows: int) -> float:
        """What a run of about this size took, or the next larger one; infinite if no such run was made."""
        size = rows.bit_length()
        if size in self._ns:
            return self._ns[size]
        return min((ns for larger, ns in self._ns.items() if larger > size), default=math.inf)

    def learn(self, rows: int, ns: int) -> None:
        """A moving mean that follows faster runs quickly and slower ones slowly: the machine's pauses are no cost."""
        size = rows.bit_length()
        known = self._ns.get(size)
        if known is None:
            self._ns[size] = ns
        else:
            step = min(ns, PAUSE * max(known, LEAST_NS)) - known
            self._ns[size] = known + step * (0.5 if step < 0 else 0.05)
