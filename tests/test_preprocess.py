"""From uint8 frames to the tower's input, against a bilinear resize written with loops."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch

from evl_cache.errors import ClipError, UsageError
from evl_cache.preprocess import resize_as_several_threads, spatial_crops

MEAN, STD = (0.48, 0.4, 0.3), (0.2, 0.3, 0.25)


def slow_bilinear(image, height, width):
    """image float (H, W, 3); align_corners=False, no antialias."""
    H, W = image.shape[:2]
    out = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            sy = max((y + 0.5) * H / height - 0.5, 0.0)
            sx = max((x + 0.5) * W / width - 0.5, 0.0)
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, H - 1), min(x0 + 1, W - 1)
            fy, fx = sy - y0, sx - x0
            top = image[y0, x0] * (1 - fx) + image[y0, x1] * fx
            bottom = image[y1, x0] * (1 - fx) + image[y1, x1] * fx
            out[y, x] = top * (1 - fy) + bottom * fy
    return out


def slow_crops(frames, size, crops):
    H, W = frames.shape[1:3]
    if H <= W:
        height, width = size, W * size // H
    else:
        height, width = H * size // W, size
    resized = np.stack([slow_bilinear((f / 255.0 - MEAN) / STD, height, width) for f in frames])
    margin = max(height, width) - size
    starts = [margin // 2] if crops == 1 else [0, margin // 2, margin]
    cut = [resized[:, s : s + size] if H > W else resized[:, :, s : s + size] for s in starts]
    return np.stack(cut).transpose(0, 1, 4, 2, 3)


def picture(T, H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (T, H, W, 3), dtype=np.uint8)


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (12, 20, 8),  # landscape, smaller
        (21, 13, 8),  # portrait, odd sides, odd margin
        (5, 9, 16),  # larger
        (16, 16, 16),  # exact
        (16, 27, 16),  # short side exact
        (11, 11, 7),
        (7, 50, 6),
        (1, 3, 4),
    ],
)
def test_crops_equal_a_loop_over_pixels(height, width, size, crops):
    frames = picture(2, height, width)
    found = spatial_crops(frames, size=size, mean=MEAN, std=STD, crops=crops)
    assert found.dtype == torch.float32 and found.shape == (crops, 2, 3, size, size)
    np.testing.assert_allclose(found.numpy(), slow_crops(frames, size, crops), atol=1e-4)


def test_frames_of_the_exact_size_are_only_normalised():
    frames = picture(3, 10, 10)
    found = spatial_crops(frames, size=10, mean=MEAN, std=STD)[0]
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0
    expected = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(found, expected)


def test_frames_are_normalised_before_they_are_resized():
    # The two orders agree but for rounding: bit for bit, only one of them is the official loader's.
    frames = picture(2, 30, 41)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255.0
    shift, scale = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def resize(x):
        return torch.nn.functional.interpolate(
            x, size=(16, 41 * 16 // 30), mode="bilinear", align_corners=False
        )

    start = (41 * 16 // 30 - 16) // 2
    normalised_first = resize((pixels - shift) / scale)[..., start : start + 16]
    resized_first = ((resize(pixels) - shift) / scale)[..., start : start + 16]
    found = spatial_crops(frames, size=16, mean=MEAN, std=STD)[0]
    assert torch.equal(found, normalised_first)
    assert not torch.equal(found, resized_first)


def test_the_middle_of_three_crops_is_the_single_crop():
    frames = picture(1, 9, 24)
    one = spatial_crops(frames, size=8, mean=MEAN, std=STD, crops=1)
    three = spatial_crops(frames, size=8, mean=MEAN, std=STD, crops=3)
    assert torch.equal(one[0], three[1])


@pytest.mark.parametrize("kind", ["array", "read-only array", "backwards view", "tensor"])
def test_every_kind_of_frames_is_read_and_left_unchanged(kind):
    source = picture(2, 9, 14)
    given = {
        "array": source.copy(),
        "read-only array": source.copy(),
        "backwards view": np.ascontiguousarray(source[::-1])[::-1],
        "tensor": torch.from_numpy(source.copy()),
    }[kind]
    if kind == "read-only array":
        given.flags.writeable = False
    found = spatial_crops(given, size=9, mean=MEAN, std=STD)
    assert torch.equal(found, spatial_crops(source, size=9, mean=MEAN, std=STD))
    found.zero_()
    assert np.array_equal(np.asarray(given), source)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((2, 8, 8, 3), dtype=np.float32),
        np.zeros((2, 8, 8, 3), dtype=np.int64),
        np.zeros((2, 3, 8, 8), dtype=np.uint8),
        np.zeros((8, 8, 3), dtype=np.uint8),
    ],
)
def test_other_shapes_and_dtypes_are_refused(frames):
    with pytest.raises(UsageError, match=r"expected uint8 \(T, H, W, 3\)"):
        spatial_crops(frames, size=8, mean=MEAN, std=STD)


def test_other_numbers_of_crops_means_and_sizes_are_refused():
    frames = picture(1, 8, 8)
    with pytest.raises(UsageError, match="got 2"):
        spatial_crops(frames, size=8, mean=MEAN, std=STD, crops=2)
    with pytest.raises(UsageError, match="three numbers"):
        spatial_crops(frames, size=8, mean=(0.5,), std=STD)
    with pytest.raises(UsageError, match="size 0"):
        spatial_crops(frames, size=0, mean=MEAN, std=STD)


def test_frames_without_pixels_fail_the_clip():
    with pytest.raises(ClipError, match="no pixels"):
        spatial_crops(np.zeros((2, 0, 8, 3), dtype=np.uint8), size=8, mean=MEAN, std=STD)


@pytest.mark.parametrize("size", [16, 64, 65, 224])
@pytest.mark.parametrize(("frames", "height", "width"), [(1, 240, 320), (3, 320, 240), (2, 37, 53)])
def test_one_thread_makes_the_bits_that_several_make(size, frames, height, width):
    pictures = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    crop = partial(spatial_crops, pictures, size=size, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), crops=3)
    torch.set_num_threads(2)
    together = crop()
    torch.set_num_threads(1)

    def alone():
        resize_as_several_threads()
        return crop()

    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(alone).result(), together)
