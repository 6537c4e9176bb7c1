"""`llmd status` and a real TLS server: whom it trusts, what it shows, and what it says where that is not enough."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from llmd.cli.flags import build_parser
from llmd.cli.status import READY, UNREACHABLE, status
from llmd.config import HttpConfig
from llmd.errors import StartupFailed
from llmd.server.serving import serve
from tests.server.certificates import make_certificates, shared_certificates, tls_config
from tests.server.fake_engine import application

SOON = 30.0


@contextmanager
def running(listener: socket.socket, config: HttpConfig, model: Path) -> Iterator[None]:
    """The whole application behind this socket, in a thread."""
    token: list[trio.lowlevel.TrioToken] = []
    is_up, stop = threading.Event(), trio.Event()

    async def main() -> None:
        token.append(trio.lowlevel.current_trio_token())
        async with application(model) as app, trio.open_nursery() as nursery:
            await nursery.start(partial(serve, app.app, config, sockets=[listener], stop=stop))
            is_up.set()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    try:
        assert is_up.wait(SOON)
        yield
    finally:
        token[0].run_sync_soon(stop.set)
        thread.join()
        listener.close()


def look(*arguments: str) -> int:
    return status(build_parser().parse_args(["status", *arguments, "--once"]))


@pytest.fixture
def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def url_of(listener: socket.socket) -> str:
    return f"https://localhost:{listener.getsockname()[1]}"


def test_whom_it_trusts(listener: socket.socket, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    certificates = shared_certificates()
    with running(listener, tls_config(certificates), tiny_model_dir):
        assert look(url_of(listener), "--cacert", str(certificates.ca_certs)) == READY
        # the figures were there too
        assert "running" in capsys.readouterr().out
        assert look(url_of(listener), "--insecure") == READY
        assert look(url_of(listener)) == UNREACHABLE
        assert "certificate is not trusted" in capsys.readouterr().out
        assert look(url_of(listener).replace("https", "http")) == UNREACHABLE
        assert "HTTP 400" in capsys.readouterr().out


def test_what_it_shows_to_a_server_that_asks(
    listener: socket.socket, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificates = make_certificates(tmp_path)
    config = msgspec.structs.replace(tls_config(certificates), ssl_ca_certs=str(certificates.ca_certs))
    issued = certificates.authority.issue_cert("client@example.com")
    cert, key, both = (str(tmp_path / name) for name in ("client.pem", "client.key", "client-and-key.pem"))
    issued.cert_chain_pems[0].write_to_path(cert)
    issued.private_key_pem.write_to_path(key)
    issued.private_key_and_cert_chain_pem.write_to_path(both)
    with running(listener, config, tiny_model_dir):
        trust = (url_of(listener), "--cacert", str(certificates.ca_certs))
        assert look(*trust, "--cert", cert, "--key", key) == READY
        assert look(*trust, "--cert", both) == READY
        capsys.readouterr()
        assert look(*trust) == UNREACHABLE
        assert "asks for a client's certificate; see --cert and --key" in capsys.readouterr().out


def test_tls_on_a_unix_socket(tiny_model_dir: Path, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    certificates = shared_certificates()
    with running(listener, tls_config(certificates), tiny_model_dir):
        trust = ("--uds", str(tmp_path / "s"), "--cacert", str(certificates.ca_certs))
        assert look("https://localhost", *trust) == READY
        # a name that is not in the certificate
        assert look("https://elsewhere", *trust) == UNREACHABLE


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("https://localhost", "--cacert", "missing"), "--cacert missing: no such file"),
        (("https://localhost", "--cacert", "garbage"), "--cacert garbage: "),
        (("https://localhost", "--cert", "missing"), "--cert missing: no such file"),
        (("https://localhost", "--cert", "garbage", "--key", "garbage"), "--cert garbage --key garbage: "),
        (("https://localhost", "--key", "garbage"), "give both"),
        (("http://localhost", "--insecure"), "for https"),
        (("--cacert", "ca"), "for https"),
    ],
)
def test_what_cannot_be_used_is_named(
    arguments: tuple[str, ...], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("garbage").write_text("x")
    shared_certificates().authority.cert_pem.write_to_path("ca")
    with pytest.raises(StartupFailed, match=problem):
        look(*arguments)
