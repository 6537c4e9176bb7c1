"""What the operator sees of a starting server: one line a fact, and a bar for what takes long."""

import logging
import sys
import time

from llmd.config import LogConfig
from llmd.line_writer import takes_bytes
from llmd.protocol.control import Stage, SystemState

_STDERR = 2
_BAR_WIDTH = 30
# a log file is not a terminal: there, one line a quarter of the way is enough, and none for what is done in a moment
_LOG_STEPS = 4
_LOG_INTERVAL = 2.0  # seconds between two lines on the way

_log = logging.getLogger(__name__)


class Terminal:
    """Lines are records of the log. On a terminal a bar is drawn over itself; in a log each stage gets a few lines."""

    def __init__(self, config: LogConfig) -> None:
        self._draws_bars = config.format == "text" and config.level in ("debug", "info") and sys.stderr.isatty()
        self._began = time.monotonic()  # the start, or the latest restart
        self._is_restart = False
        self._bar_drawn = False
        self._logged: tuple[str, int] | None = None  # what was on the way, and how many steps of it
        self._logged_at = 0.0

    def line(self, text: str, *, level: int = logging.INFO) -> None:
        """Log one line, clear of the bar."""
        self._clear_bar()
        _log.log(level, "%s", text)

    def show(self, state: SystemState) -> None:
        """Show a change of the system's state."""
        if state.stage is Stage.READY:
            again = " again" if self._is_restart else ""
            self.line(f"ready{again} after {time.monotonic() - self._began:.1f} s")
        elif state.stage is Stage.DRAINING:
            self.line(f"draining: {state.detail}")
        elif state.stage is Stage.FAILED:
            self.line(f"failed: {state.detail}", level=logging.ERROR)
        elif self._draws_bars and state.progress is not None:
            self._draw_bar(state.detail, state.progress)
        else:
            self._log(state)

    def restart(self, report: str) -> None:
        """The engine is lost, and the way begins anew: `report` says what happened and what follows."""
        self.line(report, level=logging.WARNING)
        self._began, self._is_restart, self._logged = time.monotonic(), True, (report, 0)

    def _log(self, state: SystemState) -> None:
        step = int((state.progress or 0.0) * _LOG_STEPS)
        is_new = self._logged is None or state.detail != self._logged[0]
        now = time.monotonic()
        if (state.detail, step) == self._logged or not (is_new or now > self._logged_at + _LOG_INTERVAL):
            return
        self._logged, self._logged_at = (state.detail, step), now
        percent = f" {state.progress:.0%}" if state.progress else ""
        self.line(f"{state.detail}{percent}")

    def _draw_bar(self, label: str, progress: float) -> None:
        filled = round(progress * _BAR_WIDTH)
        bar = "█" * filled + "░" * (_BAR_WIDTH - filled)
        if not takes_bytes(_STDERR):
            return  # somebody has stopped the terminal (Ctrl-S); no child waits for that
        sys.stderr.write(f"\r\x1b[K{label} {bar} {progress:4.0%}")
        sys.stderr.flush()
        self._bar_drawn = True

    def _clear_bar(self) -> None:
        if self._bar_drawn and takes_bytes(_STDERR):
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._bar_drawn = False
