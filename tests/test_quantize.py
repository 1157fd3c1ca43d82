"""Quantisation of tokens and maps: against a loop written from the module's two formulas, and by error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from benchmarks.outlier_features import outlier_features, softmax_maps, worst_channel_error
from evl_cache import quantize
from evl_cache.cpu_codes import encoding, is_compiled
from evl_cache.errors import ClipError, UsageError
from evl_cache.quantize import (
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
    frame_difference,
    frame_sum_,
    quantize_maps,
    quantize_tokens,
    to_float16,
)
from tests.support.plain_codes import plain_map_codes, plain_token_codes


def decode(stored: QuantizedTokens) -> Tensor:
    return dequantize_tokens(stored.codes, stored.affine, stored.scale)


def small_features(**sizes: int) -> Tensor:
    sizes = {"clips": 2, "layers": 2, "frames": 3, "patches": 5, "channels": 16, "seed": 0} | sizes
    return outlier_features(**sizes).tokens


def naive_token_scales(item: np.ndarray) -> np.ndarray:
    """The per-token scale of one (T, N, C) float64 item, from its definition."""
    values = np.abs(item.reshape(-1, item.shape[-1]))
    sizes = []
    typical = [max(np.mean(np.sqrt(c)) ** 2, c.max() / 256) for c in values.T]
    for token in values:
        shares = [v / t if t > 0 else 0.0 for v, t in zip(token, typical, strict=True)]
        sizes.append(np.mean(np.power(shares, 4)) ** 0.25)
    usual = sorted(sizes)[(len(sizes) - 1) // 2]
    ratios = [s / usual if usual > 0 and s / usual > 1.5 else 1.0 for s in sizes]
    return np.array(ratios, dtype=np.float16).reshape(item.shape[:-1])


def naive_codes(item: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and affine of one (T, N, C) float64 item, channel by channel."""
    codes, affine = np.zeros(item.shape, np.int64), np.zeros((2, item.shape[-1]))
    for channel in range(item.shape[-1]):
        scaled = item[..., channel] / scales
        step = (scaled.max() - scaled.min()) / 255
        affine[:, channel] = step, scaled.min() + 128 * step
        codes[..., channel] = np.rint((scaled - scaled.min()) / step) - 128 if step else -128
    return codes, affine


def test_codes_agree_with_a_loop_over_tokens_and_channels() -> None:
    tokens = small_features()
    stored = quantize_tokens(tokens)
    assert stored.scale is not None and (stored.scale > 1).any() and (stored.scale == 1).any()
    for clip, layer in np.ndindex(2, 2):
        item = tokens[clip, layer].double().numpy()
        scales = naive_token_scales(item)
        # float32 against float64: one step of float16, one code
        np.testing.assert_allclose(stored.scale[clip, layer].numpy(), scales, rtol=1e-3)
        codes, affine = naive_codes(item, stored.scale[clip, layer].double().numpy())
        assert np.abs(stored.codes[clip, layer].numpy() - codes).max() <= 1
        assert np.mean(stored.codes[clip, layer].numpy() != codes) < 0.01
        np.testing.assert_allclose(stored.affine[clip, layer].numpy(), affine, rtol=1e-5, atol=1e-6)


def test_decoding_is_code_times_scale_plus_offset_times_token_scale() -> None:
    stored = quantize_tokens(small_features())
    assert stored.scale is not None
    decoded = decode(stored)
    for index in [(0, 0, 0, 0, 0), (1, 1, 2, 5, 15), (0, 1, 1, 3, 7)]:
        clip, layer, frame, token, channel = index
        scale, offset = stored.affine[clip, layer, :, channel].tolist()
        value = (int(stored.codes[index]) * scale + offset) * float(stored.scale[clip, layer, frame, token])
        assert float(decoded[index]) == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_no_value_is_off_by_more_than_half_a_step() -> None:
    tokens = small_features(patches=20, channels=64)
    stored = quantize_tokens(tokens)
    assert stored.scale is not None
    half_step = stored.affine[..., None, None, 0, :] * stored.scale.float().unsqueeze(-1) / 2
    assert bool(((decode(stored) - tokens).abs() <= half_step * 1.001 + 1e-5 * tokens.abs()).all())


def test_worst_channel_error_is_small_for_all_and_for_ordinary_tokens() -> None:
    features = outlier_features(clips=1, layers=2, seed=3)
    decoded = decode(quantize_tokens(features.tokens))
    assert worst_channel_error(features.tokens, decoded) < 0.02
    assert worst_channel_error(features.tokens, decoded, ~features.is_register) < 0.013


def test_ordinary_tokens_need_the_token_scale() -> None:
    features = outlier_features(clips=1, layers=1, seed=3)
    stored = quantize_tokens(features.tokens, token_scale=False)
    assert stored.scale is None
    assert worst_channel_error(features.tokens, decode(stored), ~features.is_register) > 0.05


def test_only_register_tokens_get_a_scale() -> None:
    features = outlier_features(clips=2, layers=1, seed=4)
    scale = quantize_tokens(features.tokens).scale
    assert scale is not None
    assert torch.equal(scale > 1, features.is_register)
    assert float(scale[features.is_register].min()) > 8 and float(scale.max()) < 15


def test_tokens_huge_in_two_channels_only_do_not_ruin_these_channels() -> None:
    # Massive activations: without a token scale the two channels are a quarter off for ordinary tokens.
    features = outlier_features(clips=1, layers=1, seed=5)
    tokens = torch.where(features.is_register.unsqueeze(-1), features.tokens / 10, features.tokens)
    tokens[..., :2] = torch.where(features.is_register.unsqueeze(-1), 300.0, tokens[..., :2])
    ordinary = ~features.is_register
    with_scale = decode(quantize_tokens(tokens))
    assert worst_channel_error(tokens, decode(quantize_tokens(tokens, token_scale=False)), ordinary) > 0.25
    assert worst_channel_error(tokens, with_scale, ordinary) < 0.04
    assert worst_channel_error(tokens, with_scale) < 0.04


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_tokens_give_the_codes_of_their_float32_values(dtype: torch.dtype) -> None:
    tokens = small_features().to(dtype)
    assert torch.equal(quantize_tokens(tokens).codes, quantize_tokens(tokens.float()).codes)


@pytest.mark.parametrize("threads", [1, 2])
def test_codes_do_not_depend_on_the_batch(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tokens = small_features(clips=3, frames=8, patches=49, channels=192)
        batch = quantize_tokens(tokens)
        for clip, layer in np.ndindex(3, 2):
            alone = quantize_tokens(tokens[clip, layer].clone())
            assert torch.equal(alone.codes, batch.codes[clip, layer])
            assert torch.equal(alone.affine, batch.affine[clip, layer])
            assert alone.scale is not None and batch.scale is not None
            assert torch.equal(alone.scale, batch.scale[clip, layer])
    finally:
        torch.set_num_threads(before)


def test_arguments_are_not_changed_and_strides_do_not_matter() -> None:
    tokens = small_features()
    maps = softmax_maps(clips=1, layers=1, frames=3, patches=4, seed=0)
    kept, kept_maps = tokens.clone(), maps.clone()
    stored, stored_maps = quantize_tokens(tokens), quantize_maps(maps)
    codes = stored.codes.clone()
    decode(stored)
    dequantize_maps(stored_maps.codes, stored_maps.row_max)
    frame_difference(stored.codes)
    assert torch.equal(tokens, kept) and torch.equal(maps, kept_maps) and torch.equal(stored.codes, codes)
    strided = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(quantize_tokens(strided).codes, stored.codes)


def test_constant_channels_and_zero_tokens_come_back_exactly() -> None:
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
    tokens[..., 3] = 0.1
    tokens[..., 4] = 0.0
    decoded = decode(quantize_tokens(tokens, token_scale=False))
    assert torch.equal(decoded[..., 3:5], tokens[..., 3:5])
    zeros = torch.zeros(1, 2, 4, 8)
    assert torch.equal(decode(quantize_tokens(zeros)), zeros)
    tokens[1, 2] = 0.0  # a zero token among others is within half a step of zero, like any value
    stored = quantize_tokens(tokens)
    assert bool((decode(stored)[1, 2].abs() <= stored.affine[0] * 0.501).all())


@pytest.mark.parametrize("zero_tokens", [1, 7, 11])
def test_mostly_zero_tokens_stay_finite_and_close(zero_tokens: int) -> None:
    tokens = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1)).reshape(12, 8)
    tokens[:zero_tokens] = 0.0
    tokens = tokens.reshape(2, 6, 8)
    stored = quantize_tokens(tokens)
    assert worst_channel_error(tokens, decode(stored)) < 0.03
    if zero_tokens > 6:  # the median token is zero: there is no usual size to be far from
        assert stored.scale is not None and bool((stored.scale == 1).all())


def test_a_channel_used_by_one_token_only_does_not_spoil_that_token() -> None:
    tokens = torch.randn(8, 50, 64, generator=torch.Generator().manual_seed(1))
    tokens[..., 0] = 0.0
    tokens[3, 7, 0] = 1.0
    assert worst_channel_error(tokens, decode(quantize_tokens(tokens))) < 0.04


@pytest.mark.parametrize("sizes", [{"frames": 1}, {"patches": 1}, {"frames": 1, "patches": 1}])
def test_one_frame_and_one_patch_work(sizes: dict[str, int]) -> None:
    tokens = small_features(**sizes)
    assert worst_channel_error(tokens, decode(quantize_tokens(tokens))) < 0.02


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e6, 1e30])
def test_magnitude_does_not_matter(magnitude: float) -> None:
    tokens = small_features()
    relative = decode(quantize_tokens(tokens * magnitude)) / magnitude
    assert worst_channel_error(tokens, relative) < 0.02


def test_a_range_too_small_to_divide_is_a_constant_channel() -> None:
    tokens = torch.full((1, 2, 4), 1e-40)
    tokens[0, 0] = 3e-39
    stored = quantize_tokens(tokens, token_scale=False)
    assert bool((stored.codes == -128).all()) and bool((stored.affine[0] == 0).all())
    torch.testing.assert_close(decode(stored), tokens, rtol=0, atol=1e-37)


@pytest.mark.parametrize("fuses", [True, False])
def test_a_code_is_rounded_once_or_twice_as_torch_does_it_on_this_processor(fuses: bool) -> None:
    kernels = pytest.importorskip("evl_cache.cpu_codes.kernels")
    generator = np.random.default_rng(0)
    values = generator.standard_normal((300, 64)).astype(np.float32)
    low, inverse = values.min(0), (255 / np.ptp(values, axis=0)).astype(np.float32)
    # Halves, where a product that is rounded first may fall to the other side.
    values[1:] = low + ((np.arange(299)[:, None] % 255 + np.float32(0.5)) / inverse).astype(np.float32)
    codes = np.empty(values.shape, np.int8)
    kernels.codes(values, np.ones(300, np.float32), low, inverse, fuses, codes)
    exact = (values - low).astype(np.float64) * inverse  # 48 bits: float64 holds it
    product = exact if fuses else exact.astype(np.float32)
    expected = np.rint((product - 128).astype(np.float32)).astype(np.int8)
    assert np.array_equal(codes, expected)
    other = exact.astype(np.float32) if fuses else exact
    assert not np.array_equal(codes, np.rint((other - 128).astype(np.float32)).astype(np.int8))


def test_a_numba_that_cannot_be_imported_is_told_and_torch_makes_the_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> NoReturn:
        raise ImportError("Numba needs NumPy 2.5 or less")

    tokens = torch.randn(1, 4, 99, 192, generator=torch.Generator().manual_seed(0))
    is_compiled.cache_clear()
    monkeypatch.setattr(encoding, "_kernels", broken)
    with pytest.warns(RuntimeWarning, match="slowly, as numba cannot be used: Numba needs NumPy 2.5 or less"):
        assert_plain_codes(tokens)
    is_compiled.cache_clear()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token_scale", [True, False])
def test_a_value_that_is_not_finite_is_a_clip_error_that_names_the_item(
    bad: float, token_scale: bool
) -> None:
    tokens = small_features()
    tokens[1, 0, 2, 3, 4] = bad
    with pytest.raises(ClipError, match=r"^tokens at index \(1, 0\) cannot be stored: [^\n]*$"):
        quantize_tokens(tokens, token_scale=token_scale)


@pytest.mark.parametrize("token_scale", [True, False])
def test_a_range_beyond_float32_is_a_clip_error(token_scale: bool) -> None:
    tokens = torch.full((1, 1, 2, 4, 4), 3e38)
    tokens[0, 0, 0] = -3e38
    with pytest.raises(ClipError, match=r"tokens at index \(0, 0\)"):
        quantize_tokens(tokens, token_scale=token_scale)


def test_a_token_too_large_for_a_float16_scale_is_a_clip_error() -> None:
    tokens = torch.ones(2, 4, 8)
    tokens[0, 1] = 1e6
    with pytest.raises(ClipError, match="tokens cannot be stored"):
        quantize_tokens(tokens)


@pytest.mark.parametrize(
    "tokens",
    [torch.zeros(4, 8), torch.zeros(2, 4, 8, dtype=torch.int32), torch.zeros(2, 0, 8)],
    ids=["two axes", "integers", "no tokens"],
)
def test_wrong_tokens_are_a_usage_error(tokens: Tensor) -> None:
    with pytest.raises(UsageError, match="quantize_tokens needs"):
        quantize_tokens(tokens)


def test_an_empty_batch_gives_empty_codes() -> None:
    stored = quantize_tokens(torch.zeros(0, 5, 2, 4, 8))
    assert stored.codes.shape == (0, 5, 2, 4, 8) and stored.affine.shape == (0, 5, 2, 8)


def test_dequantised_tokens_have_the_dtype_asked_for() -> None:
    stored = quantize_tokens(small_features())
    halves = dequantize_tokens(stored.codes, stored.affine, stored.scale, torch.bfloat16)
    assert halves.dtype == torch.bfloat16
    assert torch.equal(halves, decode(stored).bfloat16())


def assert_plain_codes(tokens: Tensor, *, token_scale: bool = True) -> None:
    """Codes of tokens that can be stored are those made the plain way, bit for bit."""
    stored = quantize_tokens(tokens, token_scale=token_scale)
    codes, affine, scale = plain_token_codes(tokens, token_scale=token_scale)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(stored.affine.view(torch.int32), affine.view(torch.int32))
    assert (stored.scale is None) == (not token_scale)
    assert stored.scale is None or torch.equal(stored.scale, scale)


@pytest.mark.parametrize("channels", [1, 7, 33, 64, 96, 384, 768, 1024, 1280])
@pytest.mark.parametrize(("frames", "per_frame"), [(1, 1), (1, 5), (1, 197), (2, 50), (8, 50), (3, 257)])
def test_blocks_of_an_item_give_the_codes_of_the_whole(
    channels: int, frames: int, per_frame: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "SMALL_ITEM_VALUES", 1)
    monkeypatch.setattr(encoding, "BLOCK_VALUES", 20_000)
    generator = torch.Generator().manual_seed(channels)
    tokens = torch.randn(2, frames, per_frame, channels, generator=generator)
    tokens = tokens * (torch.rand(channels, generator=generator) * 5).exp() + 3
    tokens[:, :, ::23] *= 9
    assert_plain_codes(tokens)
    assert_plain_codes(tokens, token_scale=False)


TOKENS_OF_KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "constant": torch.ones_like,
    "zero": torch.zeros_like,
    "denormal": lambda tokens: tokens * 1e-40,
    "tiny": lambda tokens: tokens * 1e-36,
    "huge": lambda tokens: tokens * 1e37,
    "all outliers but one": lambda tokens: torch.cat([tokens[:, :, :1], tokens[:, :, 1:] * 100], dim=2),
    "one outlier": lambda tokens: torch.cat([tokens[:, :, :-1], tokens[:, :, -1:] * 100], dim=2),
    "mostly zero": lambda tokens: torch.where(tokens > 3, tokens, 0.0),
    "float16": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "not contiguous": lambda tokens: tokens.transpose(0, 1).contiguous().transpose(0, 1),
}


WAYS_OF_CODING: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "compiled": lambda patch: None,
    "sums of torch": lambda patch: patch.setattr("evl_cache.cpu_codes.kernels.sums_as_torch", False),
    "without numba": lambda patch: patch.setattr(importlib.util, "find_spec", lambda name: None),
}


@pytest.fixture
def coded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Codes are made in the way that the test's parameter names."""
    if request.param != "without numba":
        pytest.importorskip("numba")
    is_compiled.cache_clear()
    WAYS_OF_CODING[request.param](monkeypatch)
    assert is_compiled() == (request.param != "without numba")
    yield
    is_compiled.cache_clear()


@pytest.mark.parametrize("coded", WAYS_OF_CODING, indirect=True)
@pytest.mark.usefixtures("coded")
@pytest.mark.parametrize("kind", TOKENS_OF_KINDS)
@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_give_the_codes_of_the_whole_for_any_values_and_threads(kind: str, threads: int) -> None:
    before = torch.get_num_threads()
    tokens = torch.randn(3, 4, 99, 192, generator=torch.Generator().manual_seed(0))
    assert tokens[0].numel() > quantize.SMALL_ITEM_VALUES
    torch.set_num_threads(threads)
    try:
        assert_plain_codes(TOKENS_OF_KINDS[kind](tokens))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    found = ThreadPoolExecutor(1).submit(torch.get_num_threads).result()
    assert found == before  # nor have threads of others become fewer


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_item_of_many_blocks_that_cannot_be_stored_is_named(bad: float) -> None:
    tokens = torch.randn(3, 4, 99, 192, generator=torch.Generator().manual_seed(0))
    tokens[2, 3, 98, 191] = bad
    tokens[2, 0, 0, 191] = -bad
    with pytest.raises(ClipError, match=r"^tokens at index \(2,\)"):
        quantize_tokens(tokens)


@pytest.mark.parametrize("coded", ["compiled", "without numba"], indirect=True)
@pytest.mark.usefixtures("coded")
@pytest.mark.parametrize("patches", [1, 7, 49, 196, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_of_rows_give_the_codes_of_all_maps(patches: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(patches)
    maps = (torch.randn(3, 2, 500, patches, generator=generator) * 4).softmax(-1)
    maps[0, 0, :9] = 0.0
    maps[0, 0, 9, 0] = -0.0
    maps[1, 1, 7:20] *= 60000
    maps[2, 1] *= 1e-9
    stored, (codes, row_max, usable) = quantize_maps(maps.to(dtype)), plain_map_codes(maps.to(dtype))
    assert bool(usable.all())
    assert torch.equal(stored.codes, codes) and torch.equal(stored.row_max, row_max)


def test_maps_agree_with_a_loop_over_rows() -> None:
    maps = softmax_maps(clips=1, layers=1, frames=3, patches=6, seed=0)
    stored = quantize_maps(maps)
    for index in np.ndindex(*maps.shape[:-1]):
        row = maps[index].double().numpy()
        row_max = np.float16(row.max())
        if row_max < row.max():
            row_max = np.nextafter(row_max, np.float16(np.inf))
        assert float(stored.row_max[index]) == float(row_max)
        codes = np.floor(255 * np.sqrt(row / float(row_max)) + 0.5)
        assert np.abs(stored.codes[index].numpy().astype(int) - codes).max() <= 1
        decoded = dequantize_maps(stored.codes[index], stored.row_max[index])
        expected = (stored.codes[index].double().numpy() / 255) ** 2 * float(row_max)
        np.testing.assert_allclose(decoded.numpy(), expected, rtol=1e-5)


def test_peaked_and_flat_maps_are_within_one_percent_row_by_row() -> None:
    maps = softmax_maps(clips=1, layers=1, frames=4, seed=0)
    stored = quantize_maps(maps)
    error = (dequantize_maps(stored.codes, stored.row_max) - maps).norm(dim=-1) / maps.norm(dim=-1)
    assert float(error.max()) < 0.01
    flat = torch.full((2, 3, 4, 576), 1 / 576)
    stored = quantize_maps(flat)
    torch.testing.assert_close(dequantize_maps(stored.codes, stored.row_max), flat, rtol=0.01, atol=0)


def test_map_codes_do_not_pass_255_for_any_row_maximum() -> None:
    maxima = torch.cat(
        [torch.rand(20000, generator=torch.Generator().manual_seed(0)), torch.tensor([65504.0])]
    )
    maps = torch.stack([maxima, maxima / 4, torch.zeros_like(maxima)], dim=-1)
    stored = quantize_maps(maps)
    assert bool((stored.row_max.float() >= maxima).all())
    assert int(stored.codes[:, 0].min()) >= 254  # a wrapped 256 would be 0
    assert int(stored.codes[:, 2].max()) == 0


def test_zero_rows_and_tiny_maxima_stay_close_to_zero() -> None:
    maps = torch.zeros(2, 3, 4)
    maps[0, 1] = 1e-9
    stored = quantize_maps(maps)
    torch.testing.assert_close(dequantize_maps(stored.codes, stored.row_max), maps, rtol=0.05, atol=0)


def test_maps_of_one_frame_are_empty() -> None:
    stored = quantize_maps(torch.zeros(1, 5, 2, 0, 4, 4))
    assert stored.codes.shape == (1, 5, 2, 0, 4, 4) and stored.row_max.shape == (1, 5, 2, 0, 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1, 65600.0])
def test_maps_that_cannot_be_stored_are_a_clip_error_that_names_the_row(bad: float) -> None:
    maps = torch.full((2, 3, 4), 0.25)
    maps[1, 2, 0] = bad
    with pytest.raises(ClipError, match=r"^attention maps at index \(1, 2\)"):
        quantize_maps(maps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 65520.0, -1e6])
def test_float16_storage_refuses_what_it_cannot_hold(bad: float) -> None:
    values = torch.zeros(2, 3, 4)
    values[1, 0, 2] = bad
    with pytest.raises(ClipError, match=r"class tokens at index \(1, 0, 2\)"):
        to_float16(values, what="class tokens")


def test_float16_storage_keeps_the_largest_numbers() -> None:
    values = torch.tensor([65504.0, -65504.0, 1e-7]).repeat(1000)
    assert torch.equal(to_float16(values), values.half())
    assert torch.equal(to_float16(values[:1].repeat(100_000)), values[:1].repeat(100_000).half())


def summed(differences: npt.NDArray[Any]) -> npt.NDArray[Any]:
    result = differences.copy()
    frame_sum_(result)
    return result


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_frame_differences_wrap_around_and_sum_back_exactly(dtype: type[np.int8 | np.uint8]) -> None:
    info = np.iinfo(dtype)
    random = np.random.default_rng(0).integers(info.min, info.max + 1, (2, 5, 7, 9))
    codes: npt.NDArray[Any] = random.astype(dtype)
    codes[:, ::2, 0, 0], codes[:, 1::2, 0, 0] = info.min, info.max
    before = codes.copy()
    difference = frame_difference(codes)
    assert difference.dtype == dtype
    assert np.array_equal(difference[:, 0], codes[:, 0])
    naive = np.diff(codes.astype(int), axis=1) % 256
    assert np.array_equal(difference[:, 1:].astype(int) % 256, naive)
    assert np.array_equal(summed(difference), codes)
    foreign = np.cumsum(difference.astype(int), axis=1) % 256  # what a foreign reader does
    assert np.array_equal(foreign, codes.astype(int) % 256)
    tensors = torch.from_numpy(codes)
    assert torch.equal(frame_difference(tensors), torch.from_numpy(difference))
    assert np.array_equal(codes, before)


def test_frame_differences_of_one_frame_and_of_none_change_nothing() -> None:
    for frames in (1, 0):
        codes: npt.NDArray[np.int8] = np.full((2, frames, 3, 4), -128, np.int8)
        assert np.array_equal(frame_difference(codes), codes)
        assert np.array_equal(summed(codes), codes)


def test_frame_differences_of_other_dtypes_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="only 8-bit storage"):
        frame_difference(np.zeros((2, 3, 4), np.float16))
    with pytest.raises(UsageError, match="need int8 or uint8"):
        frame_sum_(np.zeros((3, 4), np.int8))


def test_generator_has_the_statistics_it_promises() -> None:
    features = outlier_features(clips=1, layers=1, seed=0)
    ordinary = features.tokens[~features.is_register].std(0)
    ratio = ordinary / ordinary.median()
    assert 3 <= int((ratio > 15).sum()) <= 8 and float(ratio.max()) < 120
    masks = (features.is_register, ~features.is_register)
    registers, others = (features.tokens[mask].abs().median(0).values for mask in masks)
    assert float((registers / others).median()) == pytest.approx(10, abs=1)
    plain = features.tokens[0, 0][:, ~features.is_register[0, 0, 0]]
    plain = (plain - plain.mean((0, 1))).flatten(1)
    assert float(torch.corrcoef(plain)[0, 1]) == pytest.approx(0.9, abs=0.03)
    again = outlier_features(clips=1, layers=1, seed=0)
    assert torch.equal(again.tokens, features.tokens)
    maps = softmax_maps(clips=1, layers=1, frames=3, seed=0)
    assert maps.shape == (1, 1, 2, 2, 196, 196)
    assert float(maps.amax(-1).max()) > 0.9 and float(maps.amax(-1).min()) < 2 / 196


def test_worst_channel_error_finds_the_one_bad_channel() -> None:
    reference = torch.ones(2, 3, 4, 5)
    decoded = reference.clone()
    decoded[1, :, :, 2] += 0.25
    decoded[1, 0, 0, 3] += 5.0
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 0, 0] = False
    assert worst_channel_error(reference, decoded, mask) == pytest.approx(0.25)
    assert worst_channel_error(reference, decoded) == pytest.approx(5 / 12**0.5)
