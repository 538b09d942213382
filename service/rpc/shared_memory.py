"""Triton's extension for system shared memory: inputs read from it, outputs written to it.

Off unless the operator gives a prefix; then only objects of this machine whose names begin with it may be registered.
The bytes are copied by `pread` and `pwrite`, not mapped: they may change while they are read, so what is validated must
be a copy in any case, and an object that is cut short later is a refused request where a mapping would end the process.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import AlreadyExists, CalserveError, InvalidRequest, NotFound, Overloaded, Refused, shown
from service.rpc.methods import Call
from service.rpc.wire import inference

OBJECTS = Path("/dev/shm")  # noqa: S108  where the system keeps them, not a place for temporary files
KEY = re.compile(r"/?([A-Za-z0-9_-]{1,200})")
MAX_NAME_CHARACTERS = 256
MAX_REGIONS = 1024
MAX_REGION_BYTES = 2**31 - 4096
"""The most that one call of `pread` takes."""


@dataclass(frozen=True)
class Region:
    """A part of a shared memory object."""

    name: str
    key: str
    offset: int
    byte_size: int
    descriptor: int

    def read(self, offset: int, byte_size: int) -> bytes:
        """A copy of some of its bytes. InvalidRequest outside of it."""
        self.check(offset, byte_size)
        data = os.pread(self.descriptor, byte_size, self.offset + offset)
        if len(data) != byte_size:
            raise InvalidRequest(f"the object of shared memory region {shown(self.name)} is shorter than it was")
        return data

    def write(self, offset: int, byte_size: int, data: bytes | memoryview) -> None:
        """Put `data` at `offset`, where there are `byte_size` bytes for it. InvalidRequest if it does not fit."""
        self.check(offset, byte_size)
        if len(data) > byte_size:
            raise InvalidRequest(
                f"the output takes {len(data)} bytes, shared memory region {shown(self.name)} has {byte_size} for it"
            )
        if _size_of(self.descriptor) < self.offset + offset + len(data):  # a write would lengthen the object
            raise InvalidRequest(f"the object of shared memory region {shown(self.name)} is shorter than it was")
        os.pwrite(self.descriptor, data, self.offset + offset)

    def check(self, offset: int, byte_size: int) -> None:
        if offset < 0 or byte_size < 0 or offset + byte_size > self.byte_size:
            raise InvalidRequest(
                f"shared memory region {shown(self.name)} has {self.byte_size} bytes; "
                f"{byte_size} from {offset} on are not in it"
            )


class Regions:
    """The registered regions of all callers.

    `prefixes`: beginnings of the keys that may be, with commas between; empty: none may. A region belongs to the token
    that registered it, and so does its object while it is registered: another token can neither name the one nor open
    the other.
    """

    def __init__(self, prefixes: str, max_bytes: int) -> None:
        self._prefixes = tuple(filter(None, prefixes.split(",")))
        self._max_bytes = max_bytes
        self._regions: dict[tuple[str, str], Region] = {}

    @property
    def allowed(self) -> bool:
        return bool(self._prefixes)

    def of(self, owner: str) -> OwnRegions:
        return OwnRegions(self, owner)

    def release(self, *, all_but: Collection[str] = ()) -> None:
        """Forget the regions of every owner that is not one of these."""
        for owner, name in list(self._regions):
            if owner not in all_but:
                self.unregister(owner, name)

    def get(self, owner: str, name: str) -> Region:
        self._check_allowed()
        if (owner, name) not in self._regions:
            raise InvalidRequest(f"no shared memory region {shown(name)} is registered")
        return self._regions[owner, name]

    def all(self, owner: str) -> list[Region]:
        return [region for (its_owner, _), region in self._regions.items() if its_owner == owner]

    def register(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> None:
        self._check_allowed()
        if not 1 <= len(name) <= MAX_NAME_CHARACTERS:
            raise InvalidRequest(f"a region's name has 1 to {MAX_NAME_CHARACTERS} characters, got {len(name)}")
        if (owner, name) in self._regions:
            raise AlreadyExists(f"a shared memory region {shown(name)} is registered already")
        if not 1 <= byte_size <= MAX_REGION_BYTES:
            raise InvalidRequest(f"a region has 1 to {MAX_REGION_BYTES} bytes, got {byte_size}")
        held = sum(region.byte_size for region in self._regions.values())
        if len(self._regions) >= MAX_REGIONS or held + byte_size > self._max_bytes:
            raise Overloaded(
                f"at most {MAX_REGIONS} regions of {self._max_bytes} bytes together; "
                f"there are {len(self._regions)} of {held}, and {byte_size} are asked for"
            )
        self._regions[owner, name] = self._open(owner, name, key, offset, byte_size)

    def unregister(self, owner: str, name: str) -> None:
        region = self._regions.pop((owner, name), None)
        if region is not None:
            os.close(region.descriptor)

    def _check_allowed(self) -> None:
        if not self.allowed:
            raise InvalidRequest("shared memory is off on this server; --shared-memory-prefix switches it on")

    def _open(self, owner: str, name: str, key: str, offset: int, byte_size: int) -> Region:
        found = KEY.fullmatch(key)
        if found is None or not found[1].startswith(self._prefixes):
            raise InvalidRequest(
                f"a key is {' or '.join(map(repr, self._prefixes))} and then letters, digits, '-' and '_', "
                f"at most 200 in all; got {shown(key)}"
            )
        descriptor = _open_object(found[1])
        try:
            self._check_object(owner, key, descriptor, offset, byte_size)
        except CalserveError:
            os.close(descriptor)
            raise
        return Region(name, key, offset, byte_size, descriptor)

    def _check_object(self, owner: str, key: str, descriptor: int, offset: int, byte_size: int) -> None:
        object_ = os.fstat(descriptor)
        for (its_owner, _), region in self._regions.items():
            if its_owner != owner and os.path.samestat(os.fstat(region.descriptor), object_):
                raise Refused(f"shared memory object {shown(key)} is in use by another token's caller")
        if offset + byte_size > object_.st_size:
            raise InvalidRequest(
                f"shared memory object {shown(key)} has {object_.st_size} bytes; "
                f"{byte_size} from {offset} on are not in it"
            )


@dataclass(frozen=True)
class OwnRegions:
    """The regions of one owner: of a token, or of all callers on a server without tokens."""

    regions: Regions
    owner: str

    def get(self, name: str) -> Region:
        """InvalidRequest if no region of this owner has this name."""
        return self.regions.get(self.owner, name)

    def all(self) -> list[Region]:
        return self.regions.all(self.owner)

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Open an object and remember a part of it under a name.

        Raises
        ------
        InvalidRequest, AlreadyExists, NotFound, Refused, Overloaded
            shared memory is off, or a name, key, offset or size cannot be; a name is in use; there is no such object;
            it cannot be opened, or is another owner's; more regions or bytes than may be
        """
        self.regions.register(self.owner, name, key, offset, byte_size)

    def unregister(self, name: str = "") -> None:
        """Forget a region, or all. One that is not there is none that must go."""
        for region in self.all():
            if name in ("", region.name):
                self.regions.unregister(self.owner, region.name)


@dataclass(frozen=True)
class SharedMemory:
    """The part of inference.GRPCInferenceService about shared memory."""

    regions: Regions

    async def system_shared_memory_status(self, request: Any, call: Call) -> Any:
        found = [region for region in self.regions.of(call.owner).all() if request.name in ("", region.name)]
        if request.name and not found:
            raise NotFound(f"no shared memory region {shown(request.name)} is registered")
        response = inference.SystemSharedMemoryStatusResponse()
        for region in found:
            status = response.regions[region.name]
            status.name, status.key = region.name, region.key
            status.offset, status.byte_size = region.offset, region.byte_size
        return response

    async def system_shared_memory_register(self, request: Any, call: Call) -> Any:
        self.regions.of(call.owner).register(request.name, request.key, request.offset, request.byte_size)
        return inference.SystemSharedMemoryRegisterResponse()

    async def system_shared_memory_unregister(self, request: Any, call: Call) -> Any:
        self.regions.of(call.owner).unregister(request.name)
        return inference.SystemSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_status(self, request: Any, call: Call) -> Any:
        if request.name:
            raise NotFound(f"no CUDA shared memory region {shown(request.name)} is registered: there are none here")
        return inference.CudaSharedMemoryStatusResponse()

    async def cuda_shared_memory_register(self, request: Any, call: Call) -> Any:
        raise InvalidRequest("CUDA shared memory is not supported by this server")

    async def cuda_shared_memory_unregister(self, request: Any, call: Call) -> Any:
        return inference.CudaSharedMemoryUnregisterResponse()


def _open_object(key: str) -> int:
    """A descriptor of the object, which is a plain file and no link to one elsewhere."""
    try:
        descriptor = os.open(OBJECTS / key, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no shared memory object {shown(key)}") from None
    except OSError as error:
        raise Refused(f"shared memory object {shown(key)} cannot be opened: {os.strerror(error.errno or 0)}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Refused(f"shared memory object {shown(key)} is not a plain object")
    return descriptor


def _size_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_size
