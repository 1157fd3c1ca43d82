"""A cache that grows in place is read bit for bit as one that was made of all of it at once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evl_cache.store import GROWN_NAME, FeatureCache
from tests.support.grown_caches import AUGMENTED, first_clips, grow, spec_of
from tests.support.store_helpers import extract_small, load_clips

LAYERS, CLIPS, VIEWS = "layers", "clips", "views"
Steps = list[tuple[int, dict[str, Any]]]  # clips, and changes to the spec, of each command


def path_of(steps: Steps, motions: Path, folder: Path) -> tuple[Path, Path]:
    """A cache that grew by these commands, and one that the last of them made at once."""
    clips = load_clips(motions)
    for count, changes in steps:
        grow(first_clips(clips, count), folder / "grown", **changes)
    count, changes = steps[-1]
    listed = first_clips(clips, count)
    extract_small(listed, folder / "whole", spec=spec_of(listed, **changes))
    return folder / "grown", folder / "whole"


def same_bits(grown: FeatureCache, whole: FeatureCache) -> None:
    """Everything that a reader gives is the same."""
    assert grown.spec == whole.spec
    assert list(grown.clips) == list(whole.clips)
    assert np.array_equal(grown.is_valid, whole.is_valid)
    assert np.array_equal(grown.labels, whole.labels)
    assert grown.failures == whole.failures
    assert dict(grown.provenance) == dict(whole.provenance)
    rows = np.flatnonzero(whole.is_valid)[::-1]
    layers = whole.spec.layers
    for wanted in (layers, layers[:1], layers[-1:], layers[::2]):
        mine, theirs = grown.read(rows, layers=wanted), whole.read(rows, layers=wanted)
        for ours, others in zip(mine, theirs, strict=True):
            assert (ours is None) == (others is None)
            for one, other in zip(ours or [], others or [], strict=True):
                assert torch.equal(one, other)
        pairs = zip(grown.read_class_tokens(rows, wanted), whole.read_class_tokens(rows, wanted), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    for row in (int(rows[0]), int(rows[-1])):
        one, other = grown.read_row(row), whole.read_row(row)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


GROWTHS: dict[str, Steps] = {
    "layers": [(7, {"layers": (3,)}), (7, {"layers": (1, 2, 3)})],
    "layers between": [(7, {"layers": (1, 3)}), (7, {"layers": (1, 2, 3)})],
    "clips": [(3, {}), (7, {})],
    "clips of a short block": [(4, {}), (7, {})],
    "both": [(4, {"layers": (3,)}), (7, {"layers": (2, 3)})],
    "layers, then clips, then layers": [
        (3, {"layers": (3,)}),
        (3, {"layers": (2, 3)}),
        (7, {"layers": (2, 3)}),
        (7, {"layers": (1, 2, 3)}),
    ],
    "views": [(4, {"views": AUGMENTED}), (4, {"views": replace(AUGMENTED, train_views=3)})],
    "all three": [
        (3, {"layers": (3,), "views": AUGMENTED}),
        (5, {"layers": (2, 3), "views": replace(AUGMENTED, train_views=4)}),
    ],
}


@pytest.mark.parametrize("name", GROWTHS)
def test_what_grew_is_what_one_extraction_gives(motions: Path, tmp_path: Path, name: str) -> None:
    grown, whole = path_of(GROWTHS[name], motions, tmp_path)
    assert (grown / GROWN_NAME).is_file()
    opened, alone = FeatureCache(grown), FeatureCache(whole)
    same_bits(opened, alone)
    assert opened.is_complete and opened.has_manifest
    opened.check_marks(slice(None))


@pytest.mark.parametrize(
    "storage", [("fp16", "uint8"), ("int8", "none"), ("fp16", "recompute"), ("int8", "recompute")]
)
@pytest.mark.parametrize("name", ["layers", "both"])
def test_what_grew_is_the_same_however_it_is_stored(
    motions: Path, tmp_path: Path, name: str, storage: tuple[str, str]
) -> None:
    tokens, maps = storage
    steps: Steps = [(4, {"layers": (3,)}), (4 if name == "layers" else 7, {"layers": (2, 3)})]
    steps = [(count, changes | {"tokens": tokens, "maps": maps}) for count, changes in steps]
    grown, whole = path_of(steps, motions, tmp_path)
    same_bits(FeatureCache(grown), FeatureCache(whole))
