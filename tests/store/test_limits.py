"""What is written is read: limits of readers follow from the spec, and a cache that would outgrow them is not begun."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache.canonical_json import canonical_json, digest, digest_matches, signed_json
from evl_cache.clips import Clip, ClipList
from evl_cache.errors import CacheError, UsageError
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract_options import MOST_BATCH
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store import ClipRecord, create_cache, verify_cache
from evl_cache.store.disk.checksum import WholeFile
from evl_cache.store.format import limits
from evl_cache.store.format.known_blocks import KnownBlocks
from evl_cache.store.format.layout import array_layouts, mark_path, marked_blocks
from evl_cache.store.format.manifest import read_manifest
from evl_cache.store.format.marks import Mark, mark_content, mark_document, read_mark
from evl_cache.store.proving import files as files_module
from evl_cache.store.shards.shard import ShardRecord
from evl_cache.store.writing.completion import write_manifest
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tools import scale_tables

LAYERS = (8, 9, 10, 11, 12)
# clips and views of must-show: the training splits of Kinetics, ViT-B/16, 8 frames, 5 layers
LARGE = {"K400 with 32 views": (240_000, 32), "K700 with 10 views": (540_000, 10)}


def large_spec(clips: int, per_clip: int, /, **changes: Any) -> CacheSpec:
    whole = scale_tables.specs("K400", "B/16", 8)[0]
    views, block_clips = ViewSpec(frames=8, temporal_views=per_clip), max(1, 64 // per_clip)
    spec = replace(whole, num_clips=clips, views=views, layers=LAYERS, block_clips=block_clips)
    return replace(spec, **changes)


def clips_of(spec: CacheSpec) -> list[Clip]:
    """Names as Kinetics has them."""
    return [
        Clip(id=f"v_{i:08d}_000010_000020", path=f"train/some class/v_{i:08d}_000010_000020.mp4", label=0, split="train")
        for i in range(spec.num_clips)
    ]  # fmt: skip


def begin(path: Path, spec: CacheSpec, clips: list[Clip] | None = None) -> CacheSpec:
    """Lay a cache of a spec down, with the digest of its list."""
    listed = ClipList(clips=tuple(clips or clips_of(spec)), classes=spec.classes, source="test")
    spec = replace(spec, content_id=listed.content_id, num_clips=len(listed.clips))
    create_cache(path, spec, listed.clips, origin={}, created_with={})
    return spec


def records_of(spec: CacheSpec) -> dict[str, ShardRecord]:
    """Shards whose chunks are as large as they are by experience."""
    chunks = spec.block_samples * len(spec.stored_layers)
    out = {}
    for name, layout in array_layouts(spec).items():
        nbytes = np.full(chunks, layout.chunk_nbytes * 4 // 5 + 1, "<u4")
        out[name] = ShardRecord(
            size=int(nbytes.sum(dtype=np.int64)) + 16 * chunks + 4,
            sha256="ab" * 32,
            packed_nbytes=nbytes.tobytes(),
            packed_checksums=(nbytes * 7919).tobytes(),
        )
    return out


def clip_records(spec: CacheSpec, block: int) -> tuple[ClipRecord, ...]:
    view = tuple(range(300, 300 + 16 * spec.views.frames, 16))
    return tuple(
        ClipRecord(
            id=f"v_{row:08d}_000010_000020",
            source_bytes=2_000_000 + row,
            source_sha256="cd" * 32,
            frame_size=(256, 340),
            frame_count=300,
            indices=(view,) * spec.views.per_clip,
            decoder="decord 3.4.0",
        )
        for row in spec.clips_of_block(block)
    )


def mark_of(spec: CacheSpec, block: int, records: dict[str, ShardRecord]) -> Mark:
    return Mark(block=block, files=records, clips=clip_records(spec, block), environment={"batch": 32})


def worst_mark(spec: CacheSpec, clips: list[Clip]) -> bytes:
    """The largest mark that a writer can make of the first block."""
    records = tuple(
        ClipRecord(
            id=clips[row].id,
            error="\x01" * 10**6,
            source_bytes=2**63,
            source_sha256="cd" * 32,
            frame_size=(2**63, 2**63),
            frame_count=2**63,
            indices=((2**63,) * spec.views.frames,) * spec.views.per_clip,
            decoder="d" * 100,
        )
        for row in spec.clips_of_block(0)
    )
    environment = {
        "batch": MOST_BATCH,
        "device": "x" * 200,
        "versions": {str(i): "v" * 100 for i in range(10)},
    }
    mark = Mark(block=0, files=records_of(spec), clips=records, environment=environment)
    return canonical_json(mark_document(mark, spec))


@pytest.mark.parametrize(
    "name", [pytest.param("K400 with 32 views", marks=pytest.mark.soak), "K700 with 10 views"]
)
def test_the_manifest_of_a_large_cache_is_written_and_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = large_spec(*LARGE[name])
    few = begin(tmp_path, replace(spec, num_clips=10))  # the soak has marks that were written
    spec = replace(few, num_clips=spec.num_clips)
    records = records_of(spec)

    def marked(known: KnownBlocks, block: int) -> Mark:
        return Mark(block=block, files=records, clips=(), environment={}, file_digest=(33_000, "ef" * 32))

    monkeypatch.setattr(KnownBlocks, "read", marked)
    cache_digest = write_manifest(tmp_path, spec)
    nbytes = (tmp_path / "manifest.json").stat().st_size
    assert 64 << 20 < nbytes < limits.manifest_limit(spec)  # 64 MiB is where readers stopped
    found = read_manifest(tmp_path, spec)
    assert found.digest == cache_digest and len(found.files) > 7 * spec.num_blocks
    assert found.files[f"done/{spec.num_blocks - 1:06d}.json"] == (33_000, "ef" * 32)


@pytest.mark.soak
@pytest.mark.parametrize("name", LARGE)
def test_a_large_cache_is_written_read_and_verified(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all its marks. EVL_CACHE_FULL_SIZE=1: of every clip, which takes gigabytes and half an hour; else of some."""
    clips, per_clip = LARGE[name]
    spec = large_spec(clips if os.environ.get("EVL_CACHE_FULL_SIZE") == "1" else clips // 40, per_clip)
    spec = begin(tmp_path, spec)
    records = records_of(spec)
    for block in range(spec.num_blocks):
        mark_path(tmp_path, block).write_bytes(
            canonical_json(mark_document(mark_of(spec, block, records), spec))
        )
    cache_digest = write_manifest(tmp_path, spec)
    by_array = {name: record.digest for name, record in records.items()}  # the data: terabytes

    def read_whole(path: Path, **options: object) -> WholeFile:
        return WholeFile(*by_array[path.relative_to(tmp_path).parts[0]], end=b"")

    monkeypatch.setattr(files_module, "read_whole", read_whole)
    monkeypatch.setattr(files_module, "check_end", lambda *arguments: None)
    verified = verify_cache(tmp_path)
    assert (verified.cache_digest, verified.problems) == (cache_digest, ())
    assert verified.blocks_done == spec.num_blocks


@pytest.mark.parametrize(
    ("views", "frames"), [(1, 8), (10, 8), (32, 8), (3, 32), (64, 64), (1000, 8), (1, 512)], ids=str
)
def test_no_mark_is_larger_than_its_reader_takes(views: int, frames: int) -> None:
    train = ViewSpec(frames=frames, temporal_views=views)
    spec = large_spec(64, views, views=train)
    if frames > 8:  # whose chunks are below the limit
        spec = replace(spec, tower=replace(spec.tower, image_size=64))
    clips = clips_of(spec)
    written = worst_mark(spec, clips)
    assert len(written) <= limits.mark_limit(spec)
    lines = [len(canonical_json(clip.to_json())) for clip in clips[: spec.block_clips]]
    assert len(written) <= limits._mark_nbytes(spec, sum(lines))


def test_marks_of_many_frames_may_be_larger_than_those_of_few() -> None:
    many = ViewSpec(frames=4096, temporal_views=1000)
    assert 64 << 20 < limits.mark_limit(large_spec(10, 1000, views=many)) <= 256 << 20


def test_a_long_reason_is_shortened_in_the_mark_and_a_short_one_is_kept(tmp_path: Path) -> None:
    for reason in ("a" * 10**6, "\x00" * 10**6, "字" * 10**6):
        kept = limits.shortened_reason(reason)
        assert reason.startswith(kept[:-2]) and kept.endswith(" …") and len(kept) > 500
        assert len(json.dumps(kept, ensure_ascii=False).encode()) <= limits.MOST_REASON_NBYTES
    for reason in ("", "05.mp4: cannot be opened", "x" * 3000, "字" * 1000):
        assert limits.shortened_reason(reason) == reason


def test_ids_of_a_megabyte_are_refused_when_the_cache_is_begun(tmp_path: Path) -> None:
    spec = large_spec(80, 1)
    clips = [replace(clip, id=f"{i}" + "x" * 1_200_000) for i, clip in enumerate(clips_of(spec))]
    with pytest.raises(UsageError, match=r"mark of a block of 64 clips .* shorten the clips' names"):
        begin(tmp_path / "many", spec, clips)
    assert not (tmp_path / "many" / "clips.jsonl").exists()
    begin(tmp_path / "one", spec, [clips[0], *clips_of(spec)[1:]])  # readers take that


def test_a_list_that_no_reader_takes_is_refused_when_the_cache_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_CLIPS_NBYTES", 5000)
    with pytest.raises(UsageError, match=r"clips\.jsonl would have .* split the list of clips"):
        begin(tmp_path, large_spec(100, 1))
    assert not marked_blocks(tmp_path) and not (tmp_path / "zarr.json").exists()


def test_class_names_that_no_reader_takes_are_refused_when_the_cache_is_begun(tmp_path: Path) -> None:
    classes = tuple(f"{i}" + "x" * 900 for i in range(20_000))
    with pytest.raises(UsageError, match=r"zarr\.json would have .* shorter names of classes"):
        begin(tmp_path, large_spec(3, 1, classes=classes))
    with pytest.raises(UsageError, match=r"could be read again: .* classes"):
        begin(tmp_path, large_spec(3, 1, classes=("x" * 1001,)))


def test_labels_that_no_reader_takes_are_refused_when_the_cache_is_begun(tmp_path: Path) -> None:
    many = large_spec(3, 1, classes=tuple(f"{i}" for i in range(100_002)))
    for label in (-1, 100_000):
        with pytest.raises(UsageError, match=f"has label {label}; expected 0 to 99999"):
            begin(tmp_path, many, [replace(clip, label=label) for clip in clips_of(many)])
    assert not (tmp_path / "zarr.json").exists()


def test_a_mark_that_no_reader_would_take_is_not_written(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", failed=(2,))
    spec = cache.spec
    mark = read_mark(cache.path, 0, spec)
    assert mark is not None and mark_content(mark, spec) == (cache.path / "done" / "000000.json").read_bytes()
    with pytest.raises(CacheError, match="no reader would take the mark"):
        mark_content(replace(mark, environment={"batch": MOST_BATCH + 1}), spec)
    with pytest.raises(CacheError, match="no reader would take the mark"):
        mark_content(replace(mark, clips=mark.clips[:-1]), spec)


def test_a_manifest_that_no_reader_would_take_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache")
    (cache.path / "manifest.json").unlink()
    monkeypatch.setattr(limits, "_MANIFEST_NBYTES", (1000, 1000))
    with pytest.raises(UsageError, match="its manifest would have"):
        write_manifest(cache.path, cache.spec)
    assert not (cache.path / "manifest.json").exists()


def test_videos_that_stand_still_are_no_damage() -> None:
    """All their frames but the first compress to nothing; a chunk is large where there are many frames."""
    tower = replace(large_spec(1, 1).tower, image_size=64, width=1024)
    spec = large_spec(1, 1, views=ViewSpec(frames=4096), tower=tower, maps="none", block_clips=1)
    records = records_of(spec)
    layout = array_layouts(spec)["tokens"]
    assert layout.chunk_nbytes > 16 << 20
    chunks = len(spec.stored_layers)
    nbytes = np.full(chunks, layout.chunk_nbytes // 2000, "<u4")
    still = replace(
        records["tokens"], size=int(nbytes.sum()) + 16 * chunks + 4, packed_nbytes=nbytes.tobytes()
    )
    mark_content(
        Mark(block=0, files=records | {"tokens": still}, clips=clip_records(spec, 0), environment={}), spec
    )


@pytest.mark.parametrize("content", [{"files": {"é": [1]}, "content_id": "c", "a": None}, {"version": 1}])
def test_a_signed_document_is_that_of_its_digest(content: dict[str, Any]) -> None:
    own = digest(content)
    written, found = signed_json(content)
    assert (written, found) == (canonical_json({**content, "digest": own}), own)
    assert digest_matches(json.loads(written), written)
    assert not digest_matches({**json.loads(written), "version": 2}, written.replace(b"1", b"2"))


def test_more_blocks_than_a_manifest_holds_are_refused_when_the_cache_is_begun(tmp_path: Path) -> None:
    spec = large_spec(1_000_000, 1, block_clips=1)
    with pytest.raises(UsageError, match=r"1000000 blocks, whose manifest.json .* split the list"):
        limits.check_limits(spec, clip_lines=b"", files={})
    limits.check_limits(large_spec(540_000, 64), clip_lines=b"", files={})  # one block a clip


def test_a_strangers_numbers_raise_no_limit_beyond_what_a_computer_has() -> None:
    hostile = large_spec(10**8, 1, block_clips=10**6, layers=tuple(range(1, 13)))
    assert limits.manifest_limit(hostile) <= 512 << 20 and limits.mark_limit(hostile) <= 256 << 20
    assert limits.clips_limit(hostile) <= 1 << 30
    wide = replace(hostile, maps="recompute", layers=(2, 3), tower=replace(hostile.tower, width=65536))
    assert limits.projections_limit(wide) <= 4 << 30


def test_older_caches_are_read_as_before() -> None:
    small = large_spec(10, 1)
    assert limits.manifest_limit(small) == limits.mark_limit(small) == 64 << 20
    assert limits.clips_limit(small) == 256 << 20


@pytest.mark.parametrize("command", ["extract", "estimate"])
def test_a_batch_that_no_mark_may_name_is_refused_at_the_option(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--dataset", "folder", "--batch", str(MOST_BATCH + 1)])
    assert ended.value.code == 2 and "65536" in capsys.readouterr().err
    with pytest.raises(UsageError, match="batch is 65537; expected at most 65536"):
        ExtractOptions(batch=MOST_BATCH + 1)


def test_a_mark_of_the_largest_batch_is_read(tmp_path: Path) -> None:
    spec = begin(tmp_path, large_spec(2, 1, block_clips=2))
    mark = replace(mark_of(spec, 0, records_of(spec)), environment={"batch": MOST_BATCH})
    mark_path(tmp_path, 0).write_bytes(canonical_json(mark_document(mark, spec)))
    found = read_mark(tmp_path, 0, spec)
    assert found is not None and found.environment == {"batch": MOST_BATCH}


def test_only_marks_under_their_exact_names_are_marks(tmp_path: Path) -> None:
    (tmp_path / "done").mkdir()
    for name in (
        "000007.json",
        "1000000.json",
        "7.json",
        "0000007.json",
        "٠٠٠٠٠٧.json",
        "000008.json.bak",
        "notes.json",
    ):
        (tmp_path / "done" / name).touch()
    assert marked_blocks(tmp_path) == {7, 1_000_000}
    assert mark_path(tmp_path, 1_000_000).name == "1000000.json"
