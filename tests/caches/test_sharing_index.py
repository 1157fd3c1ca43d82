"""The index of a cache that is pushed and pulled: it goes along, saves requests, and one of another cache never stays."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.feature_caches import write_cache
from tests.support.servers import KEYS, s3_server
from tests.support.store_helpers import differences, tree

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.caches.share import pull, push
from evl_cache.errors import CacheError
from evl_cache.store import FeatureCache, open_objects
from evl_cache.store.format import known_blocks
from evl_cache.store.format.manifest import read_manifest
from evl_cache.store.objects.s3_objects import S3Objects

BLOCKS = 24


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as url:
        yield url


@pytest.fixture
def bucket(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    return "s3://lab"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("caches") / "a"
    write_cache(path, labels=[i % 3 for i in range(BLOCKS)], failed=(2, 9), block_clips=1)
    shutil.rmtree(path / "locks")
    return path


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same cache, but for the features; two clips more have failed."""
    path = tmp_path_factory.mktemp("caches") / "b"
    failed = (2, 9, 15, 20)
    write_cache(path, labels=[i % 3 for i in range(BLOCKS)], failed=failed, block_clips=1, seed=3)
    shutil.rmtree(path / "locks")
    return path


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Requests by name; those for parts of a list by its directory."""
    found: Counter[str] = Counter()
    real = S3Objects._ask

    def told(self, name, action):  # type: ignore[no-untyped-def]
        found[name.partition("/")[0]] += 1
        return real(self, name, action)

    monkeypatch.setattr(S3Objects, "_ask", told)
    return found


def has(url: str, name: str) -> bytes | None:
    try:
        return open_objects(url).get(name, most_nbytes=1 << 30)
    except FileNotFoundError:
        return None


def test_a_bucket_gets_the_index_and_opens_by_it(
    bucket: str, cache: Path, requests: Counter[str], tmp_path: Path
) -> None:
    url = f"{bucket}/opens/a"
    push(cache, url)
    assert has(url, "index.bin") == (cache / "index.bin").read_bytes()
    requests.clear()
    remote = FeatureCache(url)
    assert requests == dict.fromkeys(("zarr.json", "manifest.json", "clips.jsonl", "grown.json"), 1) | {
        "index.bin": 2
    }
    assert remote.is_complete and remote.failures == FeatureCache(cache).failures
    requests.clear()
    assert FeatureCache(url).fingerprint == remote.fingerprint
    assert requests.total() == 3
    requests.clear()
    assert push(cache, url).blocks_moved == 0
    assert requests["done"] == 0 and has(url, "index.bin") is not None


def test_an_index_is_added_to_a_bucket_and_a_damaged_one_is_not(
    bucket: str, cache: Path, tmp_path: Path
) -> None:
    url, source = f"{bucket}/added/a", Path(shutil.copytree(cache, tmp_path / "a"))
    right = (source / "index.bin").read_bytes()
    (source / "index.bin").write_bytes(right[:5000] + bytes([right[5000] ^ 1]) + right[5001:])
    push(source, url)
    assert has(url, "index.bin") is None and FeatureCache(url).is_complete
    (source / "index.bin").write_bytes(right)
    assert push(source, url).blocks_moved == 0
    assert has(url, "index.bin") == right
    (source / "index.bin").unlink()  # that there is whole
    push(source, url)
    assert has(url, "index.bin") == right


def test_a_push_over_a_complete_cache_asks_for_no_mark_that_is_the_same(
    bucket: str, cache: Path, other: Path, requests: Counter[str], tmp_path: Path
) -> None:
    url = f"{bucket}/over/a"
    push(other, url)
    spec = FeatureCache(cache).spec
    ours, theirs = read_manifest(cache, spec).files, read_manifest(other, spec).files
    marks = [name for name in ours if name.startswith("done/")]
    differ = sum(ours[name] != theirs[name] for name in marks)
    requests.clear()
    assert push(cache, url).blocks_moved == differ
    assert requests["done"] == 3 * differ  # looked at, removed, sent
    assert has(url, "index.bin") == (cache / "index.bin").read_bytes()
    half = Path(shutil.copytree(other, tmp_path / "half"))
    shutil.copy(cache / "done" / "000001.json", half / "done" / "000001.json")
    with pytest.raises(CacheError):  # the mark is not that of the manifest
        push(half, url)
    assert has(url, "index.bin") == (cache / "index.bin").read_bytes()


def test_the_index_of_another_cache_does_not_stay(
    bucket: str, cache: Path, other: Path, tmp_path: Path
) -> None:
    url, source = f"{bucket}/stays/a", Path(shutil.copytree(cache, tmp_path / "a"))
    push(other, url)
    (source / "index.bin").unlink()
    push(source, url)
    assert has(url, "index.bin") is None
    assert FeatureCache(url).failures == FeatureCache(cache).failures


@pytest.mark.parametrize("last", ["index.bin", "manifest.json"])
def test_a_push_that_ends_at_its_last_files_goes_on(
    bucket: str, cache: Path, other: Path, requests: Counter[str], monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    url = f"{bucket}/ends/{last}"
    push(other, url)
    real = S3Objects.put

    def put(self, name, data):  # type: ignore[no-untyped-def]
        if name == last:
            raise KeyboardInterrupt
        real(self, name, data)

    with monkeypatch.context() as patched:
        patched.setattr(S3Objects, "put", put)
        with pytest.raises(KeyboardInterrupt):
            push(cache, url)
    assert has(url, "manifest.json") is None
    assert has(url, "index.bin") == (None if last == "index.bin" else (cache / "index.bin").read_bytes())
    with pytest.raises(CacheError, match="not complete"):
        FeatureCache(url)
    requests.clear()
    assert push(cache, url).blocks_moved == 0
    assert has(url, "index.bin") == (cache / "index.bin").read_bytes()
    assert FeatureCache(url).fingerprint == FeatureCache(cache).fingerprint


@pytest.mark.parametrize("kind", ["whole", "damaged", "cut off", "none", "of another cache"])
def test_a_pulled_cache_has_its_own_index_for_which_no_mark_is_parsed_where_the_source_has_one(
    cache: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    source = Path(shutil.copytree(cache, tmp_path / "a"))
    content = (source / "index.bin").read_bytes()
    if kind == "damaged":
        (source / "index.bin").write_bytes(content[:4096] + bytes(300) + content[4396:])
    elif kind == "cut off":
        (source / "index.bin").write_bytes(content[: len(content) // 2])
    elif kind == "none":
        (source / "index.bin").unlink()
    elif kind == "of another cache":
        shutil.copy(other / "index.bin", source / "index.bin")
    parsed: list[int] = []
    real = known_blocks.parse_mark
    monkeypatch.setattr(known_blocks, "parse_mark", lambda *given: parsed.append(1) or real(*given))
    pull(str(source), str(tmp_path / "b"))
    found = {name: data for name, data in tree(tmp_path / "b").items() if not name.startswith("locks/")}
    assert differences(found, tree(cache)) == []
    assert len(parsed) == {"whole": 0, "damaged": 1}.get(kind, BLOCKS) or kind == "damaged"
    assert pull(str(source), str(tmp_path / "b")).blocks_moved == 0
