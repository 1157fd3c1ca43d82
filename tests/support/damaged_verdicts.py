"""Which of the damaged files a decoding refuses, by view; `python -m tests.support.damaged_verdicts` writes them down.

tests/fixtures/damaged_verdicts.json holds those of the code before frames were proved, so that no later code serves a
clip that was refused, unless the pictures asked for are whole.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.sampling import strided_test_views, tsn_test_views
from evl_cache.video import Choose, DecodedClip, collect
from evl_cache.video.pool import DecodePool
from tests.support.damaged_files import BadFile, damage, healthy_files

RECORD = Path(__file__).parent.parent / "fixtures" / "damaged_verdicts.json"
VIEWS: dict[str, Choose] = {
    "spread": lambda count: np.minimum([[0, 9, 18, 23]], max(0, count - 1)),
    "centre": lambda count: strided_test_views(count, frames=4, stride=2),
    "tsn": lambda count: tsn_test_views(count, frames=6),
    "all": lambda count: strided_test_views(count, frames=max(1, count), stride=1),
}


def digest_of(file: BadFile) -> str:
    """Return what tells whether a file is that of the record: encoders, libx265 even from run to run, write others."""
    return hashlib.sha256(file.path.read_bytes()).hexdigest()[:16] if file.kind != "odd" else "odd"


def verdict(pool: DecodePool, path: Path, choose: Choose) -> DecodedClip | str:
    """Return what a file serves, or why it is refused, without the folder."""
    try:
        return collect(pool.frames(path, choose))
    except ClipError as error:
        return str(error).replace(f"{path.parent}/", "")


def record(folder: Path) -> dict[str, list[str]]:
    """Decode all damaged files, and return of each that is refused its digest and the views by which it is."""
    refused: dict[str, list[str]] = {}
    with DecodePool(2, timeout_s=10.0) as pool:
        for file in damage(healthy_files(folder), folder / "bad"):
            for view, choose in VIEWS.items():
                if isinstance(verdict(pool, file.path, choose), str):
                    refused.setdefault(file.path.name, [digest_of(file)]).append(view)
                if file.kind == "odd":
                    break  # no view can be read
    return refused


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        RECORD.write_text(json.dumps(record(Path(scratch)), sort_keys=True).replace("], ", "],\n") + "\n")
