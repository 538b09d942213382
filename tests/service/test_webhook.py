"""The webhook: an alarm is posted at least once, to no address that is not allowed, and holds nobody up."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.drift import webhook
from service.drift.states import Alarm, Cause
from service.drift.webhook import Allowed, Target, Webhook, body_of
from service.errors import Refused
from service.settings import Settings
from tests.service.conftest import RunningServer, settings_for
from tests.service.test_feedback import metrics
from tests.service.test_tls import AUTHORITY, STRANGER, make

CAUSE = Cause("temperature", "class 3", ("the scores are too sharp",), "Fit again on the rows since then.")
ALARM = Alarm(
    id="alarm-1", model="mlp", monitor="default", watched="served", time_ms=1_790_000_000_000,
    noticed_ms=1_790_000_001_000, since_ms=1_789_999_000_000, since_rows=153, statistic=6.1, threshold=6.0,
    revision="temperature-1", cause=CAUSE, policy="tell", outcome="", acknowledged_by="", acknowledged_ms=0,
)  # fmt: skip


class Receiver:
    """An HTTPS server on this machine that answers with `statuses` in turn, the last for ever."""

    def __init__(self, folder: Path, statuses: list[int], *, tls: bool = True, signer: Any = AUTHORITY) -> None:
        receiver, self.posts = self, list[tuple[dict[str, str], bytes]]()
        self.statuses = statuses

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append((dict(self.headers), body))
                statuses = receiver.statuses
                self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
                self.send_header("Location", receiver.url.replace("/hook", "/elsewhere"))
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *_: None  # a caller that refuses the certificate goes away
        if tls:
            pair, folder = make("localhost", signer), folder / "tls"
            folder.mkdir(exist_ok=True)
            (folder / "tls.crt").write_bytes(pair.pem)
            (folder / "tls.key").write_bytes(pair.key_pem)
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://localhost:{self._server.server_address[1]}/hook?key=1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def receive(tmp_path: Path) -> Iterator[Callable[..., Receiver]]:
    running: list[Receiver] = []

    def start(*statuses: int, **options: Any) -> Receiver:
        running.append(Receiver(tmp_path, list(statuses or (200,)), **options))
        return running[-1]

    yield start
    for receiver in running:
        receiver.stop()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(webhook, "LONGEST_PAUSE_SECONDS", 0.001)


@asynccontextmanager
async def posting(folder: Path, url: str, hosts: str = "localhost", **options: Any) -> AsyncIterator[Webhook]:
    authority = folder / "ca.crt"
    authority.write_bytes(AUTHORITY.pem)
    hook = Webhook(Target.parse(url, hosts, authority), folder / "webhook.json", **options)
    hook.start()
    try:
        yield hook
    finally:
        await hook.close()


def sent(folder: Path, url: str, *alarms: Alarm, **options: Any) -> Webhook:
    """A webhook that was given these alarms and let finish."""

    async def send() -> Webhook:
        async with posting(folder, url, **options) as hook:
            for alarm in alarms:
                hook.send(alarm)
            async with asyncio.timeout(20):
                hook._idle.clear()
                await hook._idle.wait()
        return hook

    return asyncio.run(send())


def test_an_alarm_is_posted_with_its_id_and_signed(tmp_path: Path, receive: Callable[..., Receiver]) -> None:
    receiver, secret = receive(204), tmp_path / "secret"
    secret.write_text("correct horse\n")
    hook = sent(tmp_path, receiver.url, ALARM, secret_file=secret)
    ((headers, body),) = receiver.posts
    said = json.loads(body)
    assert said["alarm"]["cause"]["kind"] == "temperature"
    assert said["alarm"]["since_rows"] == 153
    assert said["text"].startswith("mlp: monitor default rang for its served probabilities, wrong since 2026-")
    assert said["text"].endswith("cause: temperature in class 3. Fit again on the rows since then.")
    assert headers["Idempotency-Key"] == "alarm-1"
    assert headers["Content-Type"] == "application/json"
    time, mac = (part.partition("=")[2] for part in headers["Calserve-Signature"].split(","))
    assert mac == hmac.new(b"correct horse", f"{time}.".encode() + body, hashlib.sha256).hexdigest()
    assert hook.counts == {"delivered": 1}


def test_what_fails_for_now_is_tried_again_with_the_same_id_in_order(
    tmp_path: Path, receive: Callable[..., Receiver]
) -> None:
    receiver = receive(500, 429, 503, 200)
    hook = sent(tmp_path, receiver.url, ALARM, replace(ALARM, id="alarm-2", cause=None))
    assert [headers["Idempotency-Key"] for headers, _ in receiver.posts] == ["alarm-1"] * 4 + ["alarm-2"]
    assert hook.counts == {"delivered": 2, "retried": 3}


@pytest.mark.parametrize("status", [301, 302, 307, 308, 400, 404])
def test_no_redirect_is_followed_and_what_fails_for_ever_is_given_up(
    tmp_path: Path, receive: Callable[..., Receiver], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = receive(status)
    hook = sent(tmp_path, receiver.url, ALARM)
    assert len(receiver.posts) == 1
    assert hook.counts == {"failed": 1}
    assert f"alarm alarm-1 was not delivered to localhost: status {status}" in caplog.text
    assert "key=1" not in caplog.text  # the address may hold a secret


def test_tries_are_bounded_and_the_next_start_sends_what_was_given_up(
    tmp_path: Path, receive: Callable[..., Receiver]
) -> None:
    receiver = receive(500)
    assert sent(tmp_path, receiver.url, ALARM).counts == {"failed": 1, "retried": webhook.MOST_TRIES - 1}
    assert len(receiver.posts) == webhook.MOST_TRIES
    receiver.statuses[:] = [200]
    assert sent(tmp_path, receiver.url, ALARM).counts == {"delivered": 1}
    again = sent(tmp_path, receiver.url, ALARM, replace(ALARM, id="alarm-2"))
    assert again.counts == {"delivered": 1}  # alarm-1 was
    assert receiver.posts[-1][0]["Idempotency-Key"] == "alarm-2"
    (tmp_path / "webhook.json").write_text("{damaged")
    assert sent(tmp_path, receiver.url, ALARM).counts == {"delivered": 1}


def test_a_time_is_the_other_bound(
    tmp_path: Path, receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook, "TRIES_SECONDS", 0.0)
    receiver = receive(500)
    assert sent(tmp_path, receiver.url, ALARM).counts == {"failed": 1}
    assert len(receiver.posts) == 1


def test_a_certificate_of_another_authority_is_not_believed(tmp_path: Path, receive: Callable[..., Receiver]) -> None:
    receiver = receive(200, signer=STRANGER)
    assert sent(tmp_path, receiver.url, ALARM).counts["failed"] == 1
    assert receiver.posts == []


def test_nor_one_of_another_name(tmp_path: Path, receive: Callable[..., Receiver]) -> None:
    receiver = receive(200)
    url = receiver.url.replace("localhost", "127.0.0.2")
    assert sent(tmp_path, url, ALARM, hosts="127.0.0.0/8").counts["failed"] == 1
    assert receiver.posts == []


def test_this_machine_alone_is_posted_to_in_plain_text(tmp_path: Path, receive: Callable[..., Receiver]) -> None:
    receiver = receive(200, tls=False)
    assert sent(tmp_path, receiver.url, ALARM).counts == {"delivered": 1}


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n", b"SSH-2.0\r\n", b"x" * 10000, None]
)
def test_an_endpoint_that_is_no_http_server_or_silent_is_left_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None
) -> None:
    monkeypatch.setattr(webhook, "TRY_SECONDS", 0.2)
    monkeypatch.setattr(webhook, "MOST_TRIES", 2)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if answer is None:
            with contextlib.suppress(ConnectionError):
                await reader.read()  # until the caller has gone
        else:
            writer.write(answer)
        writer.close()

    async def run() -> Webhook:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, posting(tmp_path, f"http://localhost:{port}/") as hook:
            hook.send(ALARM)
            hook._idle.clear()
            async with asyncio.timeout(20):
                await hook._idle.wait()
        return hook

    taken = answer is not None and b"200 OK" in answer
    assert asyncio.run(run()).counts == ({"delivered": 1} if taken else {"failed": 1, "retried": 1})


def test_alarms_are_sent_from_any_thread_and_never_wait(
    tmp_path: Path, receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(webhook, "MOST_WAITING", 3)
    receiver = receive(200)

    async def run() -> Webhook:
        async with posting(tmp_path, receiver.url) as hook:
            thread = threading.Thread(target=lambda: [hook.send(replace(ALARM, id=f"a-{i}")) for i in range(5)])
            thread.start()
            thread.join()  # the loop, which posts, is held up meanwhile
            hook.send(replace(ALARM, id="a-0"))
        return hook

    assert asyncio.run(run()).counts == {"delivered": 3, "dropped": 2}
    assert "alarm a-4 is not sent" in caplog.text


REFUSED = {
    "http://hooks.example.com/": "must begin with https://",
    "ftp://localhost/": "must begin with https://",
    "https://other.example.com/": "'other.example.com' is not in webhook_hosts",
    "https://10.0.0.1/": "'10.0.0.1' is not in webhook_hosts",
    "https://user:secret@hooks.example.com/": "neither user nor fragment",
    "https://hooks.example.com/a b": "without spaces",
    "https://hooks.example.com/a\r\nHost: b": "must be https://host/path|is no URL|not in webhook_hosts",
    "https://hooks.example.com:port/": "is no URL",
    "hooks.example.com": "must be https://host/path",
}


@pytest.mark.parametrize("url", REFUSED)
def test_an_address_that_alarms_are_not_posted_to_is_refused_at_start(url: str) -> None:
    with pytest.raises(Refused, match=REFUSED[url]) as refused:
        Target.parse(url, "hooks.example.com")
    assert "secret@" not in refused.value.message


@pytest.mark.parametrize(
    ("address", "hosts", "allowed"),
    [
        ("93.184.216.34", "hooks.example.com", True),
        ("2606:4700::1111", "hooks.example.com", True),
        ("10.1.2.3", "hooks.example.com", False),
        ("10.1.2.3", "hooks.example.com,10.1.0.0/16", True),
        ("10.2.2.3", "hooks.example.com,10.1.0.0/16", False),
        ("127.0.0.1", "hooks.example.com", False),
        ("127.0.0.1", "localhost", True),
        ("169.254.169.254", "hooks.example.com", False),
        ("100.64.0.1", "hooks.example.com", False),
        ("224.0.1.1", "hooks.example.com", False),
        ("0.1.2.3", "hooks.example.com", False),
        ("::ffff:10.1.2.3", "hooks.example.com", False),
        ("::ffff:10.1.2.3", "10.1.2.3", True),
        ("::1", "hooks.example.com", False),
        ("fe80::1%eth0", "hooks.example.com", False),
        ("fd00::1", "hooks.example.com", False),
        ("2002:0a01:0203::1", "hooks.example.com", False),
        ("64:ff9b::a01:203", "hooks.example.com", False),
    ],
)
def test_private_addresses_are_connected_to_only_if_they_are_listed(address: str, hosts: str, allowed: bool) -> None:
    assert Allowed.parse(hosts).has_address(address) is allowed


def test_a_name_that_leads_to_a_private_address_is_not_followed(
    tmp_path: Path, receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = receive(200)
    found = socket.getaddrinfo("127.0.0.1", int(receiver.url.split(":")[2].partition("/")[0]), proto=6)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    url = receiver.url.replace("localhost", "hooks.example.com")
    assert sent(tmp_path, url, ALARM, hosts="hooks.example.com").counts["failed"] == 1
    assert receiver.posts == []
    assert "hooks.example.com is at 127.0.0.1, which is private and not in webhook_hosts" in caplog.text


def test_another_address_of_the_host_is_tried_where_the_first_does_not_answer(
    tmp_path: Path, receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver = receive(200)
    port = int(receiver.url.split(":")[2].partition("/")[0])
    found = [socket.getaddrinfo(address, port, proto=6)[0] for address in ("127.0.0.9", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert sent(tmp_path, receiver.url, ALARM).counts == {"delivered": 1}


def test_a_secret_that_is_gone_for_a_moment_is_read_again(
    tmp_path: Path, receive: Callable[..., Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, secret = receive(200), tmp_path / "secret"
    secret.write_text("old")

    def pause(*_: object) -> float:
        secret.write_text("new")
        return 0.0

    async def run() -> Webhook:
        async with posting(tmp_path, receiver.url, secret_file=secret) as hook:
            secret.unlink()
            monkeypatch.setattr(webhook.random, "uniform", pause)
            hook.send(ALARM)
        return hook

    assert asyncio.run(run()).counts == {"delivered": 1, "retried": 1}
    ((headers, body),) = receiver.posts
    time, mac = (part.partition("=")[2] for part in headers["Calserve-Signature"].split(","))
    assert mac == hmac.new(b"new", f"{time}.".encode() + body, hashlib.sha256).hexdigest()


def test_what_json_has_no_number_for_is_null() -> None:
    body = body_of(replace(ALARM, statistic=float("inf"), threshold=float("nan"), cause=None))
    said = json.loads(body)
    assert (said["alarm"]["statistic"], said["alarm"]["threshold"], said["alarm"]["cause"]) == (None, None, None)


@pytest.mark.parametrize("content", [None, b" \n"])
def test_a_secret_that_is_not_there_is_told_at_start(tmp_path: Path, content: bytes | None) -> None:
    secret = tmp_path / "secret"
    if content is not None:
        secret.write_bytes(content)
    with pytest.raises(Refused, match="webhook_secret_file"):
        Webhook(Target.parse("https://localhost/", "localhost"), tmp_path / "webhook.json", secret)


def test_settings_of_a_webhook_without_an_address_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="are for a webhook_url"):
        Settings(tmp_path, webhook_hosts="localhost")
    with pytest.raises(Refused, match="'a/b' is no name, address or network"):
        Allowed.parse("localhost, a/b")


def test_a_server_posts_from_its_start_to_its_end_and_counts(root: Path, receive: Callable[..., Receiver]) -> None:
    authority = root.with_name("ca.crt")
    authority.write_bytes(AUTHORITY.pem)
    receiver = receive(200)
    settings = {"webhook_url": receiver.url, "webhook_hosts": "localhost", "webhook_ca": authority}
    server = RunningServer(settings_for(root, **settings))
    try:
        hook = server.app._webhook
        assert hook is not None
        assert metrics(server)['calserve_webhook_alarms_total{result="delivered"}'] == 0
        hook.send(ALARM)
    finally:
        server.stop()
    assert [json.loads(body)["alarm"]["id"] for _, body in receiver.posts] == ["alarm-1"]
    assert hook.counts == {"delivered": 1}
