"""The server process, `python -m llmd.server CONTROL_FD`: answers HTTP on the sockets that it inherits.

It answers from its first moment, whatever else is still being loaded, and never imports torch.
"""

import gc
import sys

import trio

from llmd.child import connect_control
from llmd.config import ServerConfig
from llmd.log import configure_logging


def main() -> None:
    config, control = connect_control(int(sys.argv[1]), ServerConfig)
    # the one process that sees texts
    configure_logging(config.log, process="server", withholds_messages=not config.log.requests)
    # imports make no garbage; looking for it costs a sixth of the time until the first answer
    gc.disable()
    from llmd.server.process import run

    gc.freeze()
    gc.enable()
    trio.run(run, config, control)


if __name__ == "__main__":
    main()
