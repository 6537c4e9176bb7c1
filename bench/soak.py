"""Trouble of every kind for a real server under load: is each answer the one that it gives when nothing happens?

    python bench/soak.py --minutes 10 [--model PATH] [--concurrency 24] [--seed 1] [-- FLAGS OF llmd serve]

Starts `llmd serve` (the demo model unless told otherwise), asks every question of a fixed pool once in peace, then
keeps so many clients asking while processes are killed, hang and stall, clients leave in crowds, others send nonsense.
Ends with a drain and prints what came of it. The exit status is 1 if an answer was lost or different, or if something
leaked. The seed fixes what happens in which order. docs/reliability.md says what must hold.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
from pathlib import Path

from soaking.run import Settings, soak


def main() -> int:
    own, server_flags = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--model", help="folder, file or hub id (default: the demo model)")
    parser.add_argument("--concurrency", type=int, default=24, help="clients that ask all the time (default: 24)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--num-tokens", type=int, default=40, help="of most answers (default: 40)")
    parser.add_argument("--kinds", nargs="+", default=(), metavar="KIND", help="of chaos, e.g. 'kill worker' storm")
    parser.add_argument("--output", type=Path, help="folder for the server's log and what was different")
    arguments = parser.parse_args(own)
    if "--uds" in server_flags:
        parser.error("the clients of a soak come by TCP: --uds cannot be tested with it")
    if arguments.model:
        server_flags = ["--model", arguments.model, *server_flags]
    output = arguments.output or Path(tempfile.mkdtemp(prefix="soak-"))
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        seconds=arguments.minutes * 60,
        output=output,
        concurrency=arguments.concurrency,
        seed=arguments.seed,
        num_tokens=arguments.num_tokens,
        kinds=tuple(arguments.kinds),
        server_flags=server_flags,
    )
    signal.signal(signal.SIGTERM, _give_up)
    print(f"the server's log: {output / 'server.log'}", file=sys.stderr)
    report = asyncio.run(soak(settings))
    print(report.table())
    failures = report.failures()
    for failure in failures:
        print(f"FAILED  {failure}")
    return 1 if failures else 0


def _give_up(number: int, _: object) -> None:
    """However this ends, it takes the server with it; a second signal must not interrupt that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is ours, and what stands behind the first "--"."""
    if "--" not in arguments:
        return arguments, []
    border = arguments.index("--")
    return arguments[:border], arguments[border + 1 :]


if __name__ == "__main__":
    sys.exit(main())
