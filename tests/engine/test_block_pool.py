"""Which block is handed out next, and that `check` sees what is wrong."""

import pytest

from llmd.engine.block_pool import BlockPool
from llmd.engine.prefix_cache import BlockHash, PrefixCache, extend_block_hashes


def test_all_or_nothing() -> None:
    pool = BlockPool(3, PrefixCache())
    assert pool.take(4) is None
    assert sorted(pool.take(3) or []) == [0, 1, 2]
    assert pool.take(1) is None
    assert pool.take(0) == []


def test_empty_blocks_go_first_and_cached_ones_from_the_end_of_the_prefix_released_first() -> None:
    cache = PrefixCache()
    pool = BlockPool(6, cache)
    first, second = pool.take(2), pool.take(2)
    assert first is not None
    assert second is not None
    for block_id in [*first, *second]:
        cache.publish(BlockHash(bytes([block_id])), block_id)
    pool.give_back(first)
    pool.give_back(second)
    assert set(pool.take(2) or []) == {4, 5}, "with nothing to lose"
    assert pool.take(4) == [first[1], first[0], second[1], second[0]]
    assert len(cache) == 0


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    cache = PrefixCache()
    pool = BlockPool(2, cache)
    shared = pool.take(1)
    assert shared is not None
    cache.publish(BlockHash(b"x"), shared[0])
    assert pool.take(1, sharing=cache.find([BlockHash(b"x")])) is not None
    pool.check([shared, [*shared, 1]])
    pool.give_back(shared)
    assert pool.num_free == 0
    pool.give_back([*shared, 1])
    assert pool.num_free == 2
    pool.check([])


def test_free_blocks_that_are_to_be_shared_are_not_taken_for_something_else() -> None:
    cache = PrefixCache()
    pool = BlockPool(2, cache)
    cached = pool.take(1)
    assert cached is not None
    cache.publish(BlockHash(b"x"), cached[0])
    pool.give_back(cached)
    assert pool.num_free == 2
    assert pool.take(2, sharing=cached) is None, "one of the two is the shared one"
    pool.check([])
    assert pool.take(1, sharing=cached) == [1]


@pytest.mark.parametrize("block_tables", [[], [[0]], [[0, 1], [1]], [[0, 1, 2]]], ids=str)
def test_check_sees_lost_shared_and_foreign_blocks(block_tables: list[list[int]]) -> None:
    pool = BlockPool(3, PrefixCache())
    taken = pool.take(2)
    assert taken == [0, 1]
    pool.check([taken])
    with pytest.raises(RuntimeError, match="block"):
        pool.check(block_tables)


def test_check_sees_a_block_that_was_given_back_twice() -> None:
    pool = BlockPool(2, PrefixCache())
    pool.take(1)
    pool.give_back([0])
    pool.give_back([0])
    with pytest.raises(RuntimeError, match="held by -1"):
        pool.check([])


def test_a_block_hash_depends_on_everything_before_it_and_on_the_salt() -> None:
    def hashes(token_ids: list[int], salt: str = "") -> list[BlockHash]:
        block_hashes: list[BlockHash] = []
        extend_block_hashes(block_hashes, token_ids, block_size=2, cache_salt=salt)
        return block_hashes

    base = hashes([1, 2, 3, 4])
    assert len(hashes([1, 2, 3])) == 1, "only full blocks"
    assert hashes([1, 2, 3, 4, 5, 6])[:2] == base
    assert len({*base, *hashes([9, 2, 3, 4]), *hashes([1, 2, 3, 4], "a"), *hashes([3, 4, 1, 2])}) == 8

    grown = hashes([1, 2, 3])
    extend_block_hashes(grown, [1, 2, 3, 4], block_size=2, cache_salt="")
    assert grown == base
