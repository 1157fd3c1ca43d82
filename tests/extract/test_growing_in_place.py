"""A cache that grows in place is read bit for bit as one that was made of all of it at once."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evl_cache.clips import ClipList
from evl_cache.errors import CacheDamaged, CacheError, UsageError
from evl_cache.extract.grown import extract_grown
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.stage import extract
from evl_cache.spec import ViewSpec
from evl_cache.store import (
    GROWN_NAME,
    LOCKS_NAME,
    FeatureCache,
    LockWatcher,
    array_layouts,
    finish_cache,
    replace_records,
    verify_cache,
)
from evl_cache.store.format.marks import read_mark
from tests.support.grown_caches import AUGMENTED, first_clips, grow, planned, spec_of
from tests.support.store_helpers import clear_mark, extract_small, load_clips, one_thread, tree

Steps = list[tuple[int, dict[str, Any]]]  # clips, and changes to the spec, of each command


def path_of(steps: Steps, motions: Path, folder: Path) -> tuple[Path, Path]:
    """A cache that grew by these commands, and one that the last of them made at once."""
    clips = load_clips(motions)
    for count, changes in steps:
        grow(first_clips(clips, count), folder / "grown", **changes)
    count, changes = steps[-1]
    listed = first_clips(clips, count)
    extract_small(listed, folder / "whole", spec=spec_of(listed, **changes))
    return folder / "grown", folder / "whole"


def same_bits(grown: FeatureCache, whole: FeatureCache) -> None:
    """Everything that a reader gives is the same."""
    assert grown.spec == whole.spec
    assert list(grown.clips) == list(whole.clips)
    assert np.array_equal(grown.is_valid, whole.is_valid)
    assert np.array_equal(grown.labels, whole.labels)
    assert grown.failures == whole.failures
    assert dict(grown.provenance) == dict(whole.provenance)
    rows = np.flatnonzero(whole.is_valid)[::-1]
    layers = whole.spec.layers
    for wanted in (layers, layers[:1], layers[-1:], layers[::2]):
        mine, theirs = grown.read(rows, layers=wanted), whole.read(rows, layers=wanted)
        for ours, others in zip(mine, theirs, strict=True):
            assert (ours is None) == (others is None)
            for one, other in zip(ours or [], others or [], strict=True):
                assert torch.equal(one, other)
        pairs = zip(grown.read_class_tokens(rows, wanted), whole.read_class_tokens(rows, wanted), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for row in (int(rows[0]), int(rows[-1])):
        one, other = grown.read_row(row), whole.read_row(row)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


GROWTHS: dict[str, Steps] = {
    "layers": [(7, {"layers": (3,)}), (7, {"layers": (1, 2, 3)})],
    "layers between": [(7, {"layers": (1, 3)}), (7, {"layers": (1, 2, 3)})],
    "clips": [(3, {}), (7, {})],
    "clips of a short block": [(4, {}), (7, {})],
    "both": [(4, {"layers": (3,)}), (7, {"layers": (2, 3)})],
    "layers, then clips, then layers": [
        (3, {"layers": (3,)}),
        (3, {"layers": (2, 3)}),
        (7, {"layers": (2, 3)}),
        (7, {"layers": (1, 2, 3)}),
    ],
    "views": [(4, {"views": AUGMENTED}), (4, {"views": replace(AUGMENTED, train_views=3)})],
    "all three": [
        (3, {"layers": (3,), "views": AUGMENTED}),
        (5, {"layers": (2, 3), "views": replace(AUGMENTED, train_views=4)}),
    ],
}


@pytest.mark.parametrize("name", GROWTHS)
def test_what_grew_is_what_one_extraction_gives(motions: Path, tmp_path: Path, name: str) -> None:
    grown, whole = path_of(GROWTHS[name], motions, tmp_path)
    assert (grown / GROWN_NAME).is_file()
    opened, alone = FeatureCache(grown), FeatureCache(whole)
    same_bits(opened, alone)
    assert opened.is_complete and opened.has_manifest
    opened.check_marks(slice(None))


@pytest.mark.parametrize(
    "storage", [("fp16", "uint8"), ("int8", "none"), ("fp16", "recompute"), ("int8", "recompute")]
)
@pytest.mark.parametrize("name", ["layers", "both"])
def test_what_grew_is_the_same_however_it_is_stored(
    motions: Path, tmp_path: Path, name: str, storage: tuple[str, str]
) -> None:
    tokens, maps = storage
    steps: Steps = [(4, {"layers": (3,)}), (4 if name == "layers" else 7, {"layers": (2, 3)})]
    steps = [(count, changes | {"tokens": tokens, "maps": maps}) for count, changes in steps]
    grown, whole = path_of(steps, motions, tmp_path)
    same_bits(FeatureCache(grown), FeatureCache(whole))


def test_what_is_asked_and_there_is_not_made_again(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 4)
    grow(clips, tmp_path / "cache", layers=(3,))
    first = grow(clips, tmp_path / "cache", layers=(2, 3))
    before = tree(tmp_path / "cache")
    again = grow(clips, tmp_path / "cache", layers=(2, 3))
    assert (first.clips_done_here, again.clips_done_here) == (4, 0)
    assert again.was_done and again.cache_digest == first.cache_digest
    assert tree(tmp_path / "cache") == before


def test_the_command_that_a_cache_was_begun_with_goes_over_what_was_added(
    motions: Path, tmp_path: Path
) -> None:
    clips = load_clips(motions)  # 05.mp4 is broken
    grow(clips, tmp_path / "cache", layers=(3,))
    grow(clips, tmp_path / "cache", layers=(2, 3))
    growth = planned(clips, tmp_path / "cache", layers=(3,))
    assert growth is not None and growth.told == []
    assert [step.job.spec.layers for step in growth.steps] == [(3,), (2,)]


def test_a_list_in_another_order_adds_what_is_new_behind_what_is_there(motions: Path, tmp_path: Path) -> None:
    clips = load_clips(motions)
    shuffled = replace(clips, clips=(clips.clips[6], *clips.clips[:3], clips.clips[7]))
    grow(first_clips(clips, 3), tmp_path / "cache")
    growth = planned(shuffled, tmp_path / "cache")
    assert growth is not None
    assert growth.told == [f"adds 2 clips to {tmp_path / 'cache'}"]
    assert [clip.id for clip in growth.job.clips.clips] == ["00.mp4", "01.mp4", "02.mp4", "06.mp4", "07.mp4"]


def test_a_part_is_seen_once_it_is_complete(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 4)
    grow(clips, tmp_path / "cache", layers=(3,))
    growth = planned(clips, tmp_path / "cache", layers=(2, 3))
    assert growth is not None
    with one_thread():
        extract(growth.steps[1].job, options=ExtractOptions(batch=4, decode_workers=1))
    assert FeatureCache(tmp_path / "cache").spec.layers == (3,)
    assert grow(clips, tmp_path / "cache", layers=(2, 3)).clips_done_here == 0
    assert FeatureCache(tmp_path / "cache").spec.layers == (2, 3)


def refused(clips: ClipList, cache: Path, *parts: str, **changes: Any) -> None:
    """A cache does not grow into a spec with these changes, for a reason that says this, and stays as it is."""
    before = tree(cache)
    with pytest.raises(UsageError) as caught:
        grow(clips, cache, **changes)
    assert "holds another cache" in str(caught.value)
    for part in parts:
        assert part in str(caught.value)
    assert tree(cache) == before


def test_another_cache_is_refused_with_the_reason(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    four = first_clips(clips, 4)
    grow(four, cache, layers=(2, 3))
    refused(four, cache, "layers: [3], not [2, 3]", "keeps them", layers=(3,))
    refused(first_clips(clips, 3), cache, "lacks 1 of its clips, such as '03.mp4'", layers=(2, 3))
    other = replace(clips, clips=tuple(replace(clip, label=4) for clip in clips.clips))
    refused(other, cache, "'00.mp4' has label 4, not 0", layers=(2, 3))
    renamed = replace(clips, classes=("zero", *clips.classes[1:]))
    refused(renamed, cache, "numbers its classes otherwise", layers=(2, 3))
    refused(four, cache, "tokens", layers=(1, 2, 3), tokens="fp16")
    views = ViewSpec(frames=4, stride=2, temporal_views=3)
    refused(four, cache, "each test view depends on how many there are", views=views)
    grow(four, cache, layers=(1, 2, 3))
    refused(four, cache, "layers: [1, 3], not [1, 2, 3]", layers=(1, 3))


def test_fewer_augmented_views_than_there_are_are_refused(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 3)
    grow(clips, tmp_path / "cache", views=AUGMENTED)
    fewer = replace(AUGMENTED, train_views=1)
    refused(clips, tmp_path / "cache", "has 2 augmented views of a clip, and keeps them", views=fewer)


def test_an_unfinished_cache_does_not_grow(motions: Path, tmp_path: Path) -> None:
    clips, cache = first_clips(load_clips(motions), 4), tmp_path / "cache"
    grow(clips, cache, layers=(3,))
    clear_mark(cache, spec_of(clips, layers=(3,)), 1)
    with pytest.raises(UsageError, match="only a complete cache grows"):
        grow(clips, cache, layers=(2, 3))


def test_new_classes_may_follow_those_that_are_there(motions: Path, tmp_path: Path) -> None:
    clips = load_clips(motions)
    three = replace(first_clips(clips, 3), classes=clips.classes[:3])
    grow(three, tmp_path / "cache")
    grow(clips, tmp_path / "cache")
    opened = FeatureCache(tmp_path / "cache")
    assert opened.spec.classes == clips.classes
    assert [clip.label for clip in opened.clips] == [clip.label for clip in clips.clips]


def test_two_growths_that_do_not_fit_are_told(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    grow(first_clips(clips, 3), cache, layers=(3,))
    slower = planned(first_clips(clips, 6), cache, layers=(3,))
    grow(first_clips(clips, 3), cache, layers=(2, 3))
    assert slower is not None
    with one_thread(), pytest.raises(CacheError, match="grew otherwise while clips-3-5-"):
        extract_grown(slower, options=ExtractOptions(batch=4, decode_workers=1))
    assert FeatureCache(cache).spec.layers == (2, 3)
    refused(first_clips(clips, 6), cache, "keeps them", layers=(3,))
    assert grow(first_clips(clips, 6), cache, layers=(2, 3)).clips == 6


def test_a_cache_of_an_older_rule_grows_where_all_its_frames_are_by_the_rule_of_today(
    motions: Path, tmp_path: Path
) -> None:
    clips = first_clips(load_clips(motions), 4)
    grow(clips, tmp_path / "cache", layers=(3,), frame_rule=1)  # what is made now is marked so
    grow(clips, tmp_path / "cache", layers=(2, 3))
    extract_small(clips, tmp_path / "whole", spec=spec_of(clips, layers=(2, 3), frame_rule=1))
    same_bits(FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "whole"))


def test_what_is_added_to_an_older_cache_is_stored_as_that_is(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 4)
    grow(clips, tmp_path / "cache", layers=(3,), chunk_keys="folders")
    grow(clips, tmp_path / "cache", layers=(2, 3))
    extract_small(clips, tmp_path / "whole", spec=spec_of(clips, layers=(2, 3), chunk_keys="folders"))
    same_bits(FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "whole"))
    assert verify_cache(tmp_path / "cache").problems == ()


def test_frames_of_an_older_rule_get_no_more_layers(motions: Path, tmp_path: Path) -> None:
    clips, cache = first_clips(load_clips(motions), 4), tmp_path / "cache"
    grow(clips, cache, layers=(3,), frame_rule=1)
    older = FeatureCache(cache)
    mark = read_mark(cache, 0, older.spec)
    assert mark is not None
    lock = LockWatcher(cache / LOCKS_NAME, expiry_s=60.0).take(0)
    assert lock is not None
    with lock:
        records = [replace(record, frame_rule=None) for record in mark.clips]
        assert replace_records(cache, older.spec, mark, records, lock=lock)
    finish_cache(cache, older.spec)
    with pytest.raises(UsageError, match="--retry-doubtful"):
        grow(clips, cache, layers=(2, 3))


def test_layers_of_another_video_are_not_added(motions: Path, tmp_path: Path) -> None:
    clips, folder = load_clips(motions), tmp_path / "videos"
    shutil.copytree(motions, folder)
    clips = replace(first_clips(clips, 4), source=str(folder))
    grow(clips, tmp_path / "cache", layers=(3,))
    shutil.copy(folder / "06.mp4", folder / "01.mp4")
    with pytest.raises(CacheDamaged, match="made of another video than the features"):
        grow(clips, tmp_path / "cache", layers=(2, 3))
    assert FeatureCache(tmp_path / "cache").spec.layers == (3,)
    grow(clips, tmp_path / "cache", layers=(2, 3), options={"check_sources": True})
    extract_small(clips, tmp_path / "whole", spec=spec_of(clips, layers=(2, 3)))
    same_bits(FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "whole"))
    assert verify_cache(tmp_path / "cache").problems == ()


def test_a_clip_that_failed_is_tried_again_in_all_that_was_added(motions: Path, tmp_path: Path) -> None:
    clips, folder = load_clips(motions), tmp_path / "videos"
    shutil.copytree(motions, folder)
    clips = replace(clips, source=str(folder))
    for layers in ((3,), (2, 3)):
        grow(clips, tmp_path / "cache", layers=layers)
    assert len(FeatureCache(tmp_path / "cache").failures) == 1
    shutil.copy(folder / "00.mp4", folder / "05.mp4")
    result = grow(clips, tmp_path / "cache", layers=(2, 3), options={"retry_failed": True})
    assert result.failures == () and result.clips_done_here == 2
    assert FeatureCache(tmp_path / "cache").is_valid.all()
    assert verify_cache(tmp_path / "cache").problems == ()


def test_a_grown_cache_survives_pickling_and_a_refresh(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 4)
    grow(clips, tmp_path / "cache", layers=(3,))
    grow(clips, tmp_path / "cache", layers=(2, 3))
    opened = FeatureCache(tmp_path / "cache")
    before = opened.read([1, 0])
    copied = pickle.loads(pickle.dumps(opened))
    copied.refresh()
    opened.close()
    for one in (copied, opened):
        assert all(torch.equal(*pair) for pair in zip(one.read([1, 0])[0], before[0], strict=True))
    assert copied.fingerprint == opened.fingerprint


def test_rows_of_a_grown_cache_are_reused(motions: Path, tmp_path: Path) -> None:
    clips = first_clips(load_clips(motions), 4)
    more = replace(AUGMENTED, train_views=3)
    grow(clips, tmp_path / "grown", layers=(3,), views=AUGMENTED)
    grow(clips, tmp_path / "grown", layers=(2, 3), views=more)
    for name, options in (("copied", {"reuse": tmp_path / "grown"}), ("whole", {})):
        spec = spec_of(clips, layers=(2, 3), views=more)
        extract_small(clips, tmp_path / name, spec=spec, **options)
    copied, whole = (tree(tmp_path / name) for name in ("copied", "whole"))
    shards = [
        layout.shard_name(block)
        for layout in array_layouts(spec).values()
        for block in range(spec.num_blocks)
    ]
    assert [copied[name] for name in shards] == [whole[name] for name in shards]
    same_bits(FeatureCache(tmp_path / "copied"), FeatureCache(tmp_path / "whole"))
    marks = [json.loads(one["done/000000.json"])["clips"] for one in (copied, whole)]
    assert marks[0] == marks[1]
