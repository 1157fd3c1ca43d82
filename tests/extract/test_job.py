"""A job whose parts contradict each other is refused before anything is written."""

from dataclasses import replace
from pathlib import Path

import pytest

from evl_cache.clips import ClipList
from evl_cache.errors import UsageError
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.extract.stage import extract_blocks
from evl_cache.video import DecodeOptions
from tests.support.store_helpers import make_clips, small_job


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> ClipList:
    return make_clips(tmp_path_factory.mktemp("clips"), 2)


@pytest.fixture
def job(clips: ClipList, tmp_path: Path) -> ExtractionJob:
    return small_job(clips, tmp_path / "cache")


def test_other_clips_than_the_specs_are_refused(clips: ClipList, job: ExtractionJob) -> None:
    with pytest.raises(
        UsageError, match=r"1 clips, content .* has 2, content .*; give the list it was made of"
    ):
        replace(job, clips=replace(clips, clips=clips.clips[:1]))
    with pytest.raises(UsageError, match="give the list it was made of"):
        replace(job, clips=replace(clips, clips=clips.clips[::-1]))


def test_another_tower_than_the_specs_is_refused(job: ExtractionJob) -> None:
    other = job.tower._replace(spec=replace(job.tower.spec, weights_sha256="0" * 64))
    with pytest.raises(UsageError, match="their features differ; give the model and weights"):
        replace(job, tower=other)
    renamed = job.tower._replace(spec=replace(job.tower.spec, model="the same elsewhere"))
    assert replace(job, tower=renamed).spec == job.spec  # names do not change features


def test_a_decoder_of_other_pixels_is_refused(job: ExtractionJob) -> None:
    options = ExtractOptions(decoding=DecodeOptions(decoder="pyav"))
    job.check_pixels(options.decoding)
    nvdec = replace(job, spec=replace(job.spec, pixels="torchcodec-cuda"))
    with pytest.raises(UsageError, match=r"torchcodec-cuda pixels, --decoder pyav .* gives software"):
        extract_blocks(nvdec, range(1), redo=(), options=options, on_clip=lambda failed: None)
    assert not nvdec.cache_path.exists()
