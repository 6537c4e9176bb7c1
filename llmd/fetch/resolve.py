"""From what the user named to a safetensors folder on this machine: `fetch` chooses the way."""

from pathlib import Path

from llmd.errors import StartupFailed
from llmd.fetch.progress import Progress, ignore_progress
from llmd.fetch.source import SourceKind, classify, converted_dir, find_ready


def fetch(
    source: str | None,
    *,
    revision: str | None,
    cache_dir: Path,
    dummy: bool = False,
    progress: Progress = ignore_progress,
) -> Path:
    """The safetensors folder of `source` (None = the demo model); downloads or converts it if need be.
    dummy: a folder without weights will do.

    `revision` is that of a hub id. Raises StartupFailed with a remedy if there is no way to such a folder.
    """
    ready = find_ready(source, revision, cache_dir, dummy=dummy)
    if ready is not None:
        return ready
    try:
        if dummy and source is not None:
            from llmd.fetch.dummy import make_dummy

            return make_dummy(source, cache_dir)
        return _make(source, revision, cache_dir, progress)
    except OSError as error:
        raise StartupFailed(f"The model could not be made ready: {error}. The cache is {cache_dir}.") from error


def _make(source: str | None, revision: str | None, cache_dir: Path, progress: Progress) -> Path:
    # imported where needed: each way has its own large library
    if source is None:
        from llmd.fetch.demo import fetch_demo

        return fetch_demo(cache_dir, progress)
    if classify(source, revision) is SourceKind.GGUF:
        from llmd.fetch.gguf.convert import convert

        gguf_path = Path(source).expanduser()
        return convert(gguf_path, converted_dir(gguf_path, cache_dir), progress)

    from llmd.fetch.hub import download

    return download(source, revision, progress)
