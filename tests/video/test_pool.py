"""What a pool's processes are asked for beside frames, and where what they say goes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from evl_cache.errors import ClipError, UsageError, WorkerError
from evl_cache.standstill import TimeLimit
from evl_cache.video import DecodeOptions, collect
from evl_cache.video import process as decode_process
from evl_cache.video.pool import DecodePool
from tests.support.example_data import ROOT
from tests.support.store_helpers import wait_until

WANTED = np.arange(4)[None]


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do on some clips what the clips' names say."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(decode_process, "WORKER", "tests.support.faulty_worker")


def test_a_doubt_is_found_out_in_a_process(motions: Path, faulty: None) -> None:
    with DecodePool(1) as pool:
        doubtful = motions / "doubtful.mp4"
        assert pool.doubt(doubtful, "decord 0.6.0") == f"{doubtful} by decord 0.6.0 is doubtful"
        assert pool.doubt(motions / "00.mp4", "PyAV 18.1.0") is None
        assert collect(pool.frames(motions / "00.mp4", lambda count: WANTED)).header.num_frames_in_file == 8


@pytest.mark.parametrize(
    ("name", "reason"), [("aborts.mp4", "SIGABRT"), ("hangs.mp4", "took longer than 2 s")]
)
def test_a_doubt_that_cannot_be_found_out_fails_the_clip(
    name: str, reason: str, motions: Path, faulty: None
) -> None:
    with DecodePool(1, timeout_s=2) as pool:
        with pytest.raises(ClipError, match=f"{name}: .*{reason}"):
            pool.doubt(motions / name, "decord 0.6.0")
        assert pool.doubt(motions / "00.mp4", "decord 0.6.0") is None


def test_while_all_stand_still_no_decoder_is_slow(motions: Path, tmp_path: Path) -> None:
    """Ctrl-Z, or a job that is suspended: its decoding processes stop with it."""
    waits = tmp_path / "waits.mp4"
    waits.write_bytes((motions / "00.mp4").read_bytes())
    script = """if True:
        import sys
        import numpy as np
        from evl_cache.video import collect, process
        from evl_cache.video.pool import DecodePool
        process.WORKER = "tests.support.faulty_worker"
        with DecodePool(1, timeout_s=3) as pool:
            print(collect(pool.frames(sys.argv[1], lambda count: np.arange(4)[None])).header.num_frames_in_file)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(waits)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )  # fmt: skip
    wait_until((tmp_path / "waits.mp4.asked").exists, what="it decodes")
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(4.0)
    os.killpg(process.pid, signal.SIGCONT)
    time.sleep(0.3)
    (tmp_path / "waits.mp4.answer").touch()
    assert process.communicate(timeout=60)[0] == "8\n"


def test_a_process_that_reads_late_is_sent_a_long_message() -> None:
    process = decode_process.DecodeProcess(DecodeOptions())
    number = process._process.pid
    try:
        process._wait_until_ready()
        os.kill(number, signal.SIGSTOP)
        threading.Timer(2.0, os.kill, (number, signal.SIGCONT)).start()
        process._send({"more than a socket holds": "x" * 4_000_000}, TimeLimit(60))
    finally:
        process.kill()


def test_what_a_decoder_writes_to_stderr_is_not_printed(
    motions: Path, tmp_path: Path, faulty: None, capfd: pytest.CaptureFixture[str]
) -> None:
    talks = tmp_path / "talks.mp4"
    talks.write_bytes((motions / "00.mp4").read_bytes())
    with DecodePool(1) as pool:
        for _ in range(2):
            collect(pool.frames(talks, lambda count: WANTED))
    assert capfd.readouterr() == ("", "")


def test_the_last_words_of_a_process_are_part_of_the_reason(tmp_path: Path, faulty: None) -> None:
    path = tmp_path / "says why and aborts.mp4"
    with DecodePool(1, options=DecodeOptions(decoder="pyav")) as pool, pytest.raises(ClipError) as caught:
        collect(pool.frames(path, lambda count: WANTED))
    assert str(caught.value) == f"{path}: the decoder crashed (SIGABRT: corrupted size at)"


def test_relative_paths_follow_a_change_of_folder(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "x.mp4").write_bytes((motions / f"0{number}.mp4").read_bytes())
    with DecodePool(1) as pool:
        found = []
        for number in range(2):
            monkeypatch.chdir(tmp_path / str(number))
            found.append(collect(pool.frames("x.mp4", lambda count: WANTED)).frames)
        assert not np.array_equal(*found)
        whole = collect(pool.frames(motions / "01.mp4", lambda count: WANTED)).frames
    assert np.array_equal(found[1], whole)


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_time_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(UsageError, match="expected more than 0 seconds"):
        DecodePool(1, timeout_s=timeout_s)


def test_no_limit_of_time_is_one(motions: Path) -> None:
    with DecodePool(1, timeout_s=float("inf")) as pool:
        assert collect(pool.frames(motions / "00.mp4", lambda count: WANTED)).header.num_frames_in_file == 8


def test_a_process_that_cannot_start_says_why_in_the_error(
    motions: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode_process, "WORKER", "no_such_module")
    started = time.monotonic()
    with DecodePool(1) as pool, pytest.raises(WorkerError, match="No module named 'no_such_module'"):
        pool.doubt(motions / "00.mp4", "decord 0.6.0")
    assert time.monotonic() - started < 60 and capfd.readouterr().err == ""


def test_a_name_that_is_not_utf8_gives_frames(motions: Path, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"clip\xff.mp4")
    path.write_bytes((motions / "00.mp4").read_bytes())
    with DecodePool(1) as pool:
        assert collect(pool.frames(path, lambda count: WANTED)).header.num_frames_in_file == 8
