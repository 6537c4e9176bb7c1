"""How long to wait before something that ended is started again."""

from llmd.config import SECONDS

# who lived this long was healthy: its death begins the series anew
_HEALTHY_AFTER = 60 * SECONDS
_SECOND_DELAY = 0.2 * SECONDS
# who was ready had work to go on with, and to load again is delay enough; whatever hinders a start may take longer
_MAX_AFTER_WORK = 1 * SECONDS
_MIN_AFTER_FAILED_START = 1 * SECONDS
_MAX_AFTER_FAILED_START = 10 * SECONDS


class BackOff:
    """None for the first time, then longer and longer."""

    def __init__(self) -> None:
        self._delay = 0.0

    def next_delay(self, *, lived: float, was_ready: bool) -> float:
        """Seconds to wait after a life of `lived` seconds, in which it was ready for its work or was not."""
        if lived > _HEALTHY_AFTER:
            self._delay = 0.0
        delay = self._delay
        self._delay = min(max(2 * delay, _SECOND_DELAY), _MAX_AFTER_FAILED_START)
        return min(delay, _MAX_AFTER_WORK) if was_ready else max(delay, _MIN_AFTER_FAILED_START)
