"""What a Zarr v3 reader that knows nothing of evl-cache gets, and how docs/cache-format.md tells it to go on.

Two readers: zarr-python and tensorstore. Values are put together here by the words of that page, with numpy.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from numpy.typing import NDArray

from evl_cache.spec import CODECS
from evl_cache.store import FeatureCache, array_layouts
from tests.support.store_helpers import BROKEN, clear_mark, extract_small, load_clips, small_spec, small_tower

tensorstore = pytest.importorskip("tensorstore")

Read = dict[str, tuple[NDArray[Any], bool]]  # values, and whether they are frame differences
STORAGES = [("int8", "uint8", "flat"), ("fp16", "fp16", "flat"), ("int8", "uint8", "folders")]


def with_zarr(cache: Path) -> Read:
    group = zarr.open_group(cache, mode="r")
    assert group.attrs["evl_cache"]["format_version"] in (1, 2)
    found: Read = {}
    for metadata in sorted(cache.glob("*/zarr.json")):  # listing the group warns of our other files
        array = group[metadata.parent.name]
        assert isinstance(array, zarr.Array)
        found[array.basename] = (np.asarray(array[...]), bool(array.attrs["evl_cache"]["frame_difference"]))
    return found


def with_tensorstore(cache: Path) -> Read:
    found: Read = {}
    for metadata in sorted(cache.glob("*/zarr.json")):
        store = {"driver": "file", "path": str(metadata.parent)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, read=True).result()
        attributes = array.spec().to_json(include_defaults=True)["metadata"]["attributes"]
        found[metadata.parent.name] = (
            np.asarray(array.read().result()),
            attributes["evl_cache"]["frame_difference"],
        )
    return found


@pytest.fixture(params=[with_zarr, with_tensorstore], ids=["zarr-python", "tensorstore"])
def read(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """Caches made so far, by storage, keys and codec."""
    return {}


@pytest.fixture(params=STORAGES, ids="+".join)
def storage(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def cache(
    made: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
    motions: Path,
    storage: tuple[str, str, str],
    codec: str,
) -> Path:
    key = (*storage, codec)
    if key not in made:
        made[key] = tmp_path_factory.mktemp("foreign") / "cache"
        clips = load_clips(motions)
        options = dict(zip(("tokens", "maps", "chunk_keys"), storage, strict=True))
        extract_small(clips, made[key], spec=small_spec(clips, small_tower(motions), codec=codec, **options))
    return made[key]


def codes(found: Read, name: str) -> NDArray[Any]:
    """Stored values; where they are differences to the frame before, summed along T modulo 256.

    tokens: (samples, layers, T, 1+P, C). No other array is stored so.
    """
    values, differenced = found[name]
    if not differenced:
        return values
    assert name == "tokens"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        summed: NDArray[Any] = np.cumsum(values.view(np.uint8), axis=2, dtype=np.uint8)
    return summed.view(np.int8)


def tokens_of(found: Read) -> NDArray[np.float32]:
    """(samples, layers, T, 1+P, C) as docs/cache-format.md says."""
    if "token_affine" not in found:
        return codes(found, "tokens").astype(np.float32)
    affine = codes(found, "token_affine")
    scale, offset = affine[:, :, 0, None, None, :], affine[:, :, 1, None, None, :]
    in_channel = codes(found, "tokens").astype(np.float32) * scale + offset
    return in_channel * codes(found, "token_scale").astype(np.float32)[..., None]


def maps_of(found: Read) -> NDArray[np.float32]:
    """(samples, layers, 2, T-1, P, P) as docs/cache-format.md says."""
    if "map_scale" not in found:
        return codes(found, "maps").astype(np.float32)
    roots = codes(found, "maps").astype(np.float32) / 255
    return roots**2 * codes(found, "map_scale").astype(np.float32)[..., None]


def test_every_array_reads_back_equal(cache: Path, read: Any) -> None:
    opened = FeatureCache(cache)
    found = read(cache)
    assert set(found) == set(array_layouts(opened.spec))
    for sample in np.flatnonzero(opened.is_valid):
        row = opened.read_row(int(sample))
        for name, expected in row.items():
            values = codes(found, name)[sample]
            assert values.dtype == expected.dtype
            np.testing.assert_array_equal(values, expected, err_msg=name)


def test_values_are_those_that_our_reader_gives(cache: Path, read: Any) -> None:
    opened = FeatureCache(cache)
    valid = np.flatnonzero(opened.is_valid)
    tokens, maps = opened.read(valid.tolist())
    assert maps is not None
    found = read(cache)
    for theirs, ours in ((tokens_of(found), tokens), (maps_of(found), maps)):
        expected = torch.stack(ours, dim=1).numpy()
        np.testing.assert_allclose(theirs[valid], expected, rtol=1e-5, atol=1e-6)


def test_a_failed_row_is_nan_and_no_other(cache: Path, read: Any) -> None:
    opened = FeatureCache(cache)
    (failed,) = np.flatnonzero(~opened.is_valid)
    assert opened.clips[failed].id == BROKEN
    found = read(cache)
    for values in (tokens_of(found), maps_of(found), codes(found, "class_tokens")):
        assert np.isnan(values[failed]).all()
        assert np.isfinite(values[opened.is_valid]).all()


@pytest.mark.parametrize(("storage", "codec"), [(STORAGES[0], "default")], indirect=True)
def test_a_block_that_is_not_done_is_nan_too(cache: Path, read: Any, made: dict[Any, Path]) -> None:
    made.clear()  # this test spoils its cache
    spec = FeatureCache(cache).spec
    clear_mark(cache, spec, 1)
    found = read(cache)
    for values in (tokens_of(found), maps_of(found)):
        assert np.isnan(values[3:6]).all()
        assert np.isfinite(values[:3]).all()
