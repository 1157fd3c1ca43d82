"""Which of the two packages serves as `decord` is told by what is imported, as both claim the name."""

import ctypes
import importlib
import importlib.metadata
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from evl_cache.video.which_decord import decord_and_version, decord_libraries, has_decord, load_decord


def imported(monkeypatch: pytest.MonkeyPatch, version: str, folder: Path = Path("/x")) -> None:
    """Let a decord of a version be the one that was imported."""
    module = ModuleType("decord")
    module.__version__ = version  # type: ignore[attr-defined]
    module.__file__ = str(folder / "decord" / "__init__.py")
    monkeypatch.setitem(sys.modules, "decord", module)


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    """Let these packages be installed, and no others."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("versions", "version", "expected"),
    [
        ({"decord2": "3.4.0"}, "3.4.0", "decord2 3.4.0"),
        ({"decord2": "3.4.0+cu132"}, "3.4.0", "decord2 3.4.0"),
        ({"decord": "0.6.0"}, "0.6.0", "decord 0.6.0"),
        ({"decord": "0.6.0", "decord2": "3.4.0"}, "3.4.0", "decord2 3.4.0"),
        ({"decord": "0.6.0", "decord2": "3.4.0"}, "0.6.0", "decord 0.6.0"),
        ({}, "0.7.0", "decord 0.7.0"),
    ],
)
def test_a_record_names_the_package_that_was_imported(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], version: str, expected: str
) -> None:
    imported(monkeypatch, version)
    installed(monkeypatch, versions)
    assert decord_and_version() == expected


@pytest.mark.parametrize("build", ["", "+cu132"])
@pytest.mark.parametrize(("version", "package"), [("3.4.0", "decord2"), ("0.6.0", "decord")])
def test_its_libraries_are_those_of_the_package_that_was_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, package: str, build: str
) -> None:
    imported(monkeypatch, version, tmp_path)
    installed(monkeypatch, {"decord": "0.6.0", "decord2": f"3.4.0{build}"})
    for name in ("decord", "decord2"):
        (tmp_path / f"{name}.libs").mkdir()
        (tmp_path / f"{name}.libs" / "libavutil-1.so").touch()
    assert decord_libraries("libavutil") == [tmp_path / f"{package}.libs" / "libavutil-1.so"]


def test_a_folder_that_an_uninstalled_package_left_is_no_decord(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip uninstall decord` beside decord2 takes the files that both have, and leaves the rest of the folder."""
    (tmp_path / "decord" / "__pycache__").mkdir(parents=True)
    (tmp_path / "decord" / "version.py").touch()
    monkeypatch.delitem(sys.modules, "decord", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert not has_decord()


def test_threads_that_load_it_at_once_leave_ctypes_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ctypes.RTLD_GLOBAL
    second_began, first_ended = threading.Event(), threading.Event()

    def import_module(name: str) -> ModuleType:
        if threading.current_thread().name == "first":
            second_began.wait(1)  # not for ever: a lock may keep the second out
        else:
            second_began.set()
            first_ended.wait(1)
        return ModuleType(name)

    def load_first() -> None:
        load_decord()
        first_ended.set()

    monkeypatch.delitem(sys.modules, "decord", raising=False)
    monkeypatch.setattr(importlib, "import_module", import_module)
    threads = [
        threading.Thread(target=load_first, name="first"),
        threading.Thread(target=load_decord, name="second"),
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert usual == ctypes.RTLD_GLOBAL
    finally:
        ctypes.RTLD_GLOBAL = usual  # type: ignore[misc]


def test_a_clip_after_the_first_changes_nothing_of_ctypes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another thread loads meanwhile would be loaded for itself alone."""
    usual, seen = ctypes.RTLD_GLOBAL, []

    def import_module(name: str) -> ModuleType:
        seen.append(ctypes.RTLD_GLOBAL)
        return sys.modules[name]

    imported(monkeypatch, "3.4.0")
    monkeypatch.setattr(importlib, "import_module", import_module)
    assert load_decord() is sys.modules["decord"]
    assert set(seen) <= {usual}


@pytest.mark.skipif(not has_decord(), reason="decord is not installed")
def test_pyav_cannot_find_its_libraries() -> None:
    """decord2's FFmpeg has the names and versions of PyAV's: found first, it would be called in its place."""
    look = """
import ctypes
from evl_cache.video.which_decord import load_decord
load_decord()
print(hasattr(ctypes.CDLL(None), "DECORDGetLastError"), ctypes.RTLD_GLOBAL != ctypes.RTLD_LOCAL)
"""
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "True"]
