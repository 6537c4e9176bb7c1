"""`llmd status`: a live picture of a running server, or one look at it whose exit status says how it is."""

import argparse
import json
import os
import shutil
import sys
import time
from collections import deque
from dataclasses import asdict
from typing import NoReturn

from llmd.cli.scrape import Scrape, Target, first_key, scrape, target, tls_context
from llmd.cli.status_view import Picture, picture, render

READY, NOT_READY, UNREACHABLE = 0, 1, 2

# rates and latencies are of so many seconds: fewer jump about
_WINDOW = 10.0
_COLORS = {"ready": "32", "unreachable": "31", "failed": "31"}
_OTHER_COLOR = "33"


def status(flags: argparse.Namespace) -> int:
    """Show the server until Ctrl-C, or once. Returns the exit status; raises StartupFailed for a wrong address."""
    key = flags.api_key or (first_key(flags.api_key_file) if flags.api_key_file else None)
    tls = None
    if flags.cacert or flags.insecure or flags.cert or flags.key:
        tls = tls_context(ca_file=flags.cacert, verify=not flags.insecure, cert_file=flags.cert, key_file=flags.key)
    server = target(flags.url, uds=flags.uds, api_key=key, tls=tls)
    screen = _Screen(as_json=flags.json)
    # what cannot be written in this terminal's encoding is a question mark, never a crash
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # only a test replaces it by another kind
    try:
        if flags.once:
            shown = picture(server.address, scrape(server), wall_time=time.time())
            screen.show(shown)
            return _exit_status(shown)
        _watch(server, screen, interval=flags.interval)
    except KeyboardInterrupt:
        return 0
    except BrokenPipeError:
        # `llmd status | head` has seen enough; nothing must be flushed into that pipe at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        screen.close()


def _watch(server: Target, screen: "_Screen", *, interval: float) -> NoReturn:
    history: deque[Scrape] = deque()  # those with figures, one after the other
    while True:
        started = time.monotonic()
        now = scrape(server)
        while len(history) > 1 and now.time - history[1].time >= _WINDOW:
            history.popleft()
        before = history[0] if history else None
        screen.show(picture(server.address, now, before, wall_time=time.time()))
        if now.samples is None:
            history.clear()
        else:
            history.append(now)
        time.sleep(max(started + interval - time.monotonic(), 0.0))


def _exit_status(shown: Picture) -> int:
    if shown.stage == "unreachable":
        return UNREACHABLE
    return READY if shown.stage == "ready" else NOT_READY


class _Screen:
    """Draws one picture over the last where it can, and one below the other where it cannot."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._redraws = sys.stdout.isatty() and not as_json
        self._num_lines = 0  # of the last picture

    def show(self, shown: Picture) -> None:
        if self._as_json:
            self._write(json.dumps({"time": time.time(), **asdict(shown)}) + "\n")
        elif self._redraws:
            self._redraw(shown)
        else:
            self._write("\n".join([*render(shown), "", ""]))

    def close(self) -> None:
        """Leave the last picture there, and the cursor below it."""
        if self._num_lines:
            self._write("\x1b[?25h")

    def _redraw(self, shown: Picture) -> None:
        size = shutil.get_terminal_size()
        # a line that wraps, or a picture that scrolls, could not be drawn over
        lines = [line[: size.columns - 1] for line in render(shown)[: size.lines - 1]]
        color = _COLORS.get(shown.stage, _OTHER_COLOR)
        lines[0] = f"\x1b[{color}m●\x1b[0m\x1b[1m{lines[0][1:]}\x1b[0m"
        up = f"\x1b[{self._num_lines}A" if self._num_lines else "\x1b[?25l"
        self._write(f"{up}\r\x1b[J" + "\n".join(lines) + "\n")
        self._num_lines = len(lines)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
