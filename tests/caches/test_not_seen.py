"""What cannot be looked at is told beside what was found, and is never taken for empty: by `ls` and by `train --dataset`."""

import io
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest

from evl_cache.caches.listing import list_caches
from evl_cache.caches.pairing import find_pair
from evl_cache.caches.places import NotSeen, find_caches
from evl_cache.errors import Unreachable, UsageError, WaitEnded
from evl_cache.store import waits_end_when
from evl_cache.store.objects import waits
from evl_cache.store.objects.objects import DirectoryObjects
from evl_cache.train.needs import HeadNeeds
from evl_cache.train.options import TrainOptions
from evl_cache_cli.main import main
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import FaultyServer, faulty_server, free_port
from tests.support.without_rights import closed

NEEDS = HeadNeeds((TrainOptions(head="decoder3", epochs=1),))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A place with a pair of caches of one data set, and one of another; a test that changes it takes a copy."""
    root = tmp_path_factory.mktemp("four")
    write_cache(root / "a", layers=(2, 3, 4))
    write_cache(root / "b", layers=(2, 3, 4), split="val", prefix="v")
    write_cache(root / "c", layers=(2, 3, 4), dataset="other")
    write_cache(root / "d", layers=(2, 3, 4), split="val", prefix="v", dataset="other")
    (root / "no cache").mkdir()
    return root


@pytest.fixture
def place(four: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(four, tmp_path / "place"))


@pytest.fixture
def server(place: Path) -> Iterator[FaultyServer]:
    with faulty_server(place) as found:
        yield found


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.delenv("EVL_CACHE_ROOT", raising=False)


@dataclass(frozen=True)
class Ended:
    """Exit status of a command, and what it printed."""

    exit_code: int
    stdout: str
    stderr: str


def run(*words: object) -> Ended:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert isinstance(ended.value.code, int)
    return Ended(ended.value.code, out.getvalue(), err.getvalue())


def ls(*places: str | Path) -> Ended:
    return run("ls", *places)


def names(done: Ended) -> list[str]:
    """Of the caches of a table."""
    return [line.split()[-1].rpartition("/")[2] for line in done.stdout.splitlines()[1:]]


@pytest.mark.parametrize("name", ["zarr.json", "manifest.json"])
def test_one_forbidden_file_of_four_caches_hides_that_cache_alone(server: FaultyServer, name: str) -> None:
    server.fault = lambda path, body: 403 if path == f"/c/{name}" else None
    done = ls(server.url)
    assert (done.exit_code, names(done)) == (1, ["a", "b", "d"]), done
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"not seen: {server.url}/c: {name}: ") and "denied" in line
    reported = json.loads(ls(server.url, "--json").stdout)
    assert [Path(cache["place"]).name for cache in reported["caches"]] == ["a", "b", "d"]
    assert [one["place"] for one in reported["not_seen"]] == [f"{server.url}/c"]
    assert line.endswith(reported["not_seen"][0]["reason"])


def test_a_server_that_is_down_hides_no_other_place_and_is_no_empty_one(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience_of_attempts(monkeypatch)
    down = f"http://127.0.0.1:{free_port()}/caches"
    done = ls(down, four, "s3://lab:x@y/z?")
    assert (done.exit_code, names(done)) == (1, ["a", "b", "c", "d"])
    assert [line.split(": ")[:2] for line in done.stderr.splitlines() if line.startswith("not seen")] == [
        ["not seen", down], ["not seen", "s3://y/z"],
    ]  # fmt: skip
    alone = ls(down)
    assert alone.exit_code == 1 and "extract" not in alone.stderr
    found = find_pair("test", places=[down, four], needs=NEEDS)
    assert [cache.name for cache in found] == ["a", "b"]


def test_places_are_asked_together_and_told_of_in_their_order(place: Path) -> None:
    """The first server answers only when the second was asked."""
    asked = threading.Event()

    def wait(path: str, body: bytes) -> None:
        assert asked.wait(60), "the other place was not asked meanwhile"

    def note(path: str, body: bytes) -> None:
        asked.set()

    with faulty_server(place) as first, faulty_server(place) as second:
        first.fault, second.fault = wait, note
        done = ls(f"{first.url}/c", f"{second.url}/a", place / "b")
    assert (done.exit_code, names(done)) == (0, ["c", "a", "b"]), done


def test_silent_servers_are_each_one_line_beside_what_is_there(
    four: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are silent until both are asked: they are waited for at the same time."""
    patience_of_attempts(monkeypatch, 0)
    both, answer = threading.Barrier(2), threading.Event()

    def silent(path: str, body: bytes) -> None:
        both.wait(20)  # who asks one after the other waits for longer
        monkeypatch.setattr(waits, "_SILENCE_S", 0.5)
        answer.wait(60)

    with faulty_server(four) as first, faulty_server(four) as second:
        first.fault = second.fault = silent
        done = ls(f"{first.url}/a", four, f"{second.url}/b")
        answer.set()
    assert not both.broken
    assert (done.exit_code, names(done)) == (1, ["a", "b", "c", "d"])
    told = done.stderr.splitlines()
    for line, place in zip(told, (f"{first.url}/a", f"{second.url}/b"), strict=True):
        assert line.startswith(f"not seen: {place}: zarr.json: ") and "answer" in line


@pytest.mark.parametrize("mode", [0, 0o111])
def test_a_directory_that_may_not_be_read_is_told_of(four: Path, place: Path, mode: int) -> None:
    other = Path(shutil.copytree(four, place.parent / "other"))
    other.chmod(0o755)
    ls(other)  # what is imported is imported
    with closed(place, mode):
        with pytest.raises(
            Unreachable, match=r"cannot be listed \(Permission denied\); check its permissions"
        ):
            DirectoryObjects(place).folders()
        done = ls(other, place)
        alone = ls(place)
    assert (done.exit_code, names(done)) == (1, ["a", "b", "c", "d"])
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"not seen: {place}: ") and "Permission denied" in line
    assert (alone.exit_code, alone.stdout) == (1, "") and "extract" not in alone.stderr


def test_a_cache_that_may_not_be_read_hides_no_other(four: Path, place: Path) -> None:
    ls(four)
    with closed(place / "c"):
        done = ls(place)
    assert (done.exit_code, names(done)) == (1, ["a", "b", "d"])
    assert done.stderr.startswith(f"not seen: {place}/c: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", ["{", "", '{"zarr_format": 3, "node_type": "group"'])
def test_a_damaged_cache_is_told_of_and_what_is_no_cache_is_not(place: Path, content: str) -> None:
    (place / "c" / "zarr.json").write_text(content)
    for name, other in {
        "group": '{"zarr_format": 3, "node_type": "group", "attributes": {}}',
        "list": "[]",
    }.items():
        (place / name).mkdir()
        (place / name / "zarr.json").write_text(other)
    (place / "loop").symlink_to("loop")
    (place / "file").write_text("")
    done = ls(place)
    assert (done.exit_code, names(done)) == (1, ["a", "b", "d"])
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"not seen: {place}/c: zarr.json: cannot be read") and "repair" in line


def test_a_damaged_cache_at_the_top_of_a_place_hides_none_below_it(place: Path) -> None:
    (place / "zarr.json").write_text("{")
    done = ls(place)
    assert (done.exit_code, names(done)) == (1, ["a", "b", "c", "d"])
    shutil.copytree(place / "a", place / "e")
    written = (place / "e" / "zarr.json").read_text()
    (place / "e" / "zarr.json").write_text(written.replace('"test"', '"tost"'))
    inside = list(find_caches(place / "e"))
    assert [type(one) for one in inside] == [NotSeen], "arrays of a damaged cache are no damaged caches"


def test_a_place_that_is_named_must_be_there_and_the_default_need_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    empty = ls()
    assert empty.exit_code == 0 and "no caches; run evl-cache extract" in empty.stderr
    (tmp_path / "file").write_text("")
    for text in ("missing", "file", "file/x", "x" * 300):
        monkeypatch.setenv("EVL_CACHE_ROOT", text)
        for done in (ls(text), ls()):
            assert (done.exit_code, done.stdout) == (1, "")
            assert done.stderr == (
                f"not seen: {text}: no such directory; correct the name, or mount the disk that it is on\n"
            )
    monkeypatch.delenv("EVL_CACHE_ROOT")
    (tmp_path / "caches").write_text("")
    assert ls().exit_code == 1


def test_what_a_server_that_falls_silent_holds_is_asked_for_once(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thirty caches that each wait as long as one would take thirty times as long."""
    from evl_cache.caches import places

    monkeypatch.setattr(places, "_AT_ONCE", 1)
    monkeypatch.setattr(places, "_SILENCE_S", -1.0)
    looked: list[str] = []

    def silent(address: str) -> None:
        looked.append(address)
        raise Unreachable(f"{address}/zarr.json: no answer within 120 s; run it again")

    found = list(places.look_together(silent, [f"http://h/{i}" for i in range(30)], address_of=str))
    assert looked == ["http://h/0"]
    assert str(found[0]) == "http://h/0: zarr.json: no answer within 120 s; run it again"
    assert str(found[29]).startswith("http://h/29: not asked for, as http://h/0: zarr.json: no answer")


def test_a_pair_is_found_among_what_is_seen_and_the_rest_is_told(
    place: Path, four: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (place / "c" / "zarr.json").write_text("{")
    train = [
        "train",
        "--dataset",
        "test",
        "--head",
        "linear",
        "--steps",
        "1",
        "--batch",
        "4",
        "--device",
        "cpu",
    ]
    monkeypatch.setenv("EVL_CACHE_ROOT", f"{tmp_path}/missing{os.pathsep}{place}")
    done = run(*train, "--out", tmp_path / "run")
    assert done.exit_code == 0, done
    told = done.stderr.splitlines()
    assert told[0].startswith(f"not seen: {tmp_path}/missing: no such directory")
    assert told[1].startswith(f"not seen: {place}/c: zarr.json: cannot be read")
    assert told[2] == f"train cache: {place}/a"


def test_a_cache_whose_clips_cannot_be_read_is_in_no_pair(place: Path) -> None:
    shutil.copytree(place / "a", place / "e")
    (place / "e" / "clips.jsonl").write_text("")
    told: list[NotSeen] = []
    found = find_pair("test", places=[place], needs=NEEDS, on_not_seen=told.extend)
    assert [cache.name for cache in found] == ["a", "b"]
    assert [one.place for one in told] == [f"{place}/e"]


def test_what_could_not_be_looked_at_is_told_before_the_advice_to_extract(
    place: Path, tmp_path: Path
) -> None:
    (place / "b" / "zarr.json").write_text("{")
    start = rf"^could not look at {tmp_path}/missing \(no such directory; .*\), nor at {place}/b \(zarr.json: .*\): "
    for dataset, said in (
        ("test", "no pair of train and validation caches of test"),
        ("k400", "no caches of k400"),
    ):
        with pytest.raises(UsageError, match=f"{start}.*: {said}.*run evl-cache extract"):
            find_pair(dataset, places=[tmp_path / "missing", place], needs=NEEDS)
    many = [tmp_path / str(number) for number in range(10)]
    with pytest.raises(UsageError, match=rf"nor at {tmp_path}/3 \(.*\) and 6 more: what fits"):
        find_pair("test", places=many, needs=NEEDS)


@pytest.mark.parametrize("error", [WaitEnded("the wait was ended"), KeyboardInterrupt()])
def test_who_is_interrupted_gets_no_result(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    from evl_cache.caches import places

    def ended(address: str) -> None:
        raise error

    monkeypatch.setattr(places, "cache_parts", ended)
    for look in (lambda: list(list_caches([place])), lambda: find_pair("test", places=[place], needs=NEEDS)):
        with pytest.raises(type(error)):
            look()


def test_a_wait_for_a_silent_server_is_ended(server: FaultyServer) -> None:
    asked, answer = threading.Event(), threading.Event()

    def silent(path: str, body: bytes) -> None:
        asked.set()
        answer.wait(60)

    server.fault = silent
    try:
        with waits_end_when(asked.is_set), pytest.raises(WaitEnded):
            list(list_caches([server.url]))
    finally:
        answer.set()
