"""Receipts: what a caller who cannot lose the join keeps of a prediction and sends back with its label.

A receipt carries what the journal would hold, signed with a key of the data directory:

    key number  1 byte     signature  16 bytes     length of the head  4 bytes     head  JSON     the pack's bytes
"""

from __future__ import annotations

import hmac
import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import asdict
from typing import NamedTuple

from service.store.journal_tables import StreamRow
from service.store.keys import Key, Keys
from service.store.packs import Answered, Pack

SIGNATURE_BYTES = 16
_PURPOSE = b"receipt"
_SIGNED = 1 + SIGNATURE_BYTES


class Receipt(NamedTuple):
    """A request as it was answered, and the stream that it belongs to."""

    stream: StreamRow
    pack: Pack


def issue(key: Key, stream: StreamRow, number: int, request: Answered) -> bytes:
    """The receipt of one request, as text."""
    pack = Pack.of(number, [request])
    head = {**asdict(stream), "first": number, "time_ms": request.times_ms[0], "revisions": pack.revisions}
    text = json.dumps(head).encode()
    signed = len(text).to_bytes(4) + text + pack.encode()
    return urlsafe_b64encode(bytes([key.number]) + _signature(key, signed) + signed)


def accept(keys: Keys, text: str) -> Receipt | None:
    """What a receipt says; None for what is none of this server's."""
    try:
        data = urlsafe_b64decode(text)
    except ValueError:
        return None
    key = keys.get(data[0]) if len(data) > _SIGNED + 4 else None
    if key is None or not hmac.compare_digest(_signature(key, data[_SIGNED:]), data[1:_SIGNED]):
        return None
    start = _SIGNED + 4
    end = start + int.from_bytes(data[_SIGNED:start])
    head = json.loads(data[start:end])
    pack = Pack.decode(head.pop("first"), head.pop("time_ms"), head.pop("revisions"), data[end:])
    return Receipt(StreamRow(**head), pack)


def _signature(key: Key, data: bytes) -> bytes:
    hasher = key.hasher(_PURPOSE, SIGNATURE_BYTES)
    hasher.update(data)
    signature: bytes = hasher.digest()
    return signature
