"""Everyday words on the command line and everyday names of files: odd numbers, `~`, dashes, other letters, no traceback."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.store_helpers import make_clips, tree

TINY = "--model evl-tiny --layers 7-8 --frames 4 --stride 2 --device cpu".split()
DASHED, TWO_LINES, BAD_BYTES, OTHER_LETTERS = (
    "-3B32.mp4",
    "two\nlines.mp4",
    os.fsdecode(b"caf\xe9.mp4"),
    "日本.mp4",
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory with clips of odd names, their cache and a run."""
    home = tmp_path_factory.mktemp("home")
    make_clips(home / "made", 6, broken=False)
    clips = sorted((home / "made").glob("*.mp4"))
    for place, (name, clip) in enumerate(
        zip(["1.mp4", DASHED, TWO_LINES, BAD_BYTES, OTHER_LETTERS], clips, strict=False)
    ):
        target = home / "d" / "ab"[place % 2] / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clip, target)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert status_of("extract", "--dataset", "folder", "--root", "d", *TINY, "--cache", "caches/odd") == 0
        words = (
            "--cache caches/odd --val-cache caches/odd --head linear --steps 1 --device cpu --out run".split()
        )
        assert status_of("train", *words) == 0
    return home


def status_of(*words: str) -> Any:
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    return stopped.value.code


@pytest.fixture
def run(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(world)
    monkeypatch.setenv("HOME", str(world))

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return (status_of(*words), *capsys.readouterr())

    return call


@pytest.mark.parametrize(
    "odd",
    [
        *(
            "--lr nan",
            "--lr inf",
            "--lr -1",
            "--seed -1",
            "--order-seed -1",
            "--weight-decay nan",
            "--grad-clip nan",
        ),
        *("--label-smoothing nan", "--ema nan", "--dropout nan", "--rank-timeout nan", "--cache-in-ram nan"),
        *("--warmup-steps -1", "--accumulate 0", "--seed 99999999999999999999999", "--save-every-steps 0"),
    ],
)
def test_an_odd_number_is_one_line_that_names_it(run: Run, odd: str) -> None:
    status, out, told = run(
        *"train --cache caches/odd --val-cache caches/odd --out never".split(), *odd.split()
    )
    assert status == 2 and out == ""
    assert told.count("\n") == 1 and told.startswith("error: ")
    assert odd.split()[0].lstrip("-").replace("-", "_") in told.replace("-", "_")
    assert not Path("never").exists()


def test_a_tilde_that_no_shell_expanded_is_the_home_directory(
    run: Run, world: Path, monkeypatch: Any
) -> None:
    assert run("info", "~/caches/odd", "--json")[0] == 0
    assert run("predict", "d/a/1.mp4", "--run=~/run", "--device", "cpu", "--csv=~/labels.csv")[0] == 0
    assert (world / "labels.csv").is_file()
    monkeypatch.setenv("EVL_CACHE_PREDICT_RUN", "~/run")
    assert run("predict", "~/d/a/1.mp4", "--device", "cpu")[0] == 0
    monkeypatch.setenv("EVL_CACHE_ROOT", "~/caches")
    assert str(world / "caches" / "odd") in run("ls", "--json")[1]
    assert not Path("~").exists()


def test_a_folder_called_tilde_is_named_with_its_place(run: Run) -> None:
    assert run("info", "./~/x")[2].startswith("error: ~/x: no cache here")


def test_a_file_that_begins_with_a_dash_is_told_how_to_be_given(
    run: Run, world: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(world / "d" / "b")
    status, _, told = run("predict", DASHED, "--run", "~/run")
    assert status == 2 and told.count("\n") == 1
    assert f"a file whose name begins with - is given as ./{DASHED}; see evl-cache predict --help" in told
    assert run("predict", f"./{DASHED}", "--run", "~/run", "--device", "cpu")[0] == 0
    assert "given as" not in run("predict", "-x", "--run", "~/run")[2]


@pytest.mark.parametrize("value", ["-0.5", "-1.5e-3", "-.5", "-0.5,0.5"])
def test_a_negative_number_beside_an_unknown_option_is_taken_for_no_file(run: Run, value: str) -> None:
    status, _, told = run("train", "--lr", value, "--bogus", "x")
    assert status == 2 and "--bogus" in told and "given as" not in told


def test_a_negative_number_in_the_place_of_a_file_is_taken_for_no_file(run: Run) -> None:
    status, _, told = run("predict", "-0.5", "--run", "run")
    assert status == 2 and "No such option" in told and "given as" not in told


def test_stdout_holds_one_format(run: Run) -> None:
    status, out, told = run("predict", "d", "--run", "run", "--device", "cpu", "--csv", "-", "--json")
    assert status == 2 and out == "" and "--csv FILE --json" in told


def strict(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_names_of_any_bytes_are_extracted_and_labelled_in_every_format(run: Run) -> None:
    assert len(FeatureCache(Path("caches/odd")).clips) == 5 and not FeatureCache(Path("caches/odd")).failures
    status, out, _ = run("predict", "d", "--run", "run", "--device", "cpu", "--csv", "o.csv", "--json")
    assert status == 0
    found = json.loads(out, parse_constant=strict)
    names = [Path(video["video"]).name for video in found["videos"]]
    assert {DASHED, TWO_LINES, OTHER_LETTERS, "1.mp4"} < set(names) and len(names) == 5
    assert (
        out.encode() and Path("o.csv").read_text(encoding="utf-8").count("\n") == 1 + 2 * 5 + 2
    )  # two lines twice
    status, out, _ = run("predict", "d", "--run", "run", "--device", "cpu")
    assert status == 0 and "two\\nlines.mp4" in out and "caf\\xe9.mp4" in out


def test_other_letters_in_the_c_locale_are_no_traceback(world: Path) -> None:
    import subprocess

    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["info", "caches/odd"], ["predict", "d", "--run", "run", "--device", "cpu"]):
        found = subprocess.run(
            [sys.executable, "-m", "evl_cache_cli", *words],
            cwd=world, env=environment, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        assert found.returncode == 0 and b"Traceback" not in found.stderr, found.stderr


def test_a_list_with_letters_that_the_locale_lacks_is_told_so(world: Path, tmp_path: Path) -> None:
    import subprocess

    (tmp_path / "l.txt").write_text(f"b/{OTHER_LETTERS} b\n", encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["extract", "--dataset", "list", "--list", str(tmp_path / "l.txt"), "--root", "d", *TINY]
    found = subprocess.run(
        [sys.executable, "-m", "evl_cache_cli", *words],
        cwd=world, env=environment, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert found.returncode == 2 and b"set PYTHONUTF8=1" in found.stderr, found.stderr
    assert found.stderr.count(b"\n") == 1 and b"missing" not in found.stderr


def test_repair_of_a_cache_whose_videos_moved_asks_for_the_root_and_changes_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w").mkdir()
    shutil.copytree(world / "d", tmp_path / "w" / "d")
    monkeypatch.chdir(tmp_path / "w")
    assert status_of("extract", "--dataset", "folder", "--root", "d", *TINY, "--cache", "c") == 0
    monkeypatch.chdir(tmp_path)
    Path("w").rename("elsewhere")
    cache = Path("elsewhere/c")
    whole = tree(cache)
    shard = next(path for path in sorted((cache / "tokens").glob("c*")) if path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    damaged = tree(cache)
    capsys.readouterr()
    assert status_of("repair", "elsewhere/c", "--device", "cpu") == 2
    told = capsys.readouterr().err
    assert "give --root" in told and told.count("\n") == 1 and tree(cache) == damaged
    assert status_of("repair", "elsewhere/c", "--device", "cpu", "--root", "elsewhere/d") == 0
    assert tree(cache) == whole
