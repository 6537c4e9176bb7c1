"""The server process, `python -m llmd.server CONTROL_FD`: answers HTTP on the sockets that it inherits.

It answers from its first moment, whatever else is still being loaded, and never imports torch.
"""

import gc
import logging
import sys

import trio

from llmd.child import connect_control
from llmd.config import ServerConfig


def main() -> None:
    config, control = connect_control(int(sys.argv[1]), ServerConfig)
    logging.basicConfig(level=logging.WARNING, format="server: %(levelname)s: %(message)s")
    # imports make no garbage; looking for it costs a sixth of the time until the first answer
    gc.disable()
    from llmd.server.process import run

    gc.freeze()
    gc.enable()
    trio.run(run, config, control)


if __name__ == "__main__":
    main()
