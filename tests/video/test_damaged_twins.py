"""Damaged files by the hundred: what was refused is not served now, unless its pictures are those of the whole twin."""

import json
from pathlib import Path

import numpy as np
import pytest

from evl_cache.video.pool import DecodePool
from tests.support.damaged_files import BadFile, damage, healthy_files
from tests.support.damaged_verdicts import RECORD, VIEWS, digest_of, verdict
from tests.support.video_writing import plain_linear_decode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The healthy files by name."""
    return {path.name: path for path in healthy_files(tmp_path_factory.mktemp("whole"))}


def test_what_was_refused_is_served_only_where_its_pictures_are_whole(
    whole: dict[str, Path], tmp_path: Path
) -> None:
    refused = json.loads(RECORD.read_text())
    twins = {name: np.stack(list(plain_linear_decode(path))) for name, path in whole.items()}
    wrong, compared = {}, 0
    with DecodePool(2, timeout_s=10.0) as pool:
        for file in damage(list(whole.values()), tmp_path / "bad"):
            digest, *views = refused.get(file.path.name, [None])
            if digest != digest_of(file):
                continue
            compared += 1
            for view in views:
                served = verdict(pool, file.path, VIEWS[view])
                if isinstance(served, str):
                    continue
                twin = twins.get(_twin_of(file))
                if twin is None or not _are_whole(served.header.distinct, served.frames, twin):
                    wrong[f"{file.path.name}, {view}"] = (
                        f"frames {served.header.distinct.tolist()} are served"
                    )
    assert wrong == {}
    if compared < 100:
        pytest.skip(
            f"this PyAV encodes other files than those whose verdicts were recorded, all but {compared}"
        )


def _twin_of(file: BadFile) -> str:
    return f"{file.path.stem.removesuffix(file.path.stem[-3:]).removesuffix(file.kind).rstrip('-')}{file.path.suffix}"


def _are_whole(numbers: np.ndarray, pictures: np.ndarray, twin: np.ndarray) -> bool:
    return bool(numbers.max() < len(twin)) and np.array_equal(pictures, twin[numbers])


def test_every_damaged_file_has_its_twin(whole: dict[str, Path], tmp_path: Path) -> None:
    bad = damage(list(whole.values()), tmp_path / "bad")
    assert {_twin_of(file) for file in bad if file.kind != "odd"} == set(whole)
