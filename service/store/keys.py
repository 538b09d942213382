"""The keys that sign prediction ids and receipts, and the ids themselves.

An id says where its prediction is in the journal, so that no index of ids is needed, and bears a signature, so that
nobody who was not given it can name it. 24 characters of base64 in its spelling for addresses:

    key number  1 byte     stream  4 bytes     number in the stream  5 bytes     signature  8 bytes
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.errors import Damaged
from service.store.files import signature, write_whole

SECRET_BYTES, SIGNATURE_BYTES = 32, 8
PLACE = slice(1, 10)
"""Where an id's bytes hold stream and number, which are signed."""
ID_BYTES, ID_CHARACTERS = 18, 24
MOST_KEYS = 256
PRIVATE = 0o600
_FIELDS = np.dtype([("key", "u1"), ("stream", ">u4"), ("high", "u1"), ("low", ">u4"), ("signature", "u8")])
NOWHERE = -1
"""The stream and the number of what is no id."""
NO_PLACE = np.full((1, 2), NOWHERE, np.int64)


@dataclass(frozen=True)
class Key:
    number: int
    created: float
    secret: bytes

    def hasher(self, purpose: bytes, size: int) -> Any:
        """A keyed hash to be copied for each use, which costs a third of a new one."""
        return blake2b(key=self.secret, digest_size=size, person=purpose)


class Keys:
    """The keys of a data directory: the newest signs, older ones are still known.

    One process makes and rotates them; others read the file again when they meet a number that they do not know.
    """

    def __init__(self, path: Path, *, may_write: bool = True) -> None:
        self._path, self._may_write = path, may_write
        self._lock = threading.Lock()
        self._keys: dict[int, Key] = {}
        self._seen: Any = None
        self._read()
        if not self._keys and may_write:
            self.rotate()

    @property
    def newest(self) -> Key:
        """The key to sign with. Damaged if there is none: only a server makes one."""
        if not self._keys:
            raise Damaged(f"the file of keys {self._path.name} is missing from the store")
        return max(self._keys.values(), key=lambda key: key.created)

    def rotate(self, older_than_seconds: float = 0.0, forget_after_seconds: float = float("inf")) -> bool:
        """Make a new key if the newest is older than that; forget those that nothing kept can bear. Whether it did."""
        now = time.time()
        with self._lock:
            if self._keys and now - self.newest.created < older_than_seconds:
                return False
            number = (self.newest.number + 1) % MOST_KEYS if self._keys else 0
            kept = [key for key in self._keys.values() if now - key.created < forget_after_seconds]
            keys = {key.number: key for key in [*kept, Key(number, now, secrets.token_bytes(SECRET_BYTES))]}
            rows = [{"number": k.number, "created": k.created, "secret": k.secret.hex()} for k in keys.values()]
            write_whole(self._path, json.dumps(rows).encode(), mode=PRIVATE)
            self._keys, self._seen = keys, signature(self._path)
        return True

    def get(self, number: int) -> Key | None:
        if number not in self._keys:
            self.refresh()
        return self._keys.get(number)

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        if signature(self._path) != self._seen:
            self._read()

    def _read(self) -> None:
        self._seen = signature(self._path)
        if self._seen is None:
            return
        try:
            rows = json.loads(self._path.read_bytes())
            self._keys = {
                row["number"]: Key(row["number"], row["created"], bytes.fromhex(row["secret"])) for row in rows
            }
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"the file of keys {self._path.name} is damaged") from error


class IdMaker:
    """Makes the ids of one stream, quickly."""

    def __init__(self, key: Key, stream: int) -> None:
        self.key = key
        self._head = stream.to_bytes(4)
        self._number = bytes([key.number])
        self._hasher = key.hasher(b"prediction", SIGNATURE_BYTES)

    def make(self, number: int) -> bytes:
        place = self._head + number.to_bytes(5)
        hasher = self._hasher.copy()
        hasher.update(place)
        return urlsafe_b64encode(self._number + place + hasher.digest())


class IdReader:
    """Reads ids that were made with any known key."""

    def __init__(self, keys: Keys) -> None:
        self._keys, self._nobodys = keys, Key(0, 0.0, secrets.token_bytes(SECRET_BYTES))
        self._hashers: dict[int, tuple[Key, Any]] = {}

    def read(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Where each prediction is, (len(ids), 2): stream and number; both NOWHERE for what is no id of this server's.

        Ids in a row that are the same are verified once.
        """
        if (data := _decoded(ids)) is not None:
            return self._places(data)
        places = np.repeat(NO_PLACE, len(ids), axis=0)
        if possible := [index for index, one in enumerate(ids) if _decoded([one]) is not None]:
            places[possible] = self.read([ids[index] for index in possible])
        return places

    def _places(self, data: bytes) -> NDArray[np.int64]:
        raw = np.frombuffer(data, np.uint8).reshape(-1, ID_BYTES)
        if len(raw) > 1:
            first = np.append(True, (raw[1:] != raw[:-1]).any(axis=1))
            places: NDArray[np.int64] = self._verified(raw[first].tobytes())[np.cumsum(first) - 1]
            return places
        return self._verified(data)

    def _verified(self, data: bytes) -> NDArray[np.int64]:
        fields = np.frombuffer(data, _FIELDS)
        places = np.empty((len(fields), 2), np.int64)
        places[:, 0], places[:, 1] = fields["stream"], fields["high"]
        places[:, 1] = (places[:, 1] << 32) + fields["low"]
        # whole words are compared, so that how long it takes says nothing of where they differ
        places[fields["signature"] != self._signatures(data)] = NOWHERE
        return places

    def _signatures(self, data: bytes) -> NDArray[np.uint64]:
        """What the signatures must be. Of an id of no known key it is one that nobody can know."""
        digests, copies = [], dict[int, Callable[[], Any]]()
        for start in range(0, len(data), ID_BYTES):
            if (copy := copies.get(data[start])) is None:
                copy = copies[data[start]] = self._hasher(data[start]).copy
            own = copy()
            own.update(data[start + PLACE.start : start + PLACE.stop])
            digests.append(own.digest())
        return np.frombuffer(b"".join(digests), np.uint64)

    def _hasher(self, number: int) -> Any:
        key = self._keys.get(number) or self._nobodys
        known = self._hashers.get(number)
        if known is None or known[0] is not key:
            known = self._hashers[number] = (key, key.hasher(b"prediction", SIGNATURE_BYTES))
        return known[1]


def _decoded(ids: Sequence[str]) -> bytes | None:
    """The bytes of ids, one after the other; None if one of them cannot be an id."""
    if not ids or set(map(len, ids)) != {ID_CHARACTERS}:
        return None
    try:
        data = urlsafe_b64decode("".join(ids))
    except ValueError:
        return None
    return data if len(data) == ID_BYTES * len(ids) else None
