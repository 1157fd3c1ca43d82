"""What a cache is made of belongs together: the same clips and videos, in its own directories, with one limit of open files."""

import hashlib
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evl_cache.canonical_json import signed_json
from evl_cache.errors import CacheDamaged, CacheError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.stage import extract
from evl_cache.store import ADDITIONS_NAME, GROWN_NAME, FeatureCache, copy_to_directory, verify_cache
from evl_cache.store.format.description import group_document, read_description
from evl_cache.store.format.manifest import read_manifest
from tests.extract.test_growing_in_place import same_bits
from tests.support.grown_caches import first_clips, grow, planned, spec_of
from tests.support.store_helpers import extract_small, load_clips, one_thread


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


def test_a_clip_that_is_made_again_of_another_video_than_its_other_layers_is_told(
    motions: Path, tmp_path: Path
) -> None:
    clips, folder = load_clips(motions), tmp_path / "videos"  # 05.mp4 is broken
    shutil.copytree(motions, folder)
    clips = replace(clips, source=str(folder))
    grow(clips, tmp_path / "cache", layers=(3,))
    shutil.copy(folder / "00.mp4", folder / "05.mp4")
    grow(clips, tmp_path / "cache", layers=(2, 3))
    shutil.copy(folder / "06.mp4", folder / "05.mp4")
    for _ in range(2):  # also where nothing is left to be made again
        with pytest.raises(CacheDamaged, match=r"'05\.mp4' was made of another video than the features"):
            grow(clips, tmp_path / "cache", layers=(2, 3), options={"retry_failed": True})
    assert verify_cache(tmp_path / "cache").problems != ()
    grow(clips, tmp_path / "cache", layers=(2, 3), options={"check_sources": True})
    assert verify_cache(tmp_path / "cache").problems == ()
    extract_small(clips, tmp_path / "whole", spec=spec_of(clips, layers=(2, 3)))
    same_bits(FeatureCache(tmp_path / "cache"), FeatureCache(tmp_path / "whole"))


def test_verify_compares_the_videos_of_what_was_added(motions: Path, tmp_path: Path) -> None:
    clips, cache, folder = first_clips(load_clips(motions), 4), tmp_path / "cache", tmp_path / "videos"
    for layers in ((3,), (2, 3)):
        grow(clips, cache, layers=layers)
    shutil.copytree(motions, folder)
    shutil.copy(folder / "06.mp4", folder / "01.mp4")
    (addition,) = (cache / ADDITIONS_NAME).glob("layers-*")
    growth = planned(replace(clips, source=str(folder)), cache, layers=(2, 3))
    assert growth is not None
    with one_thread():  # as an older version makes the base again, which knows of no addition
        extract(growth.steps[0].job, options=ExtractOptions(batch=4, decode_workers=1, check_sources=True))
    base = read_manifest(cache, growth.steps[0].job.spec).digest
    for name in (GROWN_NAME, f"{ADDITIONS_NAME}/{GROWN_NAME}"):
        found = json.loads((cache / name).read_bytes())
        found["base"]["cache_digest"] = base
        (cache / name).write_bytes(signed_json({k: v for k, v in found.items() if k != "digest"})[0])
    (problem,) = verify_cache(cache).problems
    assert f"{addition}: '01.mp4' was made of another video" in problem.reason


def test_additions_in_each_others_directories_are_told(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    for count, layers in ((3, (3,)), (5, (3,)), (7, (3,)), (7, (2, 3))):
        grow(first_clips(clips, count), cache, layers=layers)
    one, other = sorted((cache / ADDITIONS_NAME).glob("clips-*"))
    one.rename(tmp_path / "one")
    other.rename(one)
    (tmp_path / "one").rename(other)
    with pytest.raises(CacheDamaged, match="it holds other clips"):
        FeatureCache(cache)


def test_no_addition_is_made_or_read_through_a_link(motions: Path, tmp_path: Path) -> None:
    clips, cache, elsewhere = first_clips(load_clips(motions), 4), tmp_path / "cache", tmp_path / "elsewhere"
    grow(clips, cache, layers=(3,))
    elsewhere.mkdir()
    (cache / ADDITIONS_NAME).symlink_to(elsewhere)
    with pytest.raises(CacheError, match="is a link"):
        grow(clips, cache, layers=(2, 3))
    assert list(elsewhere.iterdir()) == []
    (cache / ADDITIONS_NAME).unlink()
    grow(clips, cache, layers=(2, 3))
    (addition,) = (cache / ADDITIONS_NAME).glob("layers-*")
    addition.rename(elsewhere / "moved")
    addition.symlink_to(elsewhere / "moved")
    assert any("is a link" in problem.reason for problem in verify_cache(cache).problems)
    with pytest.raises(CacheError, match="is a link"):
        copy_to_directory(cache, tmp_path / "copied")


def test_labels_beyond_the_classes_of_what_was_added_are_told(motions: Path, tmp_path: Path) -> None:
    clips, cache = load_clips(motions), tmp_path / "cache"
    for count in (3, 5):
        grow(first_clips(clips, count), cache)
    (addition,) = (cache / ADDITIONS_NAME).glob("clips-*")
    lines = (addition / "clips.jsonl").read_bytes().replace(b'"label":4', b'"label":9')
    (addition / "clips.jsonl").write_bytes(lines)
    described = replace(read_description(addition), clips_sha256=hashlib.sha256(lines).hexdigest())
    (addition / "zarr.json").write_text(json.dumps(group_document(described)))
    with pytest.raises(CacheDamaged, match="labels beyond its 8 classes"):
        FeatureCache(cache)
