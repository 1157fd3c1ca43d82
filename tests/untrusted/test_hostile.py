"""A cache or a head from a stranger: refused in one line, in little memory, with nothing run and nothing written."""

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.caches.share import pull
from evl_cache.canonical_json import canonical_json, digest
from evl_cache.errors import EvlCacheError
from evl_cache.store import FeatureCache
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.hostile import CACHES, CHECKPOINTS, RUNS, STATES, Forge, RunForge

MEMORY_NBYTES = 1 << 30
TRAIN = "--head decoder3 --steps 1 --batch 13 --device cpu".split()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_cache(folder / "cache")
    write_cache(folder / "val", split="val", prefix="v")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--cache", str(folder / "cache"), "--val-cache", str(folder / "val"),
              "--out", str(folder / "run"), *TRAIN])  # fmt: skip
    assert ended.value.code == 0
    return folder


@pytest.fixture
def little_memory() -> Iterator[None]:
    """So much may be taken beyond what the process has: allocations of more fail."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc, to tell how much memory the process has")
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_NBYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def ended(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def assert_refused(found: tuple[int, str, str]) -> None:
    status, _, err = found
    assert status in (1, 2), found
    lines = [line for line in err.splitlines() if not line.startswith(("train cache:", "val cache:"))]
    lines = [line for line in lines if " -> " not in line]  # the run's directory
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert lines[0].isprintable() and len(lines[0]) < 2000, err
    assert "not enough memory" not in err and "Traceback" not in err


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("attack", CACHES)
def test_a_hostile_cache_is_refused(
    attack: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge = Forge(good / "cache", tmp_path)
    CACHES[attack](forge)
    before = contents(forge.outside)
    train = ("train", "--cache", forge.cache, "--val-cache", good / "val", "--out", tmp_path / "run", *TRAIN)
    assert_refused(ended(capsys, *train))
    for command in (
        ("verify", forge.cache),
        ("info", forge.cache),
        ("ls", tmp_path),
        ("pull", forge.cache, tmp_path / "pulled"),
        ("pull", forge.cache, tmp_path / "part", "--layers", "3-4"),
    ):
        status, out, err = ended(capsys, *command)
        assert status in (0, 1, 2) and "Traceback" not in err, (command, err)
        assert all(line.isprintable() for line in [*out.splitlines(), *err.splitlines()])
        # verify names everything that it finds.
        assert len(err.splitlines()) <= 1 or (command[0] == "verify" and err.count("\ndamaged: ") < 20), err
    for name in ("pulled", "part"):
        if (tmp_path / name / "manifest.json").exists():  # what did arrive whole is good
            copied = FeatureCache(tmp_path / name)
            copied.read([row for row in range(len(copied)) if copied.is_valid[row]])
    assert contents(forge.outside) == before


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("attack", RUNS)
def test_a_hostile_run_is_refused(
    attack: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge = RunForge(good / "run", tmp_path)
    RUNS[attack](forge)
    assert_refused(ended(capsys, "eval", "--cache", good / "val", "--run", forge.run, "--device", "cpu"))
    assert contents(forge.outside) == {}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("attack", STATES)
def test_a_hostile_state_is_not_resumed(
    attack: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge = RunForge(good / "run", tmp_path)
    STATES[attack](forge)
    (forge.run / "head.safetensors").unlink()
    places = ("--cache", good / "cache", "--val-cache", good / "val", "--out", forge.run)
    assert_refused(ended(capsys, "train", *places, *TRAIN, "--resume"))
    assert contents(forge.outside) == {}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("attack", CHECKPOINTS)
def test_a_hostile_checkpoint_is_not_imported(
    attack: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forge = RunForge(good / "run", tmp_path)
    CHECKPOINTS[attack](forge)
    arguments = ("import-head", forge.run / "official.pth", "--out", tmp_path / "imported")
    assert_refused(ended(capsys, *arguments))
    assert contents(forge.outside) == {} and not (tmp_path / "imported").exists()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("attack", CACHES)
def test_a_hostile_cache_with_an_index_is_refused_or_read_as_it_was(
    attack: str, good: Path, tmp_path: Path
) -> None:
    forge = Forge(good / "cache", tmp_path, has_index=True)
    CACHES[attack](forge)
    before, was = contents(forge.outside), FeatureCache(good / "cache")
    with contextlib.suppress(EvlCacheError):
        found = FeatureCache(forge.cache)
        rows = np.flatnonzero(found.is_valid)
        tokens, _ = found.read(rows)
        expected, _ = was.read(rows)
        if found.fingerprint == was.fingerprint:  # else it is another cache, whose features may be any
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(tokens, expected, strict=True))
        assert all(0 <= label < len(found.spec.classes) for label in found.labels.tolist())
    assert contents(forge.outside) == before


LARGEST = (
    "spec num_clips 1000000000000", "spec block_clips 1000000000000", "spec views.frames 1000000000", "chunks that explode",
    "spec tower.image_size 16000", "huge zarr.json", "huge clips", "huge mark", "huge manifest", "deep manifest",
    "frame that claims 10 GB", "frame that becomes 200 MB", "chunks of 4 GB in the mark", "shard a device",
)  # fmt: skip
MEASURED = """
import re, sys
from evl_cache_cli.main import main
for cache in sys.argv[2:]:
    try:
        main(["train", "--cache", cache, "--val-cache", cache, "--out", cache + "-run", *sys.argv[1].split()])
    except SystemExit as end:
        assert end.code in (1, 2), (cache, end.code)
# Not ru_maxrss: that begins with what the process that started this one had.
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""


def test_the_largest_are_refused_by_a_process_that_stays_below_a_gigabyte(good: Path, tmp_path: Path) -> None:
    caches = []
    for number, attack in enumerate(LARGEST):
        (tmp_path / str(number)).mkdir()
        forge = Forge(good / "cache", tmp_path / str(number))
        CACHES[attack](forge)
        caches.append(forge.cache)
    command = [sys.executable, "-c", MEASURED, " ".join(TRAIN), *map(str, caches)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 1e9
    assert ended.stderr.count("error: ") == len(LARGEST)


def test_there_are_enough_of_them() -> None:
    assert len(CACHES) + len(RUNS) + len(STATES) + len(CHECKPOINTS) >= 60


def test_files_that_a_manifest_names_elsewhere_are_not_fetched(good: Path, tmp_path: Path) -> None:
    forge = Forge(good / "cache", tmp_path)
    manifest = json.loads((forge.cache / "manifest.json").read_bytes())
    manifest["files"] |= {name: {"size": 7, "sha256": "0" * 64} for name in ("../outside/x", "/tmp/evl-x")}
    manifest.pop("digest")
    forge.write("manifest.json", canonical_json({**manifest, "digest": digest(manifest)}))
    with pytest.raises(EvlCacheError, match="do not make up the cache"):
        pull(str(forge.cache), str(tmp_path / "pulled"))
    assert not (tmp_path / "pulled" / "manifest.json").exists()
    assert contents(forge.outside) == {"secret": b"secret\n"} and not Path("/tmp/evl-x").exists()


@pytest.mark.parametrize("name", ["tokens", "done", "locks", "maps/c", "zarr.json"])
def test_nothing_is_written_through_links_of_a_target(good: Path, tmp_path: Path, name: str) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    (target / name).parent.mkdir(parents=True)
    (target / name).symlink_to(outside / "x" if name == "zarr.json" else outside)
    with pytest.raises(EvlCacheError, match="is a link"):
        pull(str(good / "cache"), str(target))
    assert list(outside.iterdir()) == []


def test_repair_of_a_hostile_cache_writes_and_reads_nothing_outside(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, attack in enumerate(
        ("array elsewhere", "marks elsewhere", "zarr.json a link", "mark with a batch of text")
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        forge = Forge(good / "cache", folder)
        CACHES[attack](forge)
        before = contents(forge.outside)
        status, _, err = ended(capsys, "repair", forge.cache)
        assert status in (0, 1, 2) and "Traceback" not in err and len(err.splitlines()) <= 1, err
        assert contents(forge.outside) == before


def test_no_module_reads_pickles() -> None:
    root = Path(__file__).resolve().parents[2] / "evl_cache"
    for path in root.rglob("*.py"):
        text = path.read_text()
        assert "import pickle" not in text and "allow_pickle" not in text, path
        for call in text.split("torch.load(")[1:]:
            assert "weights_only=True" in call.partition(")")[0], path
    assert shutil.which("true") and os.name == "posix"
