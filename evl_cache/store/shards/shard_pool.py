"""Open shards, of which the least recently used are let go: a large cache has more files than one may open."""

import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from evl_cache.store.disk.forks import renew_in_children

ShardKey = tuple[str, int]  # array and block
_MOST_OPEN, _LEAST_OPEN = 1024, 16
_SHARE_OF_LIMIT = 8  # a process reads two caches or more, and opens other files too


class Closable(Protocol):
    """What a pool keeps."""

    def close(self) -> None:
        """Let go of the file once nobody uses it; the next use opens it again."""


Shard = TypeVar("Shard", bound=Closable)


class ShardPool(Generic[Shard]):
    """Open shards by array and block, for any number of threads; a process forked at any time begins with none.

    Args:
        limit: shards kept; by default what the process's limit of open files allows.
    """

    def __init__(self, *, limit: int | None = None) -> None:
        self.limit = default_limit() if limit is None else limit
        self.renew()
        renew_in_children(self)

    def find(self, key: ShardKey) -> Shard | None:
        """Return the shard where the pool has it, at once; None also where its turn would have to be noted."""
        # While there is room for more, order does not matter, and a look needs no lock.
        return self._shards.get(key) if len(self._shards) < self.limit else None

    def get(self, key: ShardKey, open_shard: Callable[[ShardKey], Shard]) -> Shard:
        """Return the shard, from the pool or from `open_shard`.

        It stays usable when it leaves the pool: its file closes after its last read.
        """
        shard = self.find(key)
        if shard is not None:
            return shard
        with self._lock:
            shard = self._shards.get(key)
            if shard is None:
                shard = self._shards[key] = open_shard(key)
            self._shards.move_to_end(key)
            while len(self._shards) > self.limit:
                _, oldest = self._shards.popitem(last=False)
                oldest.close()
            return shard

    def forget(self, key: ShardKey) -> None:
        """Open the shard's file anew at the next read."""
        with self._lock:
            self._shards.pop(key, None)

    def close(self) -> None:
        """Let go of every file; each closes after its last read."""
        with self._lock:
            for shard in self._shards.values():
                shard.close()
            self._shards.clear()

    def renew(self) -> None:
        """Begin with no shards, and leave those there are to who has them."""
        self._shards: OrderedDict[ShardKey, Shard] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit}  # no open files

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit = state["limit"]
        self.renew()
        renew_in_children(self)


def default_limit() -> int:
    """Return how many files of one kind a process may keep open, by its limit of open files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MOST_OPEN
    return min(_MOST_OPEN, max(_LEAST_OPEN, soft // _SHARE_OF_LIMIT))
