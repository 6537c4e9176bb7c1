"""Asks a running server over HTTP, on a port or a unix socket. Standard library only: it must be there at once."""

import http.client
import json
import socket
import ssl
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llmd.cli.samples import Samples, parse_samples
from llmd.errors import StartupFailed

# for a server that is there but does not answer
TIMEOUT = 5.0  # seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where the server is and how to be let in."""

    address: str  # for people
    host: str = "localhost"
    port: int | None = None
    prefix: str = ""  # of every path
    uds: str | None = None
    api_key: str | None = None
    tls: ssl.SSLContext | None = None  # None = plain HTTP


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """What a server said at one moment."""

    time: float  # monotonic, seconds
    health: dict[str, Any] | None = None  # the body of /health; None if there was no answer to read
    samples: Samples | None = None  # None if there were none, or a key is missing
    problem: str = ""  # why something is missing


def target(
    url: str, *, uds: str | None = None, api_key: str | None = None, tls: ssl.SSLContext | None = None
) -> Target:
    """The server at this URL; "host:port" will do. Beside `uds` it says the name in the certificate.

    `tls`: for an https URL, if not the usual context. Raises StartupFailed if it is no URL, or none for that.
    """
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise StartupFailed(f"{url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupFailed(f"{url} is not the address of a server, as http://127.0.0.1:8000")
    if parts.scheme == "http" and tls is not None:
        raise StartupFailed(f"{url} is not encrypted: --cacert, --insecure, --cert and --key are for https://…")
    return Target(
        address=f"unix:{uds}" if uds else f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}",
        host=parts.hostname,
        port=port,
        prefix=parts.path.rstrip("/"),
        uds=uds,
        api_key=api_key,
        tls=(tls or tls_context()) if parts.scheme == "https" else None,
    )


def tls_context(
    *, ca_file: str | None = None, verify: bool = True, cert_file: str | None = None, key_file: str | None = None
) -> ssl.SSLContext:
    """Whom to trust, and what to show to a server that asks for a certificate. Files are in PEM.

    Raises StartupFailed for one that cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise StartupFailed(f"--cacert {ca_file}: {_reason(error)}") from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if key_file is not None and cert_file is None:
        raise StartupFailed("--key is the private key of --cert: give both")
    if cert_file is not None:
        try:
            context.load_cert_chain(cert_file, key_file)
        except OSError as error:
            files = f"--cert {cert_file}" + (f" --key {key_file}" if key_file else "")
            raise StartupFailed(f"{files}: {_reason(error)}") from error
    return context


def scrape(target: Target) -> Scrape:
    """Ask for health and figures. Never raises for what a server does or does not do."""
    now = time.monotonic()
    try:
        status, body = _get(target, "/health")
    except (OSError, http.client.HTTPException) as error:
        return Scrape(time=now, problem=_reason(error))
    health = _health(body)
    if health is None:
        return Scrape(time=now, problem=f"answers /health with HTTP {status} and not as llmd does")
    try:
        status, body = _get(target, "/metrics")
    except (OSError, http.client.HTTPException) as error:
        return Scrape(time=now, health=health, problem=f"/metrics: {_reason(error)}")
    if status != 200:
        key = "; the figures need a key: --api-key-file FILE" if status == 401 else ""
        return Scrape(time=now, health=health, problem=f"/metrics: HTTP {status}{key}")
    return Scrape(time=now, health=health, samples=parse_samples(body.decode(errors="replace")))


def first_key(file: Path) -> str:
    """The first key of a file as `llmd serve --api-key-file` reads it. Raises StartupFailed if there is none."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError as error:
        raise StartupFailed(f"--api-key-file {file}: {error.strerror or error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not keys:
        raise StartupFailed(f"--api-key-file {file}: there is no key in it")
    return keys[0]


def _get(target: Target, path: str) -> tuple[int, bytes]:
    """Status and body. Raises OSError or http.client.HTTPException."""
    connection = _connection(target)
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    try:
        connection.request("GET", target.prefix + path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _connection(target: Target) -> http.client.HTTPConnection:
    if target.uds is not None:
        return _UnixConnection(target.uds, target.host, tls=target.tls)
    if target.tls is None:
        return http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT)
    return http.client.HTTPSConnection(target.host, target.port, timeout=TIMEOUT, context=target.tls)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: str, host: str, *, tls: ssl.SSLContext | None) -> None:
        super().__init__(host, timeout=TIMEOUT)
        self._path = path
        self._tls = tls

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)
        if self._tls is not None:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)


def _health(body: bytes) -> dict[str, Any] | None:
    try:
        health = json.loads(body)
    except ValueError:
        return None
    return health if isinstance(health, dict) and isinstance(health.get("status"), str) else None


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); see --cacert and --insecure"
    if isinstance(error, ssl.SSLError) and "CERTIFICATE_REQUIRED" in (error.reason or ""):
        return "it asks for a client's certificate; see --cert and --key"
    if isinstance(error, ssl.SSLError) and error.reason:
        return f"TLS: {error.reason.replace('_', ' ').lower()}"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
