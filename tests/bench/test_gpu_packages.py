"""What the server lacks where nothing can be fetched: said before anything starts, and brought as wheels."""

import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from bench.gpu import packages


def test_nothing_is_missing_where_llmd_runs() -> None:
    assert packages.missing_packages() == []


def test_missing_packages_are_named_with_their_pins(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> object:
        if name.lower() in ("trio", "h2", "werkzeug"):
            raise PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(packages, "distribution", find)
    missing = packages.missing_packages()
    # Werkzeug is what Quart asks for, not llmd.
    assert [name.partition("==")[0] for name in missing] == ["h2", "trio", "Werkzeug"]
    assert all("==" in name for name in missing)
    command = packages.fetch_command(missing, python_version="3.12")
    assert "--python-version 3.12" in command
    assert command.endswith(" ".join(missing))


def test_wheels_are_installed_without_an_index(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "ANSWER = 42\n")
        wheel.writestr("carried-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr("carried-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carried-1.0.dist-info/RECORD", "")
    packages.install(wheels, site)
    program = "import carried, importlib.metadata as m; print(carried.ANSWER, m.version('carried'))"
    found = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(site)}, capture_output=True, text=True, check=True
    )
    assert found.stdout == "42 1.0\n"


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="there are no wheels in"):
        packages.install(tmp_path, tmp_path / "site")
