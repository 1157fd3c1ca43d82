"""The file of a head: its permissions, and what a disk that takes no more leaves of it."""

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from evl_cache.errors import EvlCacheError
from evl_cache.heads import Head, build_head
from evl_cache.runs.directory import save_state
from evl_cache.runs.head_files import save_head


@pytest.fixture
def head() -> Head:
    return build_head("linear", width=512, num_frames=2, grid=(2, 2), num_classes=40, num_layers=1)


@pytest.fixture
def no_file_grows() -> Iterator[None]:
    """A disk that takes four kilobytes of a file and no more, as one that is full takes none."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("best", [False, True])
def test_whoever_may_read_a_runs_other_files_may_read_its_head(
    head: Head, tmp_path: Path, best: bool
) -> None:
    umask = os.umask(0o027)
    try:
        save_head(tmp_path, head, best=best)
        save_state(tmp_path, {"step": torch.zeros(1)})
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


@pytest.mark.usefixtures("no_file_grows")
def test_a_head_that_the_disk_does_not_take_is_one_line_and_leaves_what_was_there(
    head: Head, tmp_path: Path
) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"before")
    with pytest.raises(
        EvlCacheError, match=r"^cannot write .*head.safetensors: File too large; free space or check"
    ):
        save_head(tmp_path, head)
    with pytest.raises(EvlCacheError, match=r"^cannot write .*last.pt: .*; free space or check the disk"):
        save_state(tmp_path, {"weights": torch.ones(4096)})
    assert [path.name for path in tmp_path.iterdir()] == ["head.safetensors"]
    assert (tmp_path / "head.safetensors").read_bytes() == b"before"
