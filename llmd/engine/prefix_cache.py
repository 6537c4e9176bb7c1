"""Which blocks hold the KV of a known prefix. Knows hashes and block ids only: no sequences, no reference counts."""

from array import array
from collections.abc import Iterable
from hashlib import blake2b
from itertools import islice
from typing import NewType

# The hash of a block's tokens and of everything before them, so that equal hashes mean equal KV. Its own type, because
# bytes are many things. Cryptographic, because whoever finds a collision would read another client's context.
BlockHash = NewType("BlockHash", bytes)

_DIGEST_SIZE = 32  # bytes


def extend_block_hashes(
    block_hashes: list[BlockHash], token_ids: list[int], *, block_size: int, cache_salt: str
) -> None:
    """Append the hash of each full block of `token_ids` that has none yet.

    A block's hash is blake2b(hash of the block before it, the block's token ids); the salt stands before the first.
    """
    for start in range(len(block_hashes) * block_size, len(token_ids) - block_size + 1, block_size):
        before = block_hashes[-1] if block_hashes else blake2b(cache_salt.encode(), digest_size=_DIGEST_SIZE).digest()
        tokens = array("q", token_ids[start : start + block_size]).tobytes()
        block_hashes.append(BlockHash(blake2b(before + tokens, digest_size=_DIGEST_SIZE).digest()))


class PrefixCache:
    """Block hash → block, for full blocks whose tokens are known and computed.

    It also knows which hashes a running sequence is computing (`expect`), so that others can wait for them.
    """

    def __init__(self) -> None:
        self._block_ids: dict[BlockHash, int] = {}
        self._block_hashes: dict[int, BlockHash] = {}
        self._expected: dict[BlockHash, int] = {}  # hash → the sequence id that is computing it

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._block_hashes

    def __len__(self) -> int:
        return len(self._block_hashes)

    def find(self, block_hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest prefix that is there. They are the caller's only once the pool has shared them."""
        block_ids = []
        for block_hash in block_hashes:
            block_id = self._block_ids.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def publish(self, block_hash: BlockHash, block_id: int) -> None:
        """Say that `block_id` holds this prefix. If another block does already, that one stays."""
        self._expected.pop(block_hash, None)
        if block_hash not in self._block_ids:
            self._block_ids[block_hash] = block_id
            self._block_hashes[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """The block is about to be overwritten."""
        del self._block_ids[self._block_hashes.pop(block_id)]

    def expect(self, block_hashes: Iterable[BlockHash], *, sequence_id: int) -> None:
        """`sequence_id` runs and is going to publish these, unless another one is or they are there."""
        for block_hash in block_hashes:
            if block_hash not in self._block_ids:
                self._expected.setdefault(block_hash, sequence_id)

    def is_expected(self, block_hash: BlockHash) -> bool:
        return block_hash in self._expected

    def expect_no_longer(self, block_hashes: list[BlockHash], *, start: int, sequence_id: int) -> None:
        """`sequence_id` runs no more: nobody may wait for what it has not published, `block_hashes[start:]`."""
        for block_hash in islice(block_hashes, start, None):
            if self._expected.get(block_hash) == sequence_id:
                del self._expected[block_hash]
