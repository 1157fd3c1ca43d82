"""A cache is copied to a place outside it, wherever links and mounts lead: copied into itself it would be taken for its files."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from evl_cache.caches.share import pull, push
from evl_cache.errors import UsageError
from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.store_helpers import tree


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("made") / "a", layers=(2, 3)).path


@pytest.fixture
def cache(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVL_CACHE_ROOT", str(tmp_path / "caches"))
    shutil.copytree(made, tmp_path / "caches" / "a")
    (tmp_path / "link").symlink_to("caches")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path / "caches" / "a"


INSIDE = [
    "caches/a/sub",
    "caches/a/sub/",
    "caches/a/",
    "caches/a/deep/er",
    "link/a/sub",
    "caches/a/tokens",
    "caches/b/../a/sub",
]
OUTSIDE_BUT_AROUND = ["caches", "link", ".", "caches/a/.."]


@pytest.mark.parametrize("part", [{}, {"layers": [3]}, {"codec": "raw"}])
@pytest.mark.parametrize("target", [*INSIDE, *OUTSIDE_BUT_AROUND])
def test_neither_may_lie_in_the_other(cache: Path, target: str, part: dict[str, object]) -> None:
    said = "lies in the cache that is copied" if target in INSIDE else "holds the cache that is copied"
    before = tree(Path())
    for copy in (
        lambda: pull("caches/a", target, **part),  # type: ignore[arg-type]
        lambda: push(Path("link/a"), target, **part),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=said):
            copy()
    assert tree(Path()) == before


def test_a_disk_that_is_mounted_twice_is_one(cache: Path) -> None:
    other = cache.parent.parent / "other"
    other.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "--bind", "caches", "other"], capture_output=True).returncode
    ):
        pytest.skip("cannot mount a directory here: needs root and `mount`")
    try:
        with pytest.raises(UsageError, match="lies in the cache that is copied"):
            pull("caches/a", "other/a/sub")
        with pytest.raises(UsageError, match="from and to are the same directory"):
            pull("caches/a", "other/a")
    finally:
        subprocess.run(["umount", "--lazy", "other"], check=True)


def test_beside_it_is_outside(cache: Path) -> None:
    for target in ("caches/a-2", "caches/ab", "caches/b/", "link/c"):
        result = pull("caches/a", target)
        assert FeatureCache(result.place).is_complete


def test_the_command_says_so_in_one_line(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in (
        (
            ("pull", "caches/a", "caches/a/sub"),
            "lies in the cache that is copied, caches/a; name a directory outside",
        ),
        (
            ("push", "caches/a", "caches"),
            "caches: holds the cache that is copied, caches/a, and would become a cache itself; name a new directory",
        ),
        (("pull", "loop", "here"), "loop"),
        (("push", "caches/a", "loop"), "loop"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(list(words))
        told = capsys.readouterr().err
        assert ended.value.code in (1, 2) and told.count("\n") == 1 and said in told, told
