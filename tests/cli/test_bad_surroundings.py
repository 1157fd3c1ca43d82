"""What a process is started in, and how its parts end: no home directory, another thread, objects that never came to be."""

import ast
import gc
import importlib
import pwd
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store.reading.copy_root import default_copy_root
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.servers import faulty_server

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of no name and no home directory, as containers run under a number have it."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "EVL_CACHE_COPY_ROOT", "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("homeless")
def test_without_a_home_directory_a_place_for_copies_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_cache(tmp_path / "a", layers=(2, 3))
    write_cache(tmp_path / "v", layers=(2, 3), split="val", prefix="v")
    monkeypatch.chdir(tmp_path)
    few = ("--head", "linear", "--steps", "1", "--device", "cpu", "--out", "run")
    with faulty_server(tmp_path) as server:
        url = server.url
        asked = "this user has no home directory for copies of remote caches; set EVL_CACHE_COPY_ROOT to a directory"
        for words, status, said in (
            (("ls", url, str(tmp_path)), 0, ""),
            (("info", f"{url}/a"), 2, asked),
            (("train", "--cache", f"{url}/a", "--val-cache", f"{url}/v", *few), 2, asked),
            (("pull", f"{url}/a", "pulled"), 0, ""),
            (("train", "--cache", "a", "--val-cache", "v", *few), 0, ""),
            (("eval", "--run", "run", "--cache", f"{url}/v", "--device", "cpu"), 2, asked),
            (("card", "a", "--print"), 0, ""),
        ):
            with pytest.raises(SystemExit) as ended:
                main(list(words))
            told = capsys.readouterr().err
            assert ended.value.code == status and said in told, (words, told)
            assert not status or told.count("\n") == 1, told
        monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
        with pytest.raises(SystemExit) as ended:
            main(["info", f"{url}/a"])
        assert ended.value.code == 0
    monkeypatch.delenv("EVL_CACHE_COPY_ROOT")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_copy_root() == tmp_path / "evl-cache"


def test_a_command_runs_in_any_thread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statuses: list[object] = []

    def call() -> None:
        try:
            main(["ls", str(tmp_path)])
        except SystemExit as end:
            statuses.append(end.code)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(timeout=60)
    assert statuses == [0]
    assert "no caches" in capsys.readouterr().err


def classes_that_end() -> list[tuple[str, str]]:
    """Module and name of every class with a `__del__`; SparseShard's is tested with its file."""
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), node.name)
        for path in sorted((ROOT / "evl_cache").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and "__del__" in ast.unparse(node) and node.name != "SparseShard"
    ]


@pytest.mark.parametrize(("module", "name"), classes_that_end())
def test_an_object_that_never_came_to_be_ends_without_a_word(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where opening fails at once: Python would print a traceback that nobody can act on."""
    told: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    kind = getattr(importlib.import_module(module), name)
    made = kind.__new__(kind)
    del made
    gc.collect()
    assert [(one.exc_type, one.exc_value) for one in told] == []


def test_the_classes_that_end_are_found() -> None:
    assert {"IndexFile", "LocalFile"} <= {name for _, name in classes_that_end()}
