"""Verifying a cache on a server: as on the disk, of which the same directory is the slow twin, and what only a server does."""

import ast
import json
import random
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.errors import CacheDamaged, CacheError, NoCacheHere, Unreachable, UsageError, for_readers
from evl_cache.store import Sample, Verification, open_objects, read_description, verify_cache
from evl_cache.store.format.layout import array_layouts
from evl_cache.store.objects.objects import open_writable
from evl_cache.store.reading import attempts
from evl_cache_cli.main import cli
from tests.support.credentials import PASSWORD, USER
from tests.support.damage_kinds import KINDS
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import KEYS, FaultyServer, Nginx, faulty_server, nginx, s3_server
from tests.support.store_helpers import ROOT, tree

LABELS, BLOCKS = tuple(i % 3 for i in range(13)), 3


@dataclass(frozen=True, kw_only=True)
class Caches:
    """Files of a cache, of one of other features, and of one stored otherwise."""

    files: dict[str, bytes]
    twin: dict[str, bytes]
    other: dict[str, bytes]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Caches:
    folder = tmp_path_factory.mktemp("verified")
    write_cache(folder / "a", labels=LABELS, failed=(3,))
    write_cache(folder / "twin", labels=LABELS, seed=5)
    write_cache(folder / "other", labels=LABELS, codec="raw", layers=(1, 2))
    for name in ("a", "twin", "other"):
        shutil.rmtree(folder / name / "locks")
    return Caches(files=tree(folder / "a"), twin=tree(folder / "twin"), other=tree(folder / "other"))


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        yield server


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.001)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def served(caches: Caches, web: Nginx) -> Iterator[Path]:
    """The directory of a cache that nginx serves as `/a`."""
    write(web.www / "a", caches.files)
    yield web.www / "a"
    shutil.rmtree(web.www / "a")


@pytest.fixture
def faulty(caches: Caches, tmp_path: Path) -> Iterator[FaultyServer]:
    write(tmp_path / "www" / "a", caches.files)
    with faulty_server(tmp_path / "www") as server:
        yield server


def write(path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def blocks(found: Verification) -> list[int | None]:
    return [problem.block for problem in found.problems]


def assert_same(remote: Verification, local: Verification, url: str) -> None:
    assert blocks(remote) == blocks(local)
    assert (remote.blocks_done, remote.blocks, remote.cache_digest, remote.sampled_blocks) == (
        local.blocks_done,
        local.blocks,
        local.cache_digest,
        local.sampled_blocks,
    )
    for problem in remote.problems:
        assert (
            url in problem.reason
            and "repair" not in problem.reason
            and "evl-cache-verify-" not in problem.reason
        )
        assert "evl-cache index" not in problem.reason and "\n" not in problem.reason


@pytest.mark.parametrize("part", range(4))
def test_every_kind_of_damage_is_found_in_the_blocks_in_which_the_disk_has_it(
    caches: Caches, served: Path, web: Nginx, part: int
) -> None:
    rng, damaged = random.Random(part), 0
    for tried in range(35):
        damage = KINDS[tried % len(KINDS)]
        name, content = damage(rng, caches)
        if content is None:
            (served / name).unlink()
        else:
            (served / name).write_bytes(content)
        local = verified(served)
        assert_same_or_refused(web, local, f"{damage.__name__} of {name}")
        damaged += not isinstance(local, Verification) or bool(local.problems)
        (served / name).write_bytes(caches.files[name])
    assert damaged > 25


def verified(place: Path | str) -> Verification | CacheError:
    """What is found, or the error by which it is refused."""
    try:
        return verify_cache(place)
    except CacheError as error:
        return error


def assert_same_or_refused(web: Nginx, local: Verification | CacheError, what: str) -> None:
    remote, url = verified(f"{web.url}/a"), f"{web.url}/a"
    if isinstance(remote, Verification):
        assert isinstance(local, Verification), what
        assert_same(remote, local, url)
    else:
        assert type(remote) is type(local), what
        assert url in str(remote) and "evl-cache-verify-" not in str(remote)


def test_an_intact_cache_is_proved_wholly_or_by_the_same_sample(
    caches: Caches, served: Path, web: Nginx
) -> None:
    counted: list[tuple[str, int, int]] = []
    remote = verify_cache(f"{web.url}/a", threads=3, on_progress=lambda *told: counted.append(told))
    assert_same(remote, verify_cache(served), web.url)
    assert remote.problems == () and remote.blocks_done == BLOCKS and remote.cache_digest
    assert [told for told in counted if told[0] == "marks"] == [("marks", n, BLOCKS) for n in (1, 2, 3)]
    total = sum(len(content) for name, content in caches.files.items() if "/c." in name)
    assert counted[-1] == ("bytes", total, total)
    for seed in range(3):
        drawn = Sample(percent=34, seed=seed)
        before = len(web.requests())
        assert_same(verify_cache(f"{web.url}/a", sample=drawn), verify_cache(served, sample=drawn), web.url)
        read = {line.split()[1] for line in web.requests()[before:] if "/c." in line}
        assert len(read) == len(array_layouts(read_description(served).spec))


def test_nothing_stays_in_the_temporary_directory(served: Path, web: Nginx, tmp_path: Path) -> None:
    verify_cache(f"{web.url}/a")
    assert [path for path in tmp_path.iterdir() if path.name.startswith("evl-cache-verify-")] == []


def test_a_redo_without_a_manifest_is_told(served: Path, web: Nginx) -> None:
    (served / "manifest.json").unlink()
    (served / "done" / "000001.redo").touch()
    assert_same(verify_cache(f"{web.url}/a"), verify_cache(served), web.url)


def test_an_unfinished_cache_is_proved_as_far_as_it_is(served: Path, web: Nginx) -> None:
    for name in ("manifest.json", "index.bin", "done/000002.json"):
        (served / name).unlink()
    found = verify_cache(f"{web.url}/a")
    assert_same(found, verify_cache(served), web.url)
    assert (found.problems, found.blocks_done, found.cache_digest) == ((), 2, None)


def test_what_arrives_damaged_once_is_no_damage_of_the_cache(faulty: FaultyServer, caches: Caches) -> None:
    damaged: set[str] = set()

    def once(path: str, body: bytes) -> bytes | None:
        if path in damaged:
            return None
        damaged.add(path)
        return bytes([body[0] ^ 1]) + body[1:] if body else None

    faulty.fault = once
    found = verify_cache(f"{faulty.url}/a")
    assert found.problems == () and found.blocks_done == BLOCKS
    assert {path.removeprefix("/a/") for path in damaged} >= caches.files.keys()


def test_each_arriving_otherwise_is_damage(faulty: FaultyServer) -> None:
    rng = random.Random(0)
    faulty.fault = lambda path, body: rng.randbytes(len(body)) if "/tokens/c.1." in path else None
    (problem,) = verify_cache(f"{faulty.url}/a").problems
    assert problem.block == 1
    assert len([path for path in faulty.asked if "/tokens/c.1." in path]) == attempts.ATTEMPTS


@pytest.mark.parametrize(
    "where", ["zarr.json", "manifest.json", "done/000001.json", "tokens/c.1.0.0.0.0", "index.bin"]
)
def test_a_server_in_trouble_is_one_line_and_no_damage(
    faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    patience_of_attempts(monkeypatch)
    faulty.fault = lambda path, body: 503 if path.endswith(f"a/{where}") else None
    with pytest.raises(Unreachable, match=where):
        verify_cache(f"{faulty.url}/a")
    found = invoke("verify", f"{faulty.url}/a")
    assert isinstance(found.exception, Unreachable) and "damaged" not in found.output


def test_a_server_that_is_silent_in_one_thread_ends_all(faulty: FaultyServer) -> None:
    """A wrong answer elsewhere ends what waits at once, and not after the patience for a silent server."""
    asked, over = threading.Event(), threading.Event()

    def fault(path: str, body: bytes) -> bytes | int | None:
        if "/tokens/c.0." in path:
            asked.set()
            over.wait(60)
        if "/maps/c.0." in path:
            assert asked.wait(60)
            return 418
        return None

    faulty.fault = fault
    since = time.monotonic()
    try:
        with pytest.raises(Unreachable, match="418"):
            verify_cache(f"{faulty.url}/a", threads=8)
        assert time.monotonic() - since < 25
    finally:
        over.set()


def test_a_cache_that_changes_meanwhile_is_not_called_damaged(faulty: FaultyServer, caches: Caches) -> None:
    def fault(path: str, body: bytes) -> None:
        if "/c." in path:
            write(faulty.root / "a", caches.twin)

    faulty.fault = fault
    with pytest.raises(CacheError, match="changed while it was verified; run the same command again"):
        verify_cache(f"{faulty.url}/a")


def test_where_no_cache_is_and_other_urls(web: Nginx) -> None:
    with pytest.raises(NoCacheHere, match=f"{web.url}/none: no cache here"):
        verify_cache(f"{web.url}/none")
    with pytest.raises(UsageError, match="expected s3://"):
        verify_cache("ftp://lab.example.org/a")


def test_a_description_of_very_many_blocks_is_not_asked_for_one_by_one(
    faulty: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evl_cache.store.reading.small_files._MOST_ABSENT", 10)
    write_cache(tmp_path / "www" / "many", labels=[0] * 60, block_clips=1, layers=(2,), maps="none")
    shutil.rmtree(tmp_path / "www" / "many" / "done")
    (tmp_path / "www" / "many" / "manifest.json").unlink()
    found = verify_cache(f"{faulty.url}/many", threads=1)
    assert (found.blocks, found.blocks_done) == (60, 0)
    assert len({path for path in faulty.asked if path.endswith(".json") and "/done/" in path}) < 20


def test_a_bucket_is_proved_and_lacks_what_was_removed(
    caches: Caches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server(tmp_path / "log") as endpoint:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(name, value)
        objects = open_writable("s3://lab/a")
        for name, content in caches.files.items():
            objects.put(name, content)
        whole = verify_cache("s3://lab/a")
        assert whole.problems == () and whole.blocks_done == BLOCKS
        objects.delete("maps/c.2.0.0.0.0.0")
        objects.put("tokens/c.1.0.0.0.0", caches.twin["tokens/c.1.0.0.0.0"])
        assert blocks(verify_cache("s3://lab/a")) == [1, 2]
        assert open_objects("s3://lab/a").url == "s3://lab/a"


def invoke(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], standalone_mode=False)


def test_the_command_tells_of_the_url_and_never_of_its_password(
    served: Path, web: Nginx, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    url = web.tls_url.replace("https://", f"https://{USER}:{PASSWORD}@")
    told = invoke("verify", f"{url}/a", "--json")
    assert told.return_value == 0 and json.loads(told.stdout)["cache"] == f"{web.tls_url}/a"
    shard = served / "tokens" / "c.1.0.0.0.0"
    shard.write_bytes(shard.read_bytes()[:-1])
    told = invoke("verify", f"{url}/a")
    assert told.return_value == 1
    assert (
        f"damaged: {web.tls_url}/a/tokens/c.1.0.0.0.0: " in told.stderr
        and "tell who keeps the cache" in told.stderr
    )
    assert f"{web.tls_url}/a: 2 of 3 blocks done and intact, 1 problems" in told.stdout
    assert PASSWORD not in told.output + told.stderr


def test_sources_of_a_url_are_one_line_that_says_what_to_do(web: Nginx) -> None:
    told = invoke("verify", f"{web.url}/a", "--sources")
    assert isinstance(told.exception, UsageError) and "pull the cache" in str(told.exception)


@pytest.mark.parametrize(
    "words",
    [
        ("repair", "{}"),
        ("index", "{}"),
        ("push", "{}", "/nowhere/"),
        ("push", "{}", "s3://lab/a"),
        ("push", "{}", "/nowhere/a", "--layers", "2"),
        ("extract", "--dataset", "folder", "--root", ".", "--cache", "{}"),
    ],
)
@pytest.mark.parametrize("url", ["http://u:pa-ss@127.0.0.1:9/a", "s3://lab/a"])
def test_commands_for_directories_say_of_a_url_what_to_do(words: tuple[str, ...], url: str) -> None:
    told = invoke(*(word.format(url) for word in words))
    assert isinstance(told.exception, UsageError), told.output
    public = url.replace("u:pa-ss@", "")
    assert str(told.exception).startswith(f"{public}: is an address") and f"evl-cache pull {public}" in str(
        told.exception
    )
    assert "pa-ss" not in str(told.exception)


def test_damage_behind_a_url_is_never_to_be_repaired_by_who_reads_it() -> None:
    error = CacheDamaged("https://lab/a/zarr.json: the description's digest does not match; repair the cache")
    assert str(error) == (
        "https://lab/a/zarr.json: the description's digest does not match; tell who keeps the cache, or use another copy of it"
    )
    assert str(CacheDamaged("/data/a/zarr.json: does not match; repair the cache")).endswith(
        "repair the cache"
    )
    assert str(CacheDamaged("https://lab/a: run the same command again")).endswith(
        "a: run the same command again"
    )


def test_no_remedy_of_the_store_tells_a_reader_to_repair() -> None:
    """Every text of the store that advises a repair, or what only who may write a cache can do, has it replaced."""
    texts = [text for path in sorted((ROOT / "evl_cache" / "store").rglob("*.py")) for text in texts_of(path)]
    advising = [text for text in texts if re.search("; .*(repair|evl-cache index)", text)]
    assert len(advising) > 40
    for text in advising:
        assert not re.search("repair|evl-cache index", for_readers(text)), text


def texts_of(path: Path) -> Iterator[str]:
    """Strings of a module that are no docstrings, with a letter for each value in them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "x" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value


def test_no_more_than_a_byte_behind_the_end_is_read_of_a_shard(faulty: FaultyServer, caches: Caches) -> None:
    name = "tokens/c.1.0.0.0.0"
    with (faulty.root / "a" / name).open("ab") as file:
        file.write(bytes(1 << 20))
    (problem,) = verify_cache(f"{faulty.url}/a").problems
    assert problem.block == 1
    sent = [nbytes for path, nbytes in faulty.served if path == f"/a/{name}"]
    assert sum(sent) == 2 * (len(caches.files[name]) + 1)


@pytest.mark.parametrize("parts", [1, 7])
def test_a_shard_in_parts_that_end_with_it_is_whole(
    web: Nginx, served: Path, caches: Caches, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    part_nbytes = -(-len(caches.files["tokens/c.1.0.0.0.0"]) // parts)
    monkeypatch.setattr("evl_cache.store.reading.remote_shards._PART_NBYTES", part_nbytes)
    assert verify_cache(f"{web.url}/a").problems == ()
