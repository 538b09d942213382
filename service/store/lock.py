"""The lock on a data directory: two servers writing one store would each undo the other."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from service.errors import Refused


def lock_store(store: Path) -> IO[bytes]:
    """Hold the data directory until the file is closed. Refused if a server, or whoever mends it, holds it."""
    store.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = (store / "lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise Refused("another calserve server holds this data directory") from None
    return file
