"""When those who follow the store look at it again."""

from __future__ import annotations

import asyncio

HAIR_SECONDS = 0.001
"""What a timer may be early by."""


async def next_look(seconds: float) -> None:
    """Return when the clock has come to the next multiple of so many seconds.

    What looks that often wakes at the same moments then: to wake a server that does nothing costs more than the looks.
    """
    await asyncio.sleep(seconds_left(seconds, asyncio.get_running_loop().time()))


def seconds_left(seconds: float, now: float) -> float:
    """Until then; a moment that is hardly over or about to come is past.

    >>> seconds_left(0.5, 7.125)
    0.375
    """
    left = seconds - now % seconds
    return left if left > HAIR_SECONDS else left + seconds
