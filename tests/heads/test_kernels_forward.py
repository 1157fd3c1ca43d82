"""The forward kernels, run by Triton's interpreter, are the plain twin's arithmetic; and they compile without a GPU."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evl_cache.heads.decoder.plain import motion, relative_offsets
from evl_cache.heads.decoder.tensors import SharedTensors, StoredMaps, StoredTokens
from evl_cache.quantize import (
    dequantize_tokens,
    frame_difference,
    quantize_maps,
    quantize_tokens,
)
from tests.support.interpreted import interpreted

pytest.importorskip("triton")

# One unit in the last place of the result, and float32's own error.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# clips, frames, grid, channels: one and two frames, grids that are not square, rows that do not fill a block or do not
# end with one, channels that are no power of two or more than one block has.
SHAPES = {
    "usual": (3, 4, (3, 3), 24),
    "one frame": (2, 1, (2, 3), 16),
    "two frames": (2, 2, (2, 3), 16),
    "three frames": (5, 3, (5, 2), 20),
    "one row": (2, 3, (1, 5), 8),
    "one patch": (3, 3, (1, 1), 8),
    "more clips than a block": (17, 8, (1, 2), 40),
    "more keys and channels than a block": (1, 2, (3, 11), 72),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Stored tensors, and what they stand for in float64."""

    grid: tuple[int, int]
    tokens: StoredTokens
    maps: StoredMaps
    shared: SharedTensors
    values: Tensor  # (B, T, N, C)
    weights: Tensor  # (B, 2, T-1, P, P)

    def positioned(self, dtype: torch.dtype, **changed: Any) -> Tensor:
        made: Tensor = interpreted(
            "positioned.positioned",
            **{
                "tokens": self.tokens,
                "maps": self.maps,
                "shared": self.shared,
                "grid": self.grid,
                "dtype": dtype,
            }
            | changed,
        )
        assert made.dtype == dtype
        return made


def make_case(shape: str, *, coded: bool = True) -> Case:
    clips, frames, grid, width = SHAPES[shape]
    patches = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(sum(map(ord, shape)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    values = normal(clips, frames, 1 + patches, width) + normal(width)
    values[0, 0, 0] *= 12  # an outlier has a token scale
    weights = (3 * normal(clips, 2, frames - 1, patches, patches)).softmax(-1)
    weights[0, :, :, 0] = 0  # a row of zeros
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    shared = SharedTensors(
        normal(3, width) / 2, normal(frames, width), normal(rows, width), normal(rows, width)
    )
    if not coded:
        return Case(
            grid=grid, tokens=StoredTokens(tokens=values, affine=None, token_scale=None),
            maps=StoredMaps(maps=weights, row_max=None), shared=shared,
            values=values.double(), weights=weights.double(),
        )  # fmt: skip
    found, maps = quantize_tokens(values), quantize_maps(weights)
    assert found.scale is not None and (found.scale != 1).any()
    return Case(
        grid=grid, tokens=StoredTokens(tokens=found.codes, affine=found.affine, token_scale=found.scale),
        maps=StoredMaps(maps=maps.codes, row_max=maps.row_max), shared=shared,
        values=dequantize_tokens(found.codes, found.affine, found.scale, torch.float64),
        weights=decoded_in_float32(maps.codes, maps.row_max).double(),
    )  # fmt: skip


def decoded_in_float32(codes: Tensor, row_max: Tensor) -> Tensor:
    """Maps in the order of operations of every path, so that a half-precision copy rounds where theirs does.

    The root is rounded from float64, and so rightly, as kernels round it; torch's of float32 is off in the last bit on
    some processors.
    """
    root = row_max.double().sqrt().float()
    return (codes.float() * (root / 255)[..., None]).square()


def plainly_positioned(
    case: Case,
    *,
    taps: bool = True,
    shift: bool = True,
    moves: bool = True,
    factors: torch.dtype = torch.float64,
) -> Tensor:
    """The sum as the paper writes it, in float64; motion's factors are rounded to `factors`, as products are made."""
    y = case.values
    if taps:
        assert case.shared.taps is not None
        before, here, after = case.shared.taps.double()
        padded = F.pad(case.values, (0, 0, 0, 0, 1, 1))  # a frame of zeros at each end
        y = y + padded[:, :-2] * before + padded[:, 1:-1] * here + padded[:, 2:] * after
    if shift:
        assert case.shared.shift is not None
        y = y + case.shared.shift.double()[:, None]
    if moves and y.shape[1] > 1:
        offsets = relative_offsets(case.grid)
        assert case.shared.table_prev is not None and case.shared.table_next is not None
        tables = (t.flip(0).to(factors).double() for t in case.shared[2:])  # flipped back
        weights = case.weights.to(factors).double()
        previous, following = (motion(weights[:, d], t, offsets) for d, t in enumerate(tables))
        y = y + F.pad(previous, (0, 0, 1, 0, 1, 0)) + F.pad(following, (0, 0, 1, 0, 0, 1))
    return y


def assert_rounded(made: Tensor, expected: Tensor) -> None:
    """Every value is what was expected, rounded once to the dtype of `made`."""
    size = expected.abs().max()
    error = (made.double() - expected).abs()
    assert bool((error <= 1e-5 * size + ROUNDING[made.dtype] * expected.abs()).all()), error.max()


@pytest.mark.parametrize("shape", SHAPES)
def test_positioned_tokens_are_those_of_the_plain_sum(shape: str) -> None:
    case = make_case(shape)
    assert_rounded(case.positioned(torch.float32), plainly_positioned(case))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["usual", "three frames"])
def test_positioned_tokens_of_half_precision_are_summed_in_float32_and_rounded_once(
    shape: str, dtype: torch.dtype
) -> None:
    case = make_case(shape)
    assert_rounded(case.positioned(dtype), plainly_positioned(case, factors=dtype))


@pytest.mark.parametrize("shape", list(SHAPES)[:-1])
def test_differences_to_the_frame_before_are_undone(shape: str) -> None:
    case = make_case(shape)
    tokens = StoredTokens(
        tokens=frame_difference(case.tokens.tokens),
        affine=case.tokens.affine,
        token_scale=case.tokens.token_scale,
    )
    maps = StoredMaps(maps=frame_difference(case.maps.maps), row_max=case.maps.row_max)
    made = case.positioned(torch.float32, tokens=tokens, maps=maps, differences=True)
    assert torch.equal(made, case.positioned(torch.float32))


@pytest.mark.parametrize("off", ["taps", "shift", "moves", "taps shift moves"])
def test_modules_that_are_off_add_nothing(off: str) -> None:
    case = make_case("usual")
    names = set(off.split())
    shared = case.shared._replace(**dict.fromkeys(names & {"taps", "shift"}))
    changed: dict[str, Any] = {"shared": shared}
    if "moves" in names:
        changed = {"shared": shared._replace(table_prev=None, table_next=None), "maps": None}
    expected = plainly_positioned(case, **dict.fromkeys(names, False))
    assert_rounded(case.positioned(torch.float32, **changed), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floating_tokens_and_maps_are_taken_as_they_are(dtype: torch.dtype) -> None:
    case = make_case("usual", coded=False)
    tokens = StoredTokens(tokens=case.tokens.tokens.to(dtype), affine=None, token_scale=None)
    maps = StoredMaps(maps=case.maps.maps.to(dtype), row_max=None)
    as_stored = Case(
        grid=case.grid, tokens=tokens, maps=maps, shared=case.shared,
        values=tokens.tokens.double(), weights=maps.maps.double(),
    )  # fmt: skip
    assert_rounded(as_stored.positioned(torch.float32), plainly_positioned(as_stored))


def test_tokens_without_scales_are_those_with_scales_of_one() -> None:
    case = make_case("usual")
    without = StoredTokens(tokens=case.tokens.tokens, affine=case.tokens.affine, token_scale=None)
    assert case.tokens.token_scale is not None
    ones = torch.ones_like(case.tokens.token_scale)
    with_ones = StoredTokens(tokens=case.tokens.tokens, affine=case.tokens.affine, token_scale=ones)
    made = case.positioned(torch.float32, tokens=without)
    assert torch.equal(made, case.positioned(torch.float32, tokens=with_ones))


# clips, frames, tokens of a frame, channels, heads: channels that fill no part, several parts, heads that fill a block
# and more than one, more tokens than a block and than a split have, a single token.
ATTENDED = {
    "five heads": (3, 2, 7, 24, 5),
    "twelve heads": (2, 3, 10, 48, 12),
    "sixteen heads": (1, 2, 5, 16, 16),
    "twenty-four heads": (2, 1, 9, 32, 24),
    "several parts": (2, 2, 20, 300, 3),
    "several splits": (2, 4, 101, 40, 4),
    "one token": (2, 1, 1, 16, 2),
}


def plainly_attended(y: Tensor, query: Tensor, epsilon: float) -> dict[str, Tensor]:
    """Layer norm without gain, a softmax and a mean, in float64."""
    y = y.double().flatten(1, 2)
    unit = F.layer_norm(y, y.shape[-1:], eps=epsilon)
    logits = torch.einsum("bhc,bkc->bhk", query.double(), unit)
    scale = (y.var(-1, unbiased=False) + epsilon).rsqrt()
    return {
        "mean": torch.softmax(logits, -1) @ unit, "row_mean": y.mean(-1), "scale": scale, "logits": logits,
        "log_total": logits.logsumexp(-1),
    }  # fmt: skip


def make_attended(shape: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Tokens whose means and deviations differ, and a query with mean zero."""
    clips, frames, per_frame, width, heads = ATTENDED[shape]
    generator = torch.Generator().manual_seed(sum(map(ord, shape)))
    y = torch.randn(clips, frames, per_frame, width, generator=generator)
    y = y * (1 + 3 * torch.rand(y.shape[:3], generator=generator))[..., None] + 2
    query = torch.randn(clips, heads, width, generator=generator) / width**0.5 * 2
    return y.to(dtype), query - query.mean(-1, keepdim=True)


@pytest.mark.parametrize("shape", ATTENDED)
def test_attention_is_the_softmax_weighted_mean_of_normalised_tokens(shape: str) -> None:
    y, query = make_attended(shape, torch.float32)
    made = interpreted("attention.attend", y, query, 1e-5)
    for name, expected in plainly_attended(y, query, 1e-5).items():
        torch.testing.assert_close(getattr(made, name).double(), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["five heads", "several parts", "several splits"])
def test_attention_of_half_precision_rounds_only_the_query_and_the_weights(
    shape: str, dtype: torch.dtype
) -> None:
    y, query = make_attended(shape, dtype)
    made = interpreted("attention.attend", y, query, 1e-5)
    for name, expected in plainly_attended(y, query.to(dtype), 1e-5).items():
        # A weight's rounding errors are added up in the mean of units, which are about 1 each.
        allowed = ROUNDING[dtype] if name == "mean" else 1e-5
        torch.testing.assert_close(getattr(made, name).double(), expected, rtol=1e-5, atol=allowed, msg=name)


def test_statistics_do_not_cancel_where_the_mean_is_large() -> None:
    y, query = make_attended("several parts", torch.float32)
    y = y / 8 + 1000  # the squares' mean is a million times the variance
    made = interpreted("attention.attend", y, query, 1e-5)
    expected = plainly_attended(y, query, 1e-5)
    torch.testing.assert_close(made.scale.double(), expected["scale"], rtol=1e-4, atol=0)
    torch.testing.assert_close(made.mean.double(), expected["mean"], rtol=1e-3, atol=3e-3)


def test_large_tokens_keep_their_weights_in_float16() -> None:
    y, query = make_attended("five heads", torch.float32)
    y = (3000 * y).half()  # a weight over a deviation is below what float16 holds well
    made = interpreted("attention.attend", y, query, 1e-5)
    expected = plainly_attended(y, query.half(), 1e-5)["mean"]
    torch.testing.assert_close(made.mean.double(), expected, rtol=1e-5, atol=ROUNDING[torch.float16])


def test_constant_tokens_and_large_logits_give_finite_results() -> None:
    y, query = make_attended("five heads", torch.float32)
    y[0, 0] = 3.0  # no deviation
    made = interpreted("attention.attend", y, 200 * query, 1e-5)
    expected = plainly_attended(y, 200 * query, 1e-5)
    assert made.logits.abs().max() > 300
    torch.testing.assert_close(made.mean.double(), expected["mean"], rtol=1e-3, atol=3e-3)
    torch.testing.assert_close(made.log_total.double(), expected["log_total"], rtol=1e-5, atol=1e-3)


# Each fits beside a second program in what a processor of an A100 (163 KB) or of an H100 (227 KB) has.
SHARED_MEMORY_AT_MOST = {80: 81 << 10, 90: 113 << 10}
PRODUCTS = {80: "mma.sync", 90: "wgmma.mma_async"}


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What stands in for the kernels, by name; they compile into a folder of this test."""
    from evl_cache.heads.decoder.kernels import attention, positioned
    from tests.support.compiled_kernels import Launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    for module, name in (
        (positioned, "_positioned"),
        *((attention, n) for n in ("_logits", "_log_totals", "_mean")),
    ):
        found[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


def launch(clips: int, dtype: torch.dtype, *, differences: bool = False) -> None:
    """Launch both kernels with a ViT-B/16's tensors of 8 frames, without their memory."""
    from evl_cache.heads.decoder.kernels.attention import attend
    from evl_cache.heads.decoder.kernels.positioned import positioned

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    tokens = StoredTokens(
        tokens=empty(clips, 8, 197, 768, dtype=torch.int8),
        affine=empty(clips, 2, 768),
        token_scale=empty(clips, 8, 197, dtype=torch.float16),
    )
    maps = StoredMaps(
        maps=empty(clips, 2, 7, 196, 196, dtype=torch.uint8),
        row_max=empty(clips, 2, 7, 196, dtype=torch.float16),
    )
    shared = SharedTensors(empty(3, 768), empty(8, 768), empty(27 * 27, 768), empty(27 * 27, 768))
    y = positioned(tokens, maps, shared, (14, 14), dtype, differences=differences)
    attend(y, empty(clips, 12, 768), 1e-5)


@pytest.mark.parametrize("capability", PRODUCTS)
def test_kernels_compile_to_matrix_units_and_little_shared_memory(
    launches: dict[str, Any], capability: int
) -> None:
    launch(256, torch.bfloat16)
    for name in ("_positioned", "_logits", "_mean"):
        kernel = launches[name].compiled(capability)
        assert PRODUCTS[capability] in kernel.asm["ptx"], name
        assert kernel.metadata.shared <= SHARED_MEMORY_AT_MOST[capability], name


def test_kernels_of_other_kinds_compile(launches: dict[str, Any]) -> None:
    launch(2, torch.float32, differences=True)
    assert all(kernel.compiled(80).asm["cubin"] for kernel in launches.values())


def test_every_clip_of_a_large_batch_has_programs(launches: dict[str, Any]) -> None:
    launch(3000, torch.bfloat16)  # 3.6 thousand million values: places pass 32 bits
    assert launches["_positioned"].grid == (188 * 197 * 6,)  # of 128 rows, one token, 128 channels
    assert launches["_logits"].grid == (3000 * 25,)  # of 64 tokens
    assert launches["_mean"].grid == (3000 * 3,)  # of 256 channels
