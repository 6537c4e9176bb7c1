"""Where compiled Triton kernels are kept, so that a second start compiles nothing. Imports Triton only when asked."""

import re
import threading
from pathlib import Path

import torch


def keep_compiled_kernels(parent: Path, device: torch.device) -> Path:
    """Have this process look for compiled kernels in a folder of `parent`, and put new ones there → that folder.

    Its name says for which device they are and which PyTorch and Triton have made them. Triton finds a kernel there by
    its source and by what it was compiled for, so a folder that others have filled is never wrong. Several processes
    may share it. Raises OSError if it cannot be made.
    """
    import triton
    from triton.runtime.cache import triton_key

    # Before Triton looks for its first kernel it reads all of itself, 400 MB, to know which one it is.
    threading.Thread(target=triton_key, name="triton version", daemon=True).start()
    name = re.sub(r"[^\w.+-]+", "-", torch.cuda.get_device_name(device))
    folder = parent / f"{name}-torch-{torch.__version__}-triton-{triton.__version__}"
    folder.mkdir(parents=True, exist_ok=True)
    triton.knobs.cache.dir = str(folder)
    return folder
