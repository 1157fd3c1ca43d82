"""Files of a copy: whole or not there, even where the process ends while a thread writes them."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from evl_cache.store.reading.staged_files import remove_old_staged, staged_file
from tests.support.example_data import ROOT
from tests.support.warm_python import warm_python

# A process that ends while a thread, for which nobody waits, is in the midst of a file.
ENDS = """
import os, signal, sys, threading, time
from pathlib import Path
from evl_cache.store.reading.staged_files import staged_file

begun = threading.Event()

def write():
    with staged_file(Path(sys.argv[1])) as temporary:
        begun.set()
        time.sleep(0.5)
        temporary.write_bytes(b"whole")

signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))
threading.Thread(target=write, daemon=True).start()
begun.wait()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


def test_a_process_ends_when_what_its_threads_write_has_its_name(tmp_path: Path) -> None:
    path = tmp_path / "clips.jsonl"
    ended = subprocess.run([warm_python(), "-c", ENDS, str(path)], cwd=ROOT, env=os.environ, timeout=60)
    assert ended.returncode == 143
    assert [entry.name for entry in tmp_path.iterdir()] == ["clips.jsonl"] and path.read_bytes() == b"whole"


def test_where_writing_fails_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "a"):
        pass  # never made
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_a_day_later_and_nothing_else(tmp_path: Path) -> None:
    names = (".tmp-1-0123456789abcdef", ".tmp-7-140139674203840-clips.jsonl", "tmp-1-mine", ".tmp-mine", "b")
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    remove_old_staged(tmp_path)
    assert len(list(tmp_path.iterdir())) == len(names)
    yesterday = time.time() - 25 * 3600
    for name in names:
        os.utime(tmp_path / name, (yesterday, yesterday))
    remove_old_staged(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".tmp-mine", "b", "tmp-1-mine"]
