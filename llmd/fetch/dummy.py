"""A folder for `--load-format dummy`: a model's sizes and some tokenizer, without weights. Speed can be measured on it.

A built-in configuration gets a tokenizer of its whole vocabulary: one token a byte, and a text for every other id, so
that each drawn token shows.
"""

import json
from pathlib import Path
from typing import Any

from llmd.errors import StartupFailed
from llmd.fetch.built_in import BUILT_IN
from llmd.fetch.folder import exclusive, new_folder

# Part of the name of every folder: raise it when what is written changes.
_VERSION = 2
_NEEDED = ("config.json", "tokenizer.json")

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def find_dummy(source: str | None, cache_dir: Path) -> Path | None:
    """The folder of `source`, a folder or the name of a built-in configuration; None if it is still to be made.

    Raises StartupFailed, with the names, for anything else.
    """
    if source is not None and (folder := Path(source).expanduser()).is_dir():
        missing = [name for name in _NEEDED if not (folder / name).is_file()]
        if missing:
            raise StartupFailed(f"{folder} is not a model folder: {' and '.join(missing)} missing.")
        return folder.absolute()
    if source is None or source not in BUILT_IN:
        raise StartupFailed(
            f"--load-format dummy takes a folder with {' and '.join(_NEEDED)}, or one of the built-in configurations: "
            f"{', '.join(BUILT_IN)}"
        )
    target = _folder_of(source, cache_dir)
    return target if target.is_dir() else None


def make_dummy(name: str, cache_dir: Path) -> Path:
    """Write the folder of a built-in configuration and return it; if it exists already, that is all."""
    target = _folder_of(name, cache_dir)
    with exclusive(target):
        if not target.is_dir():
            with new_folder(target) as folder:
                config = BUILT_IN[name]
                (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
                (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": _CHAT_TEMPLATE}) + "\n")
                (folder / "tokenizer.json").write_text(_tokenizer(config["vocab_size"], _special_tokens(config)))
    return target


def _folder_of(name: str, cache_dir: Path) -> Path:
    return cache_dir / "models" / f"{name}-dummy-v{_VERSION}"


def _special_tokens(config: Any) -> dict[int, str]:
    ends = config["eos_token_id"]
    ends = ends if isinstance(ends, list) else [ends]
    begin = {config["bos_token_id"]: "<|begin|>"} if "bos_token_id" in config else {}
    return begin | {token_id: f"<|end_{token_id}|>" for token_id in ends}


def _tokenizer(vocab_size: int, special_tokens: dict[int, str]) -> str:
    """tokenizer.json. Text becomes bytes; what a model draws may be any id, whose text is its number."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    texts = dict(special_tokens)
    free_ids = (token_id for token_id in range(vocab_size) if token_id not in texts)
    texts |= dict(zip(free_ids, sorted(pre_tokenizers.ByteLevel.alphabet()), strict=False))
    # Ġ is the byte-level alphabet's space
    vocab = {texts.get(token_id, f"Ġ{token_id}"): token_id for token_id in range(vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special_tokens.values()])
    return str(tokenizer.to_str())
