"""The reader in docs/cache-format.md: it knows nothing of evl-cache, and gives the same numbers to the last bit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from evl_cache.spec import CODECS
from evl_cache.store import FeatureCache
from tests.support.store_helpers import clear_mark, extract_small, load_clips, small_spec, small_tower

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cache-format.md"
MAX_LINES = 40


def source() -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return code


@pytest.fixture(scope="module")
def reader():
    names: dict[str, object] = {}
    exec(compile(source(), str(PAGE), "exec"), names)
    return names


def test_the_reader_is_short_and_imports_nothing_of_ours():
    code = [line for line in source().splitlines() if line.strip()]
    assert len(code) <= MAX_LINES
    assert "evl_cache." not in source() and "import evl" not in source()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "storage",
    [("int8", "uint8", "flat"), ("fp16", "fp16", "flat"), ("int8", "uint8", "folders")],
    ids="+".join,
)
def test_it_reads_every_sample_exactly(reader, motions, tmp_path, codec, storage):
    clips = load_clips(motions)
    options = dict(zip(("tokens", "maps", "chunk_keys"), storage, strict=True))
    spec = small_spec(clips, small_tower(motions), codec=codec, **options)
    extract_small(clips, tmp_path / "cache", spec=spec)
    cache = FeatureCache(tmp_path / "cache")
    (failed,) = np.flatnonzero(~cache.is_valid)
    for sample in np.flatnonzero(cache.is_valid):
        tokens, maps = cache.read([int(sample)])
        assert maps is not None
        theirs = reader["read"](tmp_path / "cache", int(sample))
        np.testing.assert_array_equal(theirs[0], torch.cat(tokens).numpy())
        np.testing.assert_array_equal(theirs[1], torch.cat(maps).numpy())
    with pytest.raises(KeyError, match="failed"):
        reader["read"](tmp_path / "cache", int(failed))
    clear_mark(tmp_path / "cache", spec, 1)
    with pytest.raises(KeyError, match="block 1 is not done"):
        reader["read"](tmp_path / "cache", spec.block_clips * spec.views.per_clip)
