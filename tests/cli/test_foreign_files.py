"""Every command that deletes or replaces files, run among a person's own: none of them is touched.

What deletes or replaces, by room: store/disk (staged files, locks), store/writing (marks, shards and the manifest of a
block that is done again; leftovers), store/copying (the same, and the card), store/reading (local copies), runs, train and
sweep (files of a run), report and show (their pages), rendered (clips), cli/demo (its temporary folder).
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.example_data import DEMO_TOWER, OFFICIAL
from tests.support.foreign_files import ARRAYS, Found, link, look, plant_in_cache, touched, write
from tests.support.servers import faulty_server

EXTRACT = "extract --dataset list --list clips.txt --root videos --frames 4 --stride 2 --layers 2-3 --views 3x1".split()
TRAIN = "--head linear --steps 2 --batch 4 --device cpu".split()
MINE = "caches/mine"


@pytest.fixture(scope="module")
def world(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home directory: videos, a complete cache of theirs with a failed clip, two more caches, a run."""
    home = tmp_path_factory.mktemp("world")
    shutil.copytree(data / "videos", home / "videos", symlinks=True)
    broken = home / "videos" / "clip 7.mp4"
    broken.write_bytes(broken.read_bytes()[:300])
    shutil.copy(data / "clips.txt", home / "clips.txt")
    with pytest.MonkeyPatch.context() as patch:
        in_home(patch, home)
        assert run(*EXTRACT, "--cache", MINE) == 3
        shutil.copytree(home / MINE, home / "caches" / "other")
        assert run("pull", MINE, "caches/val") == 0
        words = ("--cache", MINE, "--val-cache", "caches/val", "--out", "runs/mine")
        assert run("train", *words, *TRAIN) == 0
    return home


def in_home(patch: pytest.MonkeyPatch, home: Path) -> None:
    patch.chdir(home)
    for name in [name for name in os.environ if name.startswith("EVL_CACHE_")]:
        patch.delenv(name)
    for name in ("EXTRACT", "ESTIMATE"):
        patch.setenv(f"EVL_CACHE_{name}_MODEL", str(DEMO_TOWER))
        patch.setenv(f"EVL_CACHE_{name}_PRETRAINED", "none")


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    return int(ended.value.code or 0)


@pytest.fixture
def home(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, to change."""
    place = tmp_path / "home"
    shutil.copytree(world, place, symlinks=True)
    in_home(monkeypatch, place)
    return place


def plant(home: Path) -> dict[str, Found]:
    """Put files of others below, beside and above the cache. Return what must not be touched."""
    ours = {f"{MINE}/{name}" for name in look(home / MINE)} | {
        f"runs/mine/{name}" for name in look(home / "runs/mine")
    }
    plant_in_cache(home / MINE, home.parent / "outside")
    for place in (home, home / "caches", home / "runs" / "mine"):
        plant_in_cache(place, home.parent / f"outside-{place.name}")
    elsewhere = (
        home / "elsewhere"
    )  # where a cache may be begun: marks and arrays without a description are refused
    plant_in_cache(elsewhere, home.parent / "outside-elsewhere")
    for name in ("999999.json", "888888.json"):
        (elsewhere / "done" / name).unlink()
    for array in ARRAYS:
        shutil.rmtree(elsewhere / array / "c")
        for shard in (elsewhere / array).glob("c.[0-9]*"):
            shard.unlink()
    for name in (
        ".bashrc",
        "c/lib/thesis.c",
        "000000.lock",
        "locks/cache.lock",
        "done/000000.json",
        "tokens/c.0.0.0.0.0",
    ):
        write(home / "caches" / name)
    link(home / "caches" / "linked-cache", home / "caches" / "other")
    return {
        name: found for name, found in look(home.parent).items() if name.removeprefix("home/") not in ours
    }


def unfinish(home: Path) -> None:
    """As a job leaves it that was killed before its last mark."""
    (home / MINE / "manifest.json").unlink()
    (home / MINE / "done" / "000000.json").unlink()
    staged = home / MINE / "tokens" / ".tmp-b000000.host-1-0123456789abcdef"
    staged.write_text("half a shard")


def damage(home: Path) -> None:
    shard = home / MINE / "tokens" / "c.0.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)


def mend(home: Path) -> None:
    """The failed clip can be read again."""
    shutil.copy(home / "videos" / "clip 6.mp4", home / "videos" / "clip 7.mp4")


COMMANDS: dict[str, tuple[Callable[[Path], None], list[str], int]] = {
    "extract again": (lambda home: None, [*EXTRACT, "--cache", MINE], 3),
    "extract goes on": (unfinish, [*EXTRACT, "--cache", MINE], 3),
    "extract --retry-failed": (mend, [*EXTRACT, "--cache", MINE, "--retry-failed"], 0),
    "extract --reuse": (lambda home: None, [*EXTRACT, "--cache", "caches/new", "--reuse", MINE], 3),
    "extract into a folder of others": (lambda home: None, [*EXTRACT, "--cache", "elsewhere"], 3),
    "estimate": (lambda home: None, ["estimate", *EXTRACT[1:], "--measure"], 0),
    "verify": (lambda home: None, ["verify", MINE], 0),
    "verify of a damaged one": (damage, ["verify", MINE], 1),
    "repair": (damage, ["repair", MINE], 0),
    "info": (lambda home: None, ["info", MINE], 0),
    "ls": (lambda home: None, ["ls", "caches"], 0),
    "card": (lambda home: None, ["card", MINE], 0),
    "push": (lambda home: None, ["push", MINE, "elsewhere"], 0),
    "push again": (damage, ["push", "caches/other", "caches/val"], 0),
    "push of layers": (lambda home: None, ["push", MINE, "elsewhere", "--layers", "3"], 0),
    "pull": (lambda home: None, ["pull", MINE, "elsewhere"], 0),
    "pull into place": (unfinish, ["pull", "caches/other", MINE], 0),
    "pull of another codec": (lambda home: None, ["pull", MINE, "elsewhere", "--codec", "raw"], 0),
    "train": (lambda home: None, ["train", "--cache", MINE, "--val-cache", "caches/val", "--out", "runs/new", *TRAIN], 0),
    "train --resume": (
        lambda home: None,
        ["train", "--cache", MINE, "--val-cache", "caches/val", "--out", "runs/mine", "--resume", *TRAIN],
        0,
    ),
    "sweep": (
        lambda home: None,
        ["sweep", "--cache", MINE, "--val-cache", "caches/val", "--out", "runs/sweep", "--head", "linear,meanpool",
         "--epochs", "1", *TRAIN[4:]],
        0,
    ),
    "eval": (lambda home: None, ["eval", "--cache", MINE, "--run", "runs/mine", "--device", "cpu"], 0),
    "predict": (lambda home: None, ["predict", "videos/clip 1.mp4", "--run", "runs/mine", "--device", "cpu"], 0),
    "report": (lambda home: None, ["report", "runs/mine"], 0),
    "show": (lambda home: None, ["show", "clip 1.mp4", "--cache", MINE, "--run", "runs/mine", "--out", "picture.png"], 0),
    "render": (lambda home: None, ["render", "motions", "--root", "elsewhere"], 2),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_touches_files_of_others(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, words, status = COMMANDS[name]
    prepare(home)
    before = plant(home)
    if "caches/val" in words and name == "push again":  # its target is ours
        before = {key: found for key, found in before.items() if not key.startswith("home/caches/val/")}
    assert run(*words) == status, capsys.readouterr()
    assert touched(before, home.parent) == []


def test_a_training_from_a_remote_cache_touches_no_files_of_others(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")
    monkeypatch.setenv("EVL_CACHE_COPY_GB", "0.0001")
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(home))
    before = plant(home)
    with faulty_server(home / "caches") as server:
        words = ("--cache", f"{server.url}/mine", "--val-cache", f"{server.url}/val", "--out", "runs/remote")
        assert run("train", *words, *TRAIN) == 0
    assert touched(before, home.parent) == []


@pytest.mark.parametrize(
    "name",
    [
        "clips.jsonl",
        "recovery.json",
        "manifest.json",
        "tokens/zarr.json",
        "tokens/c.0.0.0.0.0",
        "maps/zarr.json",
    ],
)
@pytest.mark.parametrize("command", ["extract", "pull", "push of layers"])
def test_a_file_of_others_under_a_name_of_ours_is_not_written_over(
    name: str, command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "elsewhere" / name, '{"a": 1}')
    before = look(home)
    words = {
        "extract": [*EXTRACT, "--cache", "elsewhere"],
        "pull": ["pull", MINE, "elsewhere"],
        "push of layers": ["push", MINE, "elsewhere", "--layers", "3"],
    }[command]
    assert run(*words) == 2
    assert "elsewhere" in capsys.readouterr().err
    assert touched(before, home) == []


@pytest.mark.parametrize(
    "name", ["config.json", "metrics.jsonl", "result.json", "classes.json", "tower.json"]
)
@pytest.mark.parametrize("command", ["train", "import-head"])
def test_a_run_is_not_written_over_files_of_others(
    name: str, command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "project" / name, '{"a": 1}')
    before = look(home)
    words = {
        "train": ["train", "--cache", MINE, "--val-cache", "caches/val", *TRAIN],
        "import-head": ["import-head", str(OFFICIAL)],
    }[command]
    assert run(*words, "--out", "project") == 2
    assert "choose another --out" in capsys.readouterr().err
    assert touched(before, home) == []


@pytest.mark.parametrize("name", ["report.html", "confusion.png"])
def test_a_report_is_not_written_over_files_of_others(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "figures" / name)
    before = look(home)
    assert run("report", "runs/mine", "--out", "figures") == 2
    assert "choose another --out" in capsys.readouterr().err and touched(before, home) == []
    assert run("report", "runs/mine") == run("report", "runs/mine") == 0  # over its own


@pytest.mark.parametrize("name", ["index.html", "surest-01.png"])
def test_a_page_of_clips_is_not_written_over_files_of_others(
    name: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home / "public" / name)
    before = look(home)
    words = ("show", "--cache", MINE, "--run", "runs/mine", "--clips-each", "1", "--device", "cpu")
    assert run(*words, "--page", "public") == 2
    assert "choose another --page" in capsys.readouterr().err and touched(before, home) == []
    assert run(*words, "--page", "own") == run(*words, "--page", "own") == 0  # over its own


@pytest.mark.parametrize("content", ["# My thesis\n", '---\ntitle: mine\n---\n"evl-cache" is used\n'])
def test_a_readme_of_others_is_not_written_over_by_a_card(content: str, home: Path) -> None:
    assert run("card", MINE, "--license", "mit") == 0
    (home / "elsewhere").mkdir()
    (home / "elsewhere" / "README.md").write_text(content)
    before = look(home / "elsewhere")
    assert run("pull", MINE, "elsewhere") == 0
    assert touched(before, home / "elsewhere") == [] and FeatureCache(home / "elsewhere").is_complete


def test_what_a_killed_job_left_of_a_description_is_written_over(home: Path) -> None:
    """By form it is ours: a cache of another list was begun there."""
    shutil.copytree(
        home / MINE, home / "elsewhere", ignore=shutil.ignore_patterns("c.*", "done", "manifest.json")
    )
    (home / "elsewhere" / "zarr.json").unlink()
    (home / "clips.txt").write_text("clip 1.mp4 left\nclip 2.mp4 right\n")
    assert run(*EXTRACT, "--cache", "elsewhere") == 0
    assert FeatureCache(home / "elsewhere").is_complete


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    write(tmp_path / "tmp" / "evl-cache-demo-mine" / "notes.txt")
    return tmp_path


def test_the_demo_removes_its_own_temporary_folder_and_follows_no_link(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(temporary / "outside" / "thesis.c")
    before = look(temporary)

    def begun(directory: Path, **options: object) -> None:
        link(directory / "linked", temporary / "outside")
        raise KeyboardInterrupt

    monkeypatch.setattr("evl_cache.demo.run_demo", begun)
    assert run("demo", "--device", "cpu") == 130
    assert look(temporary) == before
