"""Extraction that nothing stops: damaged files, decoders that hang and crash, and the account of them."""

import csv
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.extract_memory import peak_of_decoding
from benchmarks.long_clips import render_enlarged, repeat_clip
from evl_cache.caches.info import failed_clips_by_reason, failures_by_reason
from evl_cache.clips import Clip, ClipList
from evl_cache.errors import ClipError, TooManyFailures, UsageError, WorkerError
from evl_cache.extract.failure_limit import FailureCount, FailureLimit
from evl_cache.extract.job import ExtractOptions
from evl_cache.extract.request import ExtractRequest, extract_dataset
from evl_cache.rendered import demo_motion_frames, write_video
from evl_cache.store import ClipRecord, FeatureCache
from evl_cache.video import Choose, DecodedClip, DecodeOptions, collect, decode_clip
from evl_cache.video import pool as decode_pool
from evl_cache.video import process as decode_process
from evl_cache.video.pool import DecodePool
from evl_cache_cli.main import cli
from tests.support.damaged_files import CODECS, BadFile, damage, healthy_files, independent_complaint
from tests.support.example_data import ROOT
from tests.support.store_helpers import extract_small, make_clips, small_spec, small_tower, wait_until

NAMES = (
    "видео.mp4",
    "动画 clip.mp4",
    "مقطع.mp4",
    "naïve #1 'it's' \"x\".mp4",
    "new\nline.mp4",
    "🎬 %s {0}.mp4",
    "-rf.mp4",
)
NEVER = FailureLimit(percent=100.0)
WANTED = np.array([[0, 9, 18, 23]])


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that hang, crash and leak on clips whose names say so."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A healthy file of each codec, 24 frames of 64 x 64 pixels."""
    return healthy_files(tmp_path_factory.mktemp("healthy"))


def workers_of(pid: int) -> list[int]:
    """Processes that this one started to decode."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            if (
                int(status.read_text().rsplit(")", 1)[1].split()[1]) == pid
                and b"_worker" in (command := (status.parent / "cmdline").read_bytes())
                and b"warm_worker.py" not in command  # which decodes for other tests
            ):
                found.append(int(status.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    return found


def decode(pool: DecodePool, path: Path, choose: Choose) -> DecodedClip:
    """A clip from a pool, all at once."""
    return collect(pool.frames(path, choose))


def clip_list(paths: list[Path]) -> ClipList:
    clips = tuple(Clip(id=path.name, path=str(path), label=0, split="train") for path in paths)
    return ClipList(clips=clips, classes=("only",), source="")


def extract_paths(paths: list[Path], cache: Path, *, tower_folder: Path, **options: object) -> FeatureCache:
    clips = clip_list(paths)
    spec = small_spec(clips, small_tower(tower_folder), block_clips=16)
    extract_small(replace(clips, source=str(tower_folder)), cache, spec=spec, folder=Path("/"), **options)
    return FeatureCache(cache)


def is_equal(one: tuple, other: tuple) -> bool:
    """Whether two readings of tokens and maps are the same bytes."""
    pairs = zip((*one[0], *one[1]), (*other[0], *other[1]), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_hundreds_of_bad_files_cost_only_themselves(
    sources: list[Path], motions: Path, tmp_path: Path, faulty: None
) -> None:
    bad = damage(sources, tmp_path / "bad")
    for name in ("hangs.mp4", "aborts.mp4"):
        path = tmp_path / "bad" / name
        path.write_bytes(sources[0].read_bytes())
        bad.append(BadFile(path, "faulty", True))
    assert len(bad) >= 250 or len(sources) < len(CODECS)
    healthy = list(sources)
    for name in NAMES:
        healthy.append(tmp_path / name)
        healthy[-1].write_bytes(sources[0].read_bytes())
    mixed = [b.path for b in bad]
    for number, path in enumerate(healthy):
        mixed.insert(number * len(mixed) // len(healthy), path)

    alone = extract_paths(healthy, tmp_path / "alone", tower_folder=motions)
    among = extract_paths(
        mixed, tmp_path / "among", tower_folder=motions, clip_timeout_s=2.0, most_failures=NEVER
    )

    assert alone.failures == []
    failed = dict(among.failures)
    rows = {clip.id: row for row, clip in enumerate(among.clips)}
    whole = {clip.id: alone.read([row]) for row, clip in enumerate(alone.clips)}
    for name, features in whole.items():
        assert is_equal(among.read([rows[name]]), features), name
    for file in bad:
        name = file.path.name
        if name in failed:
            continue
        # Then what was damaged is no frame that is used, or a decoder that starts at the beginning does not see it either.
        assert not file.surely_fails, f"{name} was taken for healthy"
        source = next(
            path.name for path in sources if name.startswith(f"{path.stem}-") and name.endswith(path.suffix)
        )
        assert is_equal(among.read([rows[name]]), whole[source]) or (
            independent_complaint(file.path, frames=15) is None
        ), f"{name} was taken for healthy"
    assert all(reason and "Traceback" not in reason for reason in failed.values())
    assert "took longer than 2 s" in failed["hangs.mp4"]
    assert "SIGABRT" in failed["aborts.mp4"] and "not a regular file" in failed["fifo.mp4"]
    assert workers_of(os.getpid()) == []


def test_real_clips_damaged_in_every_way(ut_interaction: Path, motions: Path, tmp_path: Path) -> None:
    healthy = sorted(ut_interaction.rglob("*.avi"))[:100:50]
    bad = damage(healthy, tmp_path / "bad", seed=2)
    paths = [*healthy, *(b.path for b in bad)]
    cache = extract_paths(paths, tmp_path / "cache", tower_folder=motions, most_failures=NEVER)
    failed = dict(cache.failures)
    assert not {path.name for path in healthy} & set(failed)
    assert all(name in failed for name in ("fifo.mp4", "sound.mp4", "zero-bytes.mp4"))
    for file in bad:
        if file.path.name not in failed:
            whole = decode_clip(
                file.path, lambda count: np.array([[0, 2, 4, 6]]), options=DecodeOptions(decoder="pyav")
            )
            assert whole.frames.shape[0] == 4


def test_a_worker_that_leaks_is_replaced(
    faulty: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_pool, "MOST_GROWTH_BYTES", 32 << 20)
    leaks, plain = tmp_path / "leaks.mp4", tmp_path / "plain.mp4"
    for path in (leaks, plain):
        write_video(path, demo_motion_frames("right", 0, num_frames=24))
    with DecodePool(1) as pool:
        decode(pool, plain, lambda count: WANTED)
        first = workers_of(os.getpid())
        decode(pool, plain, lambda count: WANTED)
        assert workers_of(os.getpid()) == first
        assert np.array_equal(
            decode(pool, leaks, lambda count: WANTED).frames, decode(pool, plain, lambda count: WANTED).frames
        )
        assert workers_of(os.getpid()) != first and len(workers_of(os.getpid())) == 1


def test_workers_that_cannot_start_are_no_clips_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_process, "WORKER", "no_such_module")
    with DecodePool(1) as pool, pytest.raises(WorkerError, match=r"cannot start .*no_such_module") as caught:
        decode(pool, tmp_path / "x.mp4", lambda count: WANTED)
    assert "Traceback" in caught.value.__notes__[0]  # for --debug
    assert capfd.readouterr().err == ""


def test_a_long_video_takes_no_more_memory_than_a_short_one(tmp_path: Path) -> None:
    short, long = tmp_path / "short.mp4", tmp_path / "long.mp4"
    render_enlarged(short, factor=3, num_frames=130)
    repeat_clip(short, long, 20)
    peaks = [peak_of_decoding(path) for path in (short, long)]
    assert peaks[1] < 1.1 * peaks[0]


def test_what_the_choice_of_frames_says_fails_the_clip_and_spares_the_worker(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, demo_motion_frames("right", 0, num_frames=24))

    def refuse(count: int) -> np.ndarray:
        raise ClipError(f"{count} frames are too few")

    with DecodePool(1) as pool:
        with pytest.raises(ClipError, match="24 frames are too few"):
            decode(pool, path, refuse)
        assert decode(pool, path, lambda count: WANTED).header.num_frames_in_file == 24


def test_no_worker_outlives_a_killed_run(tmp_path: Path) -> None:
    make_clips(tmp_path / "clips", count=2)
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from evl_cache.video import pool as decode_pool, process as decode_process\n"
        "decode_process.WORKER = 'tests.support.faulty_worker'\n"
        "pool = decode_pool.DecodePool(2)\n"
        "list(pool.frames(sys.argv[2], lambda count: __import__('numpy').array([[0]])))\n"
    )
    path = tmp_path / "hangs.mp4"
    path.write_bytes((tmp_path / "clips" / "00.mp4").read_bytes())
    parent = subprocess.Popen([sys.executable, "-c", code, str(ROOT), str(path)])
    wait_until(lambda: len(workers_of(parent.pid)) == 1, what="the worker has started")
    workers = workers_of(parent.pid)
    time.sleep(0.5)  # one hangs in a decoder by now
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), what="the workers are gone")


@pytest.mark.parametrize("tolerates", [False, True])
def test_concealed_frames_fail_a_clip_unless_they_are_tolerated(tmp_path: Path, tolerates: bool) -> None:
    path, options = tmp_path / "clip.mp4", DecodeOptions(tolerate_bad_frames=tolerates)
    write_video(path, demo_motion_frames("right", 0, num_frames=24), crf=30)
    healthy = path.read_bytes()
    for place in range(
        healthy.find(b"mdat") + 1200, len(healthy), 7
    ):  # until a flip is concealed, as most are
        path.write_bytes(healthy[:place] + bytes([healthy[place] ^ 0x10]) + healthy[place + 1 :])
        if "corrupt frames" in (independent_complaint(path, frames=24) or ""):
            break
    else:
        raise AssertionError("no flip was concealed")
    with DecodePool(1, options=options) as pool:
        if tolerates:
            assert decode(pool, path, lambda count: WANTED).frames.shape == (4, 64, 64, 3)
        else:
            with pytest.raises(ClipError, match="has damaged frames"):
                decode(pool, path, lambda count: WANTED)


def test_seeking_gives_the_frames_that_decoding_everything_gives(sources: list[Path]) -> None:
    for path in sources:
        with av.open(str(path)) as container:
            every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for seed in range(4):
            wanted = np.sort(np.random.default_rng(seed).integers(0, len(every), size=(2, 3)))
            found = decode_clip(path, lambda count, w=wanted: w, options=DecodeOptions(decoder="pyav"))
            assert found.header.num_frames_in_file == len(every)
            for row, view in enumerate(wanted):
                assert np.array_equal(found.view(row), np.stack([every[i] for i in view]))


def test_frames_of_real_clips_are_those_of_a_whole_decode(ut_interaction: Path) -> None:
    paths = sorted(ut_interaction.rglob("*.avi"))
    with DecodePool(2) as pool:
        for path in paths[::6]:
            with av.open(str(path)) as container:
                every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            found = decode(pool, path, lambda count: np.arange(count)[None, :: max(1, count // 7)])
            assert found.header.num_frames_in_file == len(every)
            assert np.array_equal(found.frames, np.stack([every[i] for i in found.header.indices[0]]))


# The account


def good_and_missing(motions: Path, folder: Path, good: int, missing: int) -> list[Path]:
    """Copies of a clip, then files that are not there."""
    paths = [folder / f"good-{number}.mp4" for number in range(good)]
    for path in paths:
        path.write_bytes((motions / "00.mp4").read_bytes())
    return [*paths, *(folder / f"missing-{number}.mp4" for number in range(missing))]


@pytest.mark.parametrize("limit", ["20%", "10"])
def test_a_run_that_goes_wrong_is_stopped_before_that_is_recorded(
    motions: Path, tmp_path: Path, limit: str
) -> None:
    paths, most = good_and_missing(motions, tmp_path, 16, 32), FailureLimit.parse(limit)
    with pytest.raises(TooManyFailures, match=rf"16 of 32 clips failed, more than --max-failures {limit};"):
        extract_paths(paths, tmp_path / "cache", tower_folder=motions, most_failures=most)
    found = FeatureCache(tmp_path / "cache")
    assert found.num_blocks_done == 1 and found.failures == []


def test_without_a_limit_fifty_failures_in_a_row_stop_a_run_and_the_message_says_how_to_go_on(
    motions: Path, tmp_path: Path
) -> None:
    paths = good_and_missing(motions, tmp_path, 15, 60)
    with pytest.raises(TooManyFailures) as caught:
        extract_paths(paths, tmp_path / "cache", tower_folder=motions)
    said = str(caught.value)
    assert said.startswith("60 of 75 clips failed, 60 in a row;")
    assert "missing-59.mp4: cannot be opened" in said and "--max-failures 100%" in said
    assert len(FeatureCache(tmp_path / "cache").failures) == 49  # of the blocks before
    whole = extract_paths(paths, tmp_path / "cache", tower_folder=motions, most_failures=NEVER)
    assert len(whole.failures) == 60 and whole.is_complete


def counted(*failed: bool, **more: Any) -> FailureCount:
    clips = [
        ClipRecord(id=f"{number}", error="bad" if is_failed else None)
        for number, is_failed in enumerate(failed)
    ]
    return FailureCount(**more).after(clips)


def test_the_default_limit_is_five_percent_from_the_hundredth_clip_on(tmp_path: Path) -> None:
    counted(*[False, True] * 49).check(tmp_path)  # 98
    counted(*[False] * 95, *[True] * 5).check(tmp_path)
    with pytest.raises(TooManyFailures, match=r"6 of 100 clips failed, more than 5 %"):
        counted(*[False] * 94, *[True] * 6).check(tmp_path)


def test_the_default_limit_is_fifty_in_a_row(tmp_path: Path) -> None:
    counted(*[True] * 49, False, *[True] * 49).check(tmp_path)
    with pytest.raises(TooManyFailures, match=r"50 of 51 clips failed, 50 in a row"):
        counted(*[True] * 50, False).check(tmp_path)


def test_failures_of_other_runs_and_those_expected_count_for_no_default_limit(tmp_path: Path) -> None:
    clips = [ClipRecord(id=f"{number}", error="bad") for number in range(200)]
    FailureCount().after_others(clips).check(tmp_path)
    FailureCount().after(clips, expected={clip.id for clip in clips}).check(tmp_path)
    FailureCount(uncounted={clip.id for clip in clips}).after(clips).check(tmp_path)
    with pytest.raises(TooManyFailures):
        FailureCount(limit=FailureLimit(count=199)).after_others(clips).check(tmp_path)


def test_clips_that_are_allowed_to_be_missing_do_not_stop_a_run(motions: Path, tmp_path: Path) -> None:
    paths = good_and_missing(motions, tmp_path, 2, 60)
    (tmp_path / "list.txt").write_text("\n".join(f"{path.name} 0" for path in paths))
    request = ExtractRequest(
        dataset="list",
        list_path=tmp_path / "list.txt",
        model=str(motions / "tower.json"),
        pretrained="none",
        frames=4,
        stride=2,
        layers=(3,),
        cache=tmp_path / "cache",
        allow_missing_percent=99.0,
    )
    ((_, result),) = extract_dataset(request, options=ExtractOptions(decode_workers=1))
    assert len(result.failures) == 60


@pytest.mark.parametrize("text", ["x", "-1", "101%", "", "5 %%", "nan%"])
def test_a_limit_of_failures_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a number of clips, or a share"):
        FailureLimit.parse(text)


def test_failures_are_told_by_reason(motions: Path, tmp_path: Path) -> None:
    (tmp_path / "a, b.mp4").write_bytes(b"")
    paths = [motions / "00.mp4", tmp_path / "a, b.mp4", tmp_path / "gone 1.mp4", tmp_path / "gone 2.mp4"]
    cache = extract_paths(paths, tmp_path / "cache", tower_folder=motions)
    reasons = failures_by_reason(cache)
    assert list(reasons.values()) == [2, 1] and next(iter(reasons)).startswith("cannot be opened")
    assert [[clip for clip, _ in clips] for clips in failed_clips_by_reason(cache).values()] == [
        ["gone 1.mp4", "gone 2.mp4"],
        ["a, b.mp4"],
    ]
    shown = CliRunner().invoke(cli, ["info", str(tmp_path / "cache"), "--failures"])
    assert "2 x cannot be opened" in shown.stdout and "    gone 2.mp4" in shown.stdout
    table = CliRunner().invoke(cli, ["info", str(tmp_path / "cache"), "--failures", "--csv"])
    rows = list(csv.DictReader(io.StringIO(table.stdout)))
    assert [row["clip"] for row in rows] == ["gone 1.mp4", "gone 2.mp4", "a, b.mp4"]
    assert all(row["reason"] for row in rows)
