"""The connection to a server: TLS or plain text, and the token that goes with every call."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from service.errors import InvalidRequest
from service.rpc.wire import Stub
from service.settings import is_local

MAX_MESSAGE_BYTES = 64 << 20
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)
Pem: TypeAlias = bytes | str | Path
"""The content itself, or the path of its file."""


@dataclass(frozen=True)
class Security:
    """How a client knows its server and is known by it.

    Attributes
    ----------
    token : bearer token, sent with every call; in plain text to this machine only
    root_certificates : authorities, one of which signed the server's certificate; given: TLS
    certificate, private_key : the client's own chain and key, for mutual TLS; given: TLS
    tls : TLS with the authorities that grpc brings along
    """

    token: str | None = field(default=None, repr=False)
    root_certificates: Pem | None = None
    certificate: Pem | None = None
    private_key: Pem | None = field(default=None, repr=False)
    tls: bool = False

    def channel(self, library: Any, address: str) -> Any:
        """A channel of `grpc` or `grpc.aio`. InvalidRequest if the token would be read on the way."""
        if self.tls or self.root_certificates is not None or self.certificate is not None:
            return library.secure_channel(address, self._credentials(), options=CHANNEL_OPTIONS)
        if self.token is not None and not _is_local(address):
            raise InvalidRequest("a token goes to other machines over TLS only: pass root_certificates, or tls=True")
        return library.insecure_channel(address, options=CHANNEL_OPTIONS)

    def stub(self, channel: Any, service: ServiceDescriptor) -> Stub:
        """A service's methods, each call with the token."""
        return Stub(channel, service, () if self.token is None else (("authorization", f"Bearer {self.token}"),))

    def _credentials(self) -> grpc.ChannelCredentials:
        if (self.certificate is None) != (self.private_key is None):
            raise InvalidRequest("certificate and private_key go together")
        return grpc.ssl_channel_credentials(
            *map(_content, (self.root_certificates, self.private_key, self.certificate))
        )


def _content(pem: Pem | None) -> bytes | None:
    if pem is None or isinstance(pem, bytes):
        return pem
    try:
        return Path(pem).read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{pem} cannot be read: {error.strerror}") from None


def _is_local(address: str) -> bool:
    """Of a gRPC target: host:port, [host]:port, dns:///host:port, unix:path."""
    host = address.rpartition(":")[0].rpartition("/")[2]
    return address.startswith("unix:") or is_local(host.strip("[]"))
