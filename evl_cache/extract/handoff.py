"""What one thread hands to the next, in order, and what ends both."""

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Closed(Exception):
    """The hand-off was closed: whoever waits at it is to end."""


class Handoff(Generic[ItemT]):
    """A queue between threads that can be closed.

    Args:
        most: items that may wait in it; None for any number.
    """

    def __init__(self, most: int | None = None) -> None:
        self._most, self._items, self._is_closed = most, deque[ItemT](), False
        self._changed = threading.Condition()

    def put(self, item: ItemT) -> None:
        """Add an item once there is room. Raises: Closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_closed or self._most is None or len(self._items) < self._most
            )
            if self._is_closed:
                raise Closed
            self._items.append(item)
            self._changed.notify_all()

    def __iter__(self) -> Iterator[ItemT]:
        """Yield items as they come, until it is closed; what waits in it then is dropped."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or bool(self._items))
                if self._is_closed:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
            del item  # what a thread waits for must not hold what it had

    def close(self) -> None:
        """Wake whoever waits."""
        with self._changed:
            self._is_closed = True
            self._items.clear()
            self._changed.notify_all()
