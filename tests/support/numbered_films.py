"""Films whose frames show their own number, so that a test sees which frame a decoder gave.

The number stands in the top row as 16 black and white blocks, the most significant first, over a moving texture.
H and W are pixels of the picture.
"""

from functools import lru_cache

import numpy as np

BLOCKS, BLOCK_HEIGHT = 16, 16
HEIGHT, WIDTH = 96, 128  # of most films; 8 pixels a block
_DARKEST_WHITE, _BRIGHTEST_BLACK = 170, 85


class Unreadable(Exception):
    """A picture's blocks are neither black nor white: it is damaged, or mixed from two frames."""


def numbered_picture(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a picture that shows a number, uint8 (H, W, 3), RGB. Its quadrants differ, so turns and mirrors show."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    waves = (
        0.11 * x + 0.07 * y + 0.21 * number,
        0.05 * x - 0.09 * y + 0.33 * number,
        0.08 * (x + y) - 0.27 * number,
    )
    picture = np.stack([128 + 60 * np.sin(wave) for wave in waves], axis=-1).astype(np.uint8)
    top, left = height // 2 + number % (height // 4), (3 * number) % (width - 20)
    picture[top : top + 16, left : left + 16] = (230, 50, 40)
    size = width // BLOCKS
    for block in range(BLOCKS):
        picture[:BLOCK_HEIGHT, block * size : (block + 1) * size] = 235 * (number >> (BLOCKS - 1 - block) & 1)
    return picture


@lru_cache(maxsize=4096)
def cached_picture(number: int, height: int, width: int) -> np.ndarray:
    """Return `numbered_picture`; callers must not change it."""
    return numbered_picture(number, height=height, width=width)


def number_shown(picture: np.ndarray) -> int:
    """Return the number that a picture shows, upright, uint8 (H, W, 3). Raises: Unreadable rather than guess."""
    size = picture.shape[1] // BLOCKS
    number = 0
    for block in range(BLOCKS):
        inner = picture[4 : BLOCK_HEIGHT - 4, block * size + size // 4 : (block + 1) * size - size // 4]
        level = float(inner.mean())
        if _BRIGHTEST_BLACK < level < _DARKEST_WHITE:
            raise Unreadable(f"block {block} is {level:.0f}; expected black (0) or white (235)")
        number = 2 * number + (level >= _DARKEST_WHITE)
    return number


def numbers_shown(pictures: np.ndarray) -> list[int]:
    """Return the number that each of some pictures shows, uint8 (some, H, W, 3). Raises: Unreadable."""
    return [number_shown(picture) for picture in pictures]
