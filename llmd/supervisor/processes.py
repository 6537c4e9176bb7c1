"""Starting a child process with its control socket. Knows modules and file descriptors; no event loop, so that the
children can be on their way while the supervisor still imports its own."""

import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmd.config import EngineConfig, FetchConfig, ServerConfig, WorkerConfig
from llmd.protocol.framing import encode_frame

ChildConfig = ServerConfig | EngineConfig | WorkerConfig | FetchConfig

# what tells a server to end: from an init system, or Ctrl-C in a terminal
END_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# `ps` shows the architecture: python -m llmd.server, llmd.engine, llmd.worker
_MODULES = {
    ServerConfig: "llmd.server",
    EngineConfig: "llmd.engine",
    WorkerConfig: "llmd.worker",
    FetchConfig: "llmd.fetch",
}


@dataclass(frozen=True, slots=True)
class Process:
    """A child that runs, and our end of its control socket (blocking)."""

    name: str
    popen: subprocess.Popen[bytes]
    control: socket.socket


def spawn(config: ChildConfig, *, pass_fds: Iterable[int] = ()) -> Process:
    """Start the child for this configuration and hand it over as the first frame.

    Called from the main thread only: a child asks the kernel to end it with its parent, and the kernel means the
    thread that forked.
    """
    ours, theirs = socket.socketpair()
    module = _MODULES[type(config)]
    with theirs:
        popen = subprocess.Popen(
            [sys.executable, "-m", module, str(theirs.fileno())],
            pass_fds=(theirs.fileno(), *pass_fds),
            stdin=subprocess.DEVNULL,
        )
    ours.sendall(encode_frame(config))
    return Process(name=module.removeprefix("llmd."), popen=popen, control=ours)


def listen_unix(path: Path) -> socket.socket:
    """A listening unix socket. The supervisor keeps it, so connecting to a child that is being replaced just waits."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(128)
    return listener


def listen_tcp(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises OSError if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    listener.listen(2048)
    return listener
