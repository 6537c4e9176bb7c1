"""Several server processes answer as one: sums over all of them, also over those that are dead, stuck or replaced."""

import os
import time
from pathlib import Path

import msgspec
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import trio_test

from llmd.config import HttpConfig
from llmd.protocol.control import Stage, SystemState
from llmd.protocol.figures import EngineHistory, Family, Sample, ServerFigures
from llmd.server.context import Server
from llmd.server.engine_history import heard
from llmd.server.exposition import own_figures
from llmd.server.families import added_up, without_gauges
from llmd.server.figures import STALE_AFTER, leave_figures, left_before, others
from llmd.server.metrics import Metrics
from tests.server.live import SOON, until
from tests.server.test_app import make_server
from tests.server.test_metrics import OURS, READY, STATISTICS, samples


def one_of(folder: Path, index: int, *, num_servers: int = 2) -> Server:
    server = make_server()
    server.config = msgspec.structs.replace(
        server.config, http=HttpConfig(num_frontends=num_servers), index=index, figures_dir=str(folder)
    )
    server.metrics = Metrics("tiny", server=str(index))
    return server


async def leave(server: Server) -> None:
    """Leave the figures of this moment, once."""
    file = Path(server.config.figures_dir or "") / f"server-{server.config.index}.figures"
    before = file.stat().st_ino if file.exists() else None
    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_figures, server.config, lambda: own_figures(server))
            await until(lambda: file.exists() and file.stat().st_ino != before)
            nursery.cancel_scope.cancel()


def replacement(server: Server, folder: Path) -> Server:
    """As a process begins that takes the place of this one."""
    new = one_of(folder, server.config.index)
    before = left_before(new.config)
    assert before is not None
    new.counted_before, new.engine.history = without_gauges(before.counted), before.engine
    return new


@trio_test
async def test_each_says_what_all_have_counted(tmp_path: Path) -> None:
    first, second = one_of(tmp_path, 0), one_of(tmp_path, 1)
    first.metrics.first_token(0.05)
    second.metrics.first_token(0.05)
    second.metrics.first_token(0.5)
    for server in (first, second):
        await leave(server)
    for server in (first, second):
        found = await samples(server)
        assert found["vllm:time_to_first_token_seconds_count"][OURS] == 3
        assert found["vllm:time_to_first_token_seconds_bucket"][(OURS[0], ("le", "0.06"), OURS[1])] == 2
        assert found["llmd:servers_unreachable"] == {(): 0}
        assert set(found["process_cpu_seconds_total"]) == {(("server", "0"),), (("server", "1"),)}


@trio_test
async def test_of_the_engine_there_is_one_truth_and_not_a_sum(tmp_path: Path) -> None:
    first, second = one_of(tmp_path, 0), one_of(tmp_path, 1)
    # the first has heard of an engine that was gone before the second began
    for num_steps in (7, 0, 9):
        report = msgspec.structs.replace(STATISTICS, num_steps=num_steps, num_preemptions=num_steps)
        first.engine.history = heard(first.engine.history, report)
    second.engine.history = heard(EngineHistory(), report)
    for server in (first, second):
        await leave(server)
    for server in (first, second):
        assert (await samples(server))["vllm:num_preemptions_total"][OURS] == 7 + 9


@trio_test
async def test_who_is_not_connected_believes_who_is(tmp_path: Path) -> None:
    first, second = one_of(tmp_path, 0), one_of(tmp_path, 1)
    second.engine.ready, second.engine.history = READY, heard(EngineHistory(), STATISTICS)
    assert (await samples(first))["vllm:num_requests_running"][OURS] == 0
    await leave(second)
    found = await samples(first)
    assert found["vllm:num_requests_running"][OURS] == STATISTICS.num_running
    assert "vllm:cache_config_info" in found
    # but that may be older than the engine's death
    first.state.update(SystemState(stage=Stage.RESTARTING))
    assert (await samples(first))["vllm:num_requests_running"][OURS] == 0


@trio_test
async def test_who_is_dead_or_stuck_is_named_and_still_counts(tmp_path: Path) -> None:
    first, second = one_of(tmp_path, 0), one_of(tmp_path, 1)
    second.metrics.first_token(0.05)
    # in the middle of a request
    second.metrics.http_request()
    # a process that has not left anything yet
    assert (await samples(first))["llmd:servers_unreachable"] == {(): 1}
    await leave(second)
    assert (await samples(first))["http_requests_inprogress"] == {(): 2}
    long_ago = time.time() - STALE_AFTER - 1
    os.utime(tmp_path / "server-1.figures", (long_ago, long_ago))
    found = await samples(first)
    assert found["llmd:servers_unreachable"] == {(): 1}
    assert found["vllm:time_to_first_token_seconds_count"][OURS] == 1
    # but nobody works on its requests
    assert found["http_requests_inprogress"] == {(): 1}
    assert set(found["process_cpu_seconds_total"]) == {(("server", "0"),)}


@trio_test
async def test_a_replacement_goes_on_counting(tmp_path: Path) -> None:
    first, second = one_of(tmp_path, 0), one_of(tmp_path, 1)
    second.engine.history = heard(second.engine.history, STATISTICS)
    for _ in range(3):
        second.metrics.first_token(0.05)
        second.metrics.http_request()
        await leave(second)
        second = replacement(second, tmp_path)
    await leave(second)
    for server in (first, second):
        found = await samples(server)
        assert found["vllm:time_to_first_token_seconds_count"][OURS] == 3
        assert found["vllm:prefix_cache_hits_total"][OURS] == 48
        # what was open in the dead is not open any more
        assert found["http_requests_inprogress"] == {(): 1}


@trio_test
async def test_nonsense_in_a_file_is_nobodys_end(tmp_path: Path) -> None:
    server = one_of(tmp_path, 0)
    (tmp_path / "server-0.figures").write_bytes(b"nonsense")
    (tmp_path / "server-1.figures").write_bytes(b"")
    assert left_before(server.config) is None
    assert (await others(server.config)).num_unreachable == 1


@trio_test
async def test_a_disk_that_takes_nothing_is_nobodys_end(tmp_path: Path) -> None:
    server = one_of(tmp_path / "missing", 0)
    with trio.move_on_after(0.05) as scope:
        await leave_figures(server.config, lambda: own_figures(server))
    assert scope.cancelled_caught


FAMILIES = st.lists(
    st.builds(
        Family,
        st.sampled_from(["a", "b"]),
        st.just("counter"),
        st.just(""),
        st.lists(
            st.builds(
                Sample,
                st.sampled_from(["x", "y"]),
                st.dictionaries(st.sampled_from("lm"), st.sampled_from("12")),
                st.integers(0, 9),
            ),
            max_size=4,
        ),
    ),
    max_size=3,
)


@given(st.lists(FAMILIES, max_size=4))
def test_a_sum_has_each_series_once_and_loses_nothing(parts: list[list[Family]]) -> None:
    summed = added_up(parts)
    assert len({family.name for family in summed}) == len(summed)
    for family in summed:
        series = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in family.samples]
        assert len(set(series)) == len(series)
        given_values = [s.value for part in parts for f in part if f.name == family.name for s in f.samples]
        assert sum(sample.value for sample in family.samples) == sum(given_values)
    assert added_up([summed]) == summed


def test_figures_cross_a_process_border() -> None:
    figures = ServerFigures(counted=Metrics("tiny").counted(), process=[], engine=EngineHistory(latest=STATISTICS))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(figures), type=ServerFigures) == figures
