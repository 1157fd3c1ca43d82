"""Long films whose frames show their numbers, and what a segment of one must be, worked out the obvious way.

A film is 96 pixels square, the size of the tower's image, so that a sample shows whole frames, and their numbers.
"""

import json
import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from evl_cache.clips import Clip, ClipList, Segment
from evl_cache.extract.prepare import PreparedClip
from evl_cache.rendered import DEMO_CLASSES
from evl_cache.spec import TowerSpec, ViewSpec
from tests.support.numbered_films import numbers_shown
from tests.support.store_helpers import load_clips, make_clips
from tests.support.video_writing import Film, Streams, write_streams

SIDE = 96
MEAN, STD = (0.5, 0.4, 0.3), (0.3, 0.2, 0.25)


def tower() -> TowerSpec:
    """A tower that exists by its name only: of the size of the films."""
    return TowerSpec(
        model="none",
        pretrained="none",
        weights_sha256="0" * 64,
        image_size=SIDE,
        patch_size=16,
        width=64,
        blocks=3,
        heads=2,
        quick_gelu=True,
        mean=MEAN,
        std=STD,
    )


@dataclass(frozen=True, kw_only=True)
class LongFilm:
    """A film, how it is written, and when its frames are shown.

    Attributes:
        name: of the file, whose suffix is the container.
        film: what it shows.
        start: as `Streams` has it.
        tick: of the container: times are rounded to it; None where it holds them exactly.
        container: as `Streams` has it.
    """

    name: str
    film: Film
    start: int = 0
    tick: Fraction | None = None
    container: str | None = None

    def write(self, folder: Path) -> Path:
        """Write the file."""
        path = folder / self.name
        write_streams(path, Streams(film=self.film, start=self.start, container=self.container))
        return path

    @property
    def seconds(self) -> list[Fraction]:
        """When each frame is shown, exactly, since the first one is."""
        ticks = self.film.times or range(self.film.frames)
        times = [(tick + self.start) / self.film.rate for tick in ticks]
        if self.tick is not None:
            times = [round(time / self.tick) * self.tick for time in times]
        return [time - times[0] for time in times]

    def frames_of(self, segment: Segment) -> list[int]:
        """The frames of a segment, by the rule as it is written: shown from its start on, and before its end."""
        where = self.seconds if segment.unit == "seconds" else list(range(self.film.frames))
        # Decimals as a table has them: 1.001 is 1001/1000, whatever the nearest double. Six places are rounded.
        rounding = Fraction(1, 10**6) if segment.unit == "seconds" else 0
        low = Fraction(repr(segment.start)) - rounding
        high = None if segment.end is None else Fraction(repr(segment.end)) - rounding
        return [number for number, at in enumerate(where) if low <= at and (high is None or at < high)]


def square(**changes: object) -> Film:
    """A film of the tower's size."""
    return Film(**{"height": SIDE, "width": SIDE, **changes})  # type: ignore[arg-type]


def plain_views(frames: list[int], views: ViewSpec) -> list[list[int]]:
    """Test views of a clip of these frames, strided, as section 4 of the paper has them."""
    span = views.stride * (views.frames - 1) + 1  # type: ignore[operator]
    slack = max(len(frames) - span, 0)
    count = views.temporal_views
    starts = [slack // 2] if count == 1 else [round(slack * view / (count - 1)) for view in range(count)]
    return [
        [frames[min(start + views.stride * t, len(frames) - 1)] for t in range(views.frames)]  # type: ignore[operator]
        for start in starts
    ]


def shown_by(prepared: PreparedClip) -> list[list[int]]:
    """The numbers that the frames of a clip's samples show."""
    assert prepared.samples is not None, prepared.record.error
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = ((prepared.samples * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return [numbers_shown(np.asarray(view.permute(0, 2, 3, 1))) for view in pixels]


def clip_of(path: Path, segment: Segment | None, *, label: int = 0) -> Clip:
    """A clip as a table makes it."""
    name = path.name
    clip_id = name if segment is None else f"{name}#{segment}"
    return Clip(id=clip_id, path=name, label=label, split="train", segment=segment)


def films_of(count: int, frames: int) -> list[LongFilm]:
    """Films of several containers, codecs and rates, in turn."""
    kinds = (
        {"suffix": "mp4", "x264": (("bframes", 2),)},
        {"suffix": "mp4", "rate": Fraction(24)},
        {"suffix": "avi", "encoder": "mpeg4", "options": (("bf", "2"),)},
        {"suffix": "ts", "x264": (("bframes", 2),)},
        {"suffix": "mkv", "rate": Fraction(30)},
    )
    films = []
    for number in range(count):
        kind = dict(kinds[number % len(kinds)])
        suffix = kind.pop("suffix")
        first = 211 * number  # of each film other numbers
        film = square(frames=frames, first=first, **kind)
        tick = Fraction(1, 1000) if suffix == "mkv" else None
        films.append(LongFilm(name=f"film{number:02d}.{suffix}", film=film, tick=tick))
    return films


def segmented(folder: Path, films: list[LongFilm], count: int, *, seed: int) -> ClipList:
    """Write films, and a list of segments of them: films one after the other, both units, overlapping; one is beyond its film."""
    make_clips(folder, 1)
    (folder / "00.mp4").unlink()
    rng, clips = random.Random(seed), {}
    for film in films:
        path = film.write(folder)
        length = film.film.frames
        while sum(clip.path == path.name for clip in clips.values()) < count // len(films):
            start = rng.randrange(length - 10)
            frames = rng.randrange(8, 30)
            if rng.random() < 0.5:
                segment = Segment(unit="frames", start=start, end=start + frames)
            else:
                at = round(float(start / film.film.rate), 3) + 0.002
                segment = Segment(
                    unit="seconds", start=round(at, 3), end=round(at + float(frames / film.film.rate), 3)
                )
            clip = clip_of(path, segment, label=rng.randrange(len(DEMO_CLASSES)))
            clips[clip.id] = clip
    last = next(reversed(clips))
    beyond = clip_of(folder / clips[last].path, Segment(unit="seconds", start=1e4, end=1e4 + 5))
    listed = [*list(clips.values())[:-1], beyond]
    (folder / "list.jsonl").write_text("".join(json.dumps(clip.to_json()) + "\n" for clip in listed))
    return load_clips(folder)
