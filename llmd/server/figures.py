"""What the server processes know of one another: each leaves its figures in a file, and reads those of the others.

A file, because it still tells what a process had counted that is dead or stuck: a sum that falls when one of them goes
would look to Prometheus as if all had begun at 0. The process that replaces a dead one goes on from its file.
"""

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from llmd.config import SECONDS, ServerConfig
from llmd.protocol.figures import ServerFigures
from llmd.server.families import without_gauges

# what a process that is killed can lose of its counts, and how old those of the others are at most
INTERVAL = 1 * SECONDS
# without a sign of life for so long, a server process counts as unreachable
STALE_AFTER = 5 * SECONDS

_log = logging.getLogger(__name__)
_decoder = msgspec.msgpack.Decoder(ServerFigures)


@dataclass(frozen=True, slots=True)
class Others:
    """The other server processes, as they have left their figures."""

    figures: list[ServerFigures]
    num_unreachable: int  # those that have left none, or not lately


async def leave_figures(config: ServerConfig, figures: Callable[[], ServerFigures]) -> None:
    """Keep this process's file true, until cancelled."""
    if config.figures_dir is None:
        return
    path = _path(config.figures_dir, config.index)
    problem = ""
    while True:
        content = msgspec.msgpack.encode(figures())
        try:
            # a disk may take its time
            await trio.to_thread.run_sync(_replace, path, content)
        except OSError as error:
            if str(error) != problem:
                _log.warning("the other server processes cannot see what this one counts: %s", error)
            problem = str(error)
        await trio.sleep(INTERVAL)


def left_before(config: ServerConfig) -> ServerFigures | None:
    """What a process with this one's index has left: this one replaces it. None for the first."""
    if config.figures_dir is None:
        return None
    figures, _ = _read(_path(config.figures_dir, config.index))
    return figures


async def others(config: ServerConfig) -> Others:
    """What the other processes have left."""
    if config.figures_dir is None:
        return Others([], 0)
    paths = [_path(config.figures_dir, index) for index in range(config.http.num_frontends) if index != config.index]
    return await trio.to_thread.run_sync(_read_all, paths)


def _path(folder: str, index: int) -> Path:
    return Path(folder) / f"server-{index}.figures"


def _replace(path: Path, content: bytes) -> None:
    """Nobody ever reads half of it."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    os.replace(new, path)


def _read_all(paths: list[Path]) -> Others:
    found, num_unreachable = [], 0
    for path in paths:
        figures, age = _read(path)
        is_stale = age > STALE_AFTER
        num_unreachable += is_stale
        if figures is not None:
            found.append(_of_the_gone(figures) if is_stale else figures)
    return Others(found, num_unreachable)


def _of_the_gone(figures: ServerFigures) -> ServerFigures:
    """What stays true of a process that is dead or stuck."""
    return ServerFigures(counted=without_gauges(figures.counted), process=[], engine=figures.engine)


def _read(path: Path) -> tuple[ServerFigures | None, float]:
    """The figures and how many seconds ago they were left; None and infinity if there are none."""
    try:
        return _decoder.decode(path.read_bytes()), time.time() - path.stat().st_mtime
    except (OSError, msgspec.DecodeError):
        return None, math.inf
