"""What one task leaves for another, without waiting. Knows nothing of what it is."""

from typing import Generic, TypeVar

import trio

Item = TypeVar("Item")


class Mailbox(Generic[Item]):
    """Many may put, one takes all that is pending. Putting never waits, so nobody slow can hold up the sender."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._waiting = trio.lowlevel.ParkingLot()

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._waiting.unpark()

    async def take(self) -> list[Item]:
        """Everything that has come in, at least one. Always a checkpoint; a cancelled take loses nothing."""
        if self._items:
            await trio.lowlevel.checkpoint()
        else:
            await self._waiting.park()
        return self.take_pending()

    def take_pending(self) -> list[Item]:
        """What has come in, without waiting: perhaps nothing."""
        items, self._items = self._items, []
        return items
