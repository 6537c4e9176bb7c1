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
    scheme: str = "http"
    host: str = "localhost"
    port: int | None = None
    prefix: str = ""  # of every path
    uds: str | None = None
    api_key: str | None = None
    ca_file: str | None = None
    verify: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """What a server said at one moment."""

    time: float  # monotonic, seconds
    health: dict[str, Any] | None = None  # the body of /health; None if there was no answer to read
    samples: Samples | None = None  # None if there were none, or a key is missing
    problem: str = ""  # why something is missing


def target(url: str, *, uds: str | None = None, **access: Any) -> Target:
    """The server at this URL; "host:port" will do. Raises StartupFailed if it is none."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError as error:
        raise StartupFailed(f"{url}: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise StartupFailed(f"{url} is not the address of a server, as http://127.0.0.1:8000")
    return Target(
        address=f"unix:{uds}" if uds else f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}",
        scheme=parts.scheme,
        host=parts.hostname,
        port=port,
        prefix=parts.path.rstrip("/"),
        uds=uds,
        **access,
    )


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
        return _UnixConnection(target.uds)
    if target.scheme == "http":
        return http.client.HTTPConnection(target.host, target.port, timeout=TIMEOUT)
    context = ssl.create_default_context(cafile=target.ca_file)
    if not target.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return http.client.HTTPSConnection(target.host, target.port, timeout=TIMEOUT, context=context)


class _UnixConnection(http.client.HTTPConnection):
    """HTTP on a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT)
        self.sock.connect(self._path)


def _health(body: bytes) -> dict[str, Any] | None:
    try:
        health = json.loads(body)
    except ValueError:
        return None
    return health if isinstance(health, dict) and isinstance(health.get("status"), str) else None


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted ({error.verify_message}); see --cacert and --insecure"
    if isinstance(error, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    return text[:1].lower() + text[1:]
