"""The order of the requests that wait for a run."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Waiting(Protocol):
    """A request, which has rows."""

    rows: int


T = TypeVar("T", bound=Waiting)


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

    def take(self, most: int, *, one: bool = False) -> list[T]:
        """Those whose turn it is, up to so many rows of them; with `one`, the first in any case."""
        taken: list[T] = []
        while self._callers:
            caller, own = next(iter(self._callers.items()))
            turn = 1 if len(self._callers) > 1 else len(own)
            while own and turn:
                most -= own[0].rows
                if most < 0 and not one:
                    return taken
                one = False
                taken.append(own.popleft())
                turn -= 1
            if own:
                self._callers.move_to_end(caller)
            else:
                del self._callers[caller]
        return taken

    def held(self) -> Iterator[tuple[str, int]]:
        """How many each caller has here."""
        return ((caller, len(own)) for caller, own in self._callers.items())

    def give_way(self, caller: str, *, oldest: bool = False) -> T | None:
        """Take back the caller's newest request, or its oldest; None if it has none here."""
        own = self._callers.get(caller)
        if own is None:
            return None
        taken = own.popleft() if oldest else own.pop()
        if not own:
            del self._callers[caller]
        return taken
