"""Columns of whole numbers, in as few bytes as the largest takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Whole = NDArray[np.uint32]
_WIDTHS: dict[int, Any] = {1: np.dtype("<u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}


def write_column(values: NDArray[Any]) -> bytes:
    """A number each; one number where all are the same."""
    numbers = values.astype(np.uint32)
    if (numbers == numbers[0]).all():
        return b"\0" + numbers[:1].astype("<u4").tobytes()
    width = next(width for width in _WIDTHS if int(numbers.max()) < 1 << 8 * width)
    return bytes([width]) + numbers.astype(_WIDTHS[width]).tobytes()


def read_column(data: bytes, position: int, count: int) -> tuple[Whole, int]:
    """The numbers, and where what follows them begins."""
    width, position = data[position], position + 1
    if width == 0:
        return np.full(count, int.from_bytes(data[position : position + 4], "little"), np.uint32), position + 4
    end = position + width * count
    return np.frombuffer(data[position:end], _WIDTHS.get(width, "<u4"), count).astype(np.uint32), end
