"""`python -m llmd.worker CONTROL_FD`: load, then run plans until the engine or the supervisor is gone."""

import sys

from llmd.child import connect_control
from llmd.config import WorkerConfig
from llmd.errors import StartupFailed
from llmd.log import configure_logging
from llmd.protocol.control import ChildFailed, ChildProgress, Stage


def main() -> int:
    config, control = connect_control(int(sys.argv[1]), WorkerConfig)
    control.beat_in_thread()
    configure_logging(config.log, process="worker")
    control.send(ChildProgress(stage=Stage.LOADING, detail="importing torch"))

    # here and not above, because it takes seconds and the operator should know
    from llmd.worker.rank import run_rank

    try:
        run_rank(config, control)
    except StartupFailed as error:
        control.send(ChildFailed(str(error)))
        return 1
    return 0


sys.exit(main())
