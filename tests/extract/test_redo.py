"""A redo keeps what is good: repair, --retry-failed and --reuse never end with fewer valid clips than they found."""

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evl_cache.clips import Clip, ClipList
from evl_cache.errors import CacheError, Outage
from evl_cache.extract import outages
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.repair import RepairResult, repair
from evl_cache.rendered import DEMO_CLASSES
from evl_cache.store import FeatureCache, verify_cache
from evl_cache.store.format.layout import mark_path, redo_path
from evl_cache.store.reading import sample_reader
from evl_cache.store.writing import publication
from evl_cache.video.pool import DecodePool
from tests.support.store_helpers import (
    BLOCK_CLIPS,
    BROKEN,
    differences,
    extract_small,
    load_clips,
    make_clips,
    one_thread,
    small_spec,
    small_tower,
    tree,
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_reader, "_NFS_WAIT_S", 0.0)


@pytest.fixture(scope="module")
def made(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("redo") / "cache"
    extract_small(load_clips(motions), path)
    return path


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


@pytest.fixture
def videos(motions: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(motions, tmp_path / "videos"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are decoded."""
    names: list[str] = []
    real = DecodePool.frames

    def frames(self: DecodePool, path: Path, choose: object) -> Iterator[object]:
        names.append(Path(path).name)
        yield from real(self, path, choose)  # type: ignore[arg-type]

    monkeypatch.setattr(DecodePool, "frames", frames)
    return names


def repaired(cache: Path, motions: Path, videos: Path) -> RepairResult:
    with one_thread():
        return repair(
            cache,
            tower=lambda description: small_tower(motions),
            root=videos,
            options=ExtractOptions(decode_workers=1),
            threads=1,
        )


def valid(cache: Path) -> set[str]:
    opened = FeatureCache(cache)
    return {clip.id for clip, is_valid in zip(opened.clips, opened.is_valid, strict=True) if is_valid}


def without(videos: Path, *names: str) -> None:
    """Take videos away, and leave the folder as one that is not empty."""
    for name in names:
        (videos / name).unlink()


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(len(content) - 1, int(at * len(content)))] ^= 4
    path.write_bytes(bytes(content))


BLOCK = ["00.mp4", "01.mp4", "02.mp4"]  # the clips of the first one
DATA = [f"{name}/c.0.0.0.0" for name in ("token_affine", "token_scale", "class_tokens")]
DATA += ["tokens/c.0.0.0.0.0", "maps/c.0.0.0.0.0.0", "map_scale/c.0.0.0.0.0"]


@pytest.mark.parametrize("name", [*DATA, "done/000000.json"])
def test_repair_without_the_videos_loses_no_clip_and_undoes_the_damage_when_they_are_back(
    made: Path, cache: Path, motions: Path, videos: Path, name: str
) -> None:
    flip(cache / name, 0.1)
    damaged, before = tree(cache), valid(cache)
    without(videos, *BLOCK)
    result = repaired(cache, motions, videos)
    assert len(result.not_redone) == 1
    assert "block 0 stays as it is" in result.not_redone[0]
    assert result.blocks_redone == ()
    assert valid(cache) == before
    assert differences(tree(cache), damaged) == []
    for back in BLOCK:
        shutil.copy(motions / back, videos / back)
    assert repaired(cache, motions, videos).not_redone == ()
    assert differences(tree(cache), tree(made)) == []


def test_repair_decodes_only_the_clip_whose_bytes_are_damaged(
    made: Path, cache: Path, motions: Path, decoded: list[str]
) -> None:
    flip(cache / "tokens/c.0.0.0.0.0", 0.5)  # of the second of three
    assert repaired(cache, motions, motions).blocks_redone == (0,)
    assert decoded == ["01.mp4"]
    assert differences(tree(cache), tree(made)) == []


@pytest.mark.parametrize("damage", ["index", "end", "longer"])
def test_a_file_whose_chunks_are_good_is_mended_without_a_video(
    made: Path, cache: Path, motions: Path, tmp_path: Path, damage: str
) -> None:
    path = cache / "maps/c.1.0.0.0.0.0"
    content = path.read_bytes()
    path.write_bytes(
        {"index": content[:-30] + b"?" + content[-29:], "end": content[:-40], "longer": content + b"?"}[
            damage
        ]
    )
    (tmp_path / "others").mkdir()
    (tmp_path / "others" / "notes.txt").write_text("the videos are elsewhere")
    assert repaired(cache, motions, tmp_path / "others").not_redone == ()
    assert differences(tree(cache), tree(made)) == []


def test_where_repair_makes_nothing_the_machine_that_repairs_does_not_count(
    made: Path, cache: Path, motions: Path, decoded: list[str]
) -> None:
    path = cache / "maps/c.1.0.0.0.0.0"  # of the block with the clip that failed, which is not tried again
    path.write_bytes(path.read_bytes()[:-40])
    result = repair(
        cache, tower=lambda description: small_tower(motions), root=motions, options=ExtractOptions()
    )  # on two threads, not one
    assert (result.environment_differs, decoded) == ((), [])
    assert len(result.problems) == 1  # its mark is not to blame
    assert differences(tree(cache), tree(made)) == []


def test_repair_keeps_rows_made_elsewhere_and_says_so_in_the_mark(
    cache: Path, motions: Path, made: Path
) -> None:
    flip(cache / "tokens/c.0.0.0.0.0", 0.5)
    result = repair(
        cache, tower=lambda description: small_tower(motions), root=motions, options=ExtractOptions()
    )  # on two threads, not one
    assert result.environment_differs == ("threads: 2, not 1",)
    environment = json.loads((cache / "done/000000.json").read_bytes())["environment"]
    assert environment["threads"] == 2
    assert [kept["threads"] for kept in environment["kept"]] == [1]
    assert verify_cache(cache).problems == ()
    assert FeatureCache(cache).read([0, 2])[0][0].equal(FeatureCache(made).read([0, 2])[0][0])


def test_retry_failed_without_the_videos_loses_no_clip(made: Path, cache: Path, videos: Path) -> None:
    clips = load_clips(videos)
    without(videos, *(clip.path for clip in clips.clips))
    result = extract_small(clips, cache, retry_failed=True)
    assert [clip for clip, _ in result.failures] == [BROKEN]
    assert differences(tree(cache), tree(made)) == []


def test_retry_failed_whose_good_rows_are_damaged_leaves_the_block_and_says_so(
    cache: Path, videos: Path
) -> None:
    make_clips(videos, broken=False)
    clips = load_clips(videos)
    flip(cache / "tokens/c.1.0.0.0.0", 0.1)  # of 03.mp4, in the block of the broken one
    without(videos, "03.mp4")
    before, damaged = valid(cache), tree(cache)
    result = extract_small(clips, cache, retry_failed=True)
    assert [reason for reason in result.not_redone if "03.mp4" in reason]
    assert valid(cache) == before
    assert differences(tree(cache), damaged) == []
    make_clips(videos, broken=False)
    assert extract_small(clips, cache, retry_failed=True).not_redone == ()
    assert valid(cache) == {clip.id for clip in clips.clips}
    assert verify_cache(cache).problems == ()


def test_at_two_percent_failed_a_retry_decodes_the_failed_clips_only(
    motions: Path, tmp_path: Path, decoded: list[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    names = [f"{number:03d}.mp4" for number in range(100)]
    bad = [names[3], names[71]]
    for name in names:
        shutil.copy(motions / "00.mp4", folder / name)
    for name in bad:
        (folder / name).write_bytes((motions / "00.mp4").read_bytes()[:300])
    clips = ClipList(
        clips=tuple(Clip(id=name, path=name, label=0, split="train") for name in names),
        classes=DEMO_CLASSES,
        source=str(motions),
    )
    spec = small_spec(clips, small_tower(motions), block_clips=16)
    assert len(extract_small(clips, tmp_path / "cache", spec=spec, folder=folder).failures) == 2
    decoded.clear()
    shutil.copy(motions / "00.mp4", folder / bad[1])  # one of the two is mended
    result = extract_small(clips, tmp_path / "cache", spec=spec, folder=folder, retry_failed=True)
    assert set(decoded) == set(bad)
    assert decoded.count(bad[1]) == 1
    assert [clip for clip, _ in result.failures] == [bad[0]]
    assert result.clips_done_here == 1
    shutil.copy(motions / "00.mp4", folder / bad[0])
    extract_small(clips, tmp_path / "cache", spec=spec, folder=folder, retry_failed=True)
    extract_small(clips, tmp_path / "fresh", spec=spec, folder=folder)
    assert differences(tree(tmp_path / "cache"), tree(tmp_path / "fresh")) == []


def test_a_damaged_row_of_the_cache_that_is_reused_is_extracted_instead(
    made: Path, cache: Path, motions: Path, tmp_path: Path, decoded: list[str]
) -> None:
    flip(cache / "tokens/c.0.0.0.0.0", 0.5)
    extract_small(load_clips(motions), tmp_path / "new", reuse=cache)
    assert set(decoded) == {"01.mp4", BROKEN}
    assert differences(tree(tmp_path / "new"), tree(made)) == []


def test_a_redo_that_was_begun_is_a_problem_until_repair_or_the_same_command_ends_it(
    made: Path, cache: Path, motions: Path, decoded: list[str]
) -> None:
    redo_path(cache, 0).touch()
    (cache / "manifest.json").unlink()
    assert [problem.block for problem in verify_cache(cache).problems] == [0]
    assert FeatureCache(cache).is_valid[:3].all()  # readers have what the mark promises
    repaired(cache, motions, motions)
    assert differences(tree(cache), tree(made)) == []
    redo_path(cache, 2).touch()
    extract_small(load_clips(motions), cache)
    assert differences(tree(cache), tree(made)) == []
    assert decoded == []


def test_a_redo_that_is_killed_between_its_files_and_its_mark_is_noted_and_ended_by_the_same_command(
    cache: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_clips(videos, broken=False)
    block = int(BROKEN.split(".")[0]) // BLOCK_CLIPS
    write = publication.write_atomic

    def killed(path: Path, content: bytes, **given: Any) -> bool:
        if path == mark_path(cache, block):
            raise KeyboardInterrupt
        return write(path, content, **given)

    with monkeypatch.context() as patch:
        patch.setattr(publication, "write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            extract_small(load_clips(videos), cache, retry_failed=True)
    assert redo_path(cache, block).exists()  # else the old mark would pass for that of these files
    assert extract_small(load_clips(videos), cache, retry_failed=True).failures == ()
    assert verify_cache(cache).problems == () and not redo_path(cache, block).exists()


def test_a_block_that_lost_its_mark_keeps_its_features_when_a_redo_of_another_removes_the_manifest(
    made: Path, cache: Path, videos: Path
) -> None:
    make_clips(videos, broken=False)  # the redo of the broken one's block succeeds
    clips = load_clips(videos)
    (cache / "done/000002.json").unlink()
    without(videos, "06.mp4")
    for _ in range(2):  # the second finds no manifest
        with pytest.raises(CacheError, match=r"block 2 stays as it is: 1 of its clips would lose.*06\.mp4"):
            extract_small(clips, cache, retry_failed=True)
        assert not (cache / "manifest.json").exists()
        kept = [name for name in tree(made) if "/c.2." in name]
        assert [name for name in kept if name in differences(tree(cache), tree(made))] == []
    assert [problem.block for problem in verify_cache(cache).problems] == [2]
    make_clips(videos, broken=False)
    assert extract_small(clips, cache).failures == ()
    assert verify_cache(cache).problems == ()


def test_a_block_whose_redo_was_killed_and_cannot_be_ended_is_told_as_one_that_stays(
    cache: Path, motions: Path, videos: Path
) -> None:
    flip(cache / "tokens/c.0.0.0.0.0", 0.1)
    redo_path(cache, 0).touch()
    (cache / "manifest.json").unlink()
    without(videos, "00.mp4")
    result = repaired(cache, motions, videos)
    assert len(result.not_redone) == 1 and "block 0 stays as it is" in result.not_redone[0]
    assert (result.is_complete, result.blocks_redone) == (False, ())
    assert redo_path(cache, 0).exists()


def test_a_mark_that_the_manifest_does_not_name_stays_a_problem_while_the_videos_are_away(
    made: Path, cache: Path, motions: Path, videos: Path, tmp_path: Path
) -> None:
    other = Path(make_clips(tmp_path / "others", seed=5).source)
    extract_small(load_clips(other), tmp_path / "other")
    for name in ["done/000000.json", *DATA]:  # a block of other videos, whole
        shutil.copy(tmp_path / "other" / name, cache / name)
    without(videos, *BLOCK)
    for _ in range(2):
        assert len(repaired(cache, motions, videos).not_redone) == 3
        assert [problem.block for problem in verify_cache(cache).problems] == [0]
    assert repaired(cache, motions, motions).not_redone == ()
    assert differences(tree(cache), tree(made)) == []


def test_a_link_that_leads_nowhere_in_the_place_of_a_redos_note_is_removed_and_no_endless_wait(
    made: Path, cache: Path, motions: Path
) -> None:
    redo_path(cache, 0).symlink_to(cache / "nowhere")
    extract_small(load_clips(motions), cache)
    assert not redo_path(cache, 0).is_symlink()
    assert differences(tree(cache), tree(made)) == []


def test_a_cache_whose_empty_directory_of_marks_was_not_copied_is_extracted(
    made: Path, cache: Path, motions: Path
) -> None:
    shutil.rmtree(cache / "done")
    (cache / "manifest.json").unlink()
    extract_small(load_clips(motions), cache)
    assert differences(tree(cache), tree(made)) == []


@pytest.mark.parametrize("seed", range(6))
def test_damage_at_random_places_with_random_videos_gone_never_costs_a_valid_clip(
    made: Path, cache: Path, motions: Path, videos: Path, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 3)):
        name = rng.choice([name for name in tree(made) if "/c." in name or name.startswith("done/")])
        flip(cache / name, rng.random())
    before = valid(cache)
    gone = rng.sample([f"{number:02d}.mp4" for number in range(8)], rng.randint(1, 8))
    without(videos, *gone)
    result = repaired(cache, motions, videos)
    assert before <= valid(cache)
    assert bool(result.not_redone) == bool(verify_cache(cache).problems)
    for name in gone:
        shutil.copy(motions / name, videos / name)
    assert repaired(cache, motions, videos).not_redone == ()
    assert differences(tree(cache), tree(made)) == []


def replace_video(videos: Path, name: str, seed: int = 7) -> None:
    """Another film of the same size in bytes, so that only its time and its bytes tell."""
    other = make_clips(videos.parent / "others", count=2, seed=seed).source
    content, was = (Path(other) / "00.mp4").read_bytes(), (videos / name).stat().st_size
    (videos / name).write_bytes((content + bytes(was))[: max(was, len(content))])


def test_a_replaced_video_is_noticed_and_made_again_when_asked(
    cache: Path, videos: Path, tmp_path: Path, decoded: list[str]
) -> None:
    clips = load_clips(videos)
    assert extract_small(clips, cache).was_done
    replace_video(videos, "01.mp4")
    result = extract_small(clips, cache)
    assert result.sources_changed is not None and "01.mp4" in result.sources_changed
    assert "1 videos are not those that the features were made of" in result.sources_changed
    decoded.clear()
    result = extract_small(clips, cache, check_sources=True)
    assert (result.clips_done_here, result.sources_changed, set(decoded)) == (1, None, {"01.mp4"})
    assert extract_small(clips, cache).sources_changed is None
    extract_small(clips, tmp_path / "fresh")
    # The reason of the broken clip names the folder of the first extraction.
    assert differences(tree(cache), tree(tmp_path / "fresh")) == [
        "done/000001.json",
        "index.bin",
        "manifest.json",
    ]


def test_a_video_replaced_with_its_time_kept_is_proved_another_by_its_bytes_alone(
    cache: Path, videos: Path
) -> None:
    clips, path = load_clips(videos), videos / "00.mp4"
    times, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert extract_small(clips, cache).sources_changed is None
    extract_small(clips, cache, check_sources=True)
    mark = json.loads((cache / "done/000000.json").read_bytes())
    assert mark["clips"][0]["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_features_stay_where_the_new_video_cannot_be_used(made: Path, cache: Path, videos: Path) -> None:
    (videos / "01.mp4").write_bytes(b"no video")
    result = extract_small(load_clips(videos), cache, check_sources=True)
    assert len(result.not_redone) == 1
    assert result.not_redone[0].startswith("the features of 01.mp4 stay as they are (")
    assert differences(tree(cache), tree(made)) == []


def test_touched_videos_are_the_same_and_videos_elsewhere_are_no_fault(cache: Path, videos: Path) -> None:
    clips = load_clips(videos)
    for path in videos.glob("*.mp4"):
        path.touch()
    result = extract_small(clips, cache)
    assert (result.sources_changed, result.sources_in_doubt, result.was_done) == (None, None, True)
    without(videos, "00.mp4")
    assert extract_small(clips, cache).sources_in_doubt is None
    proof = extract_small(clips, cache, check_sources=True).sources_in_doubt
    assert proof is not None and "00.mp4 is not there" in proof


NAMED = ("ENOTCONN", "ESTALE", "EIO", "EACCES", "ENODEV", "EMFILE")


@pytest.mark.parametrize("redo", ["repair", "retry failed", "check sources"])
@pytest.mark.parametrize("name", NAMED)
def test_whatever_the_disk_of_the_videos_says_a_redo_stops_and_loses_no_clip(
    name: str, redo: str, cache: Path, motions: Path, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (videos / "00.mp4").write_bytes((videos / "02.mp4").read_bytes())  # another film than then
    if redo == "repair":
        flip(cache / "tokens/c.0.0.0.0.0", 0.5)
    before, files = valid(cache), tree(cache)
    number = getattr(errno, name)

    def fail(path: Path) -> tuple[int, str]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(outages, "sha256_of", fail)
    monkeypatch.setattr(outages, "UNREAD_PATIENCE_S", 0.0)
    with pytest.raises(Outage, match=os.strerror(number)):
        if redo == "repair":
            repaired(cache, motions, videos)
        else:
            what = {"retry_failed": True} if redo == "retry failed" else {"check_sources": True}
            extract_small(load_clips(videos), cache, **what)
    assert valid(cache) == before
    assert differences(tree(cache), files) == []
