"""Caches read where they lie: over HTTP and S3, a local copy, faults on the way, credentials that stay secret."""

import logging
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.credentials import PASSWORD, USER, write_secret
from tests.support.feature_caches import write_cache
from tests.support.patience import patience_of_attempts
from tests.support.servers import FaultyServer, Nginx, faulty_server, nginx

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.errors import CacheDamaged, CacheError, Unreachable, UsageError
from evl_cache.store import FeatureCache, open_objects
from evl_cache.store.reading import attempts, fetched_shards
from evl_cache.store.reading.copy_root import CopyRoot

LABELS = tuple(i % 3 for i in range(13))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote") / "a"
    write_cache(path, labels=LABELS, failed=(3,))
    return path


@pytest.fixture(scope="module")
def web(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(tmp_path_factory.mktemp("nginx")) as server:
        shutil.copytree(cache, server.www / "caches" / "a")
        yield server


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    return tmp_path / "copies"


@pytest.fixture
def faulty(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.001)
    patience_of_attempts(monkeypatch)
    with faulty_server(cache.parent) as server:
        yield server


def assert_equal_reads(one: FeatureCache, other: FeatureCache, layers: tuple[int, ...] | None = None) -> None:
    samples = np.flatnonzero(other.is_valid).tolist()
    for got, expected in zip(one.read(samples, layers), other.read(samples, layers), strict=True):
        assert got is not None and expected is not None
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_cache_behind_nginx_reads_as_the_one_on_the_disk(web: Nginx, cache: Path) -> None:
    remote, local = FeatureCache(f"{web.url}/caches/a"), FeatureCache(cache)
    assert (remote.spec, remote.fingerprint, remote.failures) == (
        local.spec,
        local.fingerprint,
        local.failures,
    )
    assert remote.place == f"{web.url}/caches/a" and not remote.is_local and remote.is_complete
    assert_equal_reads(remote, local)
    assert_equal_reads(remote, local, (2, 4))
    with pytest.raises(CacheError, match="failed"):
        remote.read([3])


def test_an_epoch_makes_less_than_a_request_a_sample_and_the_next_one_none(web: Nginx) -> None:
    before = len(web.requests())
    remote = FeatureCache(f"{web.url}/caches/a")
    opened = len(web.requests())
    # Description, manifest, index, clips, what was added; nothing is listed.
    assert opened - before == 1 + 1 + 2 + 1 + 1
    loader = FeatureLoader(remote, np.arange(len(remote)), layers=(3, 4), batch=4, shuffle_seed=0)
    first = {int(s) for batch in loader.epoch(0) for s in batch.samples}
    lines = web.requests()[opened:]
    assert len(first) == 12 and len(lines) == remote.copy.requests <= len(first) * 5 / 2
    assert all(
        line.startswith("GET /caches/a/") and " bytes=" in line and line.endswith("206") for line in lines
    )
    assert len(lines) == len(set(lines))  # nothing twice
    assert sum(1 for _ in loader.epoch(1)) == 3
    again = FeatureCache(f"{web.url}/caches/a")  # another run on this machine
    again.read([0, 1])
    assert len(web.requests()) == opened + len(lines) + 3  # description and manifest


def test_pieces_of_a_large_block_keep_requests_below_one_a_sample(
    tmp_path: Path, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.root = tmp_path
    write_cache(tmp_path / "big", labels=[i % 3 for i in range(60)], block_clips=20)
    monkeypatch.setattr(fetched_shards, "_PIECE_NBYTES", 8 * 4000)
    remote = FeatureCache(f"{faulty.url}/big")
    for sample in np.random.default_rng(0).permutation(60).tolist():
        remote.read([sample])
    assert remote.copy.requests <= 60
    assert remote.copy.nbytes == sum(
        sum(np.frombuffer(record.chunk_nbytes, "<u4").tolist())
        for files in remote._done.files.values()
        for name, record in files.items()
        if name != "class_tokens"
    )


def test_few_of_many_layers_are_fetched_without_the_others(
    tmp_path: Path, faulty: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.root = tmp_path
    write_cache(tmp_path / "deep", labels=(0, 1, 2), layers=(1, 2, 3, 4))
    monkeypatch.setattr(fetched_shards, "_SMALL_NBYTES", 0)
    remote = FeatureCache(f"{faulty.url}/deep")
    faulty.served.clear()
    tokens, _ = remote.read([1], (4,))
    sent = sum(nbytes for path, nbytes in faulty.served if "/tokens/" in path)
    (record,) = [files["tokens"] for files in remote._done.files.values()]
    assert sent == np.frombuffer(record.chunk_nbytes, "<u4")[4 + 3]
    assert torch.equal(tokens[0], FeatureCache(tmp_path / "deep").read([1], (4,))[0][0])


def test_a_dropped_connection_and_a_busy_server_are_retried(faulty: FaultyServer, cache: Path) -> None:
    seen: dict[str, int] = {}

    def fault(path: str, body: bytes) -> bytes | int | None:
        seen[path] = seen.get(path, 0) + 1
        if "/c." in path and seen[path] == 1:
            return body[: len(body) // 2]
        return 503 if "/c." in path and seen[path] == 2 else None

    faulty.fault = fault
    assert_equal_reads(FeatureCache(f"{faulty.url}/a"), FeatureCache(cache))


def test_a_corrupted_transfer_is_noticed_and_fetched_again(faulty: FaultyServer, cache: Path) -> None:
    flipped: set[str] = set()

    def fault(path: str, body: bytes) -> bytes | None:
        if "/c." not in path or path in flipped:
            return None
        flipped.add(path)
        return body[:5] + bytes([body[5] ^ 16]) + body[6:]

    faulty.fault = fault
    remote = FeatureCache(f"{faulty.url}/a")
    assert_equal_reads(remote, FeatureCache(cache))
    assert len(flipped) >= 15


def test_what_stays_corrupted_is_an_error_that_tells_damage_from_change(
    faulty: FaultyServer, cache: Path, tmp_path: Path
) -> None:
    remote = FeatureCache(f"{faulty.url}/a")
    faulty.fault = lambda path, body: bytes(len(body)) if "/tokens/" in path else None
    with pytest.raises(
        CacheDamaged,
        match=r"/a/tokens/c.0.0.0.0.0: chunk 0 arrives damaged, 4 times; verify http\S+/a, and tell who",
    ):
        remote.read([0])
    write_cache(tmp_path / "a", labels=LABELS, seed=5)
    faulty.fault, faulty.root = lambda path, body: None, tmp_path
    with pytest.raises(CacheError, match=r"changed while it was read .*run the same command again"):
        remote.read([0])
    faulty.root = tmp_path / "empty"
    with pytest.raises(CacheError, match=r"changed while it was read"):
        remote.read([0])


@pytest.mark.parametrize("name", ["manifest.json", "zarr.json", "clips.jsonl", "done/000001.json"])
def test_a_description_that_does_not_arrive_whole_is_refused(
    faulty: FaultyServer, copies: Path, name: str
) -> None:
    is_mark = name.startswith("done/")  # which is read where there is no index

    def fault(path: str, body: bytes) -> bytes | int | None:
        if is_mark and path.endswith("index.bin"):
            return 404
        return body[:-9] + b"x" + body[-8:] if path.endswith(f"a/{name}") else None

    faulty.fault = fault
    with pytest.raises(CacheError):
        FeatureCache(f"{faulty.url}/a")
    faulty.fault = lambda path, body: (
        404 if path.endswith(name) or (is_mark and path.endswith("index.bin")) else None
    )
    with pytest.raises(CacheError):
        FeatureCache(f"{faulty.url}/a")
    assert not list(copies.rglob("zarr.json")) or name not in ("manifest.json", "zarr.json")


def test_a_server_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    patience_of_attempts(monkeypatch)
    with pytest.raises(Unreachable, match=r"http://127\.0\.0\.1:9/x/zarr\.json: nothing listens there"):
        FeatureCache("http://127.0.0.1:9/x")


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "s3://", "https://host/x?X-Amz-Signature=abc", "gs://bucket/x"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"expected|give the cache's own address") as raised:
        FeatureCache(url)
    assert "abc" not in str(raised.value)


def test_tls_and_password_work_and_are_never_shown(
    web: Nginx, cache: Path, tmp_path: Path, copies: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    url = f"{web.tls_url}/caches/a"
    with_login = url.replace("https://", f"https://{USER}:{PASSWORD}@")
    messages = []
    with pytest.raises(
        CacheError, match="certificate of localhost is not accepted"
    ) as raised:  # an unknown certificate
        FeatureCache(with_login)
    messages.append(str(raised.value))
    monkeypatch.setenv("SSL_CERT_FILE", str(web.certificate))
    with pytest.raises(CacheError, match=r"access denied; put user and password .* into ~/\.netrc") as raised:
        FeatureCache(url)
    with pytest.raises(CacheError, match="access denied") as raised:
        FeatureCache(with_login.replace(PASSWORD, PASSWORD + "x"))
    messages.append(str(raised.value))
    remote = FeatureCache(with_login)
    assert_equal_reads(remote, FeatureCache(cache))
    write_secret(tmp_path / "netrc", f"machine localhost login {USER} password {PASSWORD}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert len(FeatureCache(url)) == len(LABELS)
    stored = b"".join(f.read_bytes() for f in copies.rglob("*") if f.is_file())
    shown = " ".join([*messages, caplog.text, *capfd.readouterr(), remote.place, repr(remote.copy)])
    assert PASSWORD not in shown and PASSWORD.encode() not in stored and USER + ":" not in shown


def test_the_copy_keeps_to_its_limit_and_what_was_removed_comes_again(
    faulty: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty.root = tmp_path
    local = write_cache(tmp_path / "many", labels=[i % 3 for i in range(30)])
    limit = 50_000
    monkeypatch.setenv("EVL_CACHE_COPY_GB", str(limit / 1e9))
    remote = FeatureCache(f"{faulty.url}/many")
    for sample in [*range(30), 0, 1, 29]:
        assert torch.equal(remote.read([sample])[0][0], local.read([sample])[0][0])
    kept = sum(f.stat().st_blocks * 512 for f in remote.path.glob("*/c.*"))
    whole = sum(f.stat().st_size for f in local.path.glob("*/c.*"))
    assert kept <= limit < whole
    again = remote.copy.requests
    remote.read([15])
    assert remote.copy.requests > again


@pytest.mark.parametrize("text", ["many", "-3", "0", "inf"])
def test_a_limit_that_is_no_number_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVL_CACHE_COPY_GB", text)
    with pytest.raises(UsageError, match="EVL_CACHE_COPY_GB"):
        CopyRoot(tmp_path)


def test_a_copy_damaged_on_this_disk_heals(web: Nginx, cache: Path) -> None:
    url = f"{web.url}/caches/a"
    remote = FeatureCache(url, trust=True)  # a copy is checked all the same
    remote.read(list(range(3)))
    shard = remote.path / "tokens" / "c.0.0.0.0.0"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    for damaged in (FeatureCache(url), remote):
        assert torch.equal(damaged.read([0])[0][0], FeatureCache(cache).read([0])[0][0])
    shard.unlink()  # another process made room
    assert torch.equal(remote.read([1])[0][0], FeatureCache(cache).read([1])[0][0])
    (remote.path / "index.bin").write_bytes(b"{}")
    assert_equal_reads(FeatureCache(url), FeatureCache(cache))


def test_a_cache_behind_a_url_travels_to_another_process(web: Nginx, cache: Path) -> None:
    remote = pickle.loads(pickle.dumps(FeatureCache(f"{web.url}/caches/a")))
    assert_equal_reads(remote, FeatureCache(cache))


def test_folders_of_a_listing_are_names_only(web: Nginx) -> None:
    (web.www / "odd").mkdir()
    (web.www / "odd" / "index.html").write_text(
        '<a href="../">up</a> <a href="/etc/">abs</a> <a href="good%20one/">x</a> <a href="a/b/">deep</a> <a href="f">f</a>'
    )
    assert open_objects(f"{web.url}/odd").folders() == ["good one"]
    assert open_objects(f"{web.url}/caches").folders() == ["a"]


def test_an_unfinished_cache_is_not_trained_from_a_url(faulty: FaultyServer) -> None:
    faulty.fault = lambda path, body: 404 if path.endswith("manifest.json") else None
    with pytest.raises(CacheError, match="not complete; finish extract or push"):
        FeatureCache(f"{faulty.url}/a")
