"""Looking at a cache while jobs change it: files that vanish during the look do not end it."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evl_cache.caches.info import describe
from evl_cache.caches.listing import list_caches
from evl_cache.store import FeatureCache, cache_size, read_description, verify_cache
from evl_cache.store.format import manifest as manifest_module
from tests.support.feature_caches import write_cache


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "cache"
    write_cache(path)
    return path


@pytest.fixture
def cache(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "cache"))


class Vanishing:
    """Gives a directory's entries, after something was done behind the reader's back."""

    def __init__(self, entries: "Iterator[os.DirEntry[str]]", action: Callable[[], None]) -> None:
        self.entries, self.action = list(entries), action

    def __enter__(self) -> "Iterator[os.DirEntry[str]]":
        self.action()
        return iter(self.entries)

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture
def when_listed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Callable[[], None]], None]:
    """`when_listed(directory, action)`: once the names of a directory are known, before they are looked at."""
    real = os.scandir

    def arrange(directory: Path, action: Callable[[], None]) -> None:
        def scandir(path: str | Path | int) -> object:  # a number: as `rmtree` lists
            return Vanishing(real(path), action) if path in (directory, str(directory)) else real(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return arrange


def looks(cache: Path) -> dict[str, Callable[[], object]]:
    return {
        "info": lambda: describe(cache),
        "ls": lambda: list(list_caches([str(cache)])),
        "verify": lambda: verify_cache(cache),
        "the report of extract": lambda: cache_size(cache, read_description(cache).spec),
    }


@pytest.mark.parametrize("name", ["info", "ls", "verify", "the report of extract"])
def test_a_file_that_vanishes_during_the_look_does_not_end_it(
    name: str, cache: Path, when_listed: Callable[[Path, Callable[[], None]], None]
) -> None:
    lock = cache / "locks" / "000001.lock"
    lock.write_text("held")
    staged = cache / "done" / ".tmp-host-1-0123456789abcdef"
    staged.write_text("on its way")
    for file in (lock, staged):
        when_listed(file.parent, lambda file=file: file.unlink(missing_ok=True))  # type: ignore[misc]
        assert looks(cache)[name]()


@pytest.mark.parametrize("name", ["info", "ls", "verify", "the report of extract"])
def test_a_folder_that_vanishes_during_the_look_does_not_end_it(
    name: str, cache: Path, when_listed: Callable[[Path, Callable[[], None]], None]
) -> None:
    when_listed(cache, lambda: shutil.rmtree(cache / "locks", ignore_errors=True))
    assert looks(cache)[name]()
    when_listed(cache / "maps", lambda: (cache / "maps" / "c.1.0.0.0.0.0").unlink(missing_ok=True))
    assert looks(cache)[name]()


def test_a_manifest_that_goes_during_the_look_is_a_cache_that_is_not_complete(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = FeatureCache(cache)
    complete, real = opened.fingerprint, manifest_module.check_no_links

    def gone(root: Path, path: Path) -> None:
        (cache / "manifest.json").unlink(missing_ok=True)
        real(root, path)

    monkeypatch.setattr(manifest_module, "check_no_links", gone)
    assert describe(cache)["cache_digest"] != complete
    assert opened.check_marks(opened.sample_clips) is None
