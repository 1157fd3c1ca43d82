"""What is said where the copy of a remote cache on this disk is damaged, and what arrives damaged when a cache is opened."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.feature_caches import write_cache
from tests.support.servers import FaultyServer, faulty_server

pytest.importorskip("boto3", reason="no boto3 here: pip install 'evl-cache[remote]'")

from evl_cache.errors import CacheDamaged
from evl_cache.store import FeatureCache
from evl_cache.store.reading import attempts, sample_reader
from evl_cache.store.shards.shard import ShardReader


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setattr(attempts, "_BACKOFF_S", 0.001)
    monkeypatch.setattr(sample_reader, "_NFS_WAIT_S", 0.0)
    monkeypatch.setenv("EVL_CACHE_COPY_ROOT", str(tmp_path / "copies"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    write_cache(tmp_path / "www" / "a")
    with faulty_server(tmp_path / "www") as found:
        yield found


def test_a_copy_that_stays_damaged_is_to_be_removed_and_the_cache_left_alone(
    server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that gives other bytes than it was given."""
    real = ShardReader.read_stacked

    def read_stacked(reader: ShardReader, chunks: Any, outs: Any) -> None:
        real(reader, chunks, outs)
        raise CacheDamaged(
            f"{reader.path} chunk {chunks[0]} does not match its mark; verify and repair the cache"
        )

    monkeypatch.setattr(ShardReader, "read_stacked", read_stacked)
    remote = FeatureCache(f"{server.url}/a")
    with pytest.raises(CacheDamaged) as raised:
        remote.read([0])
    told = str(raised.value)
    assert told.startswith(f"{server.url}/a: its copy on this disk is damaged (")
    assert told.endswith(f"remove {remote.path}, then run the same command again") and "repair" not in told


@pytest.mark.parametrize("name", ["zarr.json", "clips.jsonl", "manifest.json", "done/000001.json"])
def test_what_describes_a_cache_is_asked_for_again_where_it_arrives_damaged(
    server: FaultyServer, name: str
) -> None:
    damaged: list[str] = []

    def once(path: str, body: bytes) -> bytes | int | None:
        if path.endswith("index.bin") and name.startswith("done/"):  # marks are read where there is no index
            return 404
        if not path.endswith(f"a/{name}") or damaged:
            return None
        damaged.append(path)
        return body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]

    server.fault = once
    assert FeatureCache(f"{server.url}/a").is_complete and damaged
