"""Open shards, of which the least recently used are let go: a large cache has more files than one may open."""

import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from evl_cache.store.shards.shard import ShardReader

ShardKey = tuple[str, int]  # array and block
_MOST_OPEN, _LEAST_OPEN = 1024, 16
_SHARE_OF_LIMIT = 8  # a process reads two caches or more, and opens other files too


class ShardPool:
    """Shard readers by array and block, for any number of threads, and for processes forked at any time.

    Args:
        limit: readers kept; by default what the process's limit of open files allows.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        self._renew()

    def renew_after_fork(self) -> None:
        """Drop the parent's readers in a child. Call it before the first `get` of every piece of work."""
        if self._pid != os.getpid():
            self._renew()

    def get(self, key: ShardKey, open_shard: Callable[[ShardKey], ShardReader]) -> ShardReader:
        """Return the shard's reader, from the pool or from `open_shard`.

        It stays usable when it leaves the pool: its file closes after its last read.
        """
        # While there is room for more, order does not matter, and a look needs no lock.
        reader = self._readers.get(key)
        if reader is not None and len(self._readers) < self.limit:
            return reader
        with self._lock:
            reader = self._readers.get(key)
            if reader is None:
                reader = self._readers[key] = open_shard(key)
            self._readers.move_to_end(key)
            while len(self._readers) > self.limit:
                _, oldest = self._readers.popitem(last=False)
                oldest.close()
            return reader

    def forget(self, key: ShardKey) -> None:
        """Open the shard's file anew at the next read."""
        self.renew_after_fork()
        with self._lock:
            self._readers.pop(key, None)

    def close(self) -> None:
        """Let go of every file; each closes after its last read."""
        self.renew_after_fork()
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}  # no open files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self._renew()

    def _renew(self) -> None:
        # After a fork the lock may be held by a thread that only the parent has.
        self._readers: OrderedDict[ShardKey, ShardReader] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()


def default_limit() -> int:
    """Return how many files of one kind a process may keep open, by its limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return min(_MOST_OPEN, max(_LEAST_OPEN, soft // _SHARE_OF_LIMIT))
