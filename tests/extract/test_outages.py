"""Bad file or bad world: an outage is waited for, ends the run where it lasts, and fails no clip."""

import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from evl_cache.clips import Clip
from evl_cache.errors import ClipError, Outage, WorkerError
from evl_cache.extract import outages
from evl_cache.extract.outages import Surroundings
from evl_cache.extract.prepare import PreparedClip, prepare_clip
from evl_cache.live.clips import LiveClips
from evl_cache.live.loader import OnlineLoader
from evl_cache.processes import Processes
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.store import FeatureCache
from evl_cache.towers import Backbone
from evl_cache.video import Choose, DecodeOptions, FrameEvent, decode_clip, decode_frames
from evl_cache.video import process as decode_process
from evl_cache.video.packets import read_packets
from evl_cache.video.pool import DecodePool
from evl_cache.video.with_torchcodec import torchcodec_frames
from evl_cache_cli.main import cli
from tests.support.example_data import ROOT
from tests.support.lying_disk import Fault, LyingDisk, lying_disk, needs_lying_disks
from tests.support.store_helpers import (
    BROKEN,
    differences,
    extract_small,
    load_clips,
    small_spec,
    small_tower,
    tree,
    wait_until,
)
from tests.support.warm_python import warm_python

ERRNOS = ("ENOTCONN", "ESTALE", "EIO", "EACCES", "EPERM", "ENODEV", "EMFILE", "ENFILE", "ENOMEM", "ETIMEDOUT", "EHOSTDOWN",
          "EREMOTEIO", "EUCLEAN")  # fmt: skip
NAMED = (*ERRNOS[:4], "ENODEV", "EMFILE")  # by those who lost clips
CALLS = {"open": 34, "read": 64, "getattr": 220, "any": 380}  # of an extraction of eight clips, about
VIEWS = ViewSpec(frames=4, stride=2)
WANTED = np.array([[0, 2, 4, 6]])


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(outages, "LONGEST_PAUSE_S", 0.1)


@pytest.fixture
def videos(motions: Path, tmp_path: Path) -> Path:
    """Eight clips, one of them broken, and their tower, in a folder of the test's own."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in motions.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def disk(motions: Path, tmp_path: Path) -> Iterator[LyingDisk]:
    """These clips on a disk that can fail, whose files are read from it each time."""
    needs_lying_disks()
    backing = tmp_path / "backing"
    backing.mkdir()
    for path in motions.iterdir():
        (backing / path.name).write_bytes(path.read_bytes())
    with lying_disk(backing, tmp_path / "disk") as found:
        found.set(no_mmap=True)
        yield found


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that crash and are killed on clips whose names say so."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")


def tower_of(folder: Path) -> TowerSpec:
    return small_tower(folder).spec


def prepared(path: Path, motions: Path, **more: object) -> PreparedClip:
    """One clip made ready."""
    clip = Clip(id=path.name, path=path.name, label=0, split="train")
    how = {"decode": decode_frames, **more}
    return prepare_clip(clip, path.parent, tower=tower_of(motions), views=VIEWS, **how)  # type: ignore[arg-type]


# What is an outage


@pytest.mark.parametrize("name", ERRNOS)
def test_an_error_of_the_system_is_no_clips_fault(
    name: str, videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(errno, name)

    def fail(path: Path) -> tuple[int, str]:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(outages, "sha256_of", fail)
    with pytest.raises(Outage, match=os.strerror(number)) as caught:
        Surroundings(videos).hash_file(videos / "00.mp4", may_be_missing=True)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "relative",
    ["gone.mp4", "00.mp4/gone.mp4", "circle.mp4", "nowhere.mp4", "n" * 300, "a folder", "a\0b", "\ud800"],
)
def test_a_path_that_leads_to_no_file_fails_the_clip(relative: str, videos: Path) -> None:
    (videos / "circle.mp4").symlink_to("circle.mp4")
    (videos / "nowhere.mp4").symlink_to("gone.mp4")
    (videos / "a folder").mkdir()
    with pytest.raises(ClipError, match=r"cannot be opened|not a regular file"):
        Surroundings(videos).hash_file(videos / relative)


def test_a_name_that_no_file_can_have_fails_the_clip(videos: Path) -> None:
    with pytest.raises(ClipError, match="no file has such a name"):
        Surroundings(videos).hash_file(videos / "a\0b.mp4")


def test_a_root_that_is_gone_or_emptied_is_an_outage(videos: Path) -> None:
    around = Surroundings(videos)
    videos.rename(videos.with_name("elsewhere"))
    with pytest.raises(Outage, match="videos: is not there"):
        around.hash_file(videos / "00.mp4")
    videos.mkdir()
    with pytest.raises(Outage, match="videos: is empty"):
        around.hash_file(videos / "00.mp4")
    with pytest.raises(ClipError):  # that one was missing before, and it was allowed
        around.hash_file(videos / "00.mp4", may_be_missing=True)


def test_a_root_that_was_gone_from_the_beginning_is_an_outage(tmp_path: Path) -> None:
    with pytest.raises(Outage, match="unmounted: is not there"):
        Surroundings(tmp_path / "unmounted").hash_file(tmp_path / "unmounted" / "00.mp4")


@pytest.mark.parametrize("state", ["gone", "empty"])
def test_a_folder_that_clips_were_read_from_and_that_is_away_is_an_outage(state: str, videos: Path) -> None:
    folder = videos / "class"
    folder.mkdir()
    for name in ("00.mp4", "01.mp4"):
        (videos / name).rename(folder / name)
    around = Surroundings(videos)
    around.hash_file(folder / "00.mp4")
    folder.rename(videos / "moved")
    if state == "empty":
        folder.mkdir()
    with pytest.raises(Outage, match="class: is "):
        around.hash_file(folder / "01.mp4")


@pytest.mark.parametrize("listed", ["by its own path", "by a link"])
def test_a_mount_point_that_is_gone_is_an_outage_for_folders_that_no_clip_was_read_from(
    listed: str, videos: Path, tmp_path: Path
) -> None:
    disk, root = tmp_path / "mounts" / "disk", tmp_path / "root"
    root.mkdir()
    (tmp_path / "mounts" / "other").mkdir(parents=True)
    paths = []
    for name in ("a", "b"):
        (disk / name).mkdir(parents=True)
        shutil.copy(videos / "00.mp4", disk / name / "0.mp4")
        (root / name).symlink_to(disk / name / "0.mp4")
        paths.append(root / name if listed == "by a link" else disk / name / "0.mp4")
    around = Surroundings(root)
    around.hash_file(paths[0])
    disk.rename(tmp_path / "away")  # as an automounter does
    with pytest.raises(Outage, match="is not there, as where a disk is away"):
        around.hash_file(paths[1])


def test_a_link_into_an_empty_mount_point_is_an_outage(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "mount").mkdir()
    (videos / "link.mp4").symlink_to(tmp_path / "mount" / "link.mp4")
    with pytest.raises(Outage, match="mount: is empty"):
        Surroundings(videos).hash_file(videos / "link.mp4")


def test_a_mount_that_is_gone_is_an_outage_though_files_lie_beneath_it(tmp_path: Path, motions: Path) -> None:
    needs_lying_disks()
    mount = tmp_path / "disk"
    mount.mkdir()
    (mount / "README").write_text("nothing is mounted here\n")
    with lying_disk(motions, mount):
        around = Surroundings(mount)
        around.hash_file(mount / "00.mp4")
    with pytest.raises(Outage, match="disk: is on another disk than before"):
        around.hash_file(mount / "01.mp4")
    with lying_disk(motions, mount):
        around.hash_file(mount / "01.mp4")
        with pytest.raises(ClipError):  # the disk has another number now, but clips are read from it again
            around.hash_file(mount / "gone.mp4")


def test_a_file_that_comes_and_goes_is_an_outage(videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> tuple[int, str]:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(outages, "sha256_of", fail)
    with pytest.raises(Outage, match="away for a moment"):
        Surroundings(videos).hash_file(videos / "00.mp4")


# Patience


def failing(times: int, *, tried: list[float] | None = None) -> Callable[[], str]:
    """An attempt that meets an outage so often."""
    left = [times]

    def attempt() -> str:
        if tried is not None:
            tried.append(time.monotonic())
        left[0] -= 1
        if left[0] >= 0:
            raise Outage("the disk is away", remedy="bring it back")
        return "done"

    return attempt


def test_an_outage_is_told_once_and_its_end_once_for_all_threads(tmp_path: Path) -> None:
    said: list[str] = []
    around = Surroundings(tmp_path, patience_s=60, on_outage=said.append)
    is_back = threading.Event()

    def attempt() -> None:
        if not is_back.is_set():
            raise Outage("the disk is away", remedy="bring it back")

    threads = [threading.Thread(target=around.patiently, args=(attempt,)) for _ in range(5)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(said) == 1, what="it is told")
    time.sleep(0.2)
    is_back.set()
    for thread in threads:
        thread.join(timeout=60)
    assert said[0] == "the disk is away; no clip's fault: tried again for up to 60 s (bring it back)"
    assert len(said) == 2 and said[1].startswith("the outage is over after")


def test_pauses_grow_up_to_the_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses, real, mine = list[float](), threading.Condition.wait, threading.get_ident()

    def wait(self: threading.Condition, timeout: float | None = None) -> bool:
        if threading.get_ident() == mine:  # a progress bar's thread wakes every ten seconds
            pauses.append(timeout or 0.0)
        return real(self, timeout)

    monkeypatch.setattr(threading.Condition, "wait", wait)
    tried: list[float] = []
    assert Surroundings(tmp_path, patience_s=60).patiently(failing(6, tried=tried)) == "done"
    assert pauses == [0.02, 0.04, 0.08, 0.1, 0.1, 0.1]
    assert all(waited > 0.99 * pause for waited, pause in zip(np.diff(tried), pauses, strict=True))


def test_while_this_process_stands_still_patience_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, stood = threading.get_ident(), list[float]()

    def wait(self: threading.Condition, timeout: float | None = None) -> bool:
        if threading.get_ident() == mine and not stood:
            stood.append(4.0)
            time.sleep(4.0)
        return False

    monkeypatch.setattr(threading.Condition, "wait", wait)
    assert Surroundings(tmp_path, patience_s=2.5).patiently(failing(3)) == "done" and stood


def test_an_outage_that_lasts_ends_the_run_with_what_to_do(tmp_path: Path) -> None:
    around = Surroundings(tmp_path, patience_s=0.2)
    with pytest.raises(Outage, match="the disk is away, still after 0 s; no clip was recorded as failed for it; "
                                     "bring it back; then run the same command again, and it goes on"):  # fmt: skip
        around.patiently(failing(10**6))
    with pytest.raises(Outage):  # nobody waits again
        Surroundings.patiently(around, failing(1))


def test_closing_ends_every_wait_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 600.0)
    monkeypatch.setattr(outages, "LONGEST_PAUSE_S", 600.0)
    said: list[str] = []
    around = Surroundings(tmp_path, patience_s=600, on_outage=said.append)
    errors: list[Exception] = []

    def wait() -> None:
        try:
            around.patiently(failing(10**6))
        except Outage as error:
            errors.append(error)

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(said), what="they wait")
    around.close()
    for thread in threads:
        thread.join(timeout=60)
    assert len(errors) == 3 and len(said) == 1


# What a decoder complains of


def test_a_bad_file_is_decoded_twice_and_its_reason_is_the_decoders(motions: Path) -> None:
    calls: list[Path] = []

    def decode(path: Path, choose: Choose) -> Iterator[FrameEvent]:
        calls.append(path)
        return decode_frames(path, choose)

    record = prepared(motions / BROKEN, motions, decode=decode).record
    with pytest.raises(ClipError) as caught:
        decode_clip(motions / BROKEN, lambda count: WANTED)
    assert record.error == str(caught.value) and len(calls) == 2
    calls.clear()
    assert prepared(motions / "00.mp4", motions, decode=decode).record.error is None and len(calls) == 1


def test_a_disk_that_fails_while_a_clip_is_decoded_does_not_fail_it(motions: Path) -> None:
    def decode(path: Path, choose: Choose) -> Iterator[FrameEvent]:
        if not calls:
            calls.append(path)
            raise ClipError(f"{path}: cannot be decoded (Input/output error)")
        yield from decode_frames(path, choose)

    calls: list[Path] = []
    found = prepared(motions / "00.mp4", motions, decode=decode)
    assert found.record == prepared(motions / "00.mp4", motions).record


def test_a_complaint_that_was_the_disks_does_not_stand_for_the_one_that_is_the_files(motions: Path) -> None:
    def decode(path: Path, choose: Choose) -> Iterator[FrameEvent]:
        raise ClipError(next(complaints))
        yield

    for order in (["disk", "file", "file"], ["file", "disk", "file"]):
        complaints = iter(order)
        assert prepared(motions / "00.mp4", motions, decode=decode).record.error == "file"


def test_a_file_that_is_written_while_it_is_read_is_tried_anew(videos: Path) -> None:
    whole = (videos / "00.mp4").read_bytes()
    (videos / "00.mp4").write_bytes(whole[:700])

    def decode(path: Path, choose: Choose) -> Iterator[FrameEvent]:
        try:
            yield from decode_frames(path, choose)
        finally:
            path.write_bytes(whole)  # whoever copies it is ready now

    around = Surroundings(videos, patience_s=60)
    record = prepared(videos / "00.mp4", videos, decode=decode, surroundings=around).record
    assert record.error is None and record.source_bytes == len(whole)


def test_a_gpu_without_memory_for_its_decoder_is_an_outage(
    motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wants(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    decoders = ModuleType("torchcodec.decoders")
    monkeypatch.setattr(decoders, "VideoDecoder", wants, raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    with pytest.raises(Outage, match=r"cuda cannot decode \(CUDA out of memory\); free the GPU"):
        options = DecodeOptions(device="cuda")
        packets = read_packets(motions / "00.mp4")
        list(torchcodec_frames(motions / "00.mp4", lambda count: WANTED, options, packets))


def test_torchcodec_without_ffmpeg_is_an_outage_and_no_fault_of_a_file(
    motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finds_none(*_: object, **__: object) -> None:
        raise RuntimeError(
            "Could not load libtorchcodec. Likely causes:\n  1. FFmpeg is not properly installed"
        )

    decoders = ModuleType("torchcodec.decoders")
    monkeypatch.setattr(decoders, "VideoDecoder", finds_none, raising=False)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    packets = read_packets(motions / "00.mp4")
    with pytest.raises(Outage, match=r"finds no FFmpeg that it can use; install FFmpeg's shared libraries"):
        list(torchcodec_frames(motions / "00.mp4", lambda count: WANTED, DecodeOptions(), packets))


# Processes that decode


def test_a_process_that_is_killed_is_started_again_and_the_clip_is_good(faulty: None, videos: Path) -> None:
    killed = videos / "killed once.mp4"
    killed.write_bytes((videos / "00.mp4").read_bytes())
    said: list[str] = []
    around = Surroundings(videos, patience_s=60, on_outage=said.append)
    with DecodePool(1) as pool:
        found = prepared(killed, videos, decode=pool.frames, surroundings=around)
    assert found.record.error is None and "SIGKILL" in said[0] and "--decode-workers" in said[0]


def test_processes_that_are_killed_each_time_end_the_run_and_fail_no_clip(
    faulty: None, videos: Path, tmp_path: Path
) -> None:
    (videos / "killed.mp4").write_bytes((videos / "00.mp4").read_bytes())
    with pytest.raises(Outage, match=r"SIGKILL.*fewer --decode-workers"):
        extract_small(load_clips(videos), tmp_path / "cache", outage_patience_s=0.2)
    assert [name for name, _ in FeatureCache(tmp_path / "cache").failures] in ([], [BROKEN])


@pytest.mark.parametrize("failing", ["socketpair", "memfd", "process"])
def test_a_process_that_cannot_be_started_for_want_of_something_is_an_outage(
    failing: str, motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {
        "socketpair": (socket, "socketpair"),
        "memfd": (decode_process, "_file_in_memory"),
        "process": (subprocess, "Popen"),
    }
    real, left = getattr(*places[failing]), [2]

    def wants(*args: object, **more: object) -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args, **more)

    before = len(os.listdir("/proc/self/fd"))
    said: list[str] = []
    around = Surroundings(motions, patience_s=60, on_outage=said.append)
    with DecodePool(1) as pool:
        monkeypatch.setattr(*places[failing], wants)
        found = prepared(motions / "00.mp4", motions, decode=pool.frames, surroundings=around)
    assert found.record.error is None and "ulimit -n" in said[0]
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_process_that_cannot_pass_frames_on_is_an_outage(faulty: None, videos: Path) -> None:
    path = videos / "no memory.mp4"
    path.write_bytes((videos / "00.mp4").read_bytes())
    with DecodePool(1) as pool, pytest.raises(Outage, match="cannot be passed on"):
        list(pool.frames(path, lambda count: WANTED))


def test_once_a_process_has_started_the_installation_is_not_to_blame(
    motions: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with DecodePool(2) as pool:
        list(pool.frames(motions / "00.mp4", lambda count: WANTED))
        monkeypatch.setattr(decode_process, "WORKER", "no_such_module")
        with pytest.raises(Outage, match="cannot start"):
            list(pool.frames(motions / "00.mp4", lambda count: WANTED))
    with DecodePool(1) as pool, pytest.raises(WorkerError, match="cannot start"):
        list(pool.frames(motions / "00.mp4", lambda count: WANTED))


# Whole runs


@pytest.mark.parametrize("name", NAMED)
def test_an_outage_ends_a_run_fails_no_clip_and_the_same_command_finishes(
    name: str, disk: LyingDisk, work: Path
) -> None:
    (work / "list.txt").write_text("".join(f"{number:02d}.mp4 0\n" for number in range(8)))

    def extract(cache: str, patience: str = "0.3") -> tuple[int, str]:
        command = ["extract", "--dataset", "list", "--list", "list.txt", "--root", str(disk.path)]
        tower = ["--model", str(disk.path / "tower.json"), "--pretrained", "none", "--layers", "3"]
        how = ["--frames", "4", "--stride", "auto", "--cache", cache, "--outage-patience", patience]
        found = CliRunner().invoke(cli, [*command, *tower, *how], standalone_mode=False)
        if isinstance(found.exception, Outage):
            return 1, f"{found.stderr}{found.exception}"
        return found.return_value, found.stderr

    assert extract("whole")[0] == 3  # one clip is broken
    number = getattr(errno, name)
    disk.set(Fault("read", number, at=60, times=None), Fault("open", number, at=9, times=None), no_mmap=True)
    status, said = extract("cut")
    assert status == 1 and os.strerror(number) in said and "then run the same command again" in said
    assert len(FeatureCache(work / "cut").failures) <= 1
    disk.set(no_mmap=True)
    assert extract("cut")[0] == 3
    assert differences(tree(work / "cut"), tree(work / "whole")) == []


def extract_from(disk: LyingDisk, motions: Path, cache: Path, **options: Any) -> None:
    """Extract the clips on a disk; their list and the tower lie elsewhere."""
    extract_small(load_clips(motions), cache, folder=disk.path, **options)


def test_ctrl_c_ends_a_run_that_waits(disk: LyingDisk, motions: Path, tmp_path: Path) -> None:
    def interrupt() -> None:
        wait_until(lambda: disk.faults_met() > 1, what="a clip is tried again")
        os.kill(os.getpid(), signal.SIGINT)

    disk.set(Fault("open", errno.EIO, times=None))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    started = time.monotonic()
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            extract_from(disk, motions, tmp_path / "cache", outage_patience_s=120)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 100


def extract_with_an_outage(seed: int, disk: LyingDisk, motions: Path, cache: Path) -> bool:
    """Extract, and let the disk fail at a moment, for a while, in a way, by seed. Return whether it failed in time."""
    draw = random.Random(seed)
    call = draw.choice(tuple(CALLS))
    number = getattr(errno, draw.choice(ERRNOS[:5]))
    fault = Fault(call, number, at=draw.randint(1, CALLS[call]), times=None)
    disk.set(fault, no_mmap=True)

    def mend() -> None:
        while disk.faults_met() == 0 and not is_done.wait(0.01):
            pass
        met.extend([True] * disk.faults_met())
        is_done.wait(draw.uniform(0.0, 0.4))
        disk.set(no_mmap=True)

    is_done, met = threading.Event(), list[bool]()
    mender = threading.Thread(target=mend)
    mender.start()
    try:
        extract_from(disk, motions, cache, outage_patience_s=60)
    finally:
        is_done.set()
        mender.join()
    return bool(met)


def check_outages(seeds: range, disk: LyingDisk, motions: Path, tmp_path: Path) -> None:
    extract_from(disk, motions, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    met = 0
    for seed in seeds:
        met += extract_with_an_outage(seed, disk, motions, tmp_path / f"{seed}")
        assert differences(tree(tmp_path / f"{seed}"), whole) == [], f"seed {seed}"
    assert met > len(seeds) / 2


def test_after_an_outage_at_any_moment_the_cache_is_the_same_to_the_byte(
    disk: LyingDisk, motions: Path, tmp_path: Path
) -> None:
    check_outages(range(4), disk, motions, tmp_path)


@pytest.mark.soak
def test_after_many_outages_the_cache_is_the_same_to_the_byte(
    disk: LyingDisk, motions: Path, tmp_path: Path
) -> None:
    check_outages(range(4, 150), disk, motions, tmp_path)


# Several processes, and those who look at videos without a cache


def torchrun(work: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """`evl-cache extract` in two processes."""
    run = [warm_python(), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*run, "-m", "evl_cache_cli", "extract", "--dataset", "list", *arguments],
        cwd=work,
        env=os.environ | {"PYTHON_EXEC": warm_python(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def options_of(work: Path, videos: Path, motions: Path, count: int) -> tuple[str, ...]:
    (work / "list.txt").write_text("".join(f"{number:02d}.mp4 0\n" for number in range(count)))
    tower = ("--model", str(motions / "tower.json"), "--pretrained", "none", "--layers", "3", "--frames", "4")
    return (
        "--list",
        "list.txt",
        "--root",
        str(videos),
        *tower,
        "--stride",
        "2",
        "--cache",
        "cache",
        "--device",
        "cpu",
    )


def test_torchrun_is_told_of_an_outage(disk: LyingDisk, motions: Path, tmp_path: Path) -> None:
    disk.set(Fault("open", errno.ESTALE, times=None))
    options = options_of(tmp_path, disk.path, motions, 8)
    ended = torchrun(tmp_path, *options, "--outage-patience", "0.5")
    assert ended.returncode == 1 and os.strerror(errno.ESTALE) in ended.stderr
    assert FeatureCache(tmp_path / "cache").failures == []
    disk.clear()
    assert (
        torchrun(tmp_path, *options).returncode == 0
    )  # though one clip is broken: it would be taken for a crash
    assert [name for name, _ in FeatureCache(tmp_path / "cache").failures] == [BROKEN]


def test_torchrun_is_told_of_too_many_failures(motions: Path, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02d}.mp4").write_bytes(b"no video")
    ended = torchrun(tmp_path, *options_of(tmp_path, tmp_path, motions, 60))
    assert ended.returncode == 1 and "each of the first 20 clips failed" in ended.stderr
    assert FeatureCache(tmp_path / "cache").failures == []


def loader_of(folder: Path, **more: Any) -> OnlineLoader:
    clips = load_clips(folder).clips
    tower = small_tower(folder)
    job_spec = small_spec(load_clips(folder), tower)
    return OnlineLoader(
        LiveClips(path=folder, spec=job_spec, clips=clips),
        np.arange(len(clips)),
        backbone=Backbone(tower.visual, job_spec.layers, with_maps=True),
        device=torch.device("cpu"),
        batch=4,
        shuffle_seed=None,
        decode=decode_frames,
        workers=2,
        processes=Processes(),
        **more,
    )


def test_live_features_wait_for_a_disk(videos: Path) -> None:
    def come_back(message: str) -> None:
        said.append(message)
        if len(said) == 1:
            elsewhere.rename(videos)

    said: list[str] = []
    loader = loader_of(videos, on_outage=come_back)
    elsewhere = videos.rename(videos.with_name("elsewhere"))
    assert sum(len(batch.labels) for batch in loader.epoch()) == 7
    assert len(said) == 2 and set(loader.failures) == {5}


def test_live_features_end_with_an_outage_that_lasts(videos: Path) -> None:
    loader = loader_of(videos, patience_s=0.1)
    videos.rename(videos.with_name("elsewhere"))
    with pytest.raises(Outage, match="is not there"):
        next(loader.epoch())
    assert loader.failures == {}
