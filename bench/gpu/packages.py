"""What `llmd serve` needs that this Python lacks, and how it gets there where no package index can be reached."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent.parent
# Needed for .gguf files only, which nothing here reads.
_OPTIONAL = {"gguf"}
# Of the machines that wheels are fetched for: what manylinux tag a wheel has is its maker's choice.
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def missing_packages() -> list[str]:
    """What pyproject.toml asks for and no installed package is, and what those that are installed ask for in turn.

    As "name==version" where requirements.txt pins one. What a missing package would ask for is not known here.
    """
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    waiting = [Requirement(text) for text in pyproject["project"]["dependencies"]]
    seen: set[str] = set(_OPTIONAL)
    missing = []
    while waiting:
        requirement = waiting.pop()
        name = _normal(requirement.name)
        if name in seen or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            missing.append(_pins().get(name, requirement.name))
            continue
        # Whoever installed torch has seen to what it needs.
        if name != "torch":
            waiting += [Requirement(text) for text in found.requires or ()]
    return sorted(missing, key=str.lower)


def check_packages() -> None:
    """Raises SystemExit where one is missing."""
    if missing := missing_packages():
        raise SystemExit(f"this needs {', '.join(missing)}: see --missing and --wheels")


def fetch_command(missing: list[str], *, python_version: str) -> str:
    """What brings them, with all that they need, from a machine that reaches a package index."""
    platforms = " ".join(f"--platform {platform}" for platform in _PLATFORMS)
    return (
        f"python3 -m pip download --only-binary=:all: --implementation cp --python-version {python_version}"
        f" {platforms} -d WHEELS {' '.join(missing)}"
    )


def install(wheels: Path, target: Path) -> None:
    """Unpack every wheel of a folder, asking nobody and compiling nothing. Raises RuntimeError."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise RuntimeError(f"there are no wheels in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    command += ["--no-deps", "--no-compile", "--no-cache-dir", "--target", str(target), *files]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"pip cannot install the wheels of {wheels}: {found.stderr.strip()}")


def _pins() -> dict[str, str]:
    """name → "name==version" as requirements.txt has it for this Python."""
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                pins[_normal(requirement.name)] = f"{requirement.name}{requirement.specifier}"
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
