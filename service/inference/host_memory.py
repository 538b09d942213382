"""Buffers on the host that a batch passes through, page-locked where there is a GPU.

The driver copies page-locked ("pinned") memory to the device without staging it first.
"""

from __future__ import annotations

import ctypes
import logging
import math
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

CUDA_RUNTIMES = ("libcudart.so.13", "libcudart.so.12")
"""By soname: the provider has loaded its own already, wherever that lies."""

_PORTABLE = 1  # cudaHostAllocPortable: pinned for every context of the process


def cuda_runtime() -> Any | None:
    """The CUDA runtime library, None where there is none."""
    for name in CUDA_RUNTIMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


class HostBuffers:
    """One growing buffer for each name; `view` gives it the shape of a batch. A view lives until the next of its name.

    `device_index` of None makes plain memory, else memory pinned for that CUDA device, plain where the driver refuses.
    """

    def __init__(self, device_index: int | None) -> None:
        self._device_index = device_index
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def view(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        size = math.prod(shape) * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < size:
            buffer = self._buffers[name] = self._allocate(1 << max(size - 1, 63).bit_length())
        return buffer[:size].view(dtype).reshape(shape)

    def copy(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """A view that holds the values of `array`, in C order."""
        view = self.view(name, array.shape, array.dtype)
        np.copyto(view, array)
        return view

    def _allocate(self, size: int) -> NDArray[np.uint8]:
        pinned = None if self._device_index is None else _pinned(size, self._device_index)
        return np.empty(size, np.uint8) if pinned is None else pinned


def _pinned(size: int, device_index: int) -> NDArray[np.uint8] | None:
    runtime = cuda_runtime()
    address = ctypes.c_void_p()
    if runtime is None or runtime.cudaSetDevice(device_index):  # else a context is made on device 0 as well
        return None
    if runtime.cudaHostAlloc(ctypes.byref(address), ctypes.c_size_t(size), _PORTABLE):
        log.warning("no %d bytes of pinned memory; batches pass through pageable memory", size)
        return None
    memory = (ctypes.c_uint8 * size).from_address(int(address.value or 0))
    weakref.finalize(memory, runtime.cudaFreeHost, address).atexit = False  # the driver is gone by then
    return np.ctypeslib.as_array(memory)
