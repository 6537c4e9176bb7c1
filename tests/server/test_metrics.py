"""What Prometheus reads: names, values, what becomes of them over restarts; and docs/metrics.md says all of it."""

import re
from pathlib import Path
from typing import Any

import msgspec
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import trio_test

from llmd.protocol.control import Stage, SystemState
from llmd.protocol.figures import EngineHistory
from llmd.protocol.generation import STEP_TOKENS_BUCKETS, EngineReady, EngineStatistics
from llmd.server.context import Server
from llmd.server.engine_history import heard, totals
from llmd.server.metrics import SequenceTimes
from tests.server.fake_engine import Application, application, run
from tests.server.live import until
from tests.server.test_app import client_of, make_server

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
READY = EngineReady(max_model_len=512, block_size=16, num_blocks=64, vocab_size=264)
STATISTICS = EngineStatistics(
    num_running=3, num_waiting=2, num_blocks=64, num_free_blocks=16, num_steps=9, num_prompt_tokens=100,
    num_output_tokens=50, num_preemptions=1, prefix_cache_queries=80, prefix_cache_hits=48,
    step_tokens=[0, 5, 3, *[0] * 10, 1], step_tokens_sum=20_000,
)  # fmt: skip

Labels = tuple[tuple[str, str], ...]
OURS: Labels = (("engine", "0"), ("model_name", "tiny"))


async def scrape(server: Server) -> str:
    response = await client_of(server).get("/metrics")
    assert response.content_type.startswith("text/plain; version=0.0.4")
    text: str = (await response.get_data()).decode()
    return text


def parse(text: str) -> dict[str, dict[Labels, float]]:
    """Sample name → labels → value."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def samples(server: Server) -> dict[str, dict[Labels, float]]:
    return parse(await scrape(server))


def connected(**http: Any) -> Server:
    """A server whose engine has said something."""
    server = make_server(**http)
    server.engine.ready = READY
    server.engine.history = heard(server.engine.history, STATISTICS)
    return server


# --- the document


def exposed(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Name and type as Prometheus is told them, and the labels of the samples but for a bucket's bound."""
    found = {}
    for family in re.split(r"^# HELP .*\n", text, flags=re.M)[1:]:
        type_line, _, lines = family.partition("\n")
        _, _, name, kind = type_line.split()
        found[name] = (kind, frozenset(re.findall(r'[{,](\w+)="', lines)) - {"le"})
    return found


@trio_test
async def test_the_document_lists_every_metric_with_type_and_labels() -> None:
    server = connected()
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w:]+)` \| (\w+) \|(.*?)\| .+ \|$", text, re.M)
    documented = {name: (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(rows) == len(documented)
    await scrape(server)  # one HTTP request, so that its labels are there
    assert documented == exposed(await scrape(server))


# --- the engine's


@trio_test
async def test_engine_figures_have_vllms_names() -> None:
    found = await samples(connected())
    ours = {name: values[OURS] for name, values in found.items() if OURS in values}
    expected = {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.75,
        "vllm:num_preemptions_total": 1,
        "vllm:prefix_cache_queries_total": 80,
        "vllm:prefix_cache_hits_total": 48,
        "vllm:gpu_prefix_cache_hit_rate": 0.6,
        "vllm:iteration_tokens_total_count": 9,
        "vllm:iteration_tokens_total_sum": 20_000,
    }
    assert ours == {**ours, **expected}
    assert found["vllm:num_requests_waiting_by_reason"] == {(*OURS, ("reason", "capacity")): 2}
    layout = (("block_size", "16"), ("engine", "0"), ("max_model_len", "512"), ("model_name", "tiny"))
    assert found["vllm:cache_config_info"] == {(*layout, ("num_gpu_blocks", "64")): 1}


@trio_test
async def test_steps_by_tokens_are_a_cumulative_histogram() -> None:
    buckets = (await samples(connected()))["vllm:iteration_tokens_total_bucket"]
    by_bound = {float(dict(labels)["le"]): count for labels, count in buckets.items()}
    assert list(by_bound) == [*STEP_TOKENS_BUCKETS, float("inf")]
    assert [by_bound[bound] for bound in (1, 8, 16, 16384, float("inf"))] == [0, 5, 8, 8, 9]


@trio_test
async def test_older_dashboards_find_their_names() -> None:
    server = connected()
    server.metrics.inter_token(0.02)
    found = await samples(server)
    for old, new in [
        ("vllm:gpu_cache_usage_perc", "vllm:kv_cache_usage_perc"),
        ("vllm:gpu_prefix_cache_hits_total", "vllm:prefix_cache_hits_total"),
        ("vllm:time_per_output_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket"),
        ("vllm:time_per_output_token_seconds_count", "vllm:inter_token_latency_seconds_count"),
    ]:
        assert found[old] == found[new] != {}


def test_while_the_engine_is_away_nothing_runs_and_all_that_is_open_waits(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, stall_after=1, die_after=[1]) as app, trio.open_nursery() as nursery:
            app.server.engine.history = heard(app.server.engine.history, STATISTICS)
            nursery.start_soon(app.chat)
            await app.engine.wait_until(lambda: len(app.engine.received) == 1)
            app.engine.is_up = False
            await until(lambda: app.server.engine.ready is None)
            found = await figures(app)
            assert found["vllm:num_requests_running"][OURS] == 0
            assert found["vllm:num_requests_waiting"][OURS] == 1
            assert found["vllm:kv_cache_usage_perc"][OURS] == 0
            assert "vllm:cache_config_info" not in found
            # what was counted stays
            assert found["vllm:prefix_cache_hits_total"][OURS] == 48
            app.engine.is_up, app.engine.stall_after = True, None

    run(main)


# --- counters over restarts


def test_a_new_engine_goes_on_counting_where_the_last_one_stopped() -> None:
    history = EngineHistory()
    assert totals(history) is None
    for num_steps, num_preemptions in [(0, 0), (5, 2), (9, 3), (0, 0), (4, 1), (1, 1)]:
        report = msgspec.structs.replace(STATISTICS, num_steps=num_steps, num_preemptions=num_preemptions)
        history = heard(history, report)
    total = totals(history)
    assert total is not None
    assert (total.num_steps, total.num_preemptions) == (9 + 4 + 1, 3 + 1 + 1)
    assert total.step_tokens == [0, 15, 9, *[0] * 10, 3]
    # the state is the last engine's
    assert (total.num_running, total.num_free_blocks) == (3, 16)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1), min_size=1))
def test_totals_never_fall(engines: list[list[int]]) -> None:
    history, last = EngineHistory(), 0
    for steps in engines:
        num_steps = 0
        # each engine reports at once, before its first step
        for more in [0, *steps]:
            num_steps += more
            history = heard(history, msgspec.structs.replace(STATISTICS, num_steps=num_steps))
            total = totals(history)
            assert total is not None
            assert total.num_steps >= last
            last = total.num_steps
    assert last == sum(map(sum, engines))


# --- the requests'


@trio_test
async def test_times_of_a_sequence() -> None:
    server = make_server()
    metrics = server.metrics
    metrics.first_token(0.05)
    metrics.inter_token(0.02)
    metrics.finished(
        "stop",
        SequenceTimes(submitted=0.25, started=0.5, first_token=1, ended=2),
        prompt_tokens=10, cached_tokens=4, output_tokens=5, max_tokens=64,
    )  # fmt: skip
    never_began = SequenceTimes(submitted=0.25, started=None, first_token=None, ended=2)
    metrics.finished("abort", never_began, prompt_tokens=10, cached_tokens=0, output_tokens=0, max_tokens=64)
    metrics.prompt_finished(n=2, max_output_tokens=5)
    found = await samples(server)
    assert found["vllm:time_to_first_token_seconds_bucket"][(*OURS[:1], ("le", "0.06"), *OURS[1:])] == 1
    expected = {
        "inter_token_latency_seconds": (0.02, 1),
        "request_time_per_output_token_seconds": (0.25, 1),
        "e2e_request_latency_seconds": (4, 2),
        # who left before its turn has waited as well
        "request_queue_time_seconds": (0.25 + 1.75, 2),
        "request_prefill_time_seconds": (0.5, 1),
        "request_decode_time_seconds": (1, 1),
        "request_inference_time_seconds": (1.5, 1),
        "request_prompt_tokens": (20, 2),
        "request_prefill_kv_computed_tokens": (6, 1),
        "request_generation_tokens": (5, 2),
        "request_max_num_generation_tokens": (5, 1),
        "request_params_n": (2, 1),
        "request_params_max_tokens": (128, 2),
    }
    got = {name: (found[f"vllm:{name}_sum"][OURS], found[f"vllm:{name}_count"][OURS]) for name in expected}
    assert got == expected
    assert {dict(labels)["finished_reason"]: n for labels, n in found["vllm:request_success_total"].items()} == {
        "stop": 1, "length": 0, "abort": 1, "error": 0,
    }  # fmt: skip


async def figures(app: Application) -> dict[str, dict[Labels, float]]:
    return parse((await app.request("GET", "/metrics")).body.decode())


def test_tokens_and_choices_are_counted_as_they_come(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir, num_cached_tokens=2) as app:
            usage = (await app.complete(["Once", "upon"], n=2, max_tokens=3))["usage"]
            found = await figures(app)
            # a sequence a choice
            assert found["vllm:prompt_tokens_total"][OURS] == 2 * usage["prompt_tokens"]
            assert found["vllm:prompt_tokens_cached_total"][OURS] == 4 * 2
            by_source = {dict(labels)["source"]: n for labels, n in found["vllm:prompt_tokens_by_source_total"].items()}
            assert by_source == {"local_cache_hit": 8, "local_compute": 2 * usage["prompt_tokens"] - 8}
            assert found["vllm:generation_tokens_total"][OURS] == usage["completion_tokens"] == 12
            assert found["llmd:prefix_lookups_total"][(*OURS, ("result", "hit"))] == 4
            # a prompt once
            assert found["vllm:request_params_n_count"][OURS] == 2
            assert found["vllm:request_params_n_sum"][OURS] == 4
            assert found["vllm:request_max_num_generation_tokens_sum"][OURS] == 6

    run(main)


@trio_test
async def test_http_answers_are_counted_without_the_clients_words() -> None:
    server = make_server()
    client = client_of(server)
    for method, path in [("GET", "/v1/models/a"), ("GET", "/v1/models/b"), ("GET", "/x"), ("BREW", "/x")]:
        await client.open(path, method=method)
    found = await samples(server)
    assert found["http_requests_total"] == {
        (("handler", "/v1/models/<path:model_id>"), ("method", "GET"), ("status", "404")): 2,
        (("handler", "none"), ("method", "GET"), ("status", "404")): 1,
        (("handler", "none"), ("method", "other"), ("status", "404")): 1,
    }
    assert found["http_request_duration_seconds_count"] == found["http_requests_total"]
    # the one that asks
    assert found["http_requests_inprogress"] == {(): 1}


def test_an_http_request_lasts_until_its_stream_ends(tiny_model_dir: Path) -> None:
    async def main() -> None:
        async with application(tiny_model_dir) as app:
            await app.stream_chat()
            found = await figures(app)
            assert [dict(labels)["handler"] for labels in found["http_request_duration_seconds_count"]] == [
                "/v1/chat/completions"
            ]
            assert found["http_requests_inprogress"] == {(): 1}

    run(main)


# --- the system's


@trio_test
async def test_the_stage_is_what_health_says() -> None:
    server = connected()
    server.state.update(SystemState(stage=Stage.RESTARTING, restarts=2))
    found = await samples(server)
    assert [labels for labels, value in found["llmd:stage"].items() if value] == [(("stage", "restarting"),)]
    assert len(found["llmd:stage"]) == len(Stage)
    assert found["llmd:engine_restarts_total"] == {(): 2}


@trio_test
async def test_process_figures_say_of_which_server() -> None:
    assert list((await samples(make_server()))["process_resident_memory_bytes"]) == [(("server", "0"),)]
