"""A process that trains one run after another takes no more memory than one run does."""

import gc
import json
import os
import subprocess
from dataclasses import replace

import pytest

from evl_cache.batches.resident import ResidentSamples
from evl_cache.heads import Head
from evl_cache.spec import ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.store.reading.buffers import BatchBuffers
from evl_cache.train.stage import TrainOptions, train
from evl_cache.train.trainer import Trainer
from tests.support.feature_caches import TOWER, write_cache, write_pair
from tests.support.warm_python import warm_python

MB = 10**6
CACHE = {"tower": replace(TOWER, image_size=96, width=128), "views": ViewSpec(frames=8), "layers": (3, 4)}
RUNS = """
import json, re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from evl_cache import FeatureCache
from evl_cache.train.stage import TrainOptions, train
folder = Path(sys.argv[1])
taken = []
for number, head in enumerate(["meanpool", "decoder1"] * 4):
    options = TrainOptions(head=head, steps=4, batch=5 + number, keep_in="ram")
    train(FeatureCache(folder / "train"), FeatureCache(folder / "val"), options=options, out=folder / str(number))
    taken.append(1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]))
print(json.dumps(taken))
"""


def of_trainings():
    """What large objects of trainings there are."""
    kinds = (ResidentSamples, BatchBuffers, Trainer, Head, FeatureCache)
    return {id(found): found for found in gc.get_objects() if issubclass(type(found), kinds)}


@pytest.mark.parametrize("how", ["ends", "diverges"])
def test_when_a_training_ends_nothing_holds_what_it_held(tmp_path, how, monkeypatch, one_thread):
    monkeypatch.setattr("evl_cache.processes.memory.gc.collect", lambda: 0)  # by no cycle either
    places = [cache.path for cache in write_pair(tmp_path)]
    gc.collect()
    gc.disable()
    try:
        before = of_trainings()
        options = TrainOptions(
            head="decoder1", epochs=2, batch=4, keep_in="ram", lr=1e30 if how == "diverges" else 1e-3
        )
        try:
            train(
                *map(FeatureCache, places), options=options, out=tmp_path / "run", on_step=lambda *step: None
            )
        except Exception:
            assert how == "diverges"
        left = [found for number, found in of_trainings().items() if number not in before]
        # A head that is asked for what it reads has no memory.
        assert [type(found) for found in left if not _is_meta(found)] == []
    finally:
        gc.enable()


def _is_meta(found):
    return isinstance(found, Head) and all(p.is_meta for p in found.parameters())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the system does not tell what is taken")
def test_runs_of_many_shapes_one_after_another_leave_what_one_leaves(tmp_path):
    write_cache(tmp_path / "train", labels=[i % 3 for i in range(40)], block_clips=10, **CACHE)
    write_cache(
        tmp_path / "val", labels=[0, 1, 2] * 2, prefix="v", split="val", seed=1, block_clips=6, **CACHE
    )
    done = subprocess.run(
        [warm_python(), "-c", RUNS, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    taken = json.loads(done.stdout.splitlines()[-1])
    # Samples that are kept are 40 MB of each run.
    assert max(taken[1:]) - taken[0] < 50 * MB, taken
