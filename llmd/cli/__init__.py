"""The command line: `llmd serve`, `llmd check`. Reads argv and the configuration file; nobody else does."""

import sys

from llmd.cli.flags import build_parser, with_config_file
from llmd.errors import StartupFailed


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `llmd` command. Returns the exit status."""
    try:
        flags = build_parser().parse_args(with_config_file(sys.argv[1:] if argv is None else argv))
        status: int = flags.run(flags)
    except StartupFailed as error:
        print(f"llmd: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
