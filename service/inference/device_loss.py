"""What a failed run says about its device, and what follows when the device is gone.

A CUDA context that met one of the errors below is of no use to any session of the process, and only a new process gets
another. So the loss belongs to the device, not to a model: one `DeviceLoss` is shared by every session.
"""

from __future__ import annotations

import logging
import re
import threading
from enum import Enum

from service.errors import NotReady, Refused

log = logging.getLogger(__name__)

POLICIES = ("not_ready", "cpu")

_NUMBERED = re.compile(r"\b(CUDA|CUBLAS|CUDNN|CUDNN_FE) failure (\d+)")
_NO_MEMORY = re.compile(r"Failed to allocate memory|out of memory|ALLOC_FAILED|ALLOCATION_FAILED", re.IGNORECASE)
_GONE = re.compile(
    r"STATUS_(NOT_INITIALIZED|EXECUTION_FAILED|INTERNAL_ERROR|MAPPING_ERROR)"
    r"|execution context enqueue failed"  # TensorRT, which gives no number
    r"|\bdevice (was |is |has been )?(lost|removed)\b",
    re.IGNORECASE,
)
# cudaError_t, cublasStatus_t, and cudnnStatus_t of cuDNN 8 and 9: those after which no call succeeds. The other codes
# are of one call, such as an invalid value or a kernel that the library lacks.
_GONE_CODES = {
    "CUDA": {4, 46, 100, 101, 201, 214, 220, 700, 702, 709, 710, *range(714, 720), 802, 999},
    "CUBLAS": {1, 11, 13, 14},
    "CUDNN": {1, 4, 7, 8, 1001, 4000, *range(5000, 5004)},
}


class Failure(Enum):
    """Why a run failed."""

    INPUT = "input"
    MEMORY = "memory"
    DEVICE = "device"


def failure_of(text: str, *, on_cpu: bool) -> Failure:
    """Which of the three an error's text tells. A run on the CPU has no device to lose."""
    if _NO_MEMORY.search(text):
        return Failure.MEMORY
    if on_cpu:
        return Failure.INPUT
    codes = ((library.removesuffix("_FE"), int(code)) for library, code in _NUMBERED.findall(text))
    gone = _GONE.search(text) or any(code in _GONE_CODES[library] for library, code in codes)
    return Failure.DEVICE if gone else Failure.INPUT


class DeviceLost(Exception):
    """A run found its device gone. Never leaves a session: `DeviceLoss` says what does."""


class DeviceLoss:
    """Whether the device is lost, and the policy for that.

    `not_ready`: every model on the device answers UNAVAILABLE until the process is started again. `cpu`: sessions are
    rebuilt on the CPU, once, and the runs that failed are made again there.
    """

    def __init__(self, policy: str = "not_ready") -> None:
        if policy not in POLICIES:
            raise Refused(f"device_lost must be one of {', '.join(POLICIES)}, got {policy!r}")
        self.policy = policy
        self.lost = False
        self.wrecks: list[object] = []  # what was on it: freeing memory of a dead context may end the process
        self._lock = threading.Lock()

    def report(self, provider: str, reason: str) -> None:
        """A run found the device gone. The first report is logged."""
        with self._lock:
            first, self.lost = not self.lost, True
        if first:
            then = "models move to the CPU" if self.policy == "cpu" else "its models are not served until a restart"
            log.error("%s lost its device, %s: %s", provider, then, reason)

    def check_fallback(self) -> None:
        """NotReady unless the policy lets the CPU take over."""
        if self.policy != "cpu":
            raise NotReady(
                "the device that this model runs on is lost; the server must be restarted", reason="DEVICE_LOST"
            )
