"""How many threads a model's run gets: from the cores this process may use and what shares them."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota: Path = CGROUP_QUOTA) -> int:
    """Cores in the affinity mask, and no more than a container's CPU quota, which the mask does not show."""
    cores = len(os.sched_getaffinity(0))
    try:
        allowed, period = quota.read_text().split()
        return max(1, min(cores, math.ceil(int(allowed) / int(period))))
    except (OSError, ValueError):  # no cgroup, or its quota is "max"
        return cores


def threads_per_run(cores: int, *, models: int, replicas: int) -> int:
    """An equal share for every model of every replica, at least one: runs that share a core only get in each other's
    way, since the runtime's threads spin."""
    return max(1, cores // max(1, models * replicas))
