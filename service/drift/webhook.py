"""The webhook: alarms are posted to one address, in order, each at least once.

Off unless an address is set. What keeps a mistyped or forged address from doing harm: https alone, except on this
machine; hosts that are listed alone; no address of a private network that is not listed, whatever a name resolves to,
and the address that was checked is the one that is connected to; no redirect is followed; an answer is read no further
than its first lines; everything ends in time. An endpoint that is down holds up nothing but the webhook's own queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import random
import re
import socket
import ssl
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from service import __version__
from service.drift.states import Alarm
from service.errors import Refused
from service.store.files import write_whole

log = logging.getLogger(__name__)

MOST_WAITING = 256
MOST_TRIES, TRIES_SECONDS = 20, 3600.0
"""An alarm is given up after so many tries or so long; those that nobody acknowledged are sent at the next start."""
TRY_SECONDS = 10.0
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 300.0
CLOSE_SECONDS = 2.0
"""How long a drain waits for what is on its way."""
MOST_LINE_BYTES, MOST_LINES = 4096, 100
TRIED_AGAIN = {408, 425, 429}
"""Statuses that say "later", as all from 500 on do; any other but success says "never"."""
REMEMBERED = 1000
RESULTS = ("delivered", "failed", "dropped")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Allowed:
    """Hosts that may be posted to: names, at any public address; addresses and networks, which may be private."""

    names: frozenset[str]
    networks: tuple[Network, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """From a list with commas between. Refused for what is neither a name nor an address."""
        names, networks = set(), list[Network]()
        for entry in filter(None, (part.strip().lower() for part in text.split(","))):
            try:
                networks.append(ipaddress.ip_network(entry))
            except ValueError:
                if not re.fullmatch(r"[a-z0-9_.-]+[a-z]", entry):
                    raise Refused(f"webhook_hosts: {entry!r} is no name, address or network") from None
                names.add(entry)
        if "localhost" in names:
            networks += [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1")]
        return cls(frozenset(names), tuple(networks))

    def has_host(self, host: str) -> bool:
        address = _address(host)
        return host in self.names if address is None else self._lists(address)

    def has_address(self, text: str) -> bool:
        """Whether an address that a host is at may be connected to."""
        address = _address(text)
        return address is not None and (_is_public(address) or self._lists(address))

    def _lists(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


@dataclass(frozen=True)
class Target:
    """Where alarms are posted. `tls` is None for plain HTTP on this machine."""

    host: str
    port: int
    path: str
    allowed: Allowed
    tls: ssl.SSLContext | None

    @classmethod
    def parse(cls, url: str, hosts: str, authorities: Path | None = None) -> Self:
        """Refused, saying why, for an address that alarms are not posted to."""
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise Refused(f"webhook_url is no URL: {error}") from None
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        is_here = host == "localhost" or ((address := _address(host)) is not None and address.is_loopback)
        if not re.fullmatch(r"[!-~]+", path) or not re.fullmatch(r"[a-z0-9_.:-]+", host):
            raise Refused("webhook_url must be https://host/path in ASCII, without spaces")
        if parts.scheme != "https" and not (parts.scheme == "http" and is_here):
            raise Refused("webhook_url must begin with https://; http:// is for this machine alone")
        if parts.username is not None or parts.fragment:
            raise Refused("webhook_url must hold neither user nor fragment; requests are signed by webhook_secret_file")
        allowed = Allowed.parse(hosts)
        if not allowed.has_host(host):
            raise Refused(f"webhook_url: host {host!r} is not in webhook_hosts")
        tls = _context(authorities) if parts.scheme == "https" else None
        return cls(host, port or (443 if tls else 80), path, allowed, tls)


class Webhook:
    """Posts alarms. `send` is for any thread and never waits; the rest is for the event loop.

    Attributes
    ----------
    counts : alarms delivered, failed (given up) and dropped (too many waited), and tries that were made again
    """

    def __init__(self, target: Target, delivered_file: Path, secret_file: Path | None = None) -> None:
        self._target, self._file, self._secret_file = target, delivered_file, secret_file
        self.counts: Counter[str] = Counter()
        self._delivered = deque(_read(delivered_file), maxlen=REMEMBERED)
        self._waiting: deque[Alarm] = deque()
        self._came, self._idle = asyncio.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._secret()  # a file that cannot be read is told of at start

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Let what waits go out, for a moment."""
        if self._task is None:
            return
        if self._waiting:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), CLOSE_SECONDS)
        self._task.cancel()
        await asyncio.wait([self._task])
        if self._waiting:
            log.warning("the webhook did not deliver %d alarms yet", len(self._waiting))

    def send(self, alarm: Alarm) -> None:
        """Queue an alarm, unless it was delivered or waits already: at a start, send all that nobody acknowledged."""
        if alarm.id in self._delivered or any(alarm.id == other.id for other in list(self._waiting)):
            return
        if len(self._waiting) >= MOST_WAITING:
            self.counts["dropped"] += 1
            log.error("the webhook has %d alarms waiting; alarm %s is not sent", MOST_WAITING, alarm.id)
            return
        self._waiting.append(alarm)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._came.set)

    async def _run(self) -> None:
        while True:
            while self._waiting:
                try:
                    result = await self._deliver(self._waiting[0])
                except Exception:
                    log.exception("alarm %s could not be posted", self._waiting[0].id)
                    result = "failed"
                self.counts[result] += 1
                self._waiting.popleft()
            self._idle.set()
            self._came.clear()
            await self._came.wait()

    async def _deliver(self, alarm: Alarm) -> str:
        """Post one alarm until it is taken or given up; what became of it."""
        end, pause, why = time.monotonic() + TRIES_SECONDS, FIRST_PAUSE_SECONDS, ""
        body = body_of(alarm)
        for turn in range(MOST_TRIES):
            if turn:
                self.counts["retried"] += 1
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311  # so that many do not come at once
                pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
            try:
                async with asyncio.timeout(TRY_SECONDS):
                    status = await self._post(alarm.id, body)
            except (Refused, OSError, EOFError, ValueError) as error:  # TimeoutError and TLS errors are of OSError
                why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            else:
                if 200 <= status < 300:
                    await asyncio.to_thread(self._remember, alarm.id)
                    return "delivered"
                why = f"status {status}"
                if status not in TRIED_AGAIN and status < 500:
                    break
            if time.monotonic() >= end:
                break
        log.error("alarm %s was not delivered to %s: %s", alarm.id, self._target.host, why)
        return "failed"

    async def _post(self, alarm_id: str, body: bytes) -> int:
        """One try: the status that it was answered with."""
        reader, writer = await self._connect()
        try:
            writer.write(self._head(alarm_id, body) + body)
            await writer.drain()
            return await _status(reader)
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To the first of the host's addresses that answers; Refused if any of them may not be connected to."""
        target = self._target
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port, proto=socket.IPPROTO_TCP)
        addresses = [str(info[4][0]) for info in found]
        for address in addresses:
            if not target.allowed.has_address(address):
                raise Refused(f"{target.host} is at {address}, which is private and not in webhook_hosts")
        why = OSError("no address")
        for address in addresses:
            try:
                return await asyncio.open_connection(
                    address,
                    target.port,
                    limit=MOST_LINE_BYTES,
                    ssl=target.tls,
                    server_hostname=target.host if target.tls else None,
                )
            except OSError as error:
                why = error
        raise why

    def _head(self, alarm_id: str, body: bytes) -> bytes:
        target = self._target
        host = f"[{target.host}]" if ":" in target.host else target.host
        if target.port != (443 if target.tls else 80):
            host = f"{host}:{target.port}"
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"Host: {host}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Connection: close",
            f"User-Agent: calserve/{__version__}",
            f"Idempotency-Key: {re.sub('[^!-~]', '_', alarm_id)}",
        ]
        if secret := self._secret():
            lines.append(f"Calserve-Signature: {signature(secret, int(time.time()), body)}")
        return "\r\n".join([*lines, "", ""]).encode()

    def _secret(self) -> bytes:
        """Read for each try: it may be changed while the server runs. Refused if it is empty or cannot be read."""
        if self._secret_file is None:
            return b""
        try:
            secret = self._secret_file.read_bytes().strip()
        except OSError as error:
            raise Refused(f"webhook_secret_file cannot be read: {error.strerror}") from None
        if not secret:
            raise Refused("webhook_secret_file is empty")
        return secret

    def _remember(self, alarm_id: str) -> None:
        self._delivered.append(alarm_id)
        try:
            write_whole(self._file, json.dumps(list(self._delivered)).encode(), mode=0o600)
        except OSError as error:
            log.warning("alarm %s may be sent again after a restart: %s", alarm_id, error.strerror)


def signature(secret: bytes, time_s: int, body: bytes) -> str:
    """What a receiver compares: time, and the HMAC-SHA256 of time, a dot and the body."""
    return f"t={time_s},v1={hmac.new(secret, b'%d.' % time_s + body, hashlib.sha256).hexdigest()}"


def body_of(alarm: Alarm) -> bytes:
    """The JSON that is posted; `text` is what chat services show."""
    return json.dumps(
        {"event": "alarm", "text": _text(alarm), "alarm": _plain(asdict(alarm))}, allow_nan=False
    ).encode()


def _text(alarm: Alarm) -> str:
    since = datetime.fromtimestamp(alarm.since_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = f"{alarm.model}: monitor {alarm.monitor} rang for its {alarm.watched} probabilities, wrong since {since}"
    if alarm.cause is None:
        return text
    where = f" in {alarm.cause.where}" if alarm.cause.where else ""
    return f"{text}; cause: {alarm.cause.kind}{where}. {alarm.cause.action}"


def _plain(value: Any) -> Any:
    """The same without numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


async def _status(reader: asyncio.StreamReader) -> int:
    """The status of an HTTP answer, past those that announce another."""
    for _ in range(MOST_LINES):
        line = await reader.readline()
        if (said := re.match(rb"HTTP/1\.[01] ([1-5][0-9][0-9])\b", line)) and not said[1].startswith(b"1"):
            return int(said[1])
        if not line or not (said or line.strip() == b"" or b":" in line):
            break
    raise EOFError("no HTTP answer came")


def _address(text: str) -> Address | None:
    """The address that a text is, of IPv4 where it is that in disguise."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return (address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None) or address


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and (address.sixtofour or address.teredo):
        return False  # what they lead to is of IPv4, and may be private; so with NAT64, in ::/8, which is reserved
    return address.is_global and not (address.is_multicast or address.is_reserved)


def _context(authorities: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise Refused(f"webhook_ca cannot be read: {error}") from None


def _read(file: Path) -> list[str]:
    """Ids of alarms that were delivered; those of a file that cannot be read are sent again."""
    try:
        ids = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return []
    return [str(one) for one in ids] if isinstance(ids, list) else []
