"""A `.gguf` file to a safetensors folder, once. Knows no family by name."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmd.errors import StartupFailed
from llmd.fetch.folder import exclusive, new_folder
from llmd.fetch.gguf.families import build_config, family_of, plan_tensors
from llmd.fetch.gguf.file import GgufFile
from llmd.fetch.gguf.tokenizer import TokenizerFiles, read_tokenizer
from llmd.fetch.gguf.weights import PlannedTensor, check_types, write_safetensors
from llmd.fetch.progress import Progress

_SPARE_BYTES = 64 << 20  # tokenizer and configuration, rounded up generously


def convert(gguf_path: Path, target: Path, progress: Progress) -> Path:
    """Make `target` from `gguf_path` and return it; if it exists already, that is all.

    Safe for several processes at once: one converts, the others wait. A conversion that does not end well leaves
    no `target`. Raises UnsupportedModel for what cannot be converted exactly, StartupFailed for a damaged file.
    """
    progress(f"converting {gguf_path.name}", None)
    with exclusive(target):
        if not target.is_dir():
            _convert(gguf_path, target, progress)
    return target


@dataclass(frozen=True, slots=True)
class _Plan:
    config: dict[str, Any]
    tensors: list[PlannedTensor]
    tokenizer: TokenizerFiles


def _convert(gguf_path: Path, target: Path, progress: Progress) -> None:
    plan = _plan(gguf_path)
    _check_space(target, plan.tensors)
    with new_folder(target) as folder:
        _write_json(folder / "config.json", plan.config)
        _write_tokenizer(folder, plan.tokenizer)
        write_safetensors(folder / "model.safetensors", plan.tensors, progress)


def _plan(gguf_path: Path) -> _Plan:
    """Everything that can be wrong with a file is found here, before anything is written."""
    file = GgufFile(gguf_path)
    try:
        family = family_of(file)
        config = build_config(file, family)
        tensors = plan_tensors(file, family, config)
        check_types(tensors)
        return _Plan(config, tensors, read_tokenizer(file))
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        # a value of the wrong type or size, in any of a hundred places
        raise StartupFailed(
            f"The header of {gguf_path} makes no sense ({type(error).__name__}: {error}). Download the file again."
        ) from error


def _write_tokenizer(folder: Path, files: TokenizerFiles) -> None:
    (folder / "tokenizer.json").write_text(files.tokenizer, encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", files.tokenizer_config)
    _write_json(folder / "generation_config.json", files.generation_config)
    for name, template in files.chat_templates.items():
        if name == "default":
            path = folder / "chat_template.jinja"
        else:
            path = folder / "additional_chat_templates" / f"{name}.jinja"
            path.parent.mkdir(exist_ok=True)
        path.write_text(template, encoding="utf-8")


def _check_space(target: Path, tensors: list[PlannedTensor]) -> None:
    needed = sum(tensor.num_bytes for tensor in tensors) + _SPARE_BYTES
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise StartupFailed(
            f"The converted model needs {needed / 1e9:.1f} GB in {target.parent}, where {free / 1e9:.1f} GB are free. "
            "Make room, or name another folder with --cache-dir."
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
