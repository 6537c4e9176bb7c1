"""The unix socket on which clients connect (`--uds`): what lies in the way at its path, and what is left behind.

Knows nothing of who answers on it.
"""

import errno
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from llmd.errors import StartupFailed

# only the user who runs the server; who wants to let others in changes the file's mode or its folder's
_MODE = 0o600
_BACKLOG = 2048


@contextmanager
def listening_unix_socket(path: Path) -> Iterator[socket.socket]:
    """A listening socket at this path for the length of a block; its file is removed at the end.

    The file of a server that died is replaced. Raises StartupFailed if a live server listens there, if there is
    something else than a socket, which stays as it is, or if the folder does not allow it.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            file = _listen(listener, path)
        except OSError as error:
            raise StartupFailed(f"cannot listen on --uds {path}: {error.strerror or error}") from error
        try:
            yield listener
        finally:
            # before the listener closes: until then nobody else takes the path
            _remove(path, file)


def _listen(listener: socket.socket, path: Path) -> os.stat_result:
    """Returns what identifies the new file."""
    with _locked(path.parent):
        _clear(path)
        listener.bind(str(path))
        file = path.lstat()
        # nobody can connect before `listen`
        path.chmod(_MODE)
        listener.listen(_BACKLOG)
    return file


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other servers from looking at this folder's sockets between our look and our `listen`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartupFailed(f"another process starts or locks something in {folder}; please try again") from error
        yield
    finally:
        os.close(fd)


def _clear(path: Path) -> None:
    """Remove the file of a dead server, if there is one."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise StartupFailed(f"--uds {path}: there is a file that is not a socket; move it away or choose another path")
    if _is_live(path):
        raise StartupFailed(f"--uds {path}: a server listens there; stop it or choose another path")
    path.unlink()


def _is_live(path: Path) -> bool:
    """Whether somebody listens. Raises OSError where that cannot be found out."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # a full queue would make a blocking one wait
        probe.setblocking(False)
        result = probe.connect_ex(str(path))
    if result in (0, errno.EAGAIN, errno.EINPROGRESS):
        return True
    if result in (errno.ECONNREFUSED, errno.ENOENT):
        return False
    raise OSError(result, os.strerror(result))


def _remove(path: Path, file: os.stat_result) -> None:
    """Remove the file, unless it is no longer the one that was made here."""
    with suppress(OSError):
        if os.path.samestat(path.lstat(), file):
            path.unlink()
