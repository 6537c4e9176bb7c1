"""What the user named as the model, and whether it is ready on this machine.

The supervisor asks at its start, so this takes milliseconds: the standard library only, no network, no file read but
small JSON.
"""

import os
import re
from enum import Enum, auto
from pathlib import Path
from typing import Any

from llmd.errors import StartupFailed
from llmd.fetch.built_in import BUILT_IN
from llmd.fetch.dummy import find_dummy

# Part of the name of every converted folder: raise it when the converter's output changes.
CONVERSION_VERSION = 1
DEMO_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_REVISION = "main"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_COMMIT_HASH = re.compile(r"[0-9a-f]{40}")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INDEX_NAME = "model.safetensors.index.json"


class SourceKind(Enum):
    """Where a model comes from."""

    DEMO = auto()  # nothing was named
    FOLDER = auto()
    GGUF = auto()
    HUB = auto()


def default_cache_dir() -> Path:
    """Where downloads and conversions go unless the user says otherwise (XDG base directories)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmd"


def classify(source: str | None, revision: str | None) -> SourceKind:
    """What `source` is. A path that exists wins over a hub id of the same spelling.

    Raises StartupFailed if it is nothing that could be served, or if a revision is given for what has none.
    """
    kind = _kind(source)
    if revision is not None and kind is not SourceKind.HUB:
        raise StartupFailed(
            f"--revision {revision} names a version of a hub repository, but the model is {_describe(source, kind)}. "
            "Leave --revision out, or name the model by its hub id (owner/name)."
        )
    return kind


def find_ready(source: str | None, revision: str | None, cache_dir: Path, *, dummy: bool = False) -> Path | None:
    """The safetensors folder of `source` if nothing has to be downloaded or converted first, else None.

    A finished download of a branch counts as ready without asking the hub for newer commits. Raises StartupFailed
    with a remedy if `source` can never be served. dummy: weights are not needed (`--load-format dummy`).
    """
    if dummy:
        if revision is not None:
            raise StartupFailed(f"--revision {revision} has no meaning without weights: leave out --load-format dummy")
        return find_dummy(source, cache_dir)
    try:
        return _find_ready(source, revision, cache_dir)
    except OSError as error:
        raise StartupFailed(f"The model {source} cannot be read: {error}.") from error


def demo_dir(cache_dir: Path) -> Path:
    """Where the demo model's safetensors folder is, or will be."""
    return cache_dir / "models" / f"{DEMO_MODEL_NAME}-v{CONVERSION_VERSION}"


def converted_dir(gguf_path: Path, cache_dir: Path) -> Path:
    """Where the conversion of a `.gguf` file is, or will be. Its name changes when the file does."""
    stat = gguf_path.stat()
    key = f"{stat.st_size:x}-{stat.st_mtime_ns:x}-v{CONVERSION_VERSION}"
    return cache_dir / "models" / f"{gguf_path.stem}-{key}"


def is_wanted(file_name: str) -> bool:
    """Whether llmd reads this file of a hub repository. `file_name` is its path inside the repository."""
    folder, _, name = file_name.rpartition("/")
    if folder:
        return folder == "additional_chat_templates" and name.endswith(".jinja")
    # `consolidated*` is the same weights a second time, in another naming
    return name.endswith((".safetensors", ".json", ".jinja")) and not name.startswith("consolidated")


def check_folder(folder: Path) -> None:
    """Raise StartupFailed, naming what is missing, unless `folder` holds a model that can be loaded."""
    missing = _missing_files(folder)
    if not missing:
        return
    names = sorted(path.name for path in folder.iterdir())
    if "weights (*.safetensors)" in missing:
        refuse_other_weights(names, str(folder))
    raise StartupFailed(
        f"{folder} is not a complete model folder: {', '.join(missing)} missing. It needs config.json, tokenizer.json "
        "and the weights as .safetensors, as Hugging Face repositories have them."
    )


def refuse_other_weights(names: list[str], place: str) -> None:
    """Raise StartupFailed if the only weights among these file names are of a kind that is not loaded from there."""
    pickles = [name for name in names if name.endswith(_PICKLE_SUFFIXES)]
    ggufs = [name for name in names if name.endswith(".gguf")]
    if ggufs:
        raise StartupFailed(
            f"{place} holds no .safetensors, but GGUF: {_listing(ggufs)}. Give the path of one .gguf file as the model."
        )
    if pickles:
        raise StartupFailed(
            f"{place} holds its weights only as pickle: {_listing(pickles)}. llmd does not load pickle, because a "
            "pickle can run code. Use a repository with .safetensors, or convert these files to safetensors first."
        )


def _find_ready(source: str | None, revision: str | None, cache_dir: Path) -> Path | None:
    kind = classify(source, revision)
    if source is None:
        return _existing(demo_dir(cache_dir))
    if kind is SourceKind.FOLDER:
        folder = Path(source).expanduser()
        check_folder(folder)
        return folder.absolute()
    if kind is SourceKind.GGUF:
        return _existing(converted_dir(Path(source).expanduser(), cache_dir))
    return _find_snapshot(source, revision or DEFAULT_REVISION)


def _kind(source: str | None) -> SourceKind:
    if source is None:
        return SourceKind.DEMO
    path = Path(source).expanduser()
    if path.is_dir():
        return SourceKind.FOLDER
    if path.exists():
        _check_is_gguf(path)
        return SourceKind.GGUF
    if _HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        return SourceKind.HUB
    if source in BUILT_IN:
        raise StartupFailed(f"{source} is a configuration without weights: it can be run with --load-format dummy")
    raise StartupFailed(
        f"There is no model at {source!r}. Give a folder with config.json and .safetensors, a .gguf file, or a hub id "
        "of the form owner/name."
    )


def _check_is_gguf(path: Path) -> None:
    if path.name.endswith((".safetensors", ".json")):
        raise StartupFailed(f"{path} is one file of a model. Give the folder that it is in: {path.parent}")
    with path.open("rb") as file:
        if file.read(4) == b"GGUF":
            return
    if path.name.endswith(_PICKLE_SUFFIXES):
        refuse_other_weights([path.name], str(path.parent))
    raise StartupFailed(f"{path} is not a GGUF file. Give a .gguf file, a model folder, or a hub id (owner/name).")


def _describe(source: str | None, kind: SourceKind) -> str:
    names = {SourceKind.DEMO: "the demo model", SourceKind.FOLDER: "the folder", SourceKind.GGUF: "the GGUF file"}
    return names[kind] + (f" {source}" if source else "")


def _existing(folder: Path) -> Path | None:
    # the rename that makes it appear is the last thing that a conversion does
    return folder if folder.is_dir() else None


def _missing_files(folder: Path) -> list[str]:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    index = folder / _INDEX_NAME
    if index.is_file():
        missing += [name for name in _indexed_files(index) if not (folder / name).is_file()]
    elif not any(folder.glob("*.safetensors")):
        missing.append("weights (*.safetensors)")
    return missing


def _indexed_files(index: Path) -> list[str]:
    try:
        return sorted(set(_read_json(index)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StartupFailed(f"{index} is not a readable index of weights: {error!r}. Download it again.") from error


def _find_snapshot(repo_id: str, revision: str) -> Path | None:
    """A complete snapshot in the cache that the hub's own library keeps (its documented layout)."""
    repo_dir = hub_cache_dir() / f"models--{repo_id.replace('/', '--')}"
    commit = revision
    if not _COMMIT_HASH.fullmatch(revision):
        try:
            commit = (repo_dir / "refs" / revision).read_text(encoding="ascii").strip()
        except OSError:
            return None
    snapshot = repo_dir / "snapshots" / commit
    if not snapshot.is_dir() or _missing_files(snapshot):
        return None
    listed = _listed_files(repo_dir / "trees" / f"{commit}.json")
    return snapshot if all((snapshot / name).is_file() for name in listed if is_wanted(name)) else None


def hub_cache_dir() -> Path:
    """Where huggingface_hub keeps its downloads: its environment variables, its defaults."""
    if cache := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return _expand(cache)
    if home := os.environ.get("HF_HOME"):
        return _expand(home) / "hub"
    return _expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface" / "hub"


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _listed_files(tree: Path) -> list[str]:
    # newer versions of the library keep the repository's list of files; without it `_missing_files` has to do
    try:
        return list(_read_json(tree)["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _read_json(path: Path) -> Any:
    import json  # here, because it would be half of this module's import time and most starts do without it

    return json.loads(path.read_text(encoding="utf-8"))


def _listing(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
