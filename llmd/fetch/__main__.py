"""`python -m llmd.fetch CONTROL_FD`: the fetcher process. Makes the model folder, names it to the supervisor, ends."""

import sys
import time
from pathlib import Path

from llmd.child import ControlChannel, connect_control
from llmd.config import FetchConfig
from llmd.errors import StartupFailed
from llmd.fetch import fetch
from llmd.fetch.progress import Progress
from llmd.log import configure_logging
from llmd.protocol.control import ChildFailed, ChildProgress, ChildReady, Stage

_REPORT_INTERVAL = 0.1  # seconds


def main() -> int:
    """Exit status: 0 if the folder is there, 1 if not; the supervisor has been told why."""
    config, control = connect_control(int(sys.argv[1]), FetchConfig)
    control.beat_in_thread()
    configure_logging(config.log, process="fetch")
    model = config.model
    try:
        folder = fetch(
            model.source,
            revision=model.revision,
            cache_dir=Path(model.cache_dir),
            dummy=model.load_format == "dummy",
            progress=_report_to(control),
        )
    except StartupFailed as error:
        control.send(ChildFailed(str(error)))
        return 1
    control.send(ChildReady(model_dir=str(folder)))
    return 0


def _report_to(control: ControlChannel) -> Progress:
    """Progress as messages, at most ten a second; a change of what is done is never left out."""
    last_detail, last_time = "", 0.0

    def report(detail: str, fraction: float | None) -> None:
        nonlocal last_detail, last_time
        now = time.monotonic()
        if detail == last_detail and now - last_time < _REPORT_INTERVAL:
            return
        last_detail, last_time = detail, now
        control.send(ChildProgress(stage=Stage.FETCHING, detail=detail, progress=fraction))

    return report


if __name__ == "__main__":
    sys.exit(main())
