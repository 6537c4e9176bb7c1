"""From what was typed to what is meant: flags become a `Config`, in one place. Knows no process and no model file."""

import argparse
import importlib.util
import re
from pathlib import Path

from llmd.config import CacheConfig, Config, HttpConfig, LogConfig, ModelConfig, SchedulerConfig, SupervisorConfig
from llmd.errors import StartupFailed
from llmd.fetch.source import DEMO_MODEL_NAME, default_cache_dir
from llmd.server.api_keys import key_digest, key_fault, read_key_file

# (sequences at once, tokens a step). On a CPU a token takes about 4 ms: more of them would make everyone's next token
# wait too long. On a GPU the weights that a step reads serve 256 sequences in the time of one.
_CPU_LIMITS = (64, 256)
_GPU_LIMITS = (256, 2048)
# as many as one request may have; a server that runs more at once must let them all come in at once too
_QUEUED_REQS = 1024

# scheme://host[:port] as a browser writes it (RFC 6454): no path, no user
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/@?#\s,]+")

_HTTP_URL = re.compile(r"https?://[^/\s]+(/\S*)?")
_OTEL_MODULES = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http.trace_exporter")


def resolve(flags: argparse.Namespace) -> Config:
    """The configuration that these flags ask for. Raises StartupFailed where they contradict one another."""
    if flags.uds is not None and (flags.host, flags.port) != (None, None):
        raise StartupFailed(f"--uds {flags.uds} listens on no address: leave out --host and --port, or --uds")
    source = _source(flags)
    model = ModelConfig(
        source=source,
        load_format=flags.load_format,
        revision=flags.revision,
        cache_dir=flags.download_dir or str(default_cache_dir()),
        served_names=tuple(flags.served_model_name or [shown_name(source)]),
        dtype=flags.dtype,
        max_model_len=flags.max_model_len,
        chat_template=_chat_template(flags.chat_template),
        use_model_defaults=flags.generation_config == "auto",
        device=flags.device,
        enforce_eager=flags.enforce_eager,
        threads=flags.threads,
    )
    cache = CacheConfig(
        block_size=flags.block_size,
        dtype="fp8" if flags.kv_cache_dtype == "fp8_e4m3" else flags.kv_cache_dtype,
        memory_bytes=flags.kv_cache_memory_bytes,
        memory_utilization=flags.gpu_memory_utilization,
        prefix_caching=flags.enable_prefix_caching,
    )
    usual_seqs, usual_step_tokens = _GPU_LIMITS if _has_gpu(flags.device) else _CPU_LIMITS
    max_num_seqs = flags.max_num_seqs or min(usual_seqs, flags.max_num_batched_tokens or usual_seqs)
    step_tokens = flags.max_num_batched_tokens or max(usual_step_tokens, 2 * max_num_seqs)
    if step_tokens < max_num_seqs:
        raise StartupFailed(
            f"--max-num-batched-tokens {step_tokens} is less than --max-num-seqs {max_num_seqs}: a step could "
            "not give every running sequence its next token"
        )
    scheduler = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=step_tokens,
        policy=flags.scheduling_policy,
    )
    http = HttpConfig(
        num_frontends=flags.api_server_count,
        response_role=flags.response_role,
        max_body_bytes=flags.max_body_bytes,
        keep_alive_timeout=flags.keep_alive_timeout,
        drain_timeout=flags.drain_timeout,
        max_logprobs=flags.max_logprobs,
        max_num_queued_reqs=flags.max_num_queued_reqs or max(_QUEUED_REQS, 4 * max_num_seqs),
        max_num_queued_tokens=flags.max_num_queued_tokens,
        api_key_digests=_api_key_digests(flags.api_key or []),
        api_key_file=_api_key_file(flags.api_key_file),
        allowed_origins=tuple(_origin(text) for text in flags.allowed_origins or []),
        sse_keep_alive=flags.sse_keep_alive,
        otlp_traces_endpoint=_otlp_traces_endpoint(flags.otlp_traces_endpoint),
        ssl_certfile=flags.ssl_certfile,
        ssl_keyfile=flags.ssl_keyfile,
        ssl_ca_certs=flags.ssl_ca_certs,
    )
    _check_tls(http)
    supervisor = SupervisorConfig(hang_timeout=flags.hang_timeout, step_timeout=flags.step_timeout)
    return Config(
        model=model, cache=cache, scheduler=scheduler, http=http, supervisor=supervisor, log=log_config(flags)
    )


def log_config(flags: argparse.Namespace) -> LogConfig:
    """What these flags say of the log. Never fails, so that every other failure can be told in the log's form."""
    return LogConfig(
        format=flags.log_format,
        level=flags.log_level,
        access_log=flags.enable_access_log,
        requests=flags.enable_log_requests,
        max_len=flags.max_log_len,
    )


def shown_name(source: str | None) -> str:
    """The name a model has if the operator gives it none: a hub id as it is, a folder's or file's own name."""
    if source is None:
        return DEMO_MODEL_NAME
    path = Path(source)
    if not path.exists():
        return source
    return path.resolve().name.removesuffix(".gguf")


def _source(flags: argparse.Namespace) -> str | None:
    argument, option = flags.model_argument, flags.model
    if argument and option and argument != option:
        raise StartupFailed(f"two models are named: {argument} and --model {option}")
    source: str | None = argument or option
    return source


def _chat_template(value: str | None) -> str | None:
    if value is None:
        return None
    # a template's text has braces or line ends, which no sane file name has
    if "{" in value or "\n" in value:
        return value
    try:
        return Path(value).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise StartupFailed(f"--chat-template {value}: {error}") from error


def _api_key_digests(keys: list[str]) -> tuple[bytes, ...]:
    for number, key in enumerate(keys, 1):
        if fault := key_fault(key):
            # an empty one is a shell's unset variable: without this, the door would be open
            raise StartupFailed(f"--api-key: key {number} {fault}")
    return tuple(map(key_digest, keys))


def _api_key_file(file: str | None) -> str | None:
    if file is not None:
        try:
            read_key_file(file)
        except OSError as error:
            raise StartupFailed(f"--api-key-file {file}: {error.strerror or error}") from error
        except ValueError as error:
            raise StartupFailed(f"--api-key-file {file}: {error}") from error
    return file


def _origin(text: str) -> str:
    # a browser writes scheme and host in small letters, and compares letter by letter
    origin = text.lower()
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise StartupFailed(f"--allowed-origins {text}: this is not an origin, as https://chat.example.com:8443, nor *")
    return origin


def _otlp_traces_endpoint(url: str | None) -> str | None:
    if url is None:
        return None
    if not _HTTP_URL.fullmatch(url):
        raise StartupFailed(f"--otlp-traces-endpoint {url}: this is not a URL, as http://localhost:4318/v1/traces")
    if not all(map(_is_installed, _OTEL_MODULES)):
        raise StartupFailed("--otlp-traces-endpoint needs packages that are not installed: pip install 'llmd[otel]'")
    return url


def _is_installed(module: str) -> bool:
    """Whether a module could be imported; its packages are, it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _check_tls(http: HttpConfig) -> None:
    """The servers read these files themselves; who starts one hears here what is wrong with them."""
    if http.ssl_certfile is None:
        for flag, file in (("--ssl-keyfile", http.ssl_keyfile), ("--ssl-ca-certs", http.ssl_ca_certs)):
            if file is not None:
                raise StartupFailed(f"{flag} {file} needs a certificate: give it with --ssl-certfile")
        return
    # most servers run without TLS, and start without waiting for its import
    from llmd.server.tls import TlsFiles, load_context

    try:
        load_context(TlsFiles.of(http))
    except ValueError as error:
        raise StartupFailed(str(error)) from error


def _has_gpu(device: str) -> bool:
    # the real question, "does torch see a GPU", would cost the import of torch here
    return device == "cuda" or (device == "auto" and Path("/dev/nvidiactl").exists())
