"""Frozen configuration, one struct a component. Resolved once by `llmd.cli`; nobody writes to it afterwards.

A child process gets only its own slice, as the first frame on its control socket.
"""

from typing import Literal

from msgspec import Struct

SECONDS = 1.0
MIB = 1 << 20

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KvDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8"]
LoadFormat = Literal["auto", "dummy"]


class ModelConfig(Struct, frozen=True, kw_only=True):
    """Which model, and how it is presented."""

    source: str | None = None  # folder, .gguf file, hub id or built-in configuration; None = the demo model
    load_format: LoadFormat = "auto"  # dummy: random weights, whatever the folder holds
    revision: str | None = None  # of a hub id
    cache_dir: str  # where downloads and conversions go
    served_names: tuple[str, ...]  # names that answer to; the first is the one that is shown
    dtype: Dtype = "auto"
    max_model_len: int | None = None  # None = what the model allows, reduced to fit the memory
    chat_template: str | None = None  # Jinja source that replaces the model's own
    use_model_defaults: bool = False  # sampling defaults from generation_config.json
    device: Literal["auto", "cpu", "cuda"] = "auto"
    enforce_eager: bool = False  # a GPU captures no steps
    threads: int | None = None  # compute threads on a CPU; None = one a free core


class CacheConfig(Struct, frozen=True, kw_only=True):
    """The paged KV cache."""

    block_size: int = 16  # tokens
    dtype: KvDtype = "auto"  # of keys and values: auto = the model's, fp8 = float8_e4m3fn with a scale a token and head
    memory_bytes: int | None = None  # None = from the memory that is free
    memory_utilization: float = 0.9  # share of a GPU's memory for everything
    prefix_caching: bool = True


class SchedulerConfig(Struct, frozen=True, kw_only=True):
    """What may run at once."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512  # tokens a step
    max_steps_in_flight: int = 2
    policy: Literal["fcfs", "priority"] = "fcfs"


class HttpConfig(Struct, frozen=True, kw_only=True):
    """The HTTP side."""

    num_frontends: int = 1
    response_role: str = "assistant"
    max_body_bytes: int = 16 * MIB
    body_timeout: float = 30 * SECONDS  # for a whole request body to come in
    write_timeout: float = 30 * SECONDS  # for a client that does not read
    keep_alive_timeout: float = 75 * SECONDS
    drain_timeout: float = 30 * SECONDS  # for running work after SIGTERM
    max_logprobs: int = 20
    # sequences, and tokens of their prompts, that wait for their first token in one server process
    max_num_queued_reqs: int = 1024
    max_num_queued_tokens: int = 1_000_000
    api_key_digests: tuple[bytes, ...] = ()  # SHA-256 of each key of --api-key
    api_key_file: str | None = None  # more keys, one a line; read again when it changes
    allowed_origins: tuple[str, ...] = ()  # of pages in a browser (CORS); "*" = all, none = no CORS
    sse_keep_alive: float = 15 * SECONDS  # between comments in a stream that has nothing to say; 0 = none
    otlp_traces_endpoint: str | None = None  # URL that takes OpenTelemetry spans
    # PEM files, read again when they change; no certificate = no TLS
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None  # None = the key lies in the certfile
    ssl_ca_certs: str | None = None  # clients must show a certificate that one of these has signed

    @property
    def asks_for_keys(self) -> bool:
        return bool(self.api_key_digests) or self.api_key_file is not None


class LogConfig(Struct, frozen=True, kw_only=True):
    """What all processes write to stderr, and how."""

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"
    access_log: bool = False  # a line for every request that has ended
    requests: bool = False  # parameters and prompts of every request
    max_len: int = 256  # characters that are shown of a prompt


class SupervisorConfig(Struct, frozen=True, kw_only=True):
    """When a process that still exists counts as lost."""

    hang_timeout: float = 10 * SECONDS  # without a sign of life from it
    step_timeout: float = 300 * SECONDS  # without the result of a step


class ServerConfig(Struct, frozen=True, kw_only=True):
    """A server process: `python -m llmd.server`."""

    model: ModelConfig
    http: HttpConfig
    listen_fds: tuple[int, ...]  # inherited listening sockets, TCP or unix
    engine_path: str  # unix socket of the engine; connecting waits until the engine accepts
    log: LogConfig = LogConfig()
    index: int = 0  # which of `http.num_frontends`
    figures_dir: str | None = None  # where the server processes leave what they have counted for one another
    started_at: float = 0.0  # unix time, seconds: when all of it began, whatever was replaced since


class EngineConfig(Struct, frozen=True, kw_only=True):
    """An engine process: `python -m llmd.engine`."""

    cache: CacheConfig
    scheduler: SchedulerConfig
    server_listen_fd: int  # inherited listening unix socket for servers
    rank_fds: tuple[int, ...]  # inherited connected sockets, one to each rank
    step_timeout: float  # seconds
    log: LogConfig = LogConfig()


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """A worker process, one device rank: `python -m llmd.worker`."""

    model: ModelConfig
    model_dir: str  # a safetensors folder
    cache: CacheConfig
    scheduler: SchedulerConfig
    rank: int
    engine_fd: int  # inherited connected socket to the engine
    num_blocks: int | None = None  # of the KV cache, as before a restart; None = what memory holds
    log: LogConfig = LogConfig()


class FetchConfig(Struct, frozen=True, kw_only=True):
    """A fetcher process, `python -m llmd.fetch`: turns what the user named into a safetensors folder, and ends."""

    model: ModelConfig
    log: LogConfig = LogConfig()


class Config(Struct, frozen=True, kw_only=True):
    """Everything, as the supervisor knows it."""

    model: ModelConfig
    cache: CacheConfig
    scheduler: SchedulerConfig
    http: HttpConfig
    log: LogConfig = LogConfig()
    supervisor: SupervisorConfig = SupervisorConfig()
