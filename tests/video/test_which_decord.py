"""Which of the two packages serves as `decord` is told by what is imported, as both claim the name."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from evl_cache.video.which_decord import decord_and_version, decord_libraries, has_decord


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


@pytest.mark.parametrize(("version", "package"), [("3.4.0", "decord2"), ("0.6.0", "decord")])
def test_its_libraries_are_those_of_the_package_that_was_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, package: str
) -> None:
    imported(monkeypatch, version, tmp_path)
    installed(monkeypatch, {"decord": "0.6.0", "decord2": "3.4.0"})
    for name in ("decord", "decord2"):
        (tmp_path / f"{name}.libs").mkdir()
        (tmp_path / f"{name}.libs" / "libavutil-1.so").touch()
    assert decord_libraries("libavutil") == [tmp_path / f"{package}.libs" / "libavutil-1.so"]


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
