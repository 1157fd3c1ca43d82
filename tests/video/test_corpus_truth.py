"""The corpus is what it says it is: files by the hundred, and a plain decode from the start shows the numbers drawn."""

import numpy as np
import pytest

from tests.support.numbered_films import Unreadable, number_shown, numbered_picture, numbers_shown
from tests.support.video_corpus import NumberedFile
from tests.support.video_surgery import ORIENTATIONS, as_coded, shown
from tests.support.video_writing import plain_linear_decode


def test_the_corpus_covers_every_axis(corpus: list[NumberedFile]) -> None:
    assert len(corpus) >= 150
    suffixes = {file.path.suffix for file in corpus}
    assert suffixes >= set(".mp4 .mov .mkv .webm .avi .ts .m2ts .mpg .vob .flv .wmv .3gp".split())
    assert {file.orientation for file in corpus} == set(ORIENTATIONS)


def test_a_plain_decode_from_the_start_shows_the_numbers_that_were_drawn(corpus: list[NumberedFile]) -> None:
    wrong = {}
    for file in corpus:
        seen = numbers_shown(np.stack(list(plain_linear_decode(file.path))))
        if tuple(seen) != file.numbers:
            wrong[file.path.name] = seen
    assert wrong == {}


def test_a_number_is_read_or_refused() -> None:
    pictures = [numbered_picture(number) for number in (0, 1, 7, 299, 40_000)]
    assert numbers_shown(np.stack(pictures)) == [0, 1, 7, 299, 40_000]
    with pytest.raises(Unreadable, match="expected black"):
        number_shown((pictures[1] // 2 + pictures[0] // 2).astype(np.uint8))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_can_be_undone(orientation: str) -> None:
    coded = numbered_picture(77)
    turned = shown(coded, orientation)
    assert np.array_equal(as_coded(turned, orientation), coded)
    assert orientation == "upright" or turned.shape != coded.shape or not np.array_equal(turned, coded)
