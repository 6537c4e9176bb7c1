"""TLS: certificates from files that may change, and encryption in front of a socket. Knows no HTTP."""

import logging
import re
import ssl
from contextlib import suppress
from dataclasses import dataclass

import trio

from llmd.config import HttpConfig
from llmd.server.file_stamp import FileStamp, file_stamp
from llmd.server.transport import SocketTransport

# best first; who speaks neither gets HTTP/1.1
ALPN_PROTOCOLS = ("h2", "http/1.1")
# of TLS 1.2: keys that a later theft does not reveal, and nothing that RFC 9113 appendix A forbids
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
# the most that one TLS record holds
_MAX_RECORD = 1 << 14

_CERTIFICATE = re.compile(rb"-----BEGIN (TRUSTED |X509 )?CERTIFICATE-----")
_PRIVATE_KEY = re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----")
_ENCRYPTED_KEY = re.compile(rb"-----BEGIN ENCRYPTED PRIVATE KEY-----|^Proc-Type: 4,ENCRYPTED", re.MULTILINE)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Where certificate, key and the certificates of clients' authorities lie (PEM)."""

    certfile: str  # the server's own certificate first, then those between it and a root
    keyfile: str | None = None  # None = the key lies in the certfile
    ca_certs: str | None = None  # clients must show a certificate that one of these has signed

    @classmethod
    def of(cls, config: HttpConfig) -> "TlsFiles":
        """Those of a configuration that asks for TLS."""
        assert config.ssl_certfile is not None
        return cls(config.ssl_certfile, config.ssl_keyfile, config.ssl_ca_certs)

    @property
    def flags(self) -> dict[str, str]:
        """Flag → file, of those that are given."""
        named = {"--ssl-certfile": self.certfile, "--ssl-keyfile": self.keyfile, "--ssl-ca-certs": self.ca_certs}
        return {flag: file for flag, file in named.items() if file is not None}


def load_context(files: TlsFiles) -> ssl.SSLContext:
    """What new connections are opened with. Raises ValueError that names file and cause."""
    for flag, file in files.flags.items():
        _check_pem(flag, file, pattern=_PRIVATE_KEY if flag == "--ssl-keyfile" else _CERTIFICATE)
    key_flag = "--ssl-keyfile" if files.keyfile is not None else "--ssl-certfile"
    keyfile = files.keyfile or files.certfile
    if _ENCRYPTED_KEY.search(_read(key_flag, keyfile)):
        raise ValueError(
            f"{key_flag} {keyfile}: the private key is encrypted, and nobody is there to type its password; "
            "decrypt it (openssl pkey -in FILE -out NEW_FILE) and protect the file by its mode"
        )
    _check_pem(key_flag, keyfile, pattern=_PRIVATE_KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_ciphers(_CIPHERS)
    context.set_alpn_protocols(ALPN_PROTOCOLS)
    try:
        context.load_cert_chain(files.certfile, files.keyfile)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(f"{key_flag} {keyfile}: this is not the key of {files.certfile}") from error
        raise ValueError(
            f"--ssl-certfile {files.certfile}, key in {keyfile}: OpenSSL cannot use them ({_reason(error)})"
        ) from error
    if files.ca_certs is not None:
        try:
            context.load_verify_locations(files.ca_certs)
        except ssl.SSLError as error:
            raise ValueError(f"--ssl-ca-certs {files.ca_certs}: OpenSSL cannot use it ({_reason(error)})") from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def validity_problem(files: TlsFiles) -> str | None:
    """What clients will hold against the dates of the certificate, if anything; the files can be loaded.

    Found by a handshake with ourselves that trusts just this certificate: the standard library reads no dates
    otherwise.
    """
    client_context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client_context.check_hostname = False
    client_context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client_context.load_verify_locations(files.certfile)
    # without the question for a client's certificate
    server_context = load_context(TlsFiles(files.certfile, files.keyfile))
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for side in (client, server, client):
            with suppress(ssl.SSLWantReadError):
                side.do_handshake()
    except ssl.SSLCertVerificationError as error:
        # the two of X509_V_ERR_… that are about time
        return {9: "is not yet valid", 10: "has expired"}.get(error.verify_code)
    return None


class Certificates:
    """The TLS context for new connections. The files are looked at each time, and read again when they have changed.

    Files that cannot be used change nothing: what was read last stays in use, and the log says why, once. Before a
    first good read there is no context, and nobody can connect.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._context: ssl.SSLContext | None = None
        self._stamps: list[FileStamp | None] = []
        self._problem = ""
        # what is wrong with them is in the log before the first client comes
        self.context()

    def context(self) -> ssl.SSLContext | None:
        """For a connection that begins now; None while there is none that could be used."""
        # before the files are read: what changes meanwhile is seen the next time
        stamps = [file_stamp(file) for file in self._files.flags.values()]
        if stamps != self._stamps:
            try:
                self._load()
            except ValueError as error:
                self._note(str(error))
                # once they are as they were, they are read again, and the log says that all is well
                self._stamps = []
            else:
                self._stamps = stamps
        return self._context

    def _load(self) -> None:
        is_first = self._context is None and not self._problem
        self._context = load_context(self._files)
        self._problem = ""
        if not is_first:
            _log.warning("--ssl-certfile %s: read again", self._files.certfile)
        if problem := validity_problem(self._files):
            _log.warning("--ssl-certfile %s: this certificate %s", self._files.certfile, problem)

    def _note(self, problem: str) -> None:
        """To the log, once for as long as it lasts."""
        if problem != self._problem:
            consequence = "nobody can connect" if self._context is None else "the certificate before stays in use"
            _log.error("%s; %s", problem, consequence)
        self._problem = problem


class HandshakeFailed(Exception):
    """The client speaks no TLS, or none that suits."""


class PlainHttp(HandshakeFailed):
    """The client speaks HTTP, but without TLS."""


class TlsTransport:
    """A connection's bytes, encrypted. First `handshake`; then as any `transport.Transport`.

    Encryption itself neither waits nor can be cancelled: a message goes to the socket whole, or the socket's transport
    cuts the client off. (trio.SSLStream looks for cancellation before it encrypts: what the protocol has counted as
    sent would be lost, and the client would get a stream with a hole in it.)
    """

    def __init__(self, context: ssl.SSLContext, transport: SocketTransport) -> None:
        self._transport = transport
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._is_over = False
        self._ended = False

    @property
    def alpn_protocol(self) -> str | None:
        """What the client wants to speak; known after the handshake."""
        return self._session.selected_alpn_protocol()

    async def handshake(self) -> None:
        """Raises HandshakeFailed; trio.BrokenResourceError or ClosedResourceError if the client is gone."""
        is_first = True
        while not await self._advance_handshake():
            data = await self._transport.receive()
            if not data:
                raise HandshakeFailed("the client left")
            # TLS begins with a 22, HTTP with the letters of its method
            if is_first and data[:1].isalpha():
                raise PlainHttp("HTTP without TLS")
            is_first = False
            self._incoming.write(data)

    async def _advance_handshake(self) -> bool:
        """Whether it is done."""
        try:
            self._session.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            raise HandshakeFailed(_reason(error)) from error
        finally:
            await self._flush()
        return True

    async def receive(self) -> bytes:
        while True:
            if self._ended:
                return await self._transport.receive()
            # first, since a request may have come together with the end of the handshake
            try:
                plain = self._decrypt()
            finally:
                # what TLS itself has to say, such as a new key or an alert
                await self._flush()
            if plain or self._is_over:
                return plain
            data = await self._transport.receive()
            if not data:
                return b""
            self._incoming.write(data)

    def _decrypt(self) -> bytes:
        """What has come in whole. Notes whether that is all there will be."""
        plain = bytearray()
        try:
            while piece := self._session.read(_MAX_RECORD):
                plain += piece
            self._is_over = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self._is_over = True
        except ssl.SSLError as error:
            self._ended = True
            raise trio.BrokenResourceError(_reason(error)) from error
        return bytes(plain)

    async def send(self, data: bytes) -> None:
        if self._ended:
            return
        rest = memoryview(data)
        while rest:
            rest = rest[self._session.write(rest) :]
        await self._flush()

    async def end(self) -> None:
        self._say_goodbye()
        await self._flush()
        await self._transport.end()

    def close(self) -> None:
        self._say_goodbye()
        self._transport.send_last(self._outgoing.read())
        self._transport.close()

    def _say_goodbye(self) -> None:
        """So that the client knows that nobody cut its answer short."""
        if not self._ended:
            self._ended = True
            # it would also wait for the client's goodbye
            with suppress(ssl.SSLError):
                self._session.unwrap()

    async def _flush(self) -> None:
        if data := self._outgoing.read():
            await self._transport.send(data)


def _check_pem(flag: str, file: str, *, pattern: re.Pattern[bytes]) -> None:
    if not pattern.search(_read(flag, file)):
        what = "private key" if pattern is _PRIVATE_KEY else "certificate"
        raise ValueError(f"{flag} {file}: there is no {what} in it (in PEM: -----BEGIN …-----)")


def _read(flag: str, file: str) -> bytes:
    try:
        with open(file, "rb") as content:
            return content.read()
    except OSError as error:
        raise ValueError(f"{flag} {file}: {error.strerror or error}") from error


def _reason(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
