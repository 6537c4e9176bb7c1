"""Whether a file of the operator's has changed. Knows nothing of what is in it."""

import os

# of its name and content: whoever changes the file changes one of these
FileStamp = tuple[int, int, int, int, int]


def file_stamp(file: str) -> FileStamp | None:
    """Another one after every change; None if the file cannot be looked at."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
