"""Watching a cache grow, from any machine that sees its disk: marks are counted, locks tell who is at work."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evl_cache.store import LOCKS_NAME, FeatureCache, lock_holders

_RATE_OVER_S = 600.0  # of the last minutes: machines come and go


@dataclass(frozen=True, kw_only=True)
class Look:
    """How far an extraction is.

    Attributes:
        clips, clips_done, clips_failed: of the cache; failed clips are not among those done.
        blocks, blocks_done: of the cache.
        in_hand: locked blocks, by machine. A dead job's lock stays until another job takes the block over.
        clips_per_s, seconds_left: from what was finished while watching; None before anything was.
    """

    clips: int
    clips_done: int
    clips_failed: int
    blocks: int
    blocks_done: int
    in_hand: dict[str, int]
    clips_per_s: float | None
    seconds_left: float | None

    @property
    def is_complete(self) -> bool:
        """Whether every block is done."""
        return self.blocks_done == self.blocks


def watch(
    path: Path,
    *,
    every_s: float,
    now_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[Look]:
    """Yield a look every so many seconds, until all blocks are done. Marks are read once each.

    Raises: CacheError where there is no cache.
    """
    cache = FeatureCache(path)
    seen: deque[tuple[float, int]] = deque()
    while True:
        look = _look(cache, seen, now_s())
        yield look
        if look.is_complete:
            return
        sleep(every_s)
        cache.refresh()


def _look(cache: FeatureCache, seen: deque[tuple[float, int]], now: float) -> Look:
    failed = len(cache.failures)
    done = int(cache.is_valid.sum()) // cache.spec.views.per_clip
    seen.append((now, done + failed))
    while now - seen[0][0] > _RATE_OVER_S:
        seen.popleft()
    (then, before), finished = seen[0], done + failed
    rate = (finished - before) / (now - then) if finished > before else None
    return Look(
        clips=cache.spec.num_clips,
        clips_done=done,
        clips_failed=failed,
        blocks=cache.num_blocks,
        blocks_done=cache.num_blocks_done,
        in_hand=dict(Counter(lock_holders(cache.path / LOCKS_NAME).values())),
        clips_per_s=rate,
        seconds_left=None if rate is None else (cache.spec.num_clips - finished) / rate,
    )
