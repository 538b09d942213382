"""Work that is done whole or not at all, however early the caller who asked for it leaves.

A call whose caller is gone is cancelled wherever it waits. Between a transaction and what memory makes of it that would
leave the two apart: the disk says that an alarm was acknowledged, and the detector goes on as if it were not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_under_way: set[asyncio.Task[Any]] = set()  # the loop itself holds none


def to_its_end(work: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The same, in a task of its own: who waits for it may be cancelled, the work is not."""

    @wraps(work)
    async def whole(*arguments: P.args, **named: P.kwargs) -> T:
        task = asyncio.create_task(work(*arguments, **named))
        _under_way.add(task)
        task.add_done_callback(_under_way.discard)
        return await asyncio.shield(task)

    return whole
