"""Downloads a model repository from the Hugging Face hub into the cache of the hub's own library.

The library does the work: tokens (HF_TOKEN), lost connections, its cache. What is ours is the choice of files, the
progress and messages that say what to do.
"""

import threading
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils.tqdm import tqdm

from llmd.errors import StartupFailed
from llmd.fetch.progress import Progress
from llmd.fetch.source import DEFAULT_REVISION, check_folder, hub_cache_dir, is_wanted, refuse_other_weights

_TIMEOUT = 10.0  # seconds for the hub to answer
_TOKEN_ADVICE = "Set HF_TOKEN to a token of an account that may read it (https://huggingface.co/settings/tokens)"


def download(repo_id: str, revision: str | None, progress: Progress) -> Path:
    """Download what llmd reads of `repo_id` and return the folder. Files that are there already are not fetched again.

    Raises StartupFailed, saying what to do, if the hub cannot be reached, refuses, or has no such model.
    """
    revision = revision or DEFAULT_REVISION
    progress(f"asking the hub for {repo_id}", None)
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=_TIMEOUT)
        sizes = _wanted_sizes(repo_id, info)
        folder = snapshot_download(
            repo_id,
            revision=revision,
            cache_dir=hub_cache_dir(),
            allow_patterns=list(sizes),
            tqdm_class=_progress_bar(repo_id, _missing_bytes(repo_id, info, sizes), progress),
        )
    except StartupFailed:
        raise
    except Exception as error:
        # the library's HTTP client is its own affair (another one in each major version), and so are its exceptions
        raise StartupFailed(_explain(error, repo_id, revision)) from error
    check_folder(Path(folder))
    return Path(folder)


def _wanted_sizes(repo_id: str, info: ModelInfo) -> dict[str, int]:
    """The files to download and their sizes in bytes. Raises StartupFailed if there are no weights among them."""
    files = info.siblings or []
    sizes = {file.rfilename: file.size or 0 for file in files if is_wanted(file.rfilename)}
    if not any(name.endswith(".safetensors") for name in sizes):
        refuse_other_weights([file.rfilename for file in files], f"The hub repository {repo_id}")
        raise StartupFailed(f"The hub repository {repo_id} holds no weights (.safetensors). Is it a model?")
    return sizes


def _missing_bytes(repo_id: str, info: ModelInfo, sizes: dict[str, int]) -> int:
    return sum(
        size
        for name, size in sizes.items()
        if not isinstance(try_to_load_from_cache(repo_id, name, cache_dir=hub_cache_dir(), revision=info.sha), str)
    )


def _progress_bar(repo_id: str, total: int, progress: Progress) -> type[Any]:
    """A silent bar class for the library, which makes several bars and advances them from several threads."""
    detail = f"downloading {repo_id} ({total / 1e6:.0f} MB)"
    lock = threading.Lock()
    bars: list[tqdm] = []  # those that count bytes; another one counts files

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            if kwargs.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            with lock:
                self.n += n or 0
                # bytes received and bytes on disk are two bars over the same files
                done = max((float(bar.n) for bar in bars), default=0.0)
                progress(detail, min(1.0, done / total) if total else None)

    return ByteCounter


def _explain(error: Exception, repo_id: str, revision: str) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is gated. Accept its terms at {constants.ENDPOINT}/{repo_id} and then set HF_TOKEN to a token "
            "of that account."
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}. Give a branch, tag or commit that it has with --revision."
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403, 404):
        return (
            f"The hub knows no model {repo_id}, or it is private (HTTP {status}). Check the spelling (owner/name). "
            f"If it is private: {_TOKEN_ADVICE}."
        )
    if isinstance(error, OfflineModeIsEnabled):
        return (
            f"{repo_id} is not complete in the cache and HF_HUB_OFFLINE forbids to download it. Unset HF_HUB_OFFLINE, "
            "or give the path of a model folder."
        )
    if status is not None:
        return f"The hub at {constants.ENDPOINT} failed to deliver {repo_id} (HTTP {status}). Try again later."
    return (
        f"{repo_id} could not be downloaded from {constants.ENDPOINT}: {_first_line(error)}. Check the network (or the "
        "proxy), or give the path of a model folder. Files that are complete will not be downloaded again."
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")
