"""The decoder's backward kernels, run by Triton's interpreter, against autograd of the plain formulas.

B clips, T frames, P patches (grid Hp x Wp), N = 1+P tokens of a frame, C channels, H heads, K = T N.
"""

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from evl_cache.heads.decoder.plain import motion, relative_offsets
from evl_cache.heads.decoder.tensors import StoredMaps, StoredTokens
from evl_cache.quantize import (
    dequantize_maps,
    dequantize_tokens,
    frame_difference,
    quantize_maps,
    quantize_tokens,
)
from tests.support.interpreted import interpreted

triton = pytest.importorskip("triton")

# Of the largest value: what float32 sums differ by, and a few roundings of each dtype.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
DTYPES = list(TOLERANCE)
EPSILON = 1e-5


def assert_near(found: Tensor | None, wanted: Tensor, dtype: torch.dtype, *, roundings: int = 1) -> None:
    assert found is not None
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    assert error < TOLERANCE[dtype] * roundings, f"differs by {error:.2e} of the largest"


class Attention(NamedTuple):
    """The inputs of the kernel, and its right results."""

    y: Tensor
    query: Tensor
    gradient: Tensor
    attended: Any
    query_gradient: Tensor
    y_gradient: Tensor

    def run(self, *, write_over: bool = False, wanted: bool = True) -> tuple[Tensor, Tensor | None]:
        """Return what the kernel returns; y is a copy, since it may be written over."""
        found: tuple[Tensor, Tensor | None] = interpreted(
            "attention_gradients.attention_gradients",
            self.y,
            self.query,
            self.gradient,
            self.attended,
            write_over=write_over,
            wanted=wanted,
        )
        return found


def make_attention(
    *,
    clips: int = 2,
    frames: int = 2,
    count: int = 7,
    heads: int = 5,
    width: int = 40,
    mean: float = 0.3,
    dtype: torch.dtype = torch.float32,
) -> Attention:
    """Return random inputs, with the results of autograd in float64 of a softmax over normalised tokens."""
    from evl_cache.heads.decoder.kernels.attention import Attended

    torch.manual_seed(0)
    # Tokens differ in size and mean, and logits are large enough that weights differ.
    size = torch.rand(clips, frames, count, 1) + 0.5
    y = (torch.randn(clips, frames, count, width) + mean) * size
    y = y.to(dtype)
    exact = y.double().flatten(1, 2).requires_grad_()
    query = (torch.randn(clips, heads, width, dtype=torch.float64) / 5).requires_grad_()
    row_mean = exact.mean(-1)
    scale = (exact.var(-1, unbiased=False) + EPSILON).rsqrt()
    unit = (exact - row_mean[..., None]) * scale[..., None]
    logits = query @ unit.transpose(1, 2)
    result = torch.softmax(logits, -1) @ unit
    gradient = torch.randn(clips, heads, width)
    (result * gradient).sum().backward()
    attended = Attended(
        mean=result.detach().float(),
        row_mean=row_mean.detach().float(),
        scale=scale.detach().float(),
        logits=logits.detach().float(),
        log_total=logits.detach().logsumexp(-1).float(),
    )
    assert query.grad is not None
    assert exact.grad is not None
    return Attention(
        y=y,
        query=query.detach().float(),
        gradient=gradient,
        attended=attended,
        query_gradient=query.grad,
        y_gradient=exact.grad.view(y.shape),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 12, "count": 26, "frames": 3},  # tokens of two blocks
        {"heads": 5, "count": 2, "frames": 1, "clips": 3},
        {"heads": 24, "count": 12, "width": 64},
        {"heads": 3, "count": 180, "width": 24},  # tokens of two programs
        {"heads": 2, "count": 3, "width": 300},  # channels of several blocks, the last one cut
    ],
    ids=lambda shape: ",".join(f"{name}={value}" for name, value in shape.items()),
)
def test_attention_gradients_are_those_of_a_softmax_over_normalised_tokens(
    shape: dict[str, int], dtype: torch.dtype
) -> None:
    case = make_attention(**shape, dtype=dtype)
    query_gradient, y_gradient = case.run()
    assert query_gradient.dtype == torch.float32
    assert_near(query_gradient, case.query_gradient, dtype)
    assert y_gradient is not None
    assert y_gradient.dtype == dtype
    assert_near(y_gradient, case.y_gradient, dtype)


def test_query_and_gradient_may_lie_in_any_order() -> None:
    case = make_attention()
    turned = case._replace(
        query=case.query.transpose(0, 2).contiguous().transpose(0, 2),
        gradient=case.gradient.transpose(1, 2).contiguous().transpose(1, 2),
    )
    for found, wanted in zip(turned.run(), case.run(), strict=True):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found, wanted)


def test_attention_gradients_do_not_cancel_where_tokens_have_a_large_mean() -> None:
    case = make_attention(mean=100.0)  # the squares' mean is ten thousand times the variance
    query_gradient, y_gradient = case.run()
    assert y_gradient is not None
    torch.testing.assert_close(query_gradient.double(), case.query_gradient, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(y_gradient.double(), case.y_gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gradients_follow_from_what_the_forward_kernel_keeps(dtype: torch.dtype) -> None:
    case = make_attention(dtype=dtype, count=70)
    # Normalised tokens have mean zero, and the kernel is given a query that has.
    query = case.query - case.query.mean(-1, keepdim=True)
    attended = interpreted("attention.attend", case.y, query, EPSILON)
    query_gradient, y_gradient = case._replace(query=query, attended=attended).run()
    assert y_gradient is not None
    # Both passes round the query and the weights.
    assert_near(query_gradient, case.query_gradient, dtype, roundings=2)
    assert_near(y_gradient, case.y_gradient, dtype, roundings=2)


def test_attention_gradients_over_the_memory_of_tokens_have_the_same_bits() -> None:
    case = make_attention(dtype=torch.bfloat16, count=70)
    for over, beside in zip(case.run(write_over=True), case.run(write_over=False), strict=True):
        assert over is not None
        assert beside is not None
        assert torch.equal(over, beside)


def test_the_query_gradient_needs_no_gradient_of_tokens() -> None:
    case = make_attention(count=70)
    query_gradient, nothing = case.run(write_over=True, wanted=False)
    assert nothing is None
    assert torch.equal(query_gradient, case.run()[0])


def test_a_clips_attention_gradients_are_the_same_bits_in_every_batch() -> None:
    case = make_attention(clips=3, count=100)
    alone = Attention(
        *(tensor[1:2] for tensor in case[:3]),
        type(case.attended)(*(tensor[1:2] for tensor in case.attended)),
        *case[4:],
    )
    for one, all_clips in zip(alone.run(), case.run(), strict=True):
        assert one is not None
        assert all_clips is not None
        assert torch.equal(one, all_clips[1:2])


def make_tokens(shape: tuple[int, int, int, int], *, token_scale: bool) -> tuple[StoredTokens, Tensor]:
    """Return codes of random tokens (B, T, N, C), some of them outliers, and their values in float64."""
    torch.manual_seed(1)
    values = torch.randn(shape) * torch.rand(shape[-1]) + torch.rand(shape[-1])
    values[:, -1, -1] *= 8
    found = quantize_tokens(values, token_scale=token_scale)
    assert not token_scale or (found.scale is not None and bool((found.scale != 1).any()))
    stored = StoredTokens(tokens=found.codes, affine=found.affine, token_scale=found.scale)
    return stored, dequantize_tokens(found.codes, found.affine, found.scale).double()


def position_formula(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return autograd's gradients of taps and shift in conv(x) + shift, in float64."""
    clips, frames, count, width = x.shape
    taps = torch.zeros(3, width, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(frames, width, dtype=torch.float64, requires_grad=True)
    series = x.permute(0, 2, 3, 1).reshape(clips * count, width, frames)
    moved = torch.nn.functional.conv1d(series, taps.t()[:, None], padding=1, groups=width)
    moved = moved.view(clips, count, width, frames).permute(0, 3, 1, 2) + shift[:, None]
    (moved * dy.double()).sum().backward()
    assert taps.grad is not None
    assert shift.grad is not None
    return taps.grad, shift.grad


def run_position(dy: Tensor, tokens: StoredTokens, **options: bool) -> tuple[Tensor | None, Tensor | None]:
    options = {"taps": True, "shift": True, **options}
    found: tuple[Tensor | None, Tensor | None]
    found = interpreted("position_gradients.position_gradients", dy, tokens, **options)
    return found


@pytest.mark.parametrize("differences", [False, True])
@pytest.mark.parametrize("token_scale", [False, True])
@pytest.mark.parametrize("shape", [(3, 1, 7, 24), (2, 2, 5, 40), (1, 3, 131, 16), (2, 8, 4, 300)], ids=str)
def test_position_gradients_of_codes_are_those_of_the_convolution(
    shape: tuple[int, int, int, int], token_scale: bool, differences: bool
) -> None:
    tokens, x = make_tokens(shape, token_scale=token_scale)
    if differences:
        tokens = StoredTokens(
            tokens=frame_difference(tokens.tokens), affine=tokens.affine, token_scale=tokens.token_scale
        )
    dy = torch.randn(shape)
    found_taps, found_shift = run_position(dy, tokens, differences=differences)
    taps, shift = position_formula(dy, x)
    assert_near(found_taps, taps, torch.float32)
    assert_near(found_shift, shift, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient_dtype", DTYPES)
def test_position_gradients_of_floating_tokens_are_exact_in_every_dtype(
    dtype: torch.dtype, gradient_dtype: torch.dtype
) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, 3, 5, 24).to(dtype)
    dy = torch.randn(2, 3, 5, 24).to(gradient_dtype)
    found_taps, found_shift = run_position(dy, StoredTokens(tokens=x, affine=None, token_scale=None))
    taps, shift = position_formula(dy, x.double())
    # Sums are float32 whatever is summed.
    assert_near(found_taps, taps, torch.float32)
    assert_near(found_shift, shift, torch.float32)


def test_only_the_position_gradients_that_are_asked_for_are_returned() -> None:
    tokens, _ = make_tokens((2, 3, 5, 24), token_scale=True)
    dy = torch.randn(2, 3, 5, 24)
    taps, shift = run_position(dy, tokens)
    only_taps, nothing = run_position(dy, tokens, shift=False)
    assert nothing is None
    assert taps is not None
    assert only_taps is not None
    assert torch.equal(only_taps, taps)
    nothing, only_shift = run_position(dy, tokens, taps=False)
    assert nothing is None
    assert shift is not None
    assert only_shift is not None
    assert torch.equal(only_shift, shift)
    assert run_position(dy, tokens, taps=False, shift=False) == (None, None)


def make_maps(clips: int, frames: int, grid: tuple[int, int]) -> tuple[StoredMaps, Tensor]:
    """Return codes of random maps (B, 2, T-1, P, P), one row of them zero, and their values in float64."""
    torch.manual_seed(3)
    patches = grid[0] * grid[1]
    maps = torch.softmax(3 * torch.randn(clips, 2, frames - 1, patches, patches), -1)
    maps[0, :, 0, -1] = 0
    found = quantize_maps(maps)
    return (
        StoredMaps(maps=found.codes, row_max=found.row_max),
        dequantize_maps(found.codes, found.row_max).double(),
    )


def table_formula(maps: Tensor, dy: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Return autograd's gradients of the flipped tables prev and next, in float64."""
    rows, width = (2 * grid[0] - 1) * (2 * grid[1] - 1), dy.shape[-1]
    tables = [torch.zeros(rows, width, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    dy, offsets = dy.double(), relative_offsets(grid)
    prev = motion(maps[:, 0], tables[0].flip(0), offsets)
    following = motion(maps[:, 1], tables[1].flip(0), offsets)
    ((prev * dy[:, 1:, 1:]).sum() + (following * dy[:, :-1, 1:]).sum()).backward()
    return [table.grad for table in tables if table.grad is not None]


def run_tables(maps: StoredMaps, dy: Tensor, grid: tuple[int, int], **options: int) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor]
    found = interpreted("table_gradients.table_gradients", maps, dy, grid, **options)
    return found


# clips, frames, grid, channels, dtype: blocks that clips, keys and channels do not fill, or of which they need several.
TABLES: dict[str, tuple[int, int, tuple[int, int], int, torch.dtype]] = {
    "two frames": (2, 2, (2, 3), 24, torch.float32),
    "clips of two blocks": (19, 4, (3, 2), 20, torch.float32),
    "one row": (3, 8, (1, 5), 16, torch.float32),
    "one patch": (5, 3, (1, 1), 20, torch.float32),
    "keys of two blocks": (2, 2, (1, 66), 8, torch.float32),
    "bfloat16": (3, 3, (2, 3), 20, torch.bfloat16),
    "float16": (3, 3, (2, 3), 20, torch.float16),
    "bfloat16, clips and channels of two blocks": (66, 2, (1, 2), 136, torch.bfloat16),
}


@pytest.mark.parametrize(
    ("case", "differences"),
    [
        (case, differences)
        for case in TABLES
        for differences in (False, True)
        if differences or "keys" not in case
    ],
)
def test_table_gradients_of_codes_are_those_of_gathered_motion(case: str, differences: bool) -> None:
    clips, frames, grid, width, dtype = TABLES[case]
    stored, values = make_maps(clips, frames, grid)
    if differences:
        stored = StoredMaps(maps=frame_difference(stored.maps), row_max=stored.row_max)
    dy = torch.randn(clips, frames, 1 + grid[0] * grid[1], width).to(dtype)
    found = run_tables(stored, dy, grid, differences=differences)
    for gradient, wanted in zip(found, table_formula(values, dy, grid), strict=True):
        assert gradient.dtype == torch.float32
        assert_near(gradient, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_gradients_of_floating_maps_are_exact_where_their_dtype_is_the_gradients(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(4)
    grid, maps = (3, 4), torch.rand(3, 2, 2, 12, 12).to(dtype)
    dy = torch.randn(3, 3, 13, 24).to(dtype)
    found = run_tables(StoredMaps(maps=maps, row_max=None), dy, grid)
    for gradient, wanted in zip(found, table_formula(maps.double(), dy, grid), strict=True):
        assert_near(gradient, wanted, torch.float32)


@pytest.mark.parametrize("rows", [1, 2])
def test_table_gradients_of_a_large_grid_are_added_up_in_groups_of_query_rows(
    rows: int,
) -> None:
    stored, values = make_maps(3, 2, (5, 2))
    dy = torch.randn(3, 2, 11, 24)
    found = run_tables(stored, dy, (5, 2), pairs_bytes=rows * 2 * 2 * 10 * 24 * 4)
    for gradient, wanted in zip(found, table_formula(values, dy, (5, 2)), strict=True):
        assert_near(gradient, wanted, torch.float32)


def test_the_same_inputs_give_the_same_bits() -> None:
    case = make_attention(dtype=torch.bfloat16, count=70)
    tokens, _ = make_tokens((2, 3, 5, 24), token_scale=True)
    stored, _ = make_maps(5, 3, (2, 2))
    dy = torch.randn(5, 3, 5, 24)

    def everything() -> list[Tensor | None]:
        return [*case.run(), *run_position(dy[:2], tokens), *run_tables(stored, dy, (2, 2))]

    for first, second in zip(everything(), everything(), strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


KERNELS = {
    "attention_gradients": ["attention_gradients_kernel"],
    "position_gradients": ["position_gradients_kernel"],
    "table_gradients": ["pair_sums_kernel", "row_sums_kernel"],
}
# A program must leave room for a second one in what a processor of an A100 (163 KB) and of an H100 (227 KB) has.
SHARED_MEMORY_AT_MOST = 100 << 10
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What stands in for the kernels, by name; they compile into a folder of this test."""
    from tests.support.compiled_kernels import Launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    for place, names in KERNELS.items():
        module = importlib.import_module(f"evl_cache.heads.decoder.kernels.{place}")
        for name in names:
            found[name] = Launches(getattr(module, name))
            monkeypatch.setattr(module, name, found[name])
    return found


def launch(
    clips: int, dtype: torch.dtype, *, grid: tuple[int, int] = (14, 14), width: int = 768, heads: int = 12
) -> tuple[Tensor, Tensor | None]:
    """Launch all kernels with a vision transformer's tensors of 8 frames, without their memory; return y and its gradient."""
    from evl_cache.heads.decoder.kernels.attention import Attended
    from evl_cache.heads.decoder.kernels.attention_gradients import attention_gradients
    from evl_cache.heads.decoder.kernels.position_gradients import position_gradients
    from evl_cache.heads.decoder.kernels.table_gradients import table_gradients

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    patches = grid[0] * grid[1]
    count, query = 8 * (1 + patches), empty(clips, heads, width)
    attended = Attended(
        query, empty(clips, count), empty(clips, count), empty(clips, heads, count), empty(clips, heads)
    )
    tokens = StoredTokens(
        tokens=empty(clips, 8, 1 + patches, width, dtype=torch.int8),
        affine=empty(clips, 2, width),
        token_scale=empty(clips, 8, 1 + patches, dtype=torch.float16),
    )
    maps = StoredMaps(
        maps=empty(clips, 2, 7, patches, patches, dtype=torch.uint8),
        row_max=empty(clips, 2, 7, patches, dtype=torch.float16),
    )
    y = empty(clips, 8, 1 + patches, width, dtype=dtype)
    _, dy = attention_gradients(y, query, query, attended, write_over=True, wanted=True)
    assert dy is not None
    position_gradients(dy, tokens, taps=True, shift=True, differences=True)
    table_gradients(maps, dy, grid, differences=True)
    return y, dy


@pytest.mark.parametrize("capability", PRODUCTS)
def test_kernels_compile_to_matrix_units_and_little_shared_memory(
    launches: dict[str, Any], capability: int
) -> None:
    launch(256, torch.bfloat16)
    for name, launched in launches.items():
        kernel = launched.compiled(capability)
        assert kernel.metadata.shared <= SHARED_MEMORY_AT_MOST, name
        if name in ("attention_gradients_kernel", "pair_sums_kernel"):
            assert PRODUCTS[capability] in kernel.asm["ptx"], name


def test_the_gradient_of_tokens_is_written_over_their_memory(launches: dict[str, Any]) -> None:
    y, dy = launch(2, torch.float32, grid=(2, 3), width=24, heads=5)
    assert dy is y
    assert all(launched.compiled(80).asm["cubin"] for launched in launches.values())


def test_every_clip_of_a_large_batch_has_programs(launches: dict[str, Any]) -> None:
    launch(3000, torch.bfloat16)  # 3.6 thousand million values: places pass 32 bits
    assert launches["attention_gradients_kernel"].grid == (5, 3000)  # of 320 tokens
    assert launches["position_gradients_kernel"].grid == (6, 2, 3000)  # of 128 channels, 99 tokens
    assert launches["pair_sums_kernel"].grid == (2 * 2 * 6, 196)  # of one direction, 128 keys, 128 channels
