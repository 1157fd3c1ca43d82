"""An index or segment that a stranger made, its digests all right: it ends in no crash and no flood of memory."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evl_cache import FeatureCache
from evl_cache.canonical_json import canonical_json, signed_json
from evl_cache.errors import CacheDamaged
from evl_cache.store import finish_cache, index_cache, verify_cache
from evl_cache.store.format.description import group_document
from evl_cache.store.format.index import believed_index
from evl_cache.store.format.index_head import CLIP, HEAD_NBYTES, SECTIONS
from evl_cache.store.format.known_blocks import KnownBlocks
from evl_cache.store.format.manifest import manifest_digest
from evl_cache.store.reading import reader
from evl_cache.store.shards.metadata import METADATA_NAME
from tests.support.feature_caches import cache_spec, write_cache

Sections = dict[str, bytes]


def remade(path: Path, change: Callable[[dict[str, Any], Sections], object]) -> None:
    """Change head and sections of an index, and give it the digests of what it has now."""
    written = path.read_bytes()
    head = json.loads(written[:HEAD_NBYTES])
    del head["digest"]
    sections = {
        name: written[start : start + nbytes] for name, (start, nbytes, _) in head["sections"].items()
    }
    change(head, sections)
    at = HEAD_NBYTES
    for name in SECTIONS:
        own = "" if name == "rows" else hashlib.sha256(sections[name]).hexdigest()
        head["sections"][name] = [at, len(sections[name]), own]
        at += len(sections[name])
    body = b"".join(sections[name] for name in SECTIONS)
    path.unlink()
    path.write_bytes(signed_json(head)[0].ljust(HEAD_NBYTES) + body)


def clip(name: str, value: int) -> Callable[[dict[str, Any], Sections], object]:
    def change(head: dict[str, Any], sections: Sections) -> None:
        clips = np.frombuffer(sections["clips"], CLIP).copy()
        clips[name][3] = value
        sections["clips"] = clips.tobytes()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda head, sections: head.update(first="abc"),
        lambda head, sections: head.update(first=[1]),
        lambda head, sections: head.update(stop=3.0),
        lambda head, sections: head.pop("stop"),
        lambda head, sections: head.pop("cache_digest"),
        lambda head, sections: head.update(cache_digest={}),
        lambda head, sections: sections.update(texts=b"{{{"),
        lambda head, sections: sections.update(texts=b'["\xff"]'),
        clip("error", -5),
        clip("decoder", -2),
        clip("decoder", 10**6),
    ],
)
def test_an_index_that_no_writer_writes_is_not_believed(
    tmp_path: Path, change: Callable[[dict[str, Any], Sections], object]
) -> None:
    cache = write_cache(tmp_path / "cache", failed=(3, 7))
    good = (cache.path / "index.bin").read_bytes()
    remade(cache.path / "index.bin", change)
    assert believed_index(cache.path, cache.spec) is None
    assert FeatureCache(cache.path).failures == cache.failures
    assert [problem.block for problem in verify_cache(cache.path).problems] == [None]
    finish_cache(cache.path, cache.spec)
    assert (cache.path / "index.bin").read_bytes() == good


def test_the_index_command_makes_an_index_of_the_marks_and_of_nothing_in_a_wrong_one(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", failed=(3, 7))
    good = (cache.path / "index.bin").read_bytes()
    remade(cache.path / "index.bin", clip("error", 0))
    index_cache(cache.path, cache.spec)
    assert (cache.path / "index.bin").read_bytes() == good


def test_a_segment_whose_name_claims_all_blocks_takes_no_memory_for_them(tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    (tmp_path / "segments" / "000000-999999999999.bin").touch()
    known = KnownBlocks(tmp_path, replace(cache_spec(block_clips=1), num_clips=10**8))
    assert known.covering(7) is None and not known._names


def test_a_manifest_of_holes_is_not_read_to_its_end(tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache")
    os.truncate(cache.path / "manifest.json", 8 << 40)
    assert manifest_digest(cache.path, cache.spec) is None


def test_a_list_of_clips_is_proved_before_memory_is_taken_for_as_many_as_an_index_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_cache(tmp_path / "cache")
    described = replace(cache.description, spec=replace(cache.spec, num_clips=10**8))
    (cache.path / METADATA_NAME).write_bytes(canonical_json(group_document(described)))
    monkeypatch.setattr(reader, "BlocksDone", lambda path, spec: pytest.fail("blocks were looked at"))
    with pytest.raises(CacheDamaged, match="13 clips listed, 100000000 described"):
        FeatureCache(cache.path)
