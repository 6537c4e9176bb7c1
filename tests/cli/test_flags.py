"""What can be typed, and what it comes to."""

import hashlib
from pathlib import Path

import pytest

from llmd.cli.flags import build_parser, with_config_file
from llmd.cli.resolve import resolve
from llmd.cli.serving_flags import byte_count, token_count
from llmd.config import Config, LogConfig
from llmd.errors import StartupFailed
from tests.server.certificates import make_certificates


def config(*arguments: str) -> Config:
    return resolve(build_parser().parse_args(with_config_file(["serve", *arguments])))


def test_nothing_typed_is_the_demo_model_on_loopback() -> None:
    assert config().model.source is None
    assert config().model.served_names == ("SmolLM2-135M-Instruct",)
    assert config().cache.prefix_caching


def test_the_model_is_an_argument_or_a_flag() -> None:
    assert config("owner/name").model.source == config("--model", "owner/name").model.source == "owner/name"
    assert config("owner/name").model.served_names == ("owner/name",)
    with pytest.raises(StartupFailed, match="two models"):
        config("owner/name", "--model", "owner/other")


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "My-Model").mkdir()
    assert config(str(tmp_path / "My-Model")).model.served_names == ("My-Model",)
    (tmp_path / "small.gguf").touch()
    assert config(str(tmp_path / "small.gguf")).model.served_names == ("small",)


@pytest.mark.parametrize(("text", "count"), [("8192", 8192), ("32k", 32_000), ("32K", 32_768), ("1.5k", 1500)])
def test_token_counts(text: str, count: int) -> None:
    assert token_count(text) == count


@pytest.mark.parametrize(("text", "count"), [("1024", 1024), ("4G", 4 << 30), ("512m", 512 << 20)])
def test_byte_counts(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-model-len", "0"),
        ("--max-model-len", "long"),
        ("--kv-cache-memory-bytes", "-1"),
        ("--gpu-memory-utilization", "1.5"),
        ("--block-size", "7"),
        ("--port", "70000"),
        ("--max-num-seqs", "0"),
        ("--max-num-queued-reqs", "0"),
        ("--max-num-queued-tokens", "0"),
        ("--hang-timeout", "1"),
        ("--step-timeout", "0"),
        ("--drain-timeout", "nan"),
        ("--dtype", "int4"),
        ("--log-format", "xml"),
        ("--log-level", "loud"),
        ("--max-log-len", "-1"),
        ("--sse-keep-alive", "-1"),
        ("--max-model", "5"),  # no abbreviations
    ],
    ids=" ".join,
)
def test_nonsense_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        config(*arguments)
    assert refused.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_file_holds_the_same_names_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "llmd.toml"
    file.write_text(
        'model = "owner/name"\nport = 9000\nserved-model-name = ["a", "b"]\n'
        'enable_prefix_caching = false\nmax-model-len = "4K"\n'
    )
    arguments = ("--config", str(file), "--max-model-len", "9001")
    typed = config(*arguments)
    assert typed.model.source == "owner/name"
    assert typed.model.served_names == ("a", "b")
    assert typed.model.max_model_len == 9001
    assert build_parser().parse_args(with_config_file(["serve", *arguments])).port == 9000
    assert not typed.cache.prefix_caching
    # a list in the file does not take the argument that follows
    assert config("--config", str(file), "owner/name").model.served_names == ("a", "b")


def test_a_file_with_an_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "llmd.toml"
    file.write_text("prot = 9000\n")
    with pytest.raises(SystemExit):
        config("--config", str(file))
    assert "--prot" in capsys.readouterr().err
    file.write_text("not toml")
    with pytest.raises(StartupFailed, match="toml"):
        config("--config", str(file))


def test_a_chat_template_is_a_file_or_its_text(tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("{{ messages }}")
    assert config("--chat-template", str(file)).model.chat_template == "{{ messages }}"
    assert config("--chat-template", "{{ messages }}").model.chat_template == "{{ messages }}"
    with pytest.raises(StartupFailed, match="missing"):
        config("--chat-template", str(tmp_path / "missing"))


def test_a_step_must_hold_every_running_sequence() -> None:
    with pytest.raises(StartupFailed, match="--max-num-seqs 64"):
        config("--max-num-batched-tokens", "32", "--max-num-seqs", "64")
    assert config("--max-num-batched-tokens", "32").scheduler.max_num_seqs == 32
    assert config("--max-num-seqs", "1000").scheduler.max_num_batched_tokens >= 1000


def test_a_gpu_runs_more_at_once() -> None:
    on_cpu, on_gpu = config("--device", "cpu").scheduler, config("--device", "cuda").scheduler
    assert (on_cpu.max_num_seqs, on_cpu.max_num_batched_tokens) == (64, 256)
    assert (on_gpu.max_num_seqs, on_gpu.max_num_batched_tokens) == (256, 2048)


def test_keys_leave_the_command_line_as_digests_only(tmp_path: Path) -> None:
    assert config().http.api_key_digests == ()
    digests = config("--api-key", "sk-one", "sk-two").http.api_key_digests
    assert digests == tuple(hashlib.sha256(key).digest() for key in (b"sk-one", b"sk-two"))
    assert "sk-one" not in repr(config("--api-key", "sk-one"))
    file = tmp_path / "keys"
    file.write_text("sk-three\n")
    assert config("--api-key-file", str(file)).http.api_key_file == str(file)


@pytest.mark.parametrize("key", ["", "sk secret", "sk-secrét", "sk-secret\n"])
def test_what_no_header_can_carry_is_no_key(key: str) -> None:
    with pytest.raises(StartupFailed, match="key 2") as refused:
        config("--api-key", "sk-one", key)
    assert "sk" not in str(refused.value)


@pytest.mark.parametrize("line", ["sk secret", "sk-secrét", "sk-secret # of Anna"])
def test_a_key_file_with_such_a_line_is_refused(line: str, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"sk-one\n{line}\n")
    with pytest.raises(StartupFailed, match="line 2") as refused:
        config("--api-key-file", str(file))
    assert "sk" not in str(refused.value)


def test_a_key_file_must_be_there_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupFailed, match="No such file"):
        config("--api-key-file", str(tmp_path / "missing"))
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(StartupFailed, match="no key"):
        config("--api-key-file", str(tmp_path / "empty"))
    with pytest.raises(StartupFailed, match="regular file"):
        config("--api-key-file", str(tmp_path))


def test_origins_are_as_browsers_write_them() -> None:
    assert config().http.allowed_origins == ()
    given = ("https://Chat.example.com", "http://[::1]:3000", "tauri://localhost", "*")
    assert config("--allowed-origins", *given).http.allowed_origins == (
        *("https://chat.example.com", "http://[::1]:3000", "tauri://localhost", "*"),
    )


@pytest.mark.parametrize("origin", ["", "chat.example.com", "https://a.b/", "https://a.b/c", "null", '["*"]'])
def test_what_is_no_origin_is_refused(origin: str) -> None:
    with pytest.raises(StartupFailed, match="not an origin"):
        config("--allowed-origins", origin)


def test_the_queue_is_bounded_and_no_smaller_than_what_runs() -> None:
    assert config().http.max_num_queued_reqs == 1024
    assert config().http.max_num_queued_tokens == 1_000_000
    assert config("--max-num-seqs", "1000").http.max_num_queued_reqs == 4000
    typed = config("--max-num-queued-reqs", "5", "--max-num-queued-tokens", "2k").http
    assert (typed.max_num_queued_reqs, typed.max_num_queued_tokens) == (5, 2000)


def test_the_log_is_plain_and_discreet_unless_asked() -> None:
    assert config().log == LogConfig(format="text", level="info", access_log=False, requests=False, max_len=256)
    flags = ("--log-format", "json", "--log-level", "debug", "--enable-access-log", "--enable-log-requests")
    assert config(*flags, "--max-log-len", "0").log == LogConfig(
        format="json", level="debug", access_log=True, requests=True, max_len=0
    )
    assert config().http.sse_keep_alive == 15
    assert config("--sse-keep-alive", "0").http.sse_keep_alive == 0


def test_spans_need_a_url_and_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config().http.otlp_traces_endpoint is None
    for url in ("localhost:4318", "grpc://localhost:4317", "http://"):
        with pytest.raises(StartupFailed, match="not a URL"):
            config("--otlp-traces-endpoint", url)
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(StartupFailed, match=r"pip install 'llmd\[otel\]'"):
        config("--otlp-traces-endpoint", "http://localhost:4318/v1/traces")
    monkeypatch.setattr("importlib.util.find_spec", lambda module: module)
    url = "http://localhost:4318"
    assert config("--otlp-traces-endpoint", url).http.otlp_traces_endpoint == url


def test_when_a_process_counts_as_lost() -> None:
    assert (config().supervisor.hang_timeout, config().supervisor.step_timeout) == (10, 300)
    typed = config("--hang-timeout", "2.5", "--step-timeout", "60").supervisor
    assert (typed.hang_timeout, typed.step_timeout) == (2.5, 60)


def test_help_is_grouped(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["serve", "--help"])
    text = capsys.readouterr().out
    groups = ("model", "device and memory", "scheduling", "HTTP", "keys and browsers", "TLS", "ends and hangs")
    assert all(f"\n{group}:\n" in text for group in groups)


def test_tls_files_go_together(tmp_path: Path) -> None:
    assert config().http.ssl_certfile is None
    for flag in ("--ssl-keyfile", "--ssl-ca-certs"):
        with pytest.raises(StartupFailed, match="--ssl-certfile"):
            config(flag, "some.pem")
    with pytest.raises(StartupFailed, match=r"missing\.pem: No such file"):
        config("--ssl-certfile", str(tmp_path / "missing.pem"))
    made = make_certificates(tmp_path)
    http = config("--ssl-certfile", str(made.certfile), "--ssl-keyfile", str(made.keyfile)).http
    assert (http.ssl_certfile, http.ssl_keyfile, http.ssl_ca_certs) == (str(made.certfile), str(made.keyfile), None)
    with pytest.raises(StartupFailed, match="no private key"):
        config("--ssl-certfile", str(made.certfile))


@pytest.mark.parametrize("address", [("--host", "0.0.0.0"), ("--port", "8000"), ("--host", "::1", "--port", "0")])
def test_a_unix_socket_and_an_address_contradict_each_other(address: tuple[str, ...]) -> None:
    with pytest.raises(StartupFailed, match="leave out --host and --port, or --uds"):
        config("--uds", "llmd.sock", *address)
    assert config("--uds", "llmd.sock")
