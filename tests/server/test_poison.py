"""A request that kills every engine ends, and it alone; engines that die of anything else cost nobody the answer."""

import random
from collections.abc import Callable
from functools import partial

import pytest
import trio
import trio.testing

from llmd.config import SchedulerConfig
from llmd.protocol.framing import FrameDecoder, encode_frame
from llmd.protocol.generation import (
    EngineReady,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    ServerToEngine,
    StepEvents,
    TokenEvent,
)
from llmd.server.engine_client import EngineClient, Generation, SequenceStart
from llmd.server.suspicion import MAX_ENGINES
from tests.fakes import VOCAB_SIZE, expected_completion
from tests.server.engines import Engines, check, engines
from tests.server.fake_engine import run

# in the prompt of a poison; the fake model never draws it
POISON = VOCAB_SIZE
ALONE = "times while it worked on this request, the last time on this request alone, so it is not tried again."


def kills(context: list[int]) -> bool:
    return POISON in context


def kills_on_its_fifth_token(context: list[int]) -> bool:
    return POISON in context and len(context) - context.index(POISON) == 5


def innocent(number: int, *, num_prompt_tokens: int | None = None) -> SequenceStart:
    num_logprobs = 0 if number % 3 == 0 else None
    sampling = SamplingParams(
        max_tokens=5 + number % 20, seed=number, num_logprobs=num_logprobs, num_prompt_logprobs=num_logprobs
    )
    num_tokens = 1 + number % 11 if num_prompt_tokens is None else num_prompt_tokens
    return SequenceStart([(number * 7 + i) % VOCAB_SIZE for i in range(num_tokens)], sampling)


def poison(*, num_before: int = 3) -> SequenceStart:
    return SequenceStart([*range(100, 100 + num_before), POISON], SamplingParams(max_tokens=12, seed=0))


class Clients:
    """Many requests at once, of one sequence each, and what they have heard."""

    def __init__(
        self, engine: Engines, starts: list[SequenceStart], *, on_events: Callable[[], None] = lambda: None
    ) -> None:
        self.starts = starts
        self.heard: list[list[TokenEvent]] = [[] for _ in starts]
        self.generations: dict[int, Generation] = {}
        self._engine = engine
        self._on_events = on_events

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(len(self.starts)):
                nursery.start_soon(self._ask, number)
                # in this order, and not in the random one of tasks
                await trio.testing.wait_all_tasks_blocked()

    async def run_at_once(self) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(len(self.starts)):
                nursery.start_soon(self._ask, number)

    async def _ask(self, number: int) -> None:
        events = self.heard[number]
        client = self._engine.clients[number % len(self._engine.clients)]
        with client.generate([self.starts[number]]) as generation:
            self.generations[number] = generation
            while not events or events[-1].finish is None:
                events += [event for _, event in await generation.take()]
                self._on_events()

    def check(self) -> None:
        """The innocent have heard what an undisturbed engine says; the others have ended with an error."""
        for start, events in zip(self.starts, self.heard, strict=True):
            if POISON in start.prompt_token_ids:
                assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
                assert events[-1].finish is FinishReason.ERROR
                assert (events[-1].error or "").endswith(ALONE)
            else:
                check(start, events)


@pytest.mark.parametrize("is_fatal", [kills, kills_on_its_fifth_token])
@pytest.mark.parametrize("position", [0, 4, 8])
@pytest.mark.parametrize("at_once", [True, False])
def test_among_eight_innocents_the_poison_alone_ends(
    is_fatal: Callable[[list[int]], bool], position: int, at_once: bool
) -> None:
    async def main() -> None:
        # room for all: the second engine dies at once, and that is the poison
        wide = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=1000)
        async with engines(is_fatal=is_fatal, num_blocks=200, limits=wide) as engine:
            starts = [innocent(number) for number in range(8)]
            starts.insert(position, poison())
            clients = Clients(engine, starts)
            await (clients.run_at_once() if at_once else clients.run())
            clients.check()
            assert engine.num_rank_deaths == 3
            token_ids = [token_id for event in clients.heard[position] for token_id in event.token_ids]
            request = GenerateRequest(
                request_id=0,
                prompt_token_ids=starts[position].prompt_token_ids,
                sampling=SamplingParams(max_tokens=4 if is_fatal is kills_on_its_fifth_token else 0, seed=0),
            )
            assert token_ids == expected_completion(request).token_ids
            assert clients.heard[position][-1].error == f"The engine died 3 {ALONE}"
            assert engine.client.num_resumed >= 2

    run(main)


@pytest.mark.parametrize("position", [0, 3, 6, 8])
def test_a_poison_that_waits_for_its_turn_is_found_too(position: int) -> None:
    async def main() -> None:
        async with engines(is_fatal=kills) as engine:
            starts = [innocent(number) for number in range(8)]
            starts.insert(position, poison())
            clients = Clients(engine, starts)
            await clients.run()
            clients.check()
            # one more if every engine had some progress before: then it might have been anything
            assert engine.num_rank_deaths in (3, 4)

    run(main)


def test_two_poisons_among_innocents_both_end() -> None:
    async def main() -> None:
        async with engines(is_fatal=kills) as engine:
            starts = [innocent(number) for number in range(8)]
            starts.insert(2, poison())
            starts.insert(5, poison(num_before=7))
            clients = Clients(engine, starts)
            await clients.run_at_once()
            clients.check()
            assert 4 <= engine.num_rank_deaths <= 8

    run(main)


def test_a_poison_at_the_end_of_a_long_prompt_is_found_though_others_get_tokens_meanwhile() -> None:
    async def main() -> None:
        async with engines(is_fatal=kills) as engine:
            # three prompts that are still computed when the poison kills, and three short ones that get on
            starts = [innocent(number, num_prompt_tokens=2 if number % 2 else 14) for number in range(6)]
            starts.insert(3, poison(num_before=40))
            clients = Clients(engine, starts)
            await clients.run_at_once()
            clients.check()
            assert engine.num_rank_deaths <= 4

    run(main)


def test_a_poison_of_one_server_costs_another_servers_clients_nothing() -> None:
    async def main() -> None:
        async with engines(is_fatal=kills, num_clients=2) as engine:
            starts = [innocent(number) for number in range(12)]
            starts[3:3] = [poison()]
            clients = Clients(engine, starts)
            await clients.run_at_once()
            clients.check()
            assert engine.num_rank_deaths <= 4

    run(main)


@pytest.mark.parametrize("num_deaths", [1, 2, 3])
def test_a_poison_whose_client_leaves_ends_with_it(num_deaths: int) -> None:
    """The third time it runs alone."""
    num_deadly = 0

    def is_fatal(context: list[int]) -> bool:
        nonlocal num_deadly
        if not kills(context):
            return False
        num_deadly += 1
        if num_deadly == num_deaths:
            cancelled.cancel_all()
        return True

    async def main() -> None:
        nonlocal cancelled
        async with engines(is_fatal=is_fatal) as engine:
            with engine.client.generate([poison()]) as cancelled:
                clients = Clients(engine, [innocent(number) for number in range(8)])
                await clients.run_at_once()
                clients.check()
                assert cancelled.take_pending() == []
                assert num_deadly == num_deaths
                assert engine.num_rank_deaths == num_deaths

    cancelled: Generation
    run(main)


@pytest.mark.parametrize("num_events", [1, 2, 3, 10])
@pytest.mark.parametrize("num_still_births", [0, 3])
def test_ten_kills_each_after_some_progress_fail_nobody(num_events: int, num_still_births: int) -> None:
    """The worst moments: as soon as a client has heard so many events, while the next in line runs alone."""

    async def main() -> None:
        async with engines() as engine:
            heard = 0
            num_kills = 0

            def on_events() -> None:
                nonlocal heard, num_kills
                heard += 1
                # once each: whoever hears of the last one's tokens only now has not seen this one get anywhere
                if heard >= num_events and engine.num_started > num_kills and num_kills < 10:
                    heard = 0
                    num_kills += 1
                    engine.num_still_births = num_still_births
                    engine.kill()

            # prompts of several steps, which get no token for a while
            starts = [innocent(number, num_prompt_tokens=40 if number % 3 == 0 else None) for number in range(24)]
            clients = Clients(engine, starts, on_events=on_events)
            await clients.run_at_once()
            clients.check()
            assert num_kills == 10
            assert engine.num_started - 1 == 10

    run(main)


def test_engines_that_die_before_they_are_ready_speak_against_nobody() -> None:
    async def main() -> None:
        async with engines() as engine:
            engine.num_still_births = 10
            clients = Clients(engine, [innocent(number) for number in range(4)])
            await clients.run_at_once()
            clients.check()
            assert engine.client.num_resumed == 0

    run(main)


def test_a_request_that_no_engine_finishes_ends_at_last() -> None:
    """Engines that die before anybody runs: nobody is a suspect, and it must not go on for ever."""

    async def main() -> None:
        received: list[GenerateRequest] = []

        async def be_an_engine(stream: trio.abc.Stream) -> None:
            async with stream:
                ready = EngineReady(max_model_len=9, block_size=1, num_blocks=9, vocab_size=264)
                await stream.send_all(encode_frame(ready))
                decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
                requests = list(decoder.feed(await stream.receive_some()))
                received.extend(request for request in requests if isinstance(request, GenerateRequest))

        async def connect(path: str) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(be_an_engine, theirs)
            return ours

        client = EngineClient("engine.sock", connect=connect)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with client.generate([innocent(0)]) as generation:
                ((_, event),) = await generation.take()
                assert event.finish is FinishReason.ERROR
                assert event.error == "The engine died 50 times before this request ended, so it is not tried again."
            assert len(received) == MAX_ENGINES
            assert not any(request.alone for request in received)
            nursery.cancel_scope.cancel()

    run(main)


def test_the_most_suspect_is_the_first_thing_that_the_next_engine_does() -> None:
    """Engines with some progress prove nothing; so that something does, the suspect must not come second for ever."""
    # of each life: the positions of those that begin to run, and then of those that get a token
    lives = [([0, 1, 2], [0]), ([0, 1, 2], [0]), ([1, 2], [1])]

    async def main() -> None:
        received: list[list[GenerateRequest]] = []

        async def be_an_engine(stream: trio.abc.Stream) -> None:
            async with stream:
                ready = EngineReady(max_model_len=9, block_size=1, num_blocks=9, vocab_size=264)
                await stream.send_all(encode_frame(ready))
                decoder: FrameDecoder[ServerToEngine] = FrameDecoder(ServerToEngine)
                messages = decoder.feed(await stream.receive_some())
                requests = [message for message in messages if isinstance(message, GenerateRequest)]
                received.append(requests)
                ids = {request.sampling.seed: request.request_id for request in requests}
                started, drew = lives[len(received) - 1] if len(received) <= len(lives) else ([2], [])
                events = [TokenEvent(request_id=ids[seed], token_ids=[1]) for seed in drew]
                await stream.send_all(encode_frame(StepEvents(started=[ids[seed] for seed in started], events=events)))

        async def connect(path: str) -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(be_an_engine, theirs)
            return ours

        client = EngineClient("engine.sock", connect=connect)
        starts = [SequenceStart([1], SamplingParams(max_tokens=9, seed=seed)) for seed in range(3)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            with client.generate(starts) as generation:
                while not (ended := [item for item in await generation.take() if item[1].finish]):
                    pass
            nursery.cancel_scope.cancel()
        orders = [[(request.sampling.seed, request.alone) for request in requests] for requests in received]
        assert orders == [
            [(0, False), (1, False), (2, False)],
            [(0, False), (1, False), (2, False)],
            [(1, True), (2, True), (0, False)],
            # it has died alone, but after another one had got a token: that might have been anything
            [(2, True), (1, False), (0, False)],
        ]
        assert [(index, event.error) for index, event in ended] == [(2, f"The engine died 4 {ALONE}")]

    run(main)


def test_what_is_submitted_while_the_engine_dies_is_submitted_again() -> None:
    async def main() -> None:
        async with engines() as engine:
            await engine.client.wait_ready()
            engine.kill()
            # the client cannot know yet
            assert engine.client.ready is not None
            clients = Clients(engine, [innocent(number) for number in range(5)])
            await clients.run_at_once()
            clients.check()
            assert engine.client.num_resumed == 5

    run(main)


def test_what_is_cancelled_while_the_engine_is_away_is_not_submitted_again() -> None:
    async def main() -> None:
        async with engines() as engine:
            await engine.client.wait_ready()
            with engine.client.generate([innocent(19)]) as leaving:
                await leaving.take()
                engine.kill()
                while engine.client.ready is not None:
                    await trio.lowlevel.checkpoint()
            clients = Clients(engine, [innocent(1)])
            await clients.run()
            clients.check()
            assert engine.num_started == 2
            assert engine.client.num_resumed == 0

    run(main)


def test_the_time_in_the_queue_is_known() -> None:
    async def main() -> None:
        client = EngineClient(
            "engine.sock", connect=partial(connect_to, (engine_end := trio.testing.memory_stream_pair())[0])
        )
        ours = engine_end[1]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            await ours.send_all(
                encode_frame(EngineReady(max_model_len=99, block_size=1, num_blocks=99, vocab_size=264))
            )
            await client.wait_ready()
            assert client.waiting_since() is None
            came = trio.current_time()
            with client.generate([innocent(1), innocent(2)]) as generation:
                await trio.sleep(2)
                with client.generate([innocent(3)]):
                    assert generation.started_at(0) is None
                    await ours.send_all(encode_frame(StepEvents(started=[1])))
                    await trio.testing.wait_all_tasks_blocked()
                    await trio.sleep(3)
                    # preempted and begun again: the first time counts; and to begin is not to have a token
                    await ours.send_all(encode_frame(StepEvents(started=[0, 1])))
                    await trio.testing.wait_all_tasks_blocked()
                    assert [generation.started_at(index) for index in (0, 1)] == [came + 5, came + 2]
                    assert client.waiting_since() == came
                    for request_id in (0, 1):
                        await ours.send_all(
                            encode_frame(StepEvents(events=[TokenEvent(request_id=request_id, token_ids=[1])]))
                        )
                    await trio.testing.wait_all_tasks_blocked()
                    assert client.waiting_since() == came + 2
                assert client.waiting_since() is None
            nursery.cancel_scope.cancel()

    async def connect_to(stream: trio.abc.Stream, path: str) -> trio.abc.Stream:
        return stream

    run(main)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_fatal", [kills, kills_on_its_fifth_token, None])
def test_storm(seed: int, is_fatal: Callable[[list[int]], bool] | None) -> None:
    """Poisons, or else kills after some progress, and clients that leave, all at random: only the poisons fail."""
    draw = random.Random(seed)

    async def main() -> None:
        async with engines(is_fatal=is_fatal or (lambda _: False)) as engine:
            heard = num_kills = 0
            patience = draw.randint(1, 12)

            def on_events() -> None:
                nonlocal heard, num_kills, patience
                heard += 1
                if is_fatal is None and heard >= patience and num_kills < min(engine.num_started, 30):
                    heard, patience = 0, draw.randint(1, 12)
                    num_kills += 1
                    engine.num_still_births = draw.randint(0, 2)
                    engine.kill()

            async def leave() -> None:
                for _ in range(4):
                    with engine.client.generate([ask(), ask()]) as leaving, trio.move_on_after(draw.random()):
                        await leaving.take()

            def ask() -> SequenceStart:
                if is_fatal is not None and draw.random() < 0.2:
                    return poison(num_before=draw.choice([2, 20]))
                return innocent(draw.randint(0, 100), num_prompt_tokens=draw.choice([None, None, 30]))

            clients = Clients(engine, [ask() for _ in range(20)], on_events=on_events)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clients.run_at_once)
                nursery.start_soon(leave)
            clients.check()
            assert is_fatal is not None or num_kills > 5

    run(main)
