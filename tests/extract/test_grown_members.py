"""What a cache is made of belongs together: the same clips and videos, in its own directories, with one limit of open files."""

import os
import pickle
from pathlib import Path

import torch

from evl_cache.store import FeatureCache
from tests.support.grown_caches import first_clips, grow
from tests.support.store_helpers import load_clips


def test_open_files_of_all_that_was_added_are_bounded_together(motions: Path, tmp_path: Path) -> None:
    clips, blocks = load_clips(motions), {"block_clips": 1, "layers": (3,)}
    for count in range(1, 6):
        grow(first_clips(clips, count), tmp_path / "cache", **blocks)
    opened = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "cache")))
    assert len(opened.members) == 5
    opened.members[0].samples.shards.limit = 4
    whole = opened.read(range(5))[0][0]
    before = len(os.listdir("/proc/self/fd"))
    for sample in (0, 3, 1, 4, 2, 0):
        assert torch.equal(opened.read([sample])[0][0][0], whole[sample])
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    opened.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 4
