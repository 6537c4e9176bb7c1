"""TLS: handshakes that go wrong, certificates that change, and what cannot be used. With TLS, all of
`test_connections`, `test_bad_http` and `test_http2` hold as well."""

import datetime
import logging
import random
import socket
import ssl
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.server.serving import serve
from llmd.server.tls import Certificates as ServedCertificates
from llmd.server.tls import TlsFiles, load_context, validity_problem
from tests.server.certificates import (
    Certificates,
    make_certificates,
    shared_certificates,
    tls_config,
    write_server_certificate,
)
from tests.server.live import (
    CLOSE,
    SOON,
    LiveServer,
    http_request,
    listen_and_serve,
    live_server,
    parse_answer,
    read_all,
    read_until,
    until,
)
from tests.server.small_app import EVENT, SmallApp, assert_answers, num_tasks


@pytest.fixture
def certificates(tmp_path: Path) -> Certificates:
    return make_certificates(tmp_path)


def client_hello() -> bytes:
    """What a client says first."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = shared_certificates().client_context("h2").wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("first", [b"", b"\x16", client_hello()[:100], client_hello()], ids=len)
@trio_test
async def test_a_handshake_that_stalls_is_ended(first: bytes) -> None:
    async with live_server(SmallApp().app, HttpConfig(keep_alive_timeout=0.3), tls=True) as server:
        tasks = num_tasks()
        stalled = [await server.connect_socket() for _ in range(20)]
        for stream in stalled:
            await stream.send_all(first)
        await assert_answers(server)
        for stream in stalled:
            await read_all(stream)
        await until(lambda: num_tasks() == tasks)


@pytest.mark.parametrize(
    "request_bytes",
    [
        http_request("/quick"),
        http_request("/echo", {"a": 1}),
        http_request("/quick", method="OPTIONS"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
    ids=lambda request: request[:7].decode(),
)
@trio_test
async def test_http_without_tls_is_told_so(request_bytes: bytes) -> None:
    small = SmallApp()
    async with live_server(small.app, tls=True) as server:
        async with await server.connect_socket() as stream:
            await stream.send_all(request_bytes)
            answer = parse_answer(await read_all(stream))
        assert answer.status == 400
        assert "https://" in answer.json()["error"]["message"]
        assert answer.headers["x-request-id"].startswith("req_")
        await assert_answers(server)


@trio_test
async def test_garbage_instead_of_a_handshake(caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(3)
    hello = client_hello()
    async with live_server(SmallApp().app, tls=True) as server:
        tasks = num_tasks()
        for _ in range(150):
            data = bytearray(chance.choice([hello, hello, chance.randbytes(50), b"\x16\x03\x01\xff\xff"]))
            for _ in range(chance.randrange(6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            async with await server.connect_socket() as stream:
                await stream.send_all(data)
                with trio.move_on_after(0.01):
                    await stream.receive_some()
        await until(lambda: num_tasks() == tasks)
        await assert_answers(server)
    # strangers do not fill the log
    assert not caplog.records


@trio_test
async def test_a_request_together_with_the_end_of_the_handshake() -> None:
    """What came with the handshake was looked at only when more came, which it never did."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = shared_certificates().client_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    async with live_server(SmallApp().app, tls=True) as server, await server.connect_socket() as stream:
        is_done = False
        while not is_done:
            with suppress(ssl.SSLWantReadError):
                client.do_handshake()
                client.write(http_request("/quick", headers=CLOSE))
                is_done = True
            await stream.send_all(outgoing.read())
            if not is_done:
                incoming.write(await stream.receive_some())
        incoming.write(await read_all(stream))
        assert parse_answer(client.read(1 << 16)).status == 200


@trio_test
async def test_garbage_after_the_handshake() -> None:
    """Records that cannot be decrypted end the connection, and what it asked for."""
    small = SmallApp()
    async with live_server(small.app, tls=True) as server:
        stream = await server.connect()
        assert isinstance(stream, trio.SSLStream)
        await stream.send_all(http_request("/hang"))
        await until(small.is_working)
        await stream.transport_stream.send_all(b"\x17\x03\x03\x00\x20" + b"x" * 32)
        await until(lambda: small.cancelled == 1)
        await assert_answers(server)
        await stream.aclose()


@trio_test
async def test_an_old_version_is_refused() -> None:
    async with live_server(SmallApp().app, tls=True) as server:
        assert server.client_context is not None
        server.client_context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            server.client_context.minimum_version = ssl.TLSVersion.TLSv1_1
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            server.client_context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(trio.BrokenResourceError):
            await server.connect()
        server.client_context.maximum_version = ssl.TLSVersion.TLSv1_2
        await assert_answers(server)


@pytest.mark.parametrize("path", ["/quick", "/stream?count=3"])
@trio_test
async def test_the_end_of_an_answer_is_not_cut_short(path: str) -> None:
    """Without TLS's own goodbye the client cannot tell the end from an attack."""
    async with live_server(SmallApp().app, tls=True) as server:
        stream = await server.connect_socket()
        encrypted = trio.SSLStream(stream, shared_certificates().client_context(), server_hostname="localhost")
        await encrypted.send_all(http_request(path, headers=CLOSE))
        answer = b""
        # an end without a goodbye raises
        while data := await encrypted.receive_some():
            answer += data
        await encrypted.aclose()
        assert answer.startswith(b"HTTP/1.1 200")
        assert answer.endswith(b'{"ok":true}' if path == "/quick" else EVENT + b"\r\n0\r\n\r\n")


@trio_test
async def test_a_client_that_says_goodbye_but_keeps_its_socket_is_not_worked_for() -> None:
    small = SmallApp()
    async with live_server(small.app, tls=True) as server:
        stream = await server.connect_socket()
        encrypted = trio.SSLStream(stream, shared_certificates().client_context(), server_hostname="localhost")
        await encrypted.send_all(http_request("/hang"))
        await until(small.is_working)
        # it does not wait for an answer, and trio makes an error of one
        with trio.move_on_after(0.1), suppress(trio.BrokenResourceError):
            await encrypted.unwrap()
        await until(lambda: small.cancelled == 1)
        await stream.aclose()


@trio_test
async def test_the_scheme_is_https() -> None:
    small = SmallApp()
    schemes = []

    async def note_scheme(scope: dict[str, str], receive: object, send: object) -> None:
        schemes.append(scope["scheme"])
        await small.app(scope, receive, send)  # type: ignore[arg-type]

    for tls in (False, True):
        async with live_server(note_scheme, tls=tls) as server:
            await assert_answers(server)
    assert schemes == ["http", "https"]


@trio_test
async def test_clients_need_a_certificate_if_an_authority_is_named(certificates: Certificates) -> None:
    config = HttpConfig(
        ssl_certfile=str(certificates.certfile),
        ssl_keyfile=str(certificates.keyfile),
        ssl_ca_certs=str(certificates.ca_certs),
    )
    small = SmallApp()
    stranger, known, none = (certificates.client_context() for _ in range(3))
    certificates.authority.issue_cert("client@example.com").configure_cert(known)
    shared_certificates().authority.issue_cert("client@example.com").configure_cert(stranger)
    async with listen_and_serve(small.app, config) as server:
        for context in (stranger, none):
            with pytest.raises(trio.BrokenResourceError):
                await ask_once(LiveServer(server.port, server.stop, server.stopped, context))
        assert small.begun == 0
        await assert_answers(LiveServer(server.port, server.stop, server.stopped, known))


async def ask_once(server: LiveServer) -> bytes | bytearray:
    async with await server.connect() as stream:
        await stream.send_all(http_request("/wait"))
        with trio.fail_after(SOON):
            return await stream.receive_some()


async def shown_certificate(server: LiveServer) -> bytes:
    """The certificate that a new connection is shown."""
    async with await server.connect() as stream:
        assert isinstance(stream, trio.SSLStream)
        shown = stream.getpeercert(binary_form=True)
        assert isinstance(shown, bytes)
        return shown


@trio_test
async def test_files_are_read_again_when_they_change(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    small = SmallApp()
    async with listen_and_serve(small.app, tls_config(certificates), certificates.client_context()) as server:
        first = await shown_certificate(server)
        old = await server.connect()
        await old.send_all(http_request("/quick"))
        await read_until(old, b'{"ok":true}')
        write_server_certificate(certificates)
        second = await shown_certificate(server)
        assert second != first
        # who is connected stays so
        await old.send_all(http_request("/quick"))
        await read_until(old, b'{"ok":true}')
        await old.aclose()
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        caplog.clear()
        # half written, and gone: what was read last stays, and the log says so once for each
        key = certificates.keyfile.read_bytes()
        certificates.keyfile.write_bytes(key[:60])
        for _ in range(3):
            assert await shown_certificate(server) == second
        certificates.keyfile.unlink()
        for _ in range(3):
            assert await shown_certificate(server) == second
        assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
        assert "stays in use" in caplog.text
        certificates.keyfile.write_bytes(key)
        assert await shown_certificate(server) == second
        assert "read again" in caplog.text
        assert "BEGIN" not in caplog.text


@trio_test
async def test_a_server_that_starts_with_broken_files_waits_for_good_ones(
    certificates: Certificates, caplog: pytest.LogCaptureFixture
) -> None:
    certificate = certificates.certfile.read_bytes()
    certificates.certfile.write_text("nothing")
    async with listen_and_serve(SmallApp().app, tls_config(certificates), certificates.client_context()) as server:
        assert "nobody can connect" in caplog.text
        for _ in range(3):
            with pytest.raises(trio.BrokenResourceError):
                await server.connect()
        assert len(caplog.records) == 1
        certificates.certfile.write_bytes(certificate)
        await assert_answers(server)


def test_what_cannot_be_used_is_named(certificates: Certificates, tmp_path: Path) -> None:
    cert, key, ca = str(certificates.certfile), str(certificates.keyfile), str(certificates.ca_certs)
    load_context(TlsFiles(cert, key, ca))
    missing, junk, other, encrypted, torn = (str(tmp_path / name) for name in ("missing", "junk", "o", "e", "torn"))
    Path(junk).write_bytes(b"\0\xff no PEM")
    Path(torn).write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    certificates.authority.issue_cert("localhost").private_key_pem.write_to_path(other)
    Path(encrypted).write_text("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n")
    for files, words in (
        (TlsFiles(missing, key), ["--ssl-certfile", missing, "No such file"]),
        (TlsFiles(cert, missing), ["--ssl-keyfile", missing, "No such file"]),
        (TlsFiles(cert, key, missing), ["--ssl-ca-certs", missing, "No such file"]),
        (TlsFiles(str(tmp_path), key), ["--ssl-certfile", "directory"]),
        (TlsFiles(junk, key), ["--ssl-certfile", junk, "no certificate"]),
        (TlsFiles(torn, key), ["--ssl-certfile", torn]),
        (TlsFiles(cert, junk), ["--ssl-keyfile", junk, "no private key"]),
        (TlsFiles(cert), ["--ssl-certfile", cert, "no private key"]),
        (TlsFiles(cert, key, junk), ["--ssl-ca-certs", junk, "no certificate"]),
        (TlsFiles(cert, key, torn), ["--ssl-ca-certs", torn]),
        (TlsFiles(cert, other), ["--ssl-keyfile", other, "not the key of"]),
        (TlsFiles(cert, encrypted), ["--ssl-keyfile", encrypted, "encrypted"]),
    ):
        with pytest.raises(ValueError, match="--ssl") as refused:
            load_context(files)
        assert [word for word in words if word not in str(refused.value)] == []


def test_the_key_may_lie_in_the_certfile(certificates: Certificates) -> None:
    both = certificates.folder / "both.pem"
    both.write_bytes(certificates.keyfile.read_bytes() + certificates.certfile.read_bytes())
    load_context(TlsFiles(str(both)))


@pytest.mark.parametrize(
    ("begin", "end", "problem"), [(-9, -1, "has expired"), (1, 9, "is not yet valid"), (-9, 9, None)]
)
def test_a_certificate_out_of_its_time_is_noticed(
    certificates: Certificates, begin: int, end: int, problem: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    now = datetime.datetime.now(datetime.UTC)
    issued = certificates.authority.issue_cert(
        "localhost",
        not_before=now + datetime.timedelta(days=begin),
        not_after=now + datetime.timedelta(days=end),
    )
    file = certificates.folder / "dated.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(file)
    assert validity_problem(TlsFiles(str(file))) == problem
    # it is used all the same: its clients decide
    assert ServedCertificates(TlsFiles(str(file))).context() is not None
    assert [record.getMessage().endswith(f"this certificate {problem}") for record in caplog.records] == (
        [] if problem is None else [True]
    )


@trio_test
async def test_a_crowd_in_and_after_the_handshake() -> None:
    """The next client notices nothing of those who idle, encrypted or about to be."""
    async with live_server(SmallApp().app, tls=True) as server:
        in_handshake = [await server.connect_socket() for _ in range(300)]
        idle = [await server.connect() for _ in range(50)]
        for stream in idle:
            await stream.send_all(http_request("/quick"))
            await read_until(stream, b'{"ok":true}')
        await assert_answers(server)
        for each in in_handshake:
            each.socket.close()
        for stream in idle:
            await stream.aclose()


@trio_test
async def test_tls_on_a_unix_socket(tmp_path: Path) -> None:
    """The same, wherever the bytes come from."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    certificates, stop = shared_certificates(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve(
                SmallApp().app, tls_config(certificates), sockets=[listener], stop=stop, task_status=task_status
            )
        )
        stream = trio.SSLStream(
            await trio.open_unix_socket(str(tmp_path / "s")), certificates.client_context(), server_hostname="localhost"
        )
        await stream.send_all(http_request("/stream"))
        assert EVENT in await read_until(stream, b"0\r\n\r\n")
        nursery.cancel_scope.cancel()
