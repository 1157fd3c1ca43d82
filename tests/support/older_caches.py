"""Caches as versions wrote them before frames had a rule, some clips with wrong frames; and doubts told by a table."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache.clips import ClipList
from evl_cache.extract.stage import ExtractResult
from evl_cache.video.pool import DecodePool

from .store_helpers import ROOT, extract_small, small_spec, small_tower

GOLDEN = ROOT / "tests" / "fixtures" / "first_rule"


def first_rule_spec(clips: ClipList, **changes: Any) -> Any:
    """The spec of `store_helpers.small_spec`, of a cache whose frames the first rule chose, a shard in folders of its own."""
    return small_spec(clips, small_tower(Path(clips.source)), frame_rule=1, chunk_keys="folders", **changes)


def extract_by_first_rule(
    clips: ClipList, cache: Path, *, wrong: Collection[str] = (), **options: Any
) -> ExtractResult:
    """Extract as `extract_small`, as versions of the first rule did. `wrong`: names of videos whose frames come mirrored."""
    with _first_rule(wrong):
        return extract_small(clips, cache, spec=first_rule_spec(clips), **options)


@contextmanager
def _first_rule(wrong: Collection[str]) -> Iterator[None]:
    frames = DecodePool.frames

    def mistaken(pool: DecodePool, path: Path, choose: Any) -> Iterator[Any]:
        for event in frames(pool, path, choose):
            is_wrong = Path(path).name in wrong and isinstance(event, np.ndarray)
            yield np.ascontiguousarray(event[:, ::-1]) if is_wrong else event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evl_cache.spec.FRAME_RULE", 1)
        patch.setattr("evl_cache.store.format.marks.FRAME_RULE", 1)
        patch.setattr(DecodePool, "frames", mistaken)
        yield


def doubting(reasons: Mapping[str, str], asked: list[tuple[str, str]]) -> Callable[..., str | None]:
    """A `DecodePool.doubt` that has these reasons by the video's name; what it is asked is noted in `asked`."""

    def doubt(pool: DecodePool, path: str | Path, decoder: str) -> str | None:
        asked.append((Path(path).name, decoder))
        return reasons.get(Path(path).name)

    return doubt
