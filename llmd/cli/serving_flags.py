"""The flags of `serve` and `check`, each with its group, type and help. Knows nothing of what becomes of them."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# not the parser's, so that what was typed can be told from them
DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000

_DEVICES = ("auto", "cpu", "cuda")
_DTYPES = ("auto", "float32", "bfloat16", "float16")


def token_count(text: str) -> int:
    """A number of tokens: 8192, 32k (decimal thousand, as vLLM reads it), 32K (1024)."""
    return _scaled(text, {"k": 1000, "K": 1024, "m": 1000**2, "M": 1024**2})


def byte_count(text: str) -> int:
    """A number of bytes: 1073741824, 4G, 512M (powers of 1024)."""
    return _scaled(text.upper(), {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40})


def _scaled(text: str, units: dict[str, int]) -> int:
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    value = int(float(number) * unit)
    if value <= 0:
        raise ValueError(f"{text} is not positive")
    return value


def _at_least(minimum: float, convert: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = convert(text)
        # a NaN is not less than anything either
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return value

    return parse


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _block_size(text: str) -> int:
    value = int(text)
    if value not in (16, 32, 64):
        raise argparse.ArgumentTypeError(f"{text} is not 16, 32 or 64")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not a port")
    return value


def add_serving_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the same names; flags win over it")
    _add_model_flags(parser.add_argument_group("model"))
    _add_memory_flags(parser.add_argument_group("device and memory"))
    _add_scheduling_flags(parser.add_argument_group("scheduling"))
    _add_http_flags(parser.add_argument_group("HTTP"))
    _add_door_flags(parser.add_argument_group("keys and browsers"))
    _add_tls_flags(parser.add_argument_group("TLS"))
    _add_supervision_flags(parser.add_argument_group("ends and hangs"))
    _add_log_flags(parser.add_argument_group("logs and tracing"))


def _add_model_flags(model: argparse._ArgumentGroup) -> None:
    model.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    model.add_argument(
        "--model",
        metavar="MODEL",
        help="Hugging Face folder, .gguf file or hub id; without it the demo model SmolLM2-135M-Instruct",
    )
    model.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        default="auto",
        help="dummy: random weights, to measure speed without a download; MODEL is then a folder with config.json and "
        "tokenizer.json or a built-in configuration such as llama-3.1-8b (default: auto)",
    )
    model.add_argument("--revision", help="branch, tag or commit of a hub id (default: main)")
    model.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="names to answer to; the first is shown (default: the last part of MODEL)",
    )
    model.add_argument(
        "--dtype", choices=_DTYPES, default="auto", help="number format of weights and computation (default: auto)"
    )
    model.add_argument(
        "--max-model-len",
        type=token_count,
        metavar="N",
        help="tokens of prompt and answer, e.g. 8192 or 32k (default: what the model allows and memory holds)",
    )
    model.add_argument("--chat-template", metavar="FILE", help="Jinja template, or its text (default: the model's own)")
    model.add_argument(
        "--generation-config",
        choices=("openai", "auto"),
        default="openai",
        help="where sampling defaults come from: OpenAI's, or auto: the model's generation_config.json "
        "(default: openai)",
    )
    model.add_argument(
        "--download-dir", metavar="DIR", help="where downloads and conversions go (default: ~/.cache/llmd)"
    )


def _add_memory_flags(device: argparse._ArgumentGroup) -> None:
    device.add_argument("--device", choices=_DEVICES, default="auto", help="where to compute (default: auto)")
    device.add_argument(
        "--enforce-eager",
        action="store_true",
        help="launch each kernel of a GPU's steps, instead of capturing them as CUDA graphs: slower, to find faults "
        "(no effect on a CPU)",
    )
    device.add_argument(
        "--threads", type=_at_least(1, int), metavar="N", help="compute threads on a CPU (default: one a core)"
    )
    device.add_argument(
        "--gpu-memory-utilization",
        type=_fraction,
        default=0.9,
        metavar="X",
        help="share of the GPU's memory to use (default: 0.9)",
    )
    device.add_argument(
        "--kv-cache-memory-bytes",
        type=byte_count,
        metavar="N",
        help="size of the KV cache, e.g. 4G (default: on a CPU half of the memory that is free, at most 4G; on a GPU "
        "what is left of its share)",
    )
    device.add_argument(
        "--kv-cache-dtype",
        choices=(*_DTYPES, "fp8", "fp8_e4m3"),
        default="auto",
        help="number format of keys and values; fp8 holds twice to four times the tokens and rounds them to three bits "
        "of mantissa, with a scale for each token and head (default: auto, as --dtype)",
    )
    device.add_argument(
        "--block-size", type=_block_size, default=16, metavar="N", help="tokens a KV block (default: 16)"
    )
    device.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="reuse the KV of equal prefixes (default: on)",
    )


def _add_scheduling_flags(scheduling: argparse._ArgumentGroup) -> None:
    scheduling.add_argument(
        "--max-num-seqs",
        type=_at_least(1, int),
        metavar="N",
        help="sequences that run at once (default: 64 on a CPU, 256 on a GPU)",
    )
    scheduling.add_argument(
        "--max-num-batched-tokens",
        type=_at_least(8, token_count),
        metavar="N",
        help="tokens a step (default: 256 on a CPU, 2048 on a GPU)",
    )
    scheduling.add_argument(
        "--scheduling-policy",
        choices=("fcfs", "priority"),
        default="fcfs",
        help="order of waiting requests; priority: the lowest `priority` field first (default: fcfs)",
    )
    scheduling.add_argument(
        "--max-num-queued-reqs",
        type=_at_least(1, int),
        metavar="N",
        help="sequences of a server process that may wait for their first token; more get a 429 (default: 1024, or "
        "four times --max-num-seqs if that is more)",
    )
    scheduling.add_argument(
        "--max-num-queued-tokens",
        type=token_count,
        default=1_000_000,
        metavar="N",
        help="the same by tokens of their prompts, e.g. 200k (default: 1000k)",
    )


def _add_http_flags(http: argparse._ArgumentGroup) -> None:
    seconds = _at_least(0, float)
    http.add_argument("--host", help=f"address to listen on (default: {DEFAULT_HOST})")
    http.add_argument("--port", type=_port, help=f"0 takes a free one and prints it (default: {DEFAULT_PORT})")
    http.add_argument("--uds", metavar="PATH", help="listen on a unix socket (mode 0600) instead of --host and --port")
    http.add_argument(
        "--api-server-count",
        type=_at_least(1, int),
        default=1,
        metavar="N",
        help="server processes on the port (default: 1)",
    )
    http.add_argument(
        "--response-role",
        default="assistant",
        metavar="ROLE",
        help="the role that chat answers have (default: assistant)",
    )
    http.add_argument(
        "--max-logprobs",
        type=_at_least(0, int),
        default=20,
        metavar="N",
        help="the most that `logprobs` and `top_logprobs` may ask for (default: 20)",
    )
    http.add_argument(
        "--max-body-bytes",
        type=byte_count,
        default=16 << 20,
        metavar="N",
        help="size of a request's body (default: 16M)",
    )
    http.add_argument(
        "--keep-alive-timeout",
        type=seconds,
        default=75.0,
        metavar="SECONDS",
        help="how long an idle connection stays open (default: 75)",
    )
    http.add_argument(
        "--sse-keep-alive",
        type=seconds,
        default=15.0,
        metavar="SECONDS",
        help="a stream that has nothing to say sends a comment so often; 0: never (default: 15)",
    )


def _add_door_flags(doors: argparse._ArgumentGroup) -> None:
    doors.add_argument(
        "--api-key",
        nargs="+",
        metavar="KEY",
        help="ask for one of these keys; `ps` shows them to every user of this machine, so better use --api-key-file",
    )
    doors.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="the same, one key a line (lines that begin with # are comments); read again when it changes",
    )
    doors.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="whose pages may use this server from a browser (CORS), e.g. https://chat.example.com, or * "
        "(default: nobody's)",
    )


def _add_log_flags(logs: argparse._ArgumentGroup) -> None:
    logs.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="form of every line (default: text)"
    )
    logs.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="what is less than this is not logged (default: info)",
    )
    logs.add_argument(
        "--enable-access-log",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="log every request when it has ended: who, what, how long, how many tokens (default: off)",
    )
    logs.add_argument(
        "--enable-log-requests",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="log parameters and PROMPTS of every request (default: off)",
    )
    logs.add_argument(
        "--max-log-len",
        type=_at_least(0, int),
        default=256,
        metavar="N",
        help="characters of a prompt that --enable-log-requests shows (default: 256)",
    )
    logs.add_argument(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="send an OpenTelemetry span of each request there, e.g. http://localhost:4318/v1/traces; needs llmd[otel]",
    )


def _add_tls_flags(tls: argparse._ArgumentGroup) -> None:
    tls.add_argument(
        "--ssl-certfile",
        metavar="FILE",
        help="serve https (HTTP/2 and HTTP/1.1) with this certificate: PEM, the server's own first, then those between "
        "it and a root; read again when it changes, as are the next two",
    )
    tls.add_argument(
        "--ssl-keyfile",
        metavar="FILE",
        help="its private key: PEM, not encrypted (default: it lies in --ssl-certfile)",
    )
    tls.add_argument(
        "--ssl-ca-certs",
        metavar="FILE",
        help="mutual TLS: let in only clients that show a certificate which one of these has signed",
    )


def _add_supervision_flags(supervision: argparse._ArgumentGroup) -> None:
    supervision.add_argument(
        "--drain-timeout",
        type=_at_least(0, float),
        default=30.0,
        metavar="SECONDS",
        help="for running requests to finish after SIGTERM or Ctrl-C; a second one ends at once (default: 30)",
    )
    supervision.add_argument(
        "--hang-timeout",
        # a beat comes once a second: less than two would take one that is a little late for a hang
        type=_at_least(2, float),
        default=10.0,
        metavar="SECONDS",
        help="replace a process that gives no sign of life for so long (default: 10; servers get three times that)",
    )
    supervision.add_argument(
        "--step-timeout",
        type=_at_least(1, float),
        default=300.0,
        metavar="SECONDS",
        help="restart the engine when a step gives no result for so long (default: 300)",
    )
