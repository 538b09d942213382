"""Loops over rows as machine code where numba is installed, as plain Python otherwise, with the same results.

numba compiles without fast-math: no operation is reordered or fused, and both call the C library's exp and log.

A compiled function uses constants and functions of its own file alone: the code that is kept on disk is thrown away
when that file changes, and no other is looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """`function` on numbers and arrays, compiled when it is first called; what it does stays on disk, where it can."""
    try:
        from numba import njit
    except ImportError:
        return function
    try:
        return cast(F, njit(cache=True)(function))
    except RuntimeError:  # there is no folder that may hold it
        return cast(F, njit(function))
