"""Numbers that stand for the inputs of a row, for monitors that must see the inputs move: the inputs are not kept.

Mean and spread, and projections on random directions (Bingham and Mannila 2001; signs instead of Gaussian numbers:
Achlioptas 2003), whose law changes with the law of the inputs. The directions depend on nothing but the names and
shapes of the inputs, so that they are the same after a restart and in every process. Of wide inputs a random part of
the numbers is looked at, the same of each row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.inference.datatypes import NUMPY
from service.inference.session import TensorSpec

MOST_PROJECTIONS = 64
MOST_NUMBERS = 4096
"""Of a row that are looked at."""

Arrays = Mapping[str, NDArray[Any]]
Sample = Sequence[NDArray[Any]]


class InputSignals:
    """Mean, spread and `count` projections of a row of inputs.

    Inputs of strings, of bfloat16 or of no fixed shape are left out; ValueError if no other is there.

    Attributes
    ----------
    names : of what `of` gives
    bytes_a_row : what a sample takes
    """

    def __init__(self, inputs: Sequence[TensorSpec], count: int) -> None:
        sizes = {spec.name: math.prod(spec.shape[1:]) for spec in inputs if _is_numeric(spec)}
        if not sizes:
            shown = ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in inputs) or "none"
            raise ValueError(f"projections need an input of numbers whose rows have one shape; the inputs are {shown}")
        total = sum(sizes.values())
        described = repr((sorted(sizes.items()), count)).encode()
        chance = np.random.Philox(key=int.from_bytes(hashlib.blake2b(described, digest_size=16).digest(), "little"))
        seen = np.arange(total)
        if total > MOST_NUMBERS:
            seen = np.sort(np.argsort(chance.random_raw(total), kind="stable")[:MOST_NUMBERS])
        ends = np.cumsum(list(sizes.values()))
        self._places = {
            name: seen[(seen >= end - size) & (seen < end)] - (end - size)
            for (name, size), end in zip(sizes.items(), ends, strict=True)
        }
        self._whole = total <= MOST_NUMBERS
        bits = chance.random_raw(len(seen) * count).reshape(len(seen), count) >> np.uint64(63)
        self._directions = ((2.0 * bits - 1.0) / math.sqrt(len(seen))).astype(np.float32)
        self.names = ("input_mean", "input_spread", *(f"input_{number}" for number in range(1, count + 1)))
        items = {spec.name: NUMPY[spec.datatype].itemsize for spec in inputs}
        self.bytes_a_row = sum(items[name] * len(places) for name, places in self._places.items())

    def sample(self, arrays: Arrays) -> list[NDArray[Any]]:
        """Of a request's inputs what `of` reads; of wide ones a copy of the part that is looked at."""
        rows = [(arrays[name].reshape(len(arrays[name]), -1), places) for name, places in self._places.items()]
        return [values if self._whole else values[:, places] for values, places in rows]

    def of(self, sample: Sample) -> dict[str, NDArray[np.float32]]:
        """The signals of each row, by name."""
        with np.errstate(over="ignore", invalid="ignore"):  # of inputs that are no numbers they are none either
            values = np.concatenate(sample, axis=1, dtype=np.float32, casting="unsafe")
            columns = [values.mean(axis=1), values.std(axis=1), *(values @ self._directions).T]
        return dict(zip(self.names, columns, strict=True))


def _is_numeric(spec: TensorSpec) -> bool:
    fixed = len(spec.shape) > 0 and all(size > 0 for size in spec.shape[1:])
    return fixed and spec.datatype not in ("BYTES", "BF16")
