"""What kind of disk a directory is on, by the kernel's list of mounts."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evl_cache.store.disk import file_system
from evl_cache.store.disk.file_system import again_if_stale, is_local

Mounts = Callable[[list[tuple[bytes, str]]], None]


@pytest.fixture
def mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mounts]:
    """Put a list of mounts in the place of the kernel's: (path as the kernel writes it, kind of file system)."""
    monkeypatch.setattr(file_system, "_MOUNTS", tmp_path / "mounts")

    def write(lines: list[tuple[bytes, str]]) -> None:
        is_local.cache_clear()
        written = (b"some:/device %b %b rw,relatime 0 0\n" % (path, kind.encode()) for path, kind in lines)
        (tmp_path / "mounts").write_bytes(b"".join(written))

    yield write
    is_local.cache_clear()


# As the kernel writes them: white space and backslashes in octal, all other bytes as they are.
NAMES = {
    b"data": b"data",
    "größe".encode(): "größe".encode(),
    "データ".encode(): "データ".encode(),
    b"latin-\xe9\xff": b"latin-\xe9\xff",
    b"a b\tc\nd\\e": rb"a\040b\011c\012d\134e",
    rb"not\040octal": rb"not\134040octal",
    "line\x85\u2028\x1c\rends".encode(): "line\x85\u2028\x1c\rends".encode(),
}


@pytest.mark.parametrize("name", NAMES, ids=[str(number) for number in range(len(NAMES))])
@pytest.mark.parametrize("kind", ["nfs4", "fuse.sshfs", "ext4"])
def test_a_mount_is_found_whatever_its_name(tmp_path: Path, mounts: Mounts, name: bytes, kind: str) -> None:
    directory = tmp_path / os.fsdecode(name) / "cache"
    directory.mkdir(parents=True)
    mounts([(b"/", "ext4"), (os.fsencode(tmp_path) + b"/" + NAMES[name], kind)])
    assert is_local(directory) == (kind == "ext4")
    assert is_local(tmp_path)


def test_a_later_mount_hides_an_earlier_one(tmp_path: Path, mounts: Mounts) -> None:
    (tmp_path / "a").mkdir()
    place = os.fsencode(tmp_path / "a")
    mounts([(b"/", "ext4"), (place, "nfs4"), (place, "xfs")])
    assert is_local(tmp_path / "a")
    mounts([(b"/", "ext4"), (place, "xfs"), (place, "nfs4")])
    assert not is_local(tmp_path / "a")


def test_what_cannot_be_told_is_no_local_disk(tmp_path: Path, mounts: Mounts) -> None:
    mounts([(b"/elsewhere", "ext4")])
    assert not is_local(tmp_path)
    assert not is_local(tmp_path / "absent")


def test_a_stale_file_is_opened_once_more() -> None:
    answers: list[int | str] = [errno.ESTALE, "content", errno.ESTALE, errno.ESTALE, errno.EIO]

    def read() -> str:
        if isinstance(answer := answers.pop(0), int):
            raise OSError(answer, os.strerror(answer))
        return answer

    assert again_if_stale(read) == "content"
    for number in (errno.ESTALE, errno.EIO):
        with pytest.raises(OSError, match=os.strerror(number)):
            again_if_stale(read)
    assert answers == []
