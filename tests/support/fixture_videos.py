"""The videos of tests/fixtures/videos: files that people really have, and what must be served of each."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evl_cache.video import DecodedClip
from tests.support.numbered_films import Unreadable, number_shown
from tests.support.video_surgery import as_coded

FOLDER = Path(__file__).parent.parent / "fixtures" / "videos"
COLON = "2023-10-01T12:30:05.mp4"  # kept under another name, as not every file system takes this one
# First picture that is damaged, as a decode from the start by one thread says: views that end before it are whole.
_DAMAGED_FROM = {"c03_flip01.mp4": 33, "c03_flip12.mp4": 38, "c03_flip17.mp4": 46}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What must be served of one file.

    Attributes:
        name: of the file.
        accepted: whether it must be served; None: it may be refused as well.
        frame_count: what a decode from the start shows.
        views: frame numbers, and the numbers that they show, by the view's name.
        other_numbers: what the frames of `centre` may show instead: those of another stream.
        orientation: of the display matrix.
        twin: name of the undamaged file that has the same pictures.
    """

    name: str
    accepted: bool | None
    frame_count: int
    views: dict[str, tuple[list[int], list[int]]]
    other_numbers: list[int] | None
    orientation: str
    twin: str | None

    def choose(self, view: str) -> "Wanted":
        """Return the choice of a view's frames."""
        return Wanted(self.views[view][0])

    def must_be_refused(self, view: str) -> bool:
        """Whether a view wants pictures that are damaged, or that such ones come before."""
        return self.accepted is False and max(self.views[view][0]) >= _DAMAGED_FROM[self.name]

    def wrong(self, clip: DecodedClip, view: str) -> str | None:
        """Return what is wrong with what was served, or None."""
        indices, numbers = self.views[view]
        if clip.header.num_frames_in_file != self.frame_count:
            return f"counts {clip.header.num_frames_in_file} frames; expected {self.frame_count}"
        if clip.header.indices.ravel().tolist() != indices:
            return f"frames {clip.header.indices.tolist()}; expected {indices}"
        try:
            shown = [number_shown(as_coded(picture, self.orientation)) for picture in clip.frames]
        except Unreadable as error:
            return f"a frame cannot be read: {error}"
        if shown == numbers or (self.other_numbers is not None and shown[0] >= 1000):
            return None
        return f"shows {shown}; expected {numbers}"


@dataclass(frozen=True)
class Wanted:
    """Chooses frames by number, whatever a file has; those that it has not become its last."""

    numbers: list[int]

    def __call__(self, count: int) -> np.ndarray:
        return np.minimum([self.numbers], max(0, count - 1))


def expected_of_all() -> list[Expected]:
    """Return what must happen with each file."""
    return [
        _expected(name, told) for name, told in json.loads((FOLDER / "expected.json").read_text()).items()
    ]


def _expected(name: str, told: dict) -> Expected:
    views = {"centre": (told["indices"], told["source_numbers"])} if "indices" in told else {}
    if "spread_indices" in told:
        views["spread"] = (told["spread_indices"], told["spread_source_numbers"])
    return Expected(
        name=name,
        accepted=None if told["accepted"] == "or refused" else told["accepted"],
        frame_count=told.get("frame_count", 0),
        views=views or {"centre": ([*range(15, 44, 4)], []), "all": ([*range(60)], [])},
        other_numbers=told.get("source_numbers_if_stream_0"),
        orientation=told.get("to_be_shown", "upright").split()[0],
        twin=told.get("same_pictures_as"),
    )


def copy_fixture_videos(folder: Path) -> list[Path]:
    """Copy all videos, under the names that they are meant to have, but those that are twins of others."""
    copied = []
    for expected in expected_of_all():
        copied.append(folder / expected.name)
        shutil.copy(FOLDER / expected.name.replace(":", "_"), copied[-1])
    for twin in FOLDER.glob("ref_*"):
        shutil.copy(twin, folder / twin.name)
    return copied
