"""Which KV-cache blocks are free, and who holds the others. Knows block ids only: no tensors, no requests."""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import chain

from llmd.engine.prefix_cache import PrefixCache


class BlockPool:
    """Hands out blocks and takes them back.

    A block is held (by one block table, or by several that share a prefix) or free. Free blocks that stand in the
    prefix cache keep their content until nothing else is left; the one that was given back first goes first.

    A block may be handed out again while the step that used it last is in flight: ranks run plans in order.
    """

    def __init__(self, num_blocks: int, prefix_cache: PrefixCache) -> None:
        self.num_blocks = num_blocks
        self._prefix_cache = prefix_cache
        self._num_holders = [0] * num_blocks
        self._empty = list(reversed(range(num_blocks)))  # free, with nothing worth keeping; a stack
        self._cached: OrderedDict[int, None] = OrderedDict()  # free, in the prefix cache; least recently used first

    @property
    def num_free(self) -> int:
        return len(self._empty) + len(self._cached)

    def take(self, count: int, *, sharing: Sequence[int] = ()) -> list[int] | None:
        """Take `count` blocks and join the holders of `sharing`, found in the prefix cache: all of it or nothing.

        Returns the `count` block ids, or None if there are not enough.
        """
        num_free = self.num_free
        if sharing:
            num_free -= sum(block_id in self._cached for block_id in sharing)
        if count > num_free:
            return None
        for block_id in sharing:
            self._num_holders[block_id] += 1
            self._cached.pop(block_id, None)
        return [self._take_one() for _ in range(count)]

    def give_back(self, block_ids: list[int]) -> None:
        """One holder lets go of a whole block table."""
        # the end of a prefix goes first, so that what is left in the cache can still be reached from its start
        for block_id in reversed(block_ids):
            self._num_holders[block_id] -= 1
            if self._num_holders[block_id] == 0:
                if block_id in self._prefix_cache:
                    self._cached[block_id] = None
                else:
                    self._empty.append(block_id)

    def check(self, block_tables: Iterable[list[int]]) -> None:
        """Prove that each block is either home or held exactly as often as it stands in `block_tables` (contract C4).

        Raises RuntimeError otherwise: that is a bug of the scheduler.
        """
        num_tables = [0] * self.num_blocks
        num_homes = [0] * self.num_blocks
        for block_id in chain.from_iterable(block_tables):
            num_tables[block_id] += 1
        for block_id in chain(self._empty, self._cached):
            num_homes[block_id] += 1
        for block_id, found in enumerate(zip(num_tables, num_homes, self._num_holders, strict=True)):
            in_tables, in_homes, holders = found
            if in_tables != holders or in_homes != (holders == 0):
                raise RuntimeError(
                    f"block {block_id} stands in {in_tables} block tables and {in_homes} free lists, "
                    f"and is counted as held by {holders}"
                )
        if not all(block_id in self._prefix_cache for block_id in self._cached):
            raise RuntimeError("a block is kept for the prefix cache, which does not know it")
        if any(block_id in self._prefix_cache for block_id in self._empty):
            raise RuntimeError("the prefix cache offers a block that is free to be overwritten")

    def _take_one(self) -> int:
        if self._empty:
            block_id = self._empty.pop()
        else:
            block_id, _ = self._cached.popitem(last=False)
            self._prefix_cache.forget(block_id)
        self._num_holders[block_id] = 1
        return block_id
