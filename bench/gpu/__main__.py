"""`scripts/gpu-check`: prove and measure llmd on the GPU of this machine, in at most nine minutes.

    scripts/gpu-check [--stages device,kernels] [--out FOLDER] [--wheels FOLDER]
    scripts/gpu-check --missing      which packages the server lacks here, and how to bring them
    scripts/gpu-check --report       fill docs/performance.md from the newest results
    scripts/gpu-check --rehearse     all of it on a CPU with tiny sizes: the figures mean nothing

A stage that is done is not done again; one that was cut goes on behind its last row. Exit status 0: all of it is good.
Needs torch and triton, and for the stages `steps` and `server` what llmd serves with.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from bench.gpu.packages import ROOT, fetch_command, install, missing_packages
from bench.gpu.performance import report
from bench.gpu.results import Origin
from bench.gpu.running import Stage, run_stages

# Seconds; each may need what an earlier one has measured or compiled. What is wanted least comes last. The first one
# reads torch from a disk that nobody has read it from before.
DEADLINES = {"device": 60.0, "correctness": 90.0, "kernels": 125.0, "steps": 80.0, "server": 165.0, "sweep": 60.0}
LIMIT = 535.0  # seconds for all of it
# A rehearsal shows that everything runs, on however busy a machine: it has so many times as long.
PATIENCE = 10


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", type=_names, default=list(DEADLINES), help=f"of {', '.join(DEADLINES)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: bench/results/DATE-DEVICE")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="wheels of packages that are missing here")
    parser.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for everything (default: 535)")
    parser.add_argument("--missing", action="store_true", help="only say what the server lacks")
    parser.add_argument("--report", action="store_true", help="only fill docs/performance.md from the newest results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, into a temporary folder")
    options = parser.parse_args()
    if options.report:
        report()
        return 0
    # Ended from outside, it still ends the stage that runs.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as site:
        if options.wheels is not None:
            install(options.wheels, Path(site))
            sys.path.insert(0, site)
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
        missing = missing_packages()
        if missing:
            print(f"the stages steps and server need {', '.join(missing)}. Fetch them elsewhere, come with --wheels:")
            print(fetch_command(missing, python_version=f"{sys.version_info.major}.{sys.version_info.minor}"))
        if options.missing:
            print("" if missing else "nothing is missing")
            return 1 if missing else 0
        return _check(options)


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in DEADLINES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no stage {', '.join(unknown)}; there are {', '.join(DEADLINES)}")
    return names


def _check(options: argparse.Namespace) -> int:
    device = "rehearsal on a CPU" if options.rehearse else gpu_name()
    if device is None:
        print("nvidia-smi finds no GPU here; --rehearse runs everything on a CPU", file=sys.stderr)
        return 2
    origin = Origin(datetime.date.today().isoformat(), device, _commit(), options.rehearse)
    folder = (options.out or _default_folder(origin)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{device}, results in {folder}", flush=True)
    patience = PATIENCE if options.rehearse else 1
    stages = [
        Stage(
            name,
            (sys.executable, "-m", "bench.gpu.stage", name, str(folder), json.dumps(asdict(origin))),
            DEADLINES[name] * patience,
        )
        for name in options.stages
    ]
    return 0 if run_stages(stages, folder, origin=origin, limit=options.limit * patience) else 1


def gpu_name() -> str | None:
    """Of the first GPU, as its driver says it; None where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    found = subprocess.run([tool, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    names = found.stdout.splitlines() if found.returncode == 0 else []
    return names[0].strip() if names else None


def _default_folder(origin: Origin) -> Path:
    if origin.rehearsal:
        return Path(tempfile.mkdtemp(prefix="gpu-check-rehearsal-"))
    return ROOT / "bench" / "results" / f"{origin.date}-{re.sub('[^a-z0-9]+', '-', origin.device.lower())}"


def _commit() -> str:
    """ "" where this is no checkout, as on a machine that got the files alone."""
    git = shutil.which("git")
    if git is None:
        return ""
    found = subprocess.run([git, "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
