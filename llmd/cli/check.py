"""`llmd check`: what `serve` would do with the same flags, from files and arithmetic alone; no weight is loaded."""

import argparse
import json
import sys
from pathlib import Path

from llmd.cli.resolve import resolve
from llmd.config import Config
from llmd.errors import StartupFailed, UnsupportedModel
from llmd.fetch import fetch
from llmd.fetch.source import find_ready
from llmd.machine import available_main_memory, num_free_cores
from llmd.model.ledger import plan_memory
from llmd.model.memory import num_parameters
from llmd.model.quantization import MXFP4
from llmd.model.quantized_layouts import has_quantized_kernels
from llmd.model.spec import ModelSpec, parse_spec
from llmd.text.chat_template import ChatTemplate
from llmd.text.tokenizer import Tokenizer

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


def check(flags: argparse.Namespace) -> int:
    """Print a report. Returns the exit status; raises StartupFailed with what would stop `serve`."""
    config = resolve(flags)
    model_dir = _model_dir(config)
    spec = _spec(model_dir)
    for name, value in report(config, model_dir, spec):
        print(f"{name:12} {value}")
    return 0


def report(config: Config, model_dir: Path, spec: ModelSpec) -> list[tuple[str, str]]:
    """What would happen, as (name, value) lines."""
    rows = [
        ("model", f"{config.model.served_names[0]} in {model_dir}"),
        ("family", spec.architecture),
        ("parameters", f"{num_parameters(spec):,}"),
        ("layers", _layers(spec)),
        *_quantization_rows(config, spec),
    ]
    if config.model.device == "cuda":
        rows.append(("memory", "is worked out when the GPU's memory is known, at the start"))
    else:
        dtype_bytes = _dtype_bytes(config)
        ledger = plan_memory(
            spec,
            dtype_bytes=dtype_bytes,
            kv_dtype_bytes=dtype_bytes if config.cache.dtype == "auto" else _DTYPE_BYTES[config.cache.dtype],
            available_bytes=available_main_memory(),
            on_cpu=True,
            model=config.model,
            cache=config.cache,
            scheduler=config.scheduler,
        )
        first, *others = ledger.lines()
        rows.append(("memory", first.removeprefix("memory: ")))
        rows += [("", line) for line in others]
        rows.append(("threads", str(config.model.threads or num_free_cores())))
    scheduler = config.scheduler
    rows.append(("batch", f"{scheduler.max_num_seqs} sequences, {scheduler.max_num_batched_tokens} tokens a step"))
    rows += _text_rows(config, model_dir)
    return rows


def _dtype_bytes(config: Config) -> int:
    """Of weights and activations. As the worker chooses, "auto" is float32 on a CPU and bfloat16 on a GPU."""
    auto = "bfloat16" if config.model.device == "cuda" else "float32"
    return _DTYPE_BYTES[auto if config.model.dtype == "auto" else config.model.dtype]


def _quantization_rows(config: Config, spec: ModelSpec) -> list[tuple[str, str]]:
    if any(layer.moe is not None and layer.moe.mxfp4 for layer in spec.layers):
        what = f"experts alone: {MXFP4.describe()}"
    elif spec.quantization is not None:
        schemes = "; ".join(scheme.describe() for scheme in spec.quantization.schemes())
        what = f"{schemes} ({spec.quantization.method})"
    else:
        return []
    kept = has_quantized_kernels(on_cpu=config.model.device != "cuda", dtype_bytes=_dtype_bytes(config))
    fate = "products read the weights as they are" if kept else "weights are dequantised at load"
    return [("quantised", what), ("", f"{fate}; activations are not quantised")]


def _layers(spec: ModelSpec) -> str:
    windows = sorted({layer.window for layer in spec.layers if layer.window})
    windowed = sum(layer.window is not None for layer in spec.layers)
    text = f"{len(spec.layers)}, {spec.num_heads} heads over {spec.num_kv_heads} KV heads of {spec.head_dim}"
    text += " (expanded from latents)" if spec.latent else ""
    text += f", {windowed} with a window of {windows[0]}" if windows else ""
    moes = [layer.moe for layer in spec.layers if layer.moe]
    return text + (f", {len(moes)} with {moes[0].num_experts} experts, {moes[0].num_chosen} a token" if moes else "")


def _text_rows(config: Config, model_dir: Path) -> list[tuple[str, str]]:
    tokenizer = Tokenizer.load(model_dir)
    ends = ", ".join(tokenizer.token_text(token_id) for token_id in sorted(tokenizer.eos_token_ids))
    template = ChatTemplate.load(model_dir, special_tokens=tokenizer.named_tokens, override=config.model.chat_template)
    rows = [("tokenizer", f"{tokenizer.vocab_size:,} tokens, ends with {ends or 'nothing'}")]
    if not template.exists:
        return [*rows, ("template", "none: chat is refused; give one with --chat-template")]
    prompt = template.render([{"role": "user", "content": "Hello"}])
    return [*rows, ("template", f"“Hello” becomes {json.dumps(prompt, ensure_ascii=False)}")]


def _model_dir(config: Config) -> Path:
    model, cache_dir = config.model, Path(config.model.cache_dir)
    ready = find_ready(model.source, model.revision, cache_dir, dummy=model.load_format == "dummy")
    if ready is not None:
        return ready
    print("fetching the model", file=sys.stderr)
    return fetch(model.source, revision=model.revision, cache_dir=cache_dir, dummy=model.load_format == "dummy")


def _spec(model_dir: Path) -> ModelSpec:
    try:
        config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupFailed(f"{model_dir / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise UnsupportedModel(f"{model_dir / 'config.json'} is not a JSON object")
    return parse_spec(config)
