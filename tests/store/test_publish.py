"""Publication is atomic: a file is whole under its name or not there, and what exists is never replaced."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from evl_cache.canonical_json import canonical_json
from evl_cache.errors import CacheError, UsageError
from evl_cache.store.disk import publish
from evl_cache.store.disk.checksum import file_digest
from evl_cache.store.disk.directories import make_directories
from evl_cache.store.disk.publish import AlreadyPublished, is_staging_name, stage_file, write_atomic


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def publish_bytes(path: Path, data: bytes) -> None:
    with stage_file(path.parent) as staged:
        staged.write(data)
        staged.publish(path)


@pytest.fixture(params=["hard links", "no hard links"])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", failing(errno.EPERM))
        # Nobody waits for so long: but a writer that a busy machine stops beside its placeholder is not dead.
        monkeypatch.setattr(publish, "_PLACEHOLDER_WAIT_S", 60.0)
    return str(request.param)


def test_published_file_is_whole_and_nothing_else_is_left(tmp_path: Path, file_system: str) -> None:
    data = os.urandom(100_000)
    with stage_file(tmp_path) as staged:
        staged.write(data[:7])
        staged.write(memoryview(data)[7:])
        assert not (tmp_path / "final").exists()
        assert (staged.size, staged.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        staged.publish(tmp_path / "final")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_bytes() == data
    assert file_digest(tmp_path / "final") == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("most", [1 << 40, 100_001], ids=["whole", "in parts"])
def test_pieces_of_any_size_are_written_in_order_however_much_the_kernel_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.writev

    def takes_a_part(descriptor: int, parts: list[memoryview]) -> int:
        taken, left = [], most
        for part in parts:
            taken.append(part[:left])
            left -= len(taken[-1])
        return real(descriptor, taken)

    monkeypatch.setattr(os, "writev", takes_a_part)
    pieces = [os.urandom(count) for count in (3, 5_000_000, 0, 20_000, 100, 100, (2 << 20) + 1, 1)]
    pieces += [bytes([count % 256]) * 9 for count in range(3000)]  # more than one call takes
    with stage_file(tmp_path) as staged:
        for piece in pieces:
            staged.write(piece)
        staged.publish(tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"".join(pieces)


def test_what_changes_after_it_was_written_is_stored_as_it_was(tmp_path: Path) -> None:
    data = bytearray(b"first" * 10_000)
    with stage_file(tmp_path) as staged:
        staged.write(data)
        data[:] = bytes(len(data))
        staged.write(memoryview(data))
        staged.publish(tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"first" * 10_000 + bytes(50_000)


def test_existing_file_is_never_replaced(tmp_path: Path, file_system: str) -> None:
    publish_bytes(tmp_path / "final", b"first")
    with pytest.raises(AlreadyPublished, match="final exists already"):
        publish_bytes(tmp_path / "final", b"second")
    assert (tmp_path / "final").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_publish_replacing_replaces(tmp_path: Path) -> None:
    publish_bytes(tmp_path / "final", b"first")
    with stage_file(tmp_path) as staged:
        staged.write(b"second")
        staged.publish_replacing(tmp_path / "final")
    assert (tmp_path / "final").read_bytes() == b"second"
    assert len(list(tmp_path.iterdir())) == 1


def test_of_many_writers_exactly_one_publishes(tmp_path: Path, file_system: str) -> None:
    winners, losers = [], []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        data = bytes([number]) * 1000
        barrier.wait()
        try:
            publish_bytes(tmp_path / "final", data)
            winners.append(data)
        except AlreadyPublished:
            losers.append(data)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 7)
    assert (tmp_path / "final").read_bytes() == winners[0]


def test_placeholder_of_a_dead_writer_is_taken_over_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.ENOTSUP))
    monkeypatch.setattr(publish, "_PLACEHOLDER_WAIT_S", 0.05)
    (tmp_path / "final").touch()
    publish_bytes(tmp_path / "final", b"data")
    assert (tmp_path / "final").read_bytes() == b"data"


@pytest.mark.parametrize("is_locked", [False, True])
def test_repeated_rename_request_of_nfs_counts_as_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_locked: bool
) -> None:
    rename = os.rename

    def answer_lost(source: Path, target: Path) -> None:
        rename(source, target)
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    monkeypatch.setattr(os, "link", failing(errno.ENOTSUP))
    monkeypatch.setattr(os, "rename", answer_lost)
    assert write_atomic(
        tmp_path / "final", b"data", replace=False, before_naming=(lambda: None) if is_locked else None
    )
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_bytes() == b"data"


def test_under_a_lock_nothing_is_there_before_the_file_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_system: str
) -> None:
    rename = os.rename

    def watched(source: Path, target: Path) -> None:
        assert not target.exists()
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    for _ in range(2):
        write_atomic(tmp_path / "final", b"data", replace=False, before_naming=lambda: None)
    with pytest.raises(AlreadyPublished):
        write_atomic(tmp_path / "final", b"other", replace=False, before_naming=lambda: None)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert (tmp_path / "final").read_bytes() == b"data"


def test_repeated_link_request_of_nfs_counts_as_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def answer_lost(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", answer_lost)
    publish_bytes(tmp_path / "final", b"data")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize("call", ["writev", "fsync", "link"])
def test_full_disk_leaves_nothing_behind_and_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.setattr(os, call, failing(errno.ENOSPC))
    with pytest.raises(CacheError, match=r"No space left on device; free space") as caught:
        publish_bytes(tmp_path / "final", b"data")
    monkeypatch.undo()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_data_is_synced_before_it_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, link = os.fsync, os.link

    def logged_fsync(descriptor: int) -> None:
        calls.append("sync directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        fsync(descriptor)

    def logged_link(source: Path, target: Path) -> None:
        calls.append("name")
        link(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "link", logged_link)
    publish_bytes(tmp_path / "final", b"data")
    assert calls == ["sync file", "name", "sync directory"]


def test_leftovers_are_recognised_and_other_names_are_not(tmp_path: Path) -> None:
    staged = stage_file(tmp_path)
    staged.write(b"killed here")
    (leftover,) = tmp_path.iterdir()
    assert is_staging_name(leftover.name)
    for name in ("zarr.json", "0", "000042.json", ".tmp", ".tmp-notes", leftover.name + ".json"):
        assert not is_staging_name(name)
    staged.discard()


def test_an_error_while_writing_removes_the_staged_file(tmp_path: Path) -> None:
    with pytest.raises(KeyError), stage_file(tmp_path) as staged:
        staged.write(b"half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_mode_lets_the_group_read_and_respects_the_umask(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        publish_bytes(tmp_path / "final", b"data")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "final").stat().st_mode) == 0o640


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with stage_file(tmp_path) as staged, pytest.raises(UsageError, match="same directory"):
        staged.publish(tmp_path / "elsewhere" / "final")
    with pytest.raises(UsageError, match="closed"):
        staged.write(b"late")
    with pytest.raises(UsageError, match="closed"):
        staged.publish(tmp_path / "final")
    with pytest.raises(CacheError, match="cannot create"):
        stage_file(tmp_path / "absent")


def test_json_is_canonical() -> None:
    assert canonical_json({"b": [1, 0.5], "a": "é"}) == '{"a":"é","b":[1,0.5]}\n'.encode()
    assert canonical_json({"a": 1, "b": 2}) == canonical_json({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json(float("nan"))
    name = os.fsdecode(b"clip\xff \\udcff.mp4")  # of a file: no UTF-8, and then the very letters of an escape
    assert (
        canonical_json(name) == b'"clip\\udcff \\\\udcff.mp4"\n' and json.loads(canonical_json(name)) == name
    )


def test_json_may_be_written_twice_but_not_changed_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "mark.json"
    assert write_atomic(path, canonical_json({"a": 1}), replace=False)
    assert not write_atomic(path, canonical_json({"a": 1}), replace=False)
    with pytest.raises(AlreadyPublished):
        write_atomic(path, canonical_json({"a": 2}), replace=False)
    assert path.read_bytes() == b'{"a":1}\n'
    assert write_atomic(path, canonical_json({"a": 2}), replace=True)
    assert path.read_bytes() == b'{"a":2}\n'
    assert len(list(tmp_path.iterdir())) == 1


def test_directories_are_made_by_several_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "tokens" / "c" / "3" / "0"
    threads = [threading.Thread(target=make_directories, args=(path,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="cannot create"):
        make_directories(tmp_path / "file" / "c")
