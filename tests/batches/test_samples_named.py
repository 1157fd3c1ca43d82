"""Samples and clips are named alike to everything that reads a cache."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evl_cache import FeatureCache
from evl_cache.batches import FeatureLoader, samples_of_clips
from evl_cache.errors import EvlCacheError, UsageError
from evl_cache.runs.evaluate import evaluate
from evl_cache.spec import ViewSpec
from evl_cache.sweep import sweep
from evl_cache.sweep.grid import expand
from evl_cache.train import TrainOptions, train
from tests.support.feature_caches import write_cache, write_pair

pytestmark = pytest.mark.usefixtures("one_thread")
OPTIONS = TrainOptions(head="linear", head_layers=(4,), steps=1, batch=4)
FALSE: list[Any] = [
    [0.7],
    ["1"],
    {0, 1},
    [99],
    [-1],
    99,
    "0",
    True,
    np.zeros(3, dtype=bool),
    [None],
    [True, 2],
]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, FeatureCache]:
    return write_pair(tmp_path_factory.mktemp("caches"), failed=(1,))


def rows_read(cache: FeatureCache, samples: Any) -> list[torch.Tensor]:
    return cache.read(samples, layers=(4,))[0]


def test_a_mask_reads_the_samples_that_it_marks(caches: tuple[FeatureCache, FeatureCache]) -> None:
    cache = caches[0]
    valid = np.flatnonzero(cache.is_valid).tolist()
    assert len(valid) == 12
    for mask in (cache.is_valid, torch.from_numpy(cache.is_valid), cache.is_valid.tolist()):
        assert torch.equal(rows_read(cache, mask)[0], rows_read(cache, valid)[0])
        assert cache.read_class_tokens(mask)[0].shape[0] == 12
        assert FeatureLoader(cache, mask, layers=(4,), batch=4).samples.tolist() == valid
        assert samples_of_clips(cache, mask).tolist() == valid


def test_one_number_is_read_as_a_list_of_one(caches: tuple[FeatureCache, FeatureCache]) -> None:
    cache = caches[0]
    for one in (3, np.int64(3), torch.tensor(3), slice(3, 4), range(3, 4)):
        assert torch.equal(rows_read(cache, one)[0], rows_read(cache, [3])[0])
        assert FeatureLoader(cache, one, layers=4, batch=4).samples.tolist() == [3]
        assert samples_of_clips(cache, one).tolist() == [3]
    assert cache.read(slice(2, -2), layers=4)[0][0].shape[0] == 9


READERS: dict[str, Callable[[FeatureCache, Any], object]] = {
    "read": lambda cache, wanted: cache.read(wanted),
    "read_stored": lambda cache, wanted: cache.read_stored(wanted),
    "read_class_tokens": lambda cache, wanted: cache.read_class_tokens(wanted),
    "check_marks": lambda cache, wanted: cache.check_marks(wanted),
    "FeatureLoader": lambda cache, wanted: FeatureLoader(cache, wanted, layers=(4,), batch=4),
    "samples_of_clips": samples_of_clips,
}


@pytest.mark.parametrize("wanted", FALSE, ids=str)
@pytest.mark.parametrize("reader", READERS)
def test_what_names_no_sample_is_an_error_of_ours(
    caches: tuple[FeatureCache, FeatureCache], reader: str, wanted: Any
) -> None:
    with pytest.raises(UsageError, match="expected"):
        READERS[reader](caches[0], wanted)


@pytest.mark.parametrize("wanted", [0.7, "0", True, 99, -1])
def test_a_row_is_one_whole_number(caches: tuple[FeatureCache, FeatureCache], wanted: Any) -> None:
    cache = caches[0]
    with pytest.raises(UsageError, match="expected"):
        cache.read_row(wanted)
    with pytest.raises(UsageError, match="expected"):
        cache.read_into(cache.buffers(slots=1), [(0, wanted)])


@pytest.mark.parametrize("wanted", FALSE, ids=str)
def test_trainings_and_evaluations_refuse_clips_that_are_not_there(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path, wanted: Any
) -> None:
    runs = expand([{"head": ["linear"], "head_layers": [[4]], "steps": [1]}], {})
    for side in ("train_clips", "val_clips"):
        with pytest.raises(UsageError, match="expected"):
            train(*caches, options=OPTIONS, out=tmp_path / "run", **{side: wanted})
        with pytest.raises(UsageError, match="expected"):
            sweep(*caches, runs=runs, out=tmp_path / "sweep", **{side: wanted})
    assert list(tmp_path.iterdir()) == []


def test_clips_are_named_by_masks_numbers_and_slices_and_places_by_strings(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    mask = np.arange(13) < 6
    out = str(tmp_path / "runs/x")
    result = train(*caches, options=OPTIONS, out=out, train_clips=mask, val_clips=slice(2, 5))
    assert result.val_clips == 3
    whole = train(
        *caches, options=OPTIONS, out=tmp_path / "runs/y", train_clips=[0, 1, 2, 3, 4, 5], val_clips=[2, 3, 4]
    )
    assert (whole.top1, whole.cache_fingerprint) == (result.top1, result.cache_fingerprint)
    assert evaluate(out, caches[1], clips=2).val_clips == 1
    with pytest.raises(UsageError, match="expected"):
        evaluate(out, caches[1], clips=[0.7])  # type: ignore[list-item]


def test_layers_come_shallow_to_deep_or_not_at_all(caches: tuple[FeatureCache, FeatureCache]) -> None:
    cache = caches[0]
    with pytest.raises(UsageError, match=r"layers \[4, 3\]; expected shallow to deep"):
        cache.read([0], layers=(4, 3))
    with pytest.raises(UsageError, match="shallow to deep"):
        cache.read_class_tokens([0], layers=(4, 3))
    with pytest.raises(UsageError, match="shallow to deep"):
        FeatureLoader(cache, [0], layers=(4, 3), batch=1)
    with pytest.raises(UsageError, match="shallow to deep"):
        train(*caches, options=TrainOptions(head="decoder2", head_layers=(4, 3), steps=1), out="never")
    for layers in ((3.0,), "3", {3}, (True,)):
        with pytest.raises(EvlCacheError, match="expected whole numbers"):
            cache.read([0], layers=layers)  # type: ignore[arg-type]


def test_no_sample_to_load_is_an_error_of_ours(caches: tuple[FeatureCache, FeatureCache]) -> None:
    with pytest.raises(UsageError, match="no sample is asked for"):
        FeatureLoader(caches[0], np.zeros(13, dtype=bool), layers=(4,), batch=4)


@pytest.mark.parametrize("side", ["train_clips", "val_clips"])
@pytest.mark.parametrize("clips", [[1], [], np.zeros(0, dtype=int)], ids=["failed", "none", "empty"])
def test_clips_without_features_end_trainings_and_sweeps_before_anything_is_written(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path, side: str, clips: Any
) -> None:
    runs = expand([{"head": ["linear"], "head_layers": [[4]], "steps": [1]}], {})
    chosen = {side: clips}
    with pytest.raises(UsageError, match=r"none of the 1 samples|no sample is asked for"):
        train(*caches, options=OPTIONS, out=tmp_path / "run", **chosen)
    with pytest.raises(UsageError, match=r"none of the 1 samples|no sample is asked for"):
        sweep(*caches, runs=runs, out=tmp_path / "sweep", **chosen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"batch": 2.5}, {"batch": "4"}, {"batch": 0}, {"threads": 0.5}, {"batch": True}]
)
def test_a_batch_and_threads_are_whole_numbers_from_one(
    caches: tuple[FeatureCache, FeatureCache], changes: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="expected at least 1 of each"):
        FeatureLoader(caches[0], [0], layers=(4,), **{"batch": 1, **changes})


@pytest.mark.parametrize("epoch", [-1, 0.5, "0", True])
def test_an_epoch_is_a_whole_number(caches: tuple[FeatureCache, FeatureCache], epoch: Any) -> None:
    loader = FeatureLoader(caches[0], [0, 2], layers=(4,), batch=1, shuffle_seed=0)
    with pytest.raises(UsageError, match="expected whole numbers from 0"):
        next(loader.epoch(epoch))
    with pytest.raises(UsageError, match="expected whole numbers from 0"):
        next(loader.epoch(0, start_batch=epoch))


def test_samples_that_are_not_all_training_views_of_their_clips_are_refused(tmp_path: Path) -> None:
    cache = write_cache(
        tmp_path / "cache", labels=(0, 1, 2), views=ViewSpec(frames=3, stride=2, train_views=2)
    )
    for samples in ([0, 1, 2], [1, 2, 3, 4], [0, 0]):
        with pytest.raises(UsageError, match="expected all views of each clip"):
            FeatureLoader(cache, samples, layers=(4,), batch=2, shuffle_seed=0)
        assert len(FeatureLoader(cache, samples, layers=(4,), batch=2)) > 0  # in their order, each by itself
    assert len(FeatureLoader(cache, [4, 5, 1, 0], layers=(4,), batch=2, shuffle_seed=0).samples) == 4
