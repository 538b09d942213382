"""The server's certificate files: checked before they are used, read again when they have changed."""

from __future__ import annotations

import logging
import ssl
import threading
from dataclasses import dataclass
from pathlib import Path

from service.errors import Refused
from service.store.files import signature

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificates:
    """PEM bytes, and the same as a context. With `client_ca` a caller must show a certificate that it signed."""

    key: bytes
    chain: bytes
    client_ca: bytes | None
    context: ssl.SSLContext


class CertificateFiles:
    """The certificates as they are now. New files that do not fit together leave those of before."""

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._chain, self._key, self._client_ca = chain, key, client_ca
        self._lock = threading.Lock()
        self._seen = self._signatures()
        self.current = self._read()

    def changed(self) -> Certificates | None:
        """The new certificates if the files have changed since the last call. Called for each new connection."""
        with self._lock:
            now = self._signatures()
            if now == self._seen:
                return None
            try:
                read = self._read()
                if self._signatures() != now:
                    return None  # they are being replaced: the next connection looks again
                self._seen, self.current = now, read
            except Refused as error:
                self._seen = now
                log.error("%s; the certificate of before goes on being served", error.message)
                return None
            log.info("certificate read again")
            return self.current

    def _read(self) -> Certificates:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.num_tickets = 0  # a session that is resumed is not asked for its certificate again
            context.set_alpn_protocols(["h2"])
            context.load_cert_chain(self._chain, self._key, password=_no_password)
            if self._client_ca is not None:
                context.load_verify_locations(self._client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
            client_ca = None if self._client_ca is None else self._client_ca.read_bytes()
            return Certificates(self._key.read_bytes(), self._chain.read_bytes(), client_ca, context)
        except ssl.SSLError as error:
            raise Refused(f"{self._shown()}: not a certificate and its key ({error.reason or 'not PEM'})") from None
        except OSError as error:
            raise Refused(f"{self._shown()}: cannot be read ({error.strerror})") from None

    def _signatures(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(signature, (self._chain, self._key, self._client_ca)))

    def _shown(self) -> str:
        return ", ".join(str(path) for path in (self._chain, self._key, self._client_ca) if path is not None)


def _no_password() -> str:
    """Of an encrypted key: none, so that it is refused and not asked for at the terminal."""
    return ""
