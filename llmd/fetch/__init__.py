"""From what the user named to a safetensors folder: a folder, a hub id, a `.gguf` file or the demo model.

A process of its own (`python -m llmd.fetch`) that ends when the folder is there; `fetch` does the same in this process.
Knows nothing of requests, engines and torch. Importing it is cheap: the supervisor does.
"""

from llmd.fetch.resolve import fetch

__all__ = ["fetch"]
