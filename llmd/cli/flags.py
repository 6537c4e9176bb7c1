"""What can be typed: the commands, and the file that flags can come from. Knows nothing of what becomes of it.

Names are vLLM's where it has one. A configuration file (TOML) holds the same names; a flag wins over the file.
"""

import argparse
import tomllib
from pathlib import Path
from typing import Any

from llmd import __version__
from llmd.cli.serving_flags import add_serving_flags
from llmd.cli.status_flags import add_status_flags
from llmd.errors import StartupFailed

_STYLE: dict[str, Any] = {
    # an abbreviation would turn tomorrow's flag into an error for today's users
    "allow_abbrev": False,
    "formatter_class": lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of the `llmd` command; the chosen command's function is in `flags.run`."""
    parser = argparse.ArgumentParser(
        prog="llmd", description="An open-weights language model behind the OpenAI HTTP API.", **_STYLE
    )
    parser.add_argument("--version", action="version", version=f"llmd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        usage="llmd serve [MODEL] [FLAGS]",
        help="serve a model",
        description="Serve a model behind the OpenAI HTTP API.",
        epilog="Example: llmd serve --model ./Llama-3.2-1B-Instruct --port 8000. Once it runs, `llmd status` shows how "
        "it is, and its page /docs describes the API.",
        **_STYLE,
    )
    add_serving_flags(serve)
    serve.set_defaults(run=_run_serve)
    check = commands.add_parser(
        "check",
        usage="llmd check [MODEL] [FLAGS]",
        help="print what `serve` would do, without serving",
        description="Print what `serve` would do with the same flags: family, parameters, memory, context, template.",
        **_STYLE,
    )
    add_serving_flags(check)
    check.set_defaults(run=_run_check)
    status = commands.add_parser(
        "status",
        usage="llmd status [URL] [FLAGS]",
        help="show how a running server is",
        description="Show a live picture of a running server. With --once, one look: the exit status is 0 if it is "
        "ready, 1 if it is not, 2 if it cannot be reached.",
        **_STYLE,
    )
    add_status_flags(status)
    status.set_defaults(run=_run_status)
    return parser


def with_config_file(argv: list[str]) -> list[str]:
    """The arguments with those of `--config FILE` put before them, as if they had been typed first: later ones win.

    Raises StartupFailed if the file cannot be read or is not TOML.
    """
    finder = argparse.ArgumentParser(add_help=False, **_STYLE)
    finder.add_argument("--config", type=Path)
    known, rest = finder.parse_known_args(argv)
    if known.config is None or not rest:
        return argv
    try:
        settings = tomllib.loads(known.config.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise StartupFailed(f"--config {known.config}: {error}") from error
    command, *typed = rest
    # --config itself comes last, so that a list in the file cannot take the first typed argument for its own
    return [command, *_as_arguments(settings), "--config", str(known.config), *typed]


def _as_arguments(settings: dict[str, Any]) -> list[str]:
    arguments: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        match value:
            case bool():
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
            case list():
                arguments += [f"--{flag}", *map(str, value)]
            case _:
                arguments += [f"--{flag}", str(value)]
    return arguments


def _run_serve(flags: argparse.Namespace) -> int:
    # the command's own imports, so that `--help` and a wrong flag answer at once
    from llmd.cli.serve import serve

    return serve(flags)


def _run_check(flags: argparse.Namespace) -> int:
    from llmd.cli.check import check

    return check(flags)


def _run_status(flags: argparse.Namespace) -> int:
    from llmd.cli.status import status

    return status(flags)
