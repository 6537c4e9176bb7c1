"""The flags of `llmd status`. Knows nothing of what becomes of them."""

import argparse
from pathlib import Path

_MIN_INTERVAL = 0.1  # seconds


def add_status_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url", nargs="?", default="http://127.0.0.1:8000", metavar="URL", help="(default: http://127.0.0.1:8000)"
    )
    parser.add_argument("--uds", metavar="PATH", help="the server's unix socket instead of a URL")
    parser.add_argument("--once", action="store_true", help="look once; the exit status says how it is")
    parser.add_argument("--interval", type=_interval, default=2.0, metavar="SECONDS", help="(default: 2)")
    parser.add_argument("--json", action="store_true", help="one JSON object a look, in a line")
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--api-key", metavar="KEY", help="better use --api-key-file: `ps` shows this one")
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="a file whose first key is used")
    trust = parser.add_mutually_exclusive_group()
    trust.add_argument("--cacert", metavar="FILE", help="certificates to trust (https)")
    trust.add_argument("--insecure", action="store_true", help="trust any certificate (https)")
    parser.add_argument("--cert", metavar="FILE", help="what to show to a server that asks for a certificate (https)")
    parser.add_argument("--key", metavar="FILE", help="its private key, unless that lies in --cert too")


def _interval(text: str) -> float:
    seconds = float(text)
    if not seconds >= _MIN_INTERVAL:
        raise argparse.ArgumentTypeError(f"{text} is less than {_MIN_INTERVAL}")
    return seconds
