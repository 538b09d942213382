"""Immutable bytes, stored under their own sha256 and checked against it at every read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from service.errors import Damaged
from service.store.files import write_whole


class Blobs:
    """A folder of files named by their content."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def put(self, data: bytes) -> str:
        """Store; return the sha256 in hex. Storing the same bytes again changes nothing."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._root / digest
        if not path.exists():
            write_whole(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes. Damaged if they are gone or no longer what they were."""
        try:
            data = (self._root / digest).read_bytes()
        except FileNotFoundError:
            raise Damaged(f"blob {digest} is missing from the store") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"blob {digest} in the store is damaged: its content has another sha256")
        return data

    def delete(self, digest: str) -> None:
        (self._root / digest).unlink(missing_ok=True)
