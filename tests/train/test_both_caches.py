"""Before the first step both caches are asked for all that the head reads: in train, sweep, eval and --online alike."""

from dataclasses import replace

import numpy as np
import pytest

from evl_cache.clips import Clip
from evl_cache.errors import UsageError
from evl_cache.live.clips import LiveClips
from evl_cache.runs.evaluate import evaluate
from evl_cache.store import Reads
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train import check_caches
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import TOWER, VIEWS, write_cache

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (1, 2, 3, 4)
OPTIONS = TrainOptions(head="decoder2", epochs=1, batch=4)
# What the validation cache is made with, and what the refusal says of it.
UNFIT = {
    "no maps": ({"maps": "none"}, "holds no attention maps"),
    "other layers": ({"layers": (2, 4)}, r"\[2, 4\]"),
    "channels": ({"tower": replace(TOWER, width=32)}, "channels 16, not 32"),
    "patches": ({"tower": replace(TOWER, patch_size=4)}, r"patches \(2, 2\), not \(4, 4\)"),
    "image size": ({"tower": replace(TOWER, image_size=32)}, "image size 16, not 32"),
    "weights": (
        {"tower": replace(TOWER, weights_sha256="34" * 32)},
        "weights 121212121212, not 343434343434",
    ),
    "frames": ({"views": replace(VIEWS, frames=4)}, "frames 3, not 4"),
    "a single frame": ({"views": replace(VIEWS, frames=1)}, "frames 3, not 1"),
    "classes": ({"classes": 4}, "classes"),
}


def val_cache(folder, **unfit):
    more = {"layers": LAYERS, **unfit}
    return write_cache(folder, labels=(0, 1, 2, 2, 1), prefix="v", split="val", seed=1, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training cache, and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    cache = write_cache(folder / "train", layers=LAYERS)
    train(cache, val_cache(folder / "val"), options=OPTIONS, out=folder / "run")
    return cache, folder / "run"


@pytest.mark.parametrize(("unfit", "message"), UNFIT.values(), ids=UNFIT)
def test_a_validation_cache_that_does_not_fit_is_refused_before_the_first_step(
    trained, tmp_path, unfit, message
):
    cache, run = trained
    val = val_cache(tmp_path / "val", **unfit)
    steps = []
    with pytest.raises(UsageError, match=message):
        train(cache, val, options=OPTIONS, out=tmp_path / "run", on_step=lambda *step: steps.append(step))
    runs = expand([{"head": ["linear", "decoder2"]}], {"epochs": 1, "batch": 4})
    with pytest.raises(UsageError, match=message):
        sweep(cache, val, runs=runs, out=tmp_path / "sweep")
    with pytest.raises(UsageError, match=message):
        evaluate(run, val)
    assert not steps and not (tmp_path / "run").exists() and not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("name", ["no maps", "other layers"])
def test_the_training_cache_is_refused_in_the_same_words(tmp_path, name):
    unfit, message = UNFIT[name]
    cache, val = write_cache(tmp_path / "train", **{"layers": LAYERS, **unfit}), val_cache(tmp_path / "val")
    for caches in ((cache, val), (val, cache)):
        with pytest.raises(UsageError, match=rf"{cache.place} .*{message}|{cache.place} {message}"):
            check_caches(caches, [Reads(layers=(3, 4))])


def live(spec, **more):
    clips = tuple(Clip(id=f"c{i}", path=f"c{i}.mp4", label=0, split="train") for i in range(3))
    return LiveClips(path=spec["path"], spec=replace(spec["spec"], **more), clips=clips)


def test_live_videos_are_asked_as_caches_are(trained, tmp_path):
    of_cache = {"path": tmp_path, "spec": trained[0].spec}
    reads = [Reads(layers=(3, 4))]
    check_caches((live(of_cache), live(of_cache, split="val")), reads)
    with pytest.raises(UsageError, match="classes"):
        check_caches((live(of_cache), live(of_cache, classes=("a", "b"))), reads)
    with pytest.raises(UsageError, match="no attention maps"):
        check_caches((live(of_cache), live(of_cache, maps="none")), reads)


def test_caches_that_are_stored_otherwise_belong_together_all_the_same(trained, tmp_path):
    val = val_cache(tmp_path / "val", layers=(3, 4), maps="fp16", codec="raw")
    result = train(trained[0], val, options=OPTIONS, out=tmp_path / "run")
    assert np.isfinite(result.top1)
