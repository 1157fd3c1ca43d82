"""Jobs that die: at any instant, by any signal, on a full disk. The same command again ends in the same bytes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from evl_cache.store import array_layouts, verify_cache
from evl_cache.store.disk.publish import is_staging_name
from evl_cache.store.format.layout import mark_path
from tests.support.extraction_server import Server, reached
from tests.support.store_helpers import (
    differences,
    extract_small,
    is_stopped,
    load_clips,
    small_spec,
    small_tower,
    tree,
    wait_until,
    watched_changes,
)

# How often in the suite, and in `make soak`.
KILLED_AT_A_CHANGE, KILLED_AT_A_MOMENT = (16, 32), (8, 24)


def often(times: tuple[int, int]) -> list[Any]:
    """(number, of how many), for the suite and for the soak."""
    suite, soak = times
    return [(n, suite) for n in range(suite)] + [
        pytest.param(n, soak, marks=pytest.mark.soak) for n in range(soak)
    ]


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A cache that nobody disturbed."""

    files: dict[str, bytes]
    changes: int
    passes: int
    seconds: float


@pytest.fixture(scope="module")
def whole(store_server: Server, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    store_server.run(folder / "first")  # loads what is loaded once
    started = time.monotonic()
    ended = store_server.run(folder / "cache")
    seconds = time.monotonic() - started
    assert ended.code == 0
    assert [clip for clip, _ in ended.report["failures"]] == ["05.mp4"]
    assert differences(tree(folder / "first"), tree(folder / "cache")) == []
    assert verify_cache(folder / "cache").problems == ()
    return Whole(
        files=tree(folder / "cache"),
        changes=ended.report["changes"],
        passes=ended.report["passes"],
        seconds=seconds,
    )


def resumed(server: Server, cache: Path, whole: Whole) -> None:
    """The same command again goes on to exactly the files of an undisturbed job; leftovers are gone."""
    ended = server.run(cache)
    assert ended.code == 0, ended
    assert differences(tree(cache), whole.files) == []


@pytest.mark.parametrize(("seed", "of"), often(KILLED_AT_A_CHANGE))
def test_killed_at_a_random_change_of_the_disk(
    store_server: Server, whole: Whole, tmp_path: Path, seed: int, of: int
) -> None:
    rng = random.Random(seed)
    # Spread over the job, so that each phase of a commit is met.
    share = (seed + rng.random()) / of
    kill_at = 1 + int(share * (whole.changes - 1))
    ended = store_server.run(tmp_path / "cache", kill_at=kill_at, kill_after=rng.random() < 0.5)
    assert ended.code == -signal.SIGKILL
    resumed(store_server, tmp_path / "cache", whole)


@pytest.mark.parametrize(("seed", "of"), often(KILLED_AT_A_MOMENT))
def test_killed_at_a_random_moment(
    store_server: Server, whole: Whole, tmp_path: Path, seed: int, of: int
) -> None:
    pid = store_server.start(tmp_path / "cache")
    time.sleep((seed + random.Random(seed).random()) / of * whole.seconds)
    os.kill(pid, signal.SIGKILL)
    store_server.wait(pid)
    resumed(store_server, tmp_path / "cache", whole)


def test_killed_between_a_placeholder_and_its_file_where_there_are_no_hard_links(
    store_server: Server, whole: Whole, tmp_path: Path
) -> None:
    undisturbed = store_server.run(tmp_path / "undisturbed", no_links=True, kill_call="rename")
    assert differences(tree(tmp_path / "undisturbed"), whole.files) == []
    renames = undisturbed.report["changes"]
    assert renames > len(whole.files) / 2
    empty = 0
    for number in range(1, 1 + renames):
        cache = tmp_path / str(number)
        ended = store_server.run(cache, no_links=True, kill_call="rename", kill_at=number)
        assert ended.code == -signal.SIGKILL
        files = [path for path in cache.rglob("*") if path.is_file()]
        empty += any(path.stat().st_size == 0 for path in files)
        assert all(path.stat().st_size for path in files if path.name == "zarr.json")
        again = store_server.run(cache, no_links=number % 2 == 0)  # another machine may have links
        assert "digest" in again.report, (number, again)
        assert differences(tree(cache), whole.files) == []
    assert empty > renames / 2


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("link", "cache/zarr.json"),
        ("rename", "cache/zarr.json"),  # where there are no links
        ("replace", "tokens/zarr.json"),
        ("replace", "recovery.json"),
        ("replace", "clips.jsonl"),
    ],
)
def test_a_job_that_stood_still_as_it_laid_a_cache_down_does_no_harm(
    store_server: Server, whole: Whole, tmp_path: Path, call: str, name: str
) -> None:
    cache, no_links = tmp_path / "cache", call == "rename"
    job: dict[str, Any] = {"spec": {"block_clips": 1}, "clips": 7, f"stop_before_{call}": name}
    pid = store_server.start(cache, no_links=no_links, **job)
    wait_until(lambda: is_stopped(pid), what="it is about to name it")
    assert not (cache / "zarr.json").exists()
    gate = tmp_path / "go on"
    other = store_server.start(cache, no_links=no_links, gates={1: str(gate)}, options={"lock_expiry_s": 0.5})
    wait_until(reached(gate).exists, what="another took the lock over and is at work")
    os.kill(pid, signal.SIGCONT)
    ended = store_server.wait(pid)
    assert ended.report["error"] == "UsageError"
    assert re.search("holds another cache .*block_clips", ended.report["message"])
    gate.touch()
    assert "digest" in store_server.wait(other).report
    assert differences(tree(cache), whole.files) == []
    assert verify_cache(cache).problems == ()


def test_a_mark_that_had_no_content_yet_holds_no_clip_back(store_server: Server, tmp_path: Path) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "clips"
    pid = store_server.start(cache, no_links=True, stop_before_rename="000000.json")
    wait_until(lambda: is_stopped(pid), what="the child reaches the first mark")
    os.kill(pid, signal.SIGKILL)
    store_server.wait(pid)
    assert (cache / "done" / "000000.json").read_bytes() == b""
    shutil.copytree(store_server.folder, folder)
    (folder / "01.mp4").write_bytes(b"no video any more")
    ended = store_server.run(cache, no_links=True, folder=str(folder))
    assert [clip for clip, _ in ended.report["failures"]] == ["01.mp4", "05.mp4"]
    assert verify_cache(cache).problems == ()


def test_killed_again_and_again_it_still_ends(store_server: Server, whole: Whole, tmp_path: Path) -> None:
    codes = [store_server.run(tmp_path / "cache", kill_at=150).code for _ in range(6)]
    assert codes[0] == -signal.SIGKILL
    resumed(store_server, tmp_path / "cache", whole)


def test_finished_blocks_are_not_done_again(store_server: Server, whole: Whole, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    pid = store_server.start(cache, stop_before_link="000002.json")
    wait_until(lambda: is_stopped(pid), what="the child reaches the last mark")
    os.kill(pid, signal.SIGKILL)
    store_server.wait(pid)
    before = {path: path.stat().st_ino for path in cache.rglob("*") if path.is_file()}
    assert len(list((cache / "done").glob("0*.json"))) == 2
    ended = store_server.run(cache)
    assert ended.report["here"] == 2  # the clips of the last block
    assert 0 < ended.report["passes"] < whole.passes
    assert differences(tree(cache), whole.files) == []
    kept = [path for path in before if re.search(r"/c\.[01]\.|00000[01]\.json", str(path))]
    assert len(kept) == 2 * 7
    assert all(path.stat().st_ino == before[path] for path in kept)


def test_a_complete_cache_is_left_as_it_is(store_server: Server, whole: Whole, tmp_path: Path) -> None:
    store_server.run(tmp_path / "cache")
    ended = store_server.run(tmp_path / "cache")
    assert (ended.report["here"], ended.report["passes"]) == (0, 0)
    assert differences(tree(tmp_path / "cache"), whole.files) == []


@pytest.mark.parametrize("polite", [False, True], ids=["default action", "handled"])
def test_sigterm_ends_the_job_and_it_goes_on_later(
    store_server: Server, whole: Whole, tmp_path: Path, polite: bool
) -> None:
    cache = tmp_path / "cache"
    pid = store_server.start(cache, polite=polite, gates={5: str(tmp_path / "never")})
    wait_until((cache / "done" / "000000.json").exists, what="the first block")
    wait_until(reached(tmp_path / "never").exists, what="the second clip of the next")
    os.kill(pid, signal.SIGTERM)
    ended = store_server.wait(pid)
    assert ended.code == (128 + signal.SIGTERM if polite else -signal.SIGTERM)
    if polite:  # whoever turns the signal into an exception leaves nothing behind
        left = [path.name for path in cache.rglob("*") if path.is_file()]
        assert [name for name in left if is_staging_name(name) or name.endswith(".lock")] == []
    resumed(store_server, cache, whole)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.99])
def test_a_file_that_may_not_grow_is_one_clear_error(
    store_server: Server, whole: Whole, tmp_path: Path, share: float
) -> None:
    largest = max(len(content) for content in whole.files.values())
    ended = store_server.run(tmp_path / "cache", file_limit=int(share * largest))
    check_refusal(ended.report)
    resumed(store_server, tmp_path / "cache", whole)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.95])
def test_a_full_disk_is_one_clear_error(
    store_server: Server, whole: Whole, tmp_path: Path, share: float
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    pages = sum(-(-len(content) // 4096) for content in whole.files.values())
    kilobytes = int(share * pages) * 4
    if os.geteuid() != 0 or _mount(disk, f"size={kilobytes}k") != 0:
        pytest.skip("needs the right to mount a small tmpfs; test_a_file_that_may_not_grow runs everywhere")
    try:
        ended = store_server.run(disk / "cache")
        check_refusal(ended.report)
        assert "No space left on device" in ended.report["message"]
        left = [path.name for path in (disk / "cache").rglob("*") if path.is_file()]
        assert [name for name in left if is_staging_name(name)] == []  # a full disk is not kept full
        assert _mount(disk, "remount,size=20m") == 0
        resumed(store_server, disk / "cache", whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def check_refusal(report: dict[str, Any]) -> None:
    assert report["error"] == "CacheError"
    assert "\n" not in report["message"]
    assert re.search(r"run the same command again|check the disk|are missing", report["message"])


def _mount(disk: Path, options: str) -> int:
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
    return subprocess.run(command, capture_output=True, check=False).returncode


@dataclass(frozen=True, kw_only=True)
class Call:
    """One system call: when it began and ended, its name and the paths it names."""

    began: float
    ended: float
    name: str
    paths: tuple[str, ...]


def check_order(calls: list[Call], cache: Path) -> None:
    """Every file of a block: data, fsync, link, fsync of the directory; and so the mark, when all are there."""
    clips = load_clips(cache.parent / "clips")
    spec = small_spec(clips, small_tower(cache.parent / "clips"))
    for block in range(spec.num_blocks):
        shards = [layout.shard(cache, block) for layout in array_layouts(spec).values()]
        published = [_check_published(calls, shard) for shard in shards]
        mark = mark_path(cache, block)
        linked = _only(calls, "link", lambda call, name=str(mark): call.paths[1] == name)
        assert max(published) <= linked.began, f"{mark} has its name before the data is safe"
        for shard in shards:
            _check_directories(calls, shard, cache, before=linked.began)
        _check_published(calls, mark)


def _check_directories(calls: list[Call], shard: Path, cache: Path, *, before: float) -> None:
    """Every name on the way to a shard was made durable, after it was made."""
    for child in shard.parents:
        if child.parent == cache:
            break
        made = [call.ended for call in calls if call.name == "mkdir" and call.paths[0] == str(child)]
        synced = [
            call
            for call in calls
            if call.name == "fsync" and call.paths[0] == str(child.parent) and call.ended <= before
        ]
        assert any(call.began >= min(made, default=0.0) for call in synced), f"{child} may be lost"


def _check_published(calls: list[Call], path: Path) -> float:
    """When the file was safe."""
    link = _only(calls, "link", lambda call: call.paths[1] == str(path))
    staged = link.paths[0]
    assert is_staging_name(Path(staged).name)
    synced = _only(calls, "fsync", lambda call: call.paths[0] == staged)
    writes = [call for call in calls if call.name in ("write", "writev") and call.paths[0] == staged]
    assert writes
    assert max(call.ended for call in writes) <= synced.began
    assert synced.ended <= link.began
    directory = [
        call
        for call in calls
        if call.name == "fsync" and call.paths[0] == str(path.parent) and call.began >= link.ended
    ]
    assert directory, f"{path.parent} is not synced after {path.name} got its name"
    return min(call.ended for call in directory)


def _only(calls: list[Call], name: str, is_it: Callable[[Call], bool]) -> Call:
    (found,) = [call for call in calls if call.name == name and is_it(call)]
    return found


@pytest.fixture
def beside_its_clips(motions: Path, tmp_path: Path) -> Path:
    (tmp_path / "clips").symlink_to(motions)
    return tmp_path / "cache"


def test_order_of_the_calls_of_a_commit(beside_its_clips: Path) -> None:
    calls: list[Call] = []
    paths: dict[int, str] = {}
    lock, clock = threading.Lock(), iter(range(10**9))

    def saw(name: str, args: tuple[Any, ...], call: Callable[[], Any]) -> Any:
        with lock:
            began = next(clock)
        result = call()
        with lock:
            if name == "open":
                paths[result] = os.fspath(args[0])
            named = [paths.get(arg, "") if isinstance(arg, int) else str(arg) for arg in args[:2]]
            calls.append(Call(began=began, ended=next(clock), name=name, paths=tuple(named)))
        return result

    with watched_changes(saw):
        extract_small(load_clips(beside_its_clips.parent / "clips"), beside_its_clips)
    check_order(calls, beside_its_clips)


def test_order_of_the_system_calls_of_a_commit(beside_its_clips: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed; the test above watches Python's calls")
    (tmp_path / "trace").mkdir()
    code = (
        "import sys; from pathlib import Path; from tests.support.store_helpers import *; folder = Path(sys.argv[1]);"
        "extract_small(load_clips(folder), Path(sys.argv[2]))"
    )
    traced = "trace=fsync,fdatasync,link,linkat,rename,write,writev,pwrite64"
    command = [
        "strace",
        "-ff",
        "-y",
        "-ttt",
        "-T",
        "-s",
        "0",
        "-e",
        traced,
        "-o",
        str(tmp_path / "trace" / "t"),
    ]
    done = subprocess.run(
        [*command, sys.executable, "-c", code, str(tmp_path / "clips"), str(beside_its_clips)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if "ptrace" in done.stderr and not beside_its_clips.exists():
        pytest.skip("strace may not trace here; the test above watches Python's calls")
    assert done.returncode == 0, done.stderr
    calls = [call for file in (tmp_path / "trace").iterdir() for call in parse_trace(file.read_text())]
    check_order(calls, beside_its_clips)


def parse_trace(text: str) -> Iterator[Call]:
    """Calls in one thread's output of `strace -ff -y -ttt -T`."""
    for line in text.splitlines():
        found = re.match(r"([\d.]+) (\w+)\((.*)\) += -?\d+.* <([\d.]+)>$", line)
        if found is None:
            continue
        began, name, arguments, took = found.groups()
        if name in ("link", "linkat", "rename"):
            paths = tuple(re.findall(r'"([^"]*)"', arguments))
        else:
            paths = tuple(re.findall(r"^\d+<([^>]*)>", arguments))
        name = {"linkat": "link", "fdatasync": "fsync", "writev": "write", "pwrite64": "write"}.get(
            name, name
        )
        if paths:
            yield Call(began=float(began), ended=float(began) + float(took), name=name, paths=paths)
