"""A disk that can lose its power: an SQLite VFS that records what is written and what is made durable.

Files are written as always. Beside that every write, truncation, sync and deletion is recorded, so that a test can ask
what would be on the disk had the power failed after any of them: everything that was synced, and of what was not
nothing, all, or a part torn in the middle. Syncs and writes can also be made to fail.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, FULL, IOERR_FSYNC = 0, 13, 10 | 4 << 8
POINTER, INT, INT64, NAME = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_char_p
OPEN = ctypes.CFUNCTYPE(INT, POINTER, POINTER, POINTER, INT, POINTER)
DELETE = ctypes.CFUNCTYPE(INT, POINTER, POINTER, INT)
WRITE = ctypes.CFUNCTYPE(INT, POINTER, POINTER, INT, INT64)
TRUNCATE = ctypes.CFUNCTYPE(INT, POINTER, INT64)
SYNC = ctypes.CFUNCTYPE(INT, POINTER, INT)


class Methods(ctypes.Structure):
    """sqlite3_io_methods, as far as it is changed here; the rest is copied as it is."""

    _fields_ = [
        ("version", INT),
        ("close", POINTER),
        ("read", POINTER),
        ("write", POINTER),
        ("truncate", POINTER),
        ("sync", POINTER),
        ("rest", POINTER * 13),
    ]


class Vfs(ctypes.Structure):
    """sqlite3_vfs, likewise."""

    _fields_ = [
        ("version", INT),
        ("file_size", INT),
        ("longest_path", INT),
        ("next", POINTER),
        ("name", NAME),
        ("data", POINTER),
        ("open", POINTER),
        ("delete", POINTER),
        ("rest", POINTER * 16),
    ]


@dataclass(frozen=True)
class Event:
    """`kind`: write, truncate, sync, delete; or acknowledged, with what the caller was told in `data`."""

    kind: str
    path: str = ""
    offset: int = 0
    data: Any = b""


@dataclass
class Disk:
    """What happened, in order, and what is to fail: `fail(kind, path)` gives an error code, or 0."""

    events: list[Event] = field(default_factory=list)
    fail: Callable[[str, str], int] = lambda _kind, _path: OK

    def acknowledge(self, what: Any) -> None:
        self.events.append(Event("acknowledged", data=what))

    def acknowledged(self, cut: int) -> list[Any]:
        return [event.data for event in self.events[:cut] if event.kind == "acknowledged"]

    def after_cut(self, cut: int, unsynced: str, seed: int = 0) -> dict[str, bytes]:
        """The files, by name, had the power failed before event `cut`; of unsynced writes nothing ("drop"), all
        ("keep"), or each at random, the last one torn ("torn")."""
        draw = random.Random(seed)
        durable: dict[str, bytearray] = {}
        waiting: dict[str, list[Event]] = {}
        for event in self.events[:cut]:
            if event.kind in {"write", "truncate"}:
                waiting.setdefault(event.path, []).append(event)
            elif event.kind == "sync":
                for written in waiting.pop(event.path, []):
                    _apply(durable.setdefault(event.path, bytearray()), written)
            elif event.kind == "delete":  # not durable before the folder is synced; SQLite does not rely on it
                waiting.pop(event.path, None)
                durable.pop(event.path, None)
        for path, events in waiting.items():
            for index, written in enumerate(events):
                if unsynced == "keep" or (unsynced == "torn" and draw.random() < 0.5):
                    torn = unsynced == "torn" and index == len(events) - 1
                    _apply(durable.setdefault(path, bytearray()), written, torn=torn)
        return {path: bytes(content) for path, content in durable.items()}


def _apply(content: bytearray, event: Event, *, torn: bool = False) -> None:
    if event.kind == "truncate":
        del content[event.offset :]
        return
    data = event.data[: len(event.data) // 2] if torn else event.data
    content.extend(bytes(max(0, event.offset - len(content))))
    content[event.offset : event.offset + len(data)] = data


@contextmanager
def recorded(folder: Path) -> Iterator[Disk]:
    """The disk below `folder`, of databases that are opened inside the block."""
    library = ctypes.CDLL(_sqlite3.__file__)
    library.sqlite3_vfs_find.restype = ctypes.POINTER(Vfs)
    library.sqlite3_vfs_register.argtypes = [POINTER, INT]
    library.sqlite3_vfs_unregister.argtypes = [POINTER]
    real = library.sqlite3_vfs_find(None)
    disk, recorder = Disk(), _Recorder(folder)
    recorder.disk = disk
    ours = recorder.vfs(real)
    assert library.sqlite3_vfs_register(ctypes.byref(ours), 1) == OK
    try:
        yield disk
    finally:
        library.sqlite3_vfs_unregister(ctypes.byref(ours))
        library.sqlite3_vfs_register(real, 1)


class _Recorder:
    disk: Disk

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder).encode()
        self._names: dict[int, str] = {}  # address of an open file -> its name
        self._changed: dict[int, tuple[Methods, Methods]] = {}  # address of real methods -> (real, ours)
        self._kept: list[Any] = []  # callbacks live as long as the library may call them

    def vfs(self, real: Any) -> Vfs:
        ours = Vfs.from_buffer_copy(real.contents)
        ours.name, ours.next = b"power-cut", None
        real_open = OPEN(real.contents.open)
        real_delete = DELETE(real.contents.delete)

        def open_(vfs: int, name: int | None, file: int, flags: int, out: int) -> int:
            code = real_open(ctypes.addressof(real.contents), name, file, flags, out)  # it keeps the very pointer
            path = ctypes.string_at(name) if name else b""
            if code == OK and path.startswith(self._folder):
                self._names[file] = Path(path.decode()).name
                slot = ctypes.cast(file, ctypes.POINTER(POINTER))
                slot[0] = ctypes.addressof(self._methods(slot[0]))
            return code

        def delete(vfs: int, name: int, sync: int) -> int:
            code, path = real_delete(ctypes.addressof(real.contents), name, sync), ctypes.string_at(name)
            if code == OK and path.startswith(self._folder):
                self.disk.events.append(Event("delete", Path(path.decode()).name))
            return code

        self._kept += [real_open, real_delete, OPEN(open_), DELETE(delete), ours]
        ours.open, ours.delete = (ctypes.cast(callback, POINTER).value for callback in self._kept[2:4])
        return ours

    def _methods(self, address: int) -> Methods:
        if address not in self._changed:
            real = ctypes.cast(address, ctypes.POINTER(Methods)).contents
            ours = Methods.from_buffer_copy(real)
            for name, kind, made in (
                ("write", WRITE, self._write),
                ("truncate", TRUNCATE, self._truncate),
                ("sync", SYNC, self._sync),
            ):
                callback = kind(made(kind(getattr(real, name))))
                self._kept.append(callback)
                setattr(ours, name, ctypes.cast(callback, POINTER).value)
            self._changed[address] = (real, ours)
            self._kept += [real, ours]
        return self._changed[address][1]

    def _write(self, real: Any) -> Callable[..., int]:
        def write(file: int, data: int, size: int, offset: int) -> int:
            path = self._names[file]
            if code := self.disk.fail("write", path):
                return code
            self.disk.events.append(Event("write", path, offset, ctypes.string_at(data, size)))
            return int(real(file, data, size, offset))

        return write

    def _truncate(self, real: Any) -> Callable[..., int]:
        def truncate(file: int, size: int) -> int:
            self.disk.events.append(Event("truncate", self._names[file], size))
            return int(real(file, size))

        return truncate

    def _sync(self, _real: Any) -> Callable[..., int]:
        def sync(file: int, flags: int) -> int:
            path = self._names[file]
            if code := self.disk.fail("sync", path):
                return code
            self.disk.events.append(Event("sync", path))
            return OK  # what the test asks is what would be there, not how long that takes

        return sync
