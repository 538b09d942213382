"""The order of the requests that wait for a run."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """First come, first served for each caller; the callers take turns."""

    __slots__ = ("_callers",)

    def __init__(self) -> None:
        self._callers: OrderedDict[str, deque[T]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._callers)

    def push(self, caller: str, pending: T) -> None:
        own = self._callers.get(caller)
        if own is None:
            own = self._callers[caller] = deque()
        own.append(pending)

    def peek(self) -> T:
        return next(iter(self._callers.values()))[0]

    def pop(self) -> T:
        caller, own = next(iter(self._callers.items()))
        pending = own.popleft()
        if own:
            self._callers.move_to_end(caller)
        else:
            del self._callers[caller]
        return pending

    def give_way(self, caller: str, *, oldest: bool = False) -> T | None:
        """Take back the caller's newest request, or its oldest; None if it has none here."""
        own = self._callers.get(caller)
        if own is None:
            return None
        taken = own.popleft() if oldest else own.pop()
        if not own:
            del self._callers[caller]
        return taken
