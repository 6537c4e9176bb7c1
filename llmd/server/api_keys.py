"""Who may come in: API keys, from flags and from a file that may change. Knows no route and no HTTP library.

Keys are kept as SHA-256 digests only, so none can get into a log, a trace or an error message.
"""

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Sequence

from llmd.errors import InvalidApiKey
from llmd.server.file_stamp import FileStamp, file_stamp

_log = logging.getLogger(__name__)


class ApiKeys:
    """The keys of this server. The file, if there is one, is looked at with every check and read when it changed.

    A file that cannot be read, or holds no key, changes nothing: the keys that were read last stay valid, and the log
    says why. Before a first good read only the flags' keys are valid; with none of those, no key is.
    """

    def __init__(self, digests: Sequence[bytes], file: str | None = None) -> None:
        self._of_flags = tuple(digests)
        self._of_file: tuple[bytes, ...] = ()
        self._file = file
        self._stamp: FileStamp | None = None  # None = to be read
        self._problem = ""

    @property
    def are_required(self) -> bool:
        return bool(self._of_flags) or self._file is not None

    def check(self, authorization: str | None) -> None:
        """Raise InvalidApiKey unless this value of the header `Authorization` brings a key, or none is required."""
        if not self.are_required:
            return
        if self._file is not None:
            self._refresh(self._file)
        key = bearer_token(authorization)
        if key is None:
            raise InvalidApiKey("This server needs an API key: send it as the header 'Authorization: Bearer KEY'.")
        if not self._holds(key_digest(key)):
            raise InvalidApiKey("This is not an API key of this server.")

    def _holds(self, digest: bytes) -> bool:
        """In a time that depends on the number of keys alone: every one is compared, and each in constant time."""
        return sum([hmac.compare_digest(digest, known) for known in (*self._of_flags, *self._of_file)]) > 0

    def _refresh(self, file: str) -> None:
        # before it is read: what changes meanwhile is seen the next time
        stamp = file_stamp(file)
        if stamp is not None and stamp == self._stamp:
            return
        try:
            self._of_file = read_key_file(file)
        except (OSError, ValueError) as error:
            self._note(f"--api-key-file {file}: {_reason(error)}; the keys that were read before stay valid")
            # once it is as it was, it is read again, and the log says that all is well
            self._stamp = None
        else:
            if self._stamp is not None or self._problem:
                _log.warning("--api-key-file %s: read again; keys in it: %d", file, len(self._of_file))
            self._stamp = stamp
            self._problem = ""

    def _note(self, problem: str) -> None:
        """To the log, once for as long as it lasts."""
        if problem != self._problem:
            _log.error("%s", problem)
        self._problem = problem


def bearer_token(authorization: str | None) -> str | None:
    """The token of a header `Authorization: Bearer TOKEN`; None if it is not there or says something else."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def identity(authorization: str | None) -> str:
    """The same for all requests with the same key, and "" without one. The key itself cannot be had from it."""
    key = bearer_token(authorization)
    return "" if key is None else key_digest(key).hex()[:16]


def key_fault(key: str) -> str | None:
    """What is wrong with a key that an operator chose, without showing it; None if nothing is."""
    if not key:
        return "is empty"
    # what a header carries unchanged (RFC 9110 section 5.5), without the space that ends a token
    if not all("!" <= character <= "~" for character in key):
        return "has a space or a character that is not ASCII"
    return None


def read_key_file(file: str) -> tuple[bytes, ...]:
    """The digests of the keys in a file: one key a line; empty lines and lines that begin with `#` do not count.

    Raises OSError if it cannot be read, ValueError (which shows no key) if a line is not a key or there is no key.
    """
    # opening a pipe would wait for its writer, and nobody could look at it a second time
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("this is not a regular file")
    with open(file, encoding="utf-8", errors="replace") as lines:
        numbered = [(number, line.strip()) for number, line in enumerate(lines, 1)]
    keys = [(number, key) for number, key in numbered if key and not key.startswith("#")]
    for number, key in keys:
        if fault := key_fault(key):
            raise ValueError(f"the key in line {number} {fault}")
    if not keys:
        raise ValueError("there is no key in it")
    return tuple(key_digest(key) for _, key in keys)


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
