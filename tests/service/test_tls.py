"""TLS and mutual TLS, with certificates made here, and new ones taken over while calls run."""

from __future__ import annotations

import datetime
import ipaddress
import logging
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service import errors
from service.client import Client
from service.errors import Refused
from tests.service import models
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_access import INFER, infer

DAY = datetime.timedelta(days=1)
PEM = serialization.Encoding.PEM


@dataclass(frozen=True)
class Pair:
    """A key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(PEM)


def make(name: str, issuer: Pair | None = None) -> Pair:
    """A certificate for this machine's addresses; an authority of its own if there is no issuer."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    if issuer is not None:
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        builder = builder.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
    return Pair(key, builder.sign(issuer.key if issuer else key, hashes.SHA256()))


AUTHORITY, STRANGER = make("authority"), make("stranger")
CALLER = make("caller", AUTHORITY)


class TlsServer(RunningServer):
    """A server whose certificate lies in `folder`."""

    def __init__(self, folder: Path, *, mutual: bool = False) -> None:
        models.write(folder / "models", "mlp", models.classifier())
        self.certificate, self.key = folder / "tls.crt", folder / "tls.key"
        self.replace(make("server", AUTHORITY))
        (folder / "ca.crt").write_bytes(AUTHORITY.pem)
        files = {"tls_cert": self.certificate, "tls_key": self.key}
        super().__init__(settings_for(folder / "models", **files, tls_client_ca=folder / "ca.crt" if mutual else None))

    def replace(self, pair: Pair) -> None:
        """Put other files in place, one after the other, as those who renew certificates do."""
        for path, content in ((self.certificate, pair.pem), (self.key, pair.key_pem)):
            temporary = path.with_suffix(".new")
            temporary.write_bytes(content)
            temporary.replace(path)

    def channel(self, trusted: bytes = AUTHORITY.pem, caller: Pair | None = None) -> grpc.Channel:
        shown = (caller.key_pem, caller.pem) if caller else (None, None)
        options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own, and a handshake
        return grpc.secure_channel(self.address, grpc.ssl_channel_credentials(trusted, *shown), options)

    def serial(self) -> int:
        """Of the certificate that a new connection is shown."""
        pem = ssl.get_server_certificate(("127.0.0.1", self.app.port))
        return x509.load_pem_x509_certificate(pem.encode()).serial_number


def code(channel: grpc.Channel) -> grpc.StatusCode:
    with channel:
        try:
            channel.unary_unary(INFER)(infer(), timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    server = TlsServer(tmp_path_factory.mktemp("tls"))
    yield server
    server.stop()


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TlsServer]:
    server = TlsServer(tmp_path_factory.mktemp("mutual"), mutual=True)
    yield server
    server.stop()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[TlsServer]:
    server = TlsServer(tmp_path)
    yield server
    server.stop()


def test_a_caller_that_trusts_the_authority_is_served_over_tls(server: TlsServer) -> None:
    assert code(server.channel()) == grpc.StatusCode.OK


def test_a_caller_in_plain_text_is_refused(server: TlsServer) -> None:
    assert code(grpc.insecure_channel(server.address)) == grpc.StatusCode.UNAVAILABLE


def test_a_caller_that_trusts_another_authority_goes_away(server: TlsServer) -> None:
    assert code(server.channel(trusted=STRANGER.pem)) == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("version", "accepted"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated:DeprecationWarning")
def test_tls_before_1_2_is_refused(server: TlsServer, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.set_ciphers("ALL:@SECLEVEL=0")  # so that it is the server that refuses
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with socket.create_connection(("127.0.0.1", server.app.port), timeout=10) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as connection:
                shaken = connection.selected_alpn_protocol() == "h2"
        except (ssl.SSLError, ConnectionResetError):
            shaken = False
    assert shaken == accepted


@pytest.mark.parametrize(
    ("caller", "wanted"),
    [
        (CALLER, grpc.StatusCode.OK),
        (None, grpc.StatusCode.UNAVAILABLE),
        (make("caller", STRANGER), grpc.StatusCode.UNAVAILABLE),
    ],
    ids=["of the authority", "none", "of a stranger"],
)
def test_with_an_authority_for_callers_only_its_certificates_are_served(
    mutual: TlsServer, caller: Pair | None, wanted: grpc.StatusCode
) -> None:
    assert code(mutual.channel(caller=caller)) == wanted


def test_the_client_speaks_tls_and_shows_its_certificate(mutual: TlsServer, tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_bytes(AUTHORITY.pem)
    own = {"certificate": CALLER.pem, "private_key": CALLER.key_pem}
    with Client(mutual.address, root_certificates=tmp_path / "ca.crt", **own) as client:
        assert [model.model for model in client.models()] == ["mlp"]
    with pytest.raises(errors.InvalidRequest, match="certificate and private_key go together"):
        Client(mutual.address, root_certificates=AUTHORITY.pem, certificate=CALLER.pem)
    with pytest.raises(errors.InvalidRequest, match=r"missing\.crt cannot be read"):
        Client(mutual.address, root_certificates=tmp_path / "missing.crt")


def test_a_new_certificate_is_shown_at_once_and_no_call_fails_meanwhile(own: TlsServer) -> None:
    codes: list[grpc.StatusCode] = []
    over = threading.Event()

    def connect_and_call() -> None:
        while not over.is_set():
            codes.append(code(own.channel()))

    def call_on_one_connection() -> None:
        with own.channel() as channel:
            while not over.is_set():
                call = channel.unary_unary(INFER).future(infer(), timeout=10)
                codes.append(call.code())

    threads = [threading.Thread(target=target) for target in (connect_and_call, call_on_one_connection)]
    for thread in threads:
        thread.start()
    renewed = [make("server", AUTHORITY) for _ in range(5)]
    try:
        for pair in renewed:
            before = len(codes)
            own.replace(pair)
            end = time.monotonic() + 5
            while own.serial() != pair.certificate.serial_number:
                assert time.monotonic() < end
            while len(codes) < before + 10:
                assert time.monotonic() < end
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(codes) == {grpc.StatusCode.OK}


@pytest.mark.parametrize("spoilt", ["another key", "not PEM", "gone"])
def test_files_that_do_not_fit_leave_the_certificate_of_before_and_are_logged(
    own: TlsServer, spoilt: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = own.serial()
    if spoilt == "another key":
        own.key.write_bytes(make("other", AUTHORITY).key_pem)
    elif spoilt == "not PEM":
        own.certificate.write_bytes(b"nothing")
    else:
        own.certificate.unlink()
    with caplog.at_level(logging.ERROR):
        assert own.serial() == before
        assert code(own.channel()) == grpc.StatusCode.OK
    assert len([r for r in caplog.records if "of before goes on being served" in r.getMessage()]) == 1
    assert "PRIVATE KEY" not in caplog.text
    renewed = make("server", AUTHORITY)
    own.replace(renewed)
    assert own.serial() == renewed.certificate.serial_number


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (make("other", AUTHORITY).key_pem, "not a certificate and its key"),
        (b"nothing", "not a certificate and its key"),
        (
            CALLER.key.private_bytes(
                PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"secret")
            ),
            "not a certificate and its key",
        ),
        (None, "cannot be read"),
    ],
    ids=["another key", "not PEM", "encrypted", "missing"],
)
def test_files_that_do_not_fit_are_refused_at_the_start(root: Path, key: bytes | None, text: str) -> None:
    files = {"tls_cert": root.parent / "tls.crt", "tls_key": root.parent / "tls.key"}
    files["tls_cert"].write_bytes(CALLER.pem)
    if key is not None:
        files["tls_key"].write_bytes(key)
    with pytest.raises(Refused, match=text):
        RunningServer(settings_for(root, **files))


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"tls_cert": Path("c")}, "tls_cert and tls_key go together"),
        ({"tls_key": Path("k")}, "tls_cert and tls_key go together"),
        ({"tls_client_ca": Path("a")}, "tls_client_ca needs tls_cert"),
    ],
)
def test_half_a_configuration_is_refused(root: Path, files: dict[str, Path], text: str) -> None:
    with pytest.raises(Refused, match=text):
        settings_for(root, **files)
