"""What decoders make of numbered files: right, refused with a reason, or what is wrong."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from evl_cache.errors import ClipError
from evl_cache.sampling import strided_test_views, tsn_test_views
from evl_cache.video import Choose, DecodedClip
from tests.support.numbered_films import Unreadable, number_shown
from tests.support.video_corpus import NumberedFile
from tests.support.video_surgery import as_coded, shown
from tests.support.video_writing import plain_linear_decode

RIGHT, REFUSED = "right", "refused: "
# A decoder may convert colours a little differently; a picture that was concealed in part is further off.
_MOST_DIFFERENCE = 3.0


def every_seventh(count: int) -> np.ndarray:
    """Return every seventh frame and the last, int64 (1, T)."""
    return np.unique([*range(0, count, 7), count - 1])[None]


VIEWS: dict[str, Choose] = {
    "centre": lambda count: strided_test_views(count, frames=8, stride=4),
    "three views": lambda count: strided_test_views(count, frames=4, stride=2, views=3),
    "tsn": lambda count: tsn_test_views(count, frames=8),
    "every seventh": every_seventh,
    "last": lambda count: np.array([[count - 1]]),
}


@dataclass(frozen=True, kw_only=True)
class Linear:
    """What a decode of a file from its start shows.

    Attributes:
        file: of the corpus.
        pictures: uint8 (N, H, W, 3), as they are to be shown.
    """

    file: NumberedFile
    pictures: np.ndarray

    @classmethod
    def of(cls, file: NumberedFile) -> "Linear":
        """Decode a file from its start."""
        return cls(
            file=file, pictures=shown(np.stack(list(plain_linear_decode(file.path))), file.orientation)
        )

    def verdict(self, decode: Callable[[], DecodedClip], choose: Choose) -> tuple[str, np.ndarray | None]:
        """Return `RIGHT`, `REFUSED` with the reason, or what is wrong; and the pictures that were served."""
        try:
            clip = decode()
        except ClipError as error:
            return f"{REFUSED}{error}", None
        return self._served(clip, choose), clip.frames

    def _served(self, clip: DecodedClip, choose: Choose) -> str:
        numbers = self.file.numbers
        if clip.header.num_frames_in_file != len(numbers):
            return f"counts {clip.header.num_frames_in_file} frames; expected {len(numbers)}"
        wanted = np.unique(choose(len(numbers)))
        if not np.array_equal(clip.header.distinct, wanted):
            return f"frames {clip.header.distinct.tolist()}; expected {wanted.tolist()}"
        if clip.frames.shape != (len(wanted), *self.pictures.shape[1:]):
            return f"frames {clip.frames.shape}; expected {(len(wanted), *self.pictures.shape[1:])}"
        try:
            seen = [number_shown(as_coded(picture, self.file.orientation)) for picture in clip.frames]
        except Unreadable as error:
            return f"a frame cannot be read: {error}"
        if seen != (expected := [numbers[at] for at in wanted]):
            return f"shows {seen}; expected {expected}"
        apart = np.abs(clip.frames.astype(np.int16) - self.pictures[wanted]).mean(axis=(1, 2, 3))
        return (
            RIGHT if apart.max() <= _MOST_DIFFERENCE else f"pictures differ by {apart.max():.1f} on average"
        )


def is_served(verdict: str) -> bool:
    """Whether frames came, right or wrong."""
    return not verdict.startswith(REFUSED)


def linear_decodes(corpus: list[NumberedFile]) -> Iterator[Linear]:
    """Decode every file from its start, one at a time: all of them would fill the memory."""
    return (Linear.of(file) for file in corpus)
