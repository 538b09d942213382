"""Triton's classification extension: the k largest values of an output, each as `value:index[:label]`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidRequest, shown

PARAMETER = "classification"


def top(name: str, values: NDArray[Any], k: int, labels: Sequence[str]) -> NDArray[np.object_]:
    """The k largest of each row, descending; ties in order of index. BYTES [batch, k], k at most the number of classes.

    Raises
    ------
    InvalidRequest
        for an output that is not numbers of shape [batch, classes]
    """
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InvalidRequest(f"output {shown(name)}: classification wants numbers of shape [batch, classes]")
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    named = len(labels) == values.shape[1]
    entries = np.empty(order.shape, dtype=object)
    for place, found in np.ndenumerate(order):
        index = int(found)
        text = f"{values[place[0], index]:f}:{index}"
        entries[place] = (f"{text}:{labels[index]}" if named else text).encode()
    return entries
