"""`llmd serve`: the port first, then the children, then the event loop that watches over them."""

import argparse
import errno
import resource
import signal
import socket
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from llmd import __version__
from llmd.cli.serving_flags import DEFAULT_HOST, DEFAULT_PORT
from llmd.config import HttpConfig
from llmd.errors import StartupFailed
from llmd.supervisor.processes import END_SIGNALS, listen_tcp
from llmd.supervisor.unix_socket import listening_unix_socket


def serve(flags: argparse.Namespace) -> int:
    """Run a server until it is told to stop. Returns the exit status, with which the process is to end."""
    # a signal waits until the supervisor can take it: before that it would leave files and children behind
    signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)
    _allow_open_files()
    try:
        with _listening(flags) as listener:
            return _serve_on(listener, flags)
    except StartupFailed as error:
        return _fail(error, flags)


def _serve_on(listener: socket.socket, flags: argparse.Namespace) -> int:
    # The port is open from here on. What is imported now took its time away from a client that could already connect.
    import logging

    from llmd.cli.resolve import resolve
    from llmd.fetch.source import find_ready
    from llmd.log import configure_logging
    from llmd.supervisor.start import Sockets, start_first_children

    config = resolve(flags)
    configure_logging(config.log, process="supervisor")
    model = config.model
    model_dir = find_ready(model.source, model.revision, Path(model.cache_dir), dummy=model.load_format == "dummy")
    log = logging.getLogger(__name__)
    log.info("llmd %s · %s · %s", __version__, config.model.served_names[0], _address(listener, config.http))
    if config.log.requests:
        log.warning("prompts are logged, up to %d characters of each (--enable-log-requests)", config.log.max_len)
    sockets = Sockets.open((listener,))
    try:
        first = start_first_children(config, sockets, model_dir=model_dir)

        # the children are on their way: their imports take longer than ours
        import trio

        from llmd.supervisor.supervise import supervise

        return trio.run(lambda: supervise(config, sockets, first, model_dir=str(model_dir) if model_dir else None))
    finally:
        sockets.close()


def _fail(error: StartupFailed, flags: argparse.Namespace) -> int:
    """Say why, in the form that the log was to have, perhaps before there was one."""
    import logging

    from llmd.cli.resolve import log_config
    from llmd.log import configure_logging

    configure_logging(log_config(flags), process="supervisor")
    logging.getLogger(__name__).error("%s", error)
    return 1


def _listening(flags: argparse.Namespace) -> AbstractContextManager[socket.socket]:
    if flags.uds is not None:
        return listening_unix_socket(Path(flags.uds))
    return _listen(flags.host or DEFAULT_HOST, DEFAULT_PORT if flags.port is None else flags.port)


def _allow_open_files() -> None:
    """As many as this user may have, here and in the children: a connection takes one, and 1024 are soon used up."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # macOS calls its limit infinite, and refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _address(listener: socket.socket, http: HttpConfig) -> str:
    is_encrypted = http.ssl_certfile is not None
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}" + (" (https)" if is_encrypted else "")
    scheme = "https" if is_encrypted else "http"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen_tcp(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartupFailed(f"port {port} on {host} is taken; choose another with --port") from error
        raise StartupFailed(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
