"""What one connection may take, whichever front it is made to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConnectionLimits:
    """What one connection may take. At its age it is asked to go, and cut when the grace is over.

    Attributes
    ----------
    half_sent_bytes : of messages that are not yet whole, or of a stream and not yet read, on all connections together;
        a half of it on one
    stall_seconds : a message that is sent slower than `slowest_bytes_per_second` has this long besides, and an answer
        that is taken slower likewise
    shared_port : whether other processes listen on the same port
    """

    message_bytes: int = 64 << 20
    metadata_bytes: int = 8 << 10
    streams: int = 1024
    handshake_seconds: float = 5.0
    idle_seconds: float = 300.0
    age_seconds: float = 3600.0
    age_grace_seconds: float = 60.0
    keepalive_seconds: float = 60.0
    keepalive_timeout_seconds: float = 20.0
    ping_interval_seconds: float = 10.0
    ping_strikes: int = 2
    half_sent_bytes: int = 512 << 20
    stall_seconds: float = 20.0
    slowest_bytes_per_second: int = 100 << 10
    shared_port: bool = False  # two servers that do not know of each other would share a port in silence

    def seconds_for(self, size: int) -> float:
        """How long so many bytes may take on their way."""
        return self.stall_seconds + size / self.slowest_bytes_per_second
