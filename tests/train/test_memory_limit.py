"""Under a limit of the kernel: whatever is kept, and however large the batch becomes, a training takes less than there is."""

import json
import os
import subprocess
from dataclasses import replace

import pytest

from evl_cache.spec import ViewSpec
from tests.support.feature_caches import TOWER, write_cache
from tests.support.memory_group import memory_group
from tests.support.warm_python import warm_python

MB = 10**6
LIMIT = 450 * MB
SAMPLES, VAL_SAMPLES = 150, 20
# 145 tokens of 128 channels in 8 frames, with maps: 0.4 MB of a sample. All are a sixth of the limit.
CACHES = {
    "tower": replace(TOWER, image_size=96, width=128),
    "views": ViewSpec(frames=8, stride=2),
    "layers": (4,),
    "block_clips": 16,
}
TRAINING = """
import json, os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import evl_cache.train.stage as stage
import evl_cache.sweep.stage as sweep_stage
from evl_cache import FeatureCache
from evl_cache.sweep.grid import expand
folder, group, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
out = folder / f"run-{os.getpid()}"
heads = given.pop("heads", None)
(group / "cgroup.procs").write_text(str(os.getpid()))
kept = []
def noted(module):
    real = module.make_loaders
    def make_loaders(*args, kept_nbytes, **more):
        kept.append(kept_nbytes)
        return real(*args, kept_nbytes=kept_nbytes, **more)
    module.make_loaders = make_loaders
noted(stage), noted(sweep_stage)
caches = FeatureCache(folder / "train"), FeatureCache(folder / "val")
if heads is None:
    result = stage.train(*caches, options=stage.TrainOptions(epochs=1, head="decoder1", **given), out=out)
    print(json.dumps({"batch": result.batch, "kept": kept}))
else:
    runs = expand([{"head": heads, "seed": [0, 1]}], {"epochs": 1, **given})
    result = sweep_stage.sweep(*caches, runs=runs, out=out)
    print(json.dumps({"batch": 0, "kept": kept, "passes": len(result.passes)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    write_cache(folder / "train", labels=[i % 3 for i in range(SAMPLES)], **CACHES)
    labels = [i % 3 for i in range(VAL_SAMPLES)]
    write_cache(folder / "val", labels=labels, prefix="v", split="val", seed=1, **CACHES)
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"batch": "auto"},
        {"batch": "auto", "keep_in": "ram"},
        {"batch": "auto", "keep_in": "ram", "keep_bytes": 2_000 * MB},
        {"batch": "auto", "keep_in": "ram", "accumulate": 4},
        {"batch": "auto", "keep_in": "device"},
        {"batch": 64, "keep_in": "ram"},
        {"batch": 48, "keep_in": "ram", "accumulate": 2, "heads": ["decoder1", "meanpool"]},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_what_a_training_takes_stays_below_the_limit(folder, options):
    with memory_group(LIMIT) as group:
        if group is None:
            pytest.skip(
                "needs root, and a kernel whose control groups bound memory, to make one with a limit"
            )
        done = subprocess.run(
            [warm_python(), "-c", TRAINING, str(folder), str(group.path), json.dumps(options)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        peak = group.peak
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"  # it was not killed for want of memory
    found = json.loads(done.stdout.splitlines()[-1])
    assert 100 * MB < peak < LIMIT, found
    assert all(found["kept"]) or "keep_in" not in options, found
