"""The fast head is the plain one: values and gradients against the twin that projects every key and value."""

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from evl_cache.errors import UsageError
from evl_cache.heads.decoder import paths
from evl_cache.heads.decoder.chunked import chunks
from evl_cache.heads.decoder.chunked.threads import map_in_threads
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.heads.decoder.whole import motion as whole_motion
from evl_cache.heads.decoder.whole import path as whole_path
from evl_cache.quantize import (
    QuantizedMaps,
    QuantizedTokens,
    dequantize_maps,
    dequantize_tokens,
    quantize_maps,
    quantize_tokens,
)

MODULES = ("temporal_conv", "temporal_pos_embed", "temporal_cross_attention")

# frames, grid, width, qkv_width, heads, layers, clips: one and two frames, grids that are not square, a decoder
# width unlike the backbone's, one to twelve layers, more clips than are taken at once.
SHAPES = {
    "usual": (4, (3, 3), 24, 24, 2, 2, 3),
    "one frame": (1, (3, 2), 16, 16, 2, 2, 2),
    "two frames": (2, (2, 3), 16, 16, 4, 2, 2),
    "tall grid": (3, (5, 2), 8, 8, 1, 1, 2),
    "one row": (3, (1, 5), 8, 8, 1, 1, 2),
    "one patch": (3, (1, 1), 8, 8, 1, 1, 2),
    "narrow decoder": (4, (2, 4), 24, 8, 2, 3, 2),
    "wide decoder": (4, (4, 2), 8, 32, 4, 1, 1),
    "twelve layers": (2, (2, 2), 8, 8, 2, 12, 2),
    "many clips": (16, (2, 2), 8, 8, 1, 1, 37),
}


@pytest.fixture(autouse=True, params=["chunked", "whole"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Compute by each path, and cut small batches into slices too, as large ones are."""
    monkeypatch.setattr(chunks, "CPU_ONE_SLICE_VALUES", 0)
    monkeypatch.setattr(whole_path, "SLICE_BYTES", 1 << 12)
    monkeypatch.setattr(whole_motion, "WINDOW_BYTES", 1 << 14)
    with paths.forced(request.param):
        yield request.param


@dataclass(frozen=True, kw_only=True)
class Case:
    head: EVLHead
    tokens: list[Tensor]
    maps: list[Tensor]


def make_case(
    shape: str, *, dtype: torch.dtype = torch.float64, modules: tuple[str, ...] = MODULES, spread: float = 0.3
) -> Case:
    """A head with all parameters drawn (none is zero, as at initialisation), and features for it."""
    frames, grid, width, qkv_width, heads, layers, clips = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype)

    head = EVLHead(
        num_layers=layers,
        width=width,
        num_frames=frames,
        grid=grid,
        num_classes=3,
        num_heads=heads,
        qkv_width=qkv_width,
        dropout=0.0,
        **{name: name in modules for name in MODULES},
    ).to(dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(drawn(*parameter.shape) * spread)
    patches = grid[0] * grid[1]
    return Case(
        head=head,
        tokens=[drawn(clips, frames, 1 + patches, width) for _ in range(layers)],
        maps=[drawn(clips, 2, max(frames - 1, 0), patches, patches).softmax(-1) for _ in range(layers)],
    )


def logits_and_gradients(
    head: torch.nn.Module, tokens: list[Any], maps: list[Any] | None, inputs: list[Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of a fixed function of them for every parameter and every one of `inputs`."""
    head.zero_grad()
    logits = head(tokens, maps)
    weights = torch.arange(logits.numel(), dtype=torch.float64).cos().view_as(logits)
    (logits.double() * weights).sum().backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    gradients |= {f"input {i}": tensor.grad for i, tensor in enumerate(inputs or [])}
    return logits.detach(), gradients


def assert_same(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], *, rtol: float, atol: float
) -> None:
    """Relative to the largest element of each gradient, as an error of one element is no larger than that."""
    assert got.keys() == expected.keys()
    for name, twin in expected.items():
        ours = got[name]
        assert (ours is None) == (twin is None), name
        if ours is None or twin is None or not twin.numel():
            continue
        bound = atol + rtol * float(twin.abs().max())
        assert float((ours - twin).abs().max()) <= bound, name


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_all_gradients_equal_the_plain_twins(shape: str) -> None:
    case = make_case(shape)
    expected, twin_gradients = logits_and_gradients(PlainHead(case.head), case.tokens, case.maps)
    logits, gradients = logits_and_gradients(case.head, case.tokens, case.maps)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("remake_one_of", [1, 2, 3])
@pytest.mark.parametrize(("chunk_bytes", "rows"), [(1, 64), (2000, 1), (2000, 8), (1 << 20, 64)])
def test_chunking_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, rows: int, remake_one_of: int
) -> None:
    case = make_case("tall grid")
    expected, twin_gradients = logits_and_gradients(PlainHead(case.head), case.tokens, case.maps)
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(chunks, "CPU_ROWS", rows)
    monkeypatch.setattr(chunks, "REMAKE_ONE_OF", remake_one_of)
    logits, gradients = logits_and_gradients(case.head, case.tokens, case.maps)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("off", [(m,) for m in MODULES] + [MODULES])
def test_equal_with_modules_off(off: tuple[str, ...], built: bool) -> None:
    case = make_case("usual", modules=MODULES if built else tuple(m for m in MODULES if m not in off))
    if built:
        for name in off:
            setattr(case.head, name, False)
    maps = None if "temporal_cross_attention" in off else case.maps
    expected, twin_gradients = logits_and_gradients(PlainHead(case.head), case.tokens, maps)
    logits, gradients = logits_and_gradients(case.head, case.tokens, maps)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", ["usual", "one frame", "narrow decoder", "many clips"])
def test_gradients_of_tokens_and_maps_equal_the_twins(shape: str) -> None:
    case = make_case(shape)
    inputs = [t.requires_grad_() for t in (*case.tokens, *(case.maps if shape != "one frame" else []))]
    _, twin_gradients = logits_and_gradients(PlainHead(case.head), case.tokens, case.maps, inputs)
    for tensor in inputs:
        tensor.grad = None
    _, gradients = logits_and_gradients(case.head, case.tokens, case.maps, inputs)
    assert_same(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


def test_float32_agrees_with_float64() -> None:
    case = make_case("usual")
    expected, exact = logits_and_gradients(PlainHead(case.head), case.tokens, case.maps)
    head = copy.deepcopy(case.head).float()
    logits, gradients = logits_and_gradients(
        head, [t.float() for t in case.tokens], [m.float() for m in case.maps]
    )
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients, exact, rtol=1e-4, atol=1e-6)


def test_tokens_with_large_means_and_outlier_channels_keep_their_accuracy() -> None:
    case = make_case("usual", dtype=torch.float32)
    tokens = [t + 100 for t in case.tokens]
    for t in tokens:
        t[..., 1] *= 50
    exact = PlainHead(case.head).double()
    expected = exact([t.double() for t in tokens], [m.double() for m in case.maps])
    twin = PlainHead(case.head)(tokens, case.maps)
    error = float((case.head(tokens, case.maps) - expected).detach().abs().max())
    assert error <= max(1e-5, 2 * float((twin - expected).detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_equal_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    case = make_case("usual", dtype=torch.float32)
    tokens, maps = [t.to(dtype) for t in case.tokens], [m.to(dtype) for m in case.maps]
    expected = case.head([t.float() for t in tokens], [m.float() for m in maps])
    torch.testing.assert_close(case.head(tokens, maps), expected, rtol=0, atol=0)


def mean_error(got: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> float:
    errors = [
        float((g - e).norm() / e.norm())
        for name, e in exact.items()
        if (g := got[name]) is not None and e is not None and "k_proj.bias" not in name
    ]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_no_less_accurate_than_the_twins(dtype: torch.dtype) -> None:
    case = make_case("usual", dtype=torch.float32, spread=0.1)
    twin = PlainHead(case.head)
    expected, exact = logits_and_gradients(twin, case.tokens, case.maps)
    with torch.autocast("cpu", dtype=dtype):
        twin_logits, twin_gradients = logits_and_gradients(twin, case.tokens, case.maps)
    with torch.autocast("cpu", dtype=dtype):
        logits, gradients = logits_and_gradients(case.head, case.tokens, case.maps)
    resolution = torch.finfo(dtype).eps
    assert float((logits - expected).norm() / expected.norm()) < 2 * resolution + 2 * float(
        (twin_logits - expected).norm() / expected.norm()
    )
    assert mean_error(gradients, exact) < 1.5 * mean_error(twin_gradients, exact)
    assert 0 < mean_error(gradients, exact) < 4 * resolution  # it was computed in lower precision


def test_a_head_in_half_precision_trains() -> None:
    case = make_case("usual", dtype=torch.float32, spread=0.1)
    head = copy.deepcopy(case.head).bfloat16()
    logits, gradients = logits_and_gradients(head, case.tokens, case.maps)
    assert logits.dtype == torch.bfloat16
    assert all(g is not None and g.dtype == torch.bfloat16 for g in gradients.values())
    expected = case.head(case.tokens, case.maps).detach()
    assert float((logits - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("token_scale", [True, False])
def test_codes_give_what_their_decoded_values_give(token_scale: bool) -> None:
    case = make_case("usual", dtype=torch.float32)
    tokens = [quantize_tokens(t, token_scale=token_scale) for t in case.tokens]
    maps = [quantize_maps(m) for m in case.maps]
    plain_tokens = [dequantize_tokens(t.codes, t.affine, t.scale) for t in tokens]
    plain_maps = [dequantize_maps(m.codes, m.row_max) for m in maps]
    expected, twin_gradients = logits_and_gradients(PlainHead(case.head), plain_tokens, plain_maps)
    logits, gradients = logits_and_gradients(case.head, tokens, maps)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert_same(gradients, twin_gradients, rtol=1e-4, atol=1e-5)


def test_codes_and_floats_may_be_mixed() -> None:
    case = make_case("usual", dtype=torch.float32)
    coded = quantize_tokens(case.tokens[0])
    expected = case.head(
        [dequantize_tokens(coded.codes, coded.affine, coded.scale), case.tokens[1]], case.maps
    )
    torch.testing.assert_close(case.head([coded, case.tokens[1]], case.maps), expected, rtol=1e-5, atol=1e-5)


def test_no_input_is_changed_and_frozen_ones_get_no_gradient() -> None:
    case = make_case("usual", dtype=torch.float32)
    coded = [quantize_tokens(t) for t in case.tokens], [quantize_maps(m) for m in case.maps]
    tensors = [*case.tokens, *case.maps]
    tensors += [t for q in coded[0] for t in (q.codes, q.affine, q.scale) if t is not None]
    tensors += [t for q in coded[1] for t in (q.codes, q.row_max)]
    before = [t.clone() for t in tensors]
    logits_and_gradients(case.head, case.tokens, case.maps)
    logits_and_gradients(case.head, *coded)
    for tensor, copied in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copied)
        assert tensor.grad is None


def test_evaluation_without_gradients_gives_the_same_logits() -> None:
    case = make_case("many clips", dtype=torch.float32)
    expected = case.head(case.tokens, case.maps).detach()
    fresh = copy.deepcopy(case.head)
    with torch.inference_mode():
        torch.testing.assert_close(fresh(case.tokens, case.maps), expected, rtol=1e-6, atol=1e-6)
    # Memory from inference mode would be of no use to autograd.
    logits, _ = logits_and_gradients(fresh, case.tokens, case.maps)
    assert torch.equal(logits, expected)


def test_two_runs_are_bit_identical() -> None:
    case = make_case("usual", dtype=torch.float32)
    first = logits_and_gradients(case.head, case.tokens, case.maps)
    second = logits_and_gradients(case.head, case.tokens, case.maps)
    assert torch.equal(first[0], second[0])
    for name, gradient in first[1].items():
        other = second[1][name]
        assert gradient is not None and other is not None
        assert torch.equal(gradient, other), name


def test_a_key_bias_moves_nothing_and_has_a_gradient_of_exactly_zero() -> None:
    case = make_case("usual", dtype=torch.float32)
    before, gradients = logits_and_gradients(case.head, case.tokens, case.maps)
    with torch.no_grad():
        case.head.layers[0].k_proj.bias.add_(3.0)
    assert torch.equal(case.head(case.tokens, case.maps).detach(), before)
    gradient = gradients["layers.0.k_proj.bias"]
    assert gradient is not None and not gradient.any()


def test_memory_used_again_never_reaches_an_older_graph() -> None:
    """A graph that is retained keeps its tokens though another forward pass runs in between."""
    case = make_case("usual")
    parameters = list(case.head.parameters())
    logits = case.head(case.tokens, case.maps)
    first = torch.autograd.grad(logits.sum(), parameters, retain_graph=True)
    other = case.head([t * 2 for t in case.tokens], case.maps)
    torch.autograd.grad(other.sum(), parameters)
    case.head([t * 3 for t in case.tokens], case.maps)
    for a, b in zip(first, torch.autograd.grad(logits.sum(), parameters), strict=True):
        assert torch.equal(a, b)


def test_small_batches_are_one_slice_and_large_ones_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunks.slice_sizes(torch.Size((8, 8, 17, 128))) == [4, 4]
    monkeypatch.undo()
    assert chunks.slice_sizes(torch.Size((8, 8, 17, 128))) == [8]
    torch.set_num_threads(2)
    assert chunks.slice_sizes(torch.Size((32, 8, 197, 768))) == [16, 16]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing_and_is_left_as_it_was(threads: int) -> None:
    case = make_case("usual")
    expected, twin_gradients = logits_and_gradients(PlainHead(case.head), case.tokens, case.maps)
    torch.set_num_threads(threads)
    logits, gradients = logits_and_gradients(case.head, case.tokens, case.maps)
    assert torch.get_num_threads() == threads
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    assert_same(gradients, twin_gradients, rtol=1e-10, atol=1e-10)


def test_the_number_of_threads_may_change_before_the_backward_pass() -> None:
    case = make_case("many clips")
    parameters = list(case.head.parameters())
    expected = torch.autograd.grad(case.head(case.tokens, case.maps).sum(), parameters)
    logits = case.head(case.tokens, case.maps).sum()
    torch.set_num_threads(1)
    for a, b in zip(torch.autograd.grad(logits, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_an_error_in_a_thread_is_raised_and_leaves_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        map_in_threads(lambda x: 1 // x, [1, 0, 1], torch.device("cpu"))
    assert torch.get_num_threads() == before


def test_two_callers_at_once_restore_the_number_of_threads() -> None:
    before = torch.get_num_threads()
    case = make_case("many clips")
    expected = case.head(case.tokens, case.maps).detach()
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(case.head, case.tokens, case.maps) for _ in range(16)]
        for future in futures:
            torch.testing.assert_close(future.result().detach(), expected, rtol=1e-10, atol=1e-10)
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as pool:  # so will threads to come
        assert pool.submit(torch.get_num_threads).result() == before


def test_two_graphs_at_once_are_kept_apart() -> None:
    case = make_case("usual")
    parameters = list(case.head.parameters())
    doubled = [t * 2 for t in case.tokens]
    expected = [
        torch.autograd.grad(case.head(t, case.maps).sum(), parameters) for t in (case.tokens, doubled)
    ]
    both = [case.head(t, case.maps) for t in (case.tokens, doubled)]
    for logits, gradients in zip(reversed(both), reversed(expected), strict=True):
        for a, b in zip(torch.autograd.grad(logits.sum(), parameters), gradients, strict=True):
            assert torch.equal(a, b)


def test_input_changed_before_the_backward_pass_is_an_error() -> None:
    case = make_case("usual")
    logits = case.head(case.tokens, case.maps)
    case.tokens[0].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_a_trained_head_can_be_copied_and_pickled() -> None:
    case = make_case("usual", dtype=torch.float32)
    logits, _ = logits_and_gradients(case.head, case.tokens, case.maps)
    for other in (copy.deepcopy(case.head), pickle.loads(pickle.dumps(case.head))):
        assert torch.equal(other(case.tokens, case.maps), logits)


def test_state_has_the_names_of_the_twin_and_nothing_else() -> None:
    case = make_case("usual")
    assert case.head.state_dict().keys() == PlainHead(case.head).state_dict().keys()


def test_wrong_features_are_told_what_was_expected() -> None:
    case = make_case("usual", dtype=torch.float32)
    coded, maps = quantize_tokens(case.tokens[0]), quantize_maps(case.maps[0])
    with pytest.raises(UsageError, match=r"tokens are torch.int8; expected floating-point .*QuantizedTokens"):
        case.head([coded.codes, coded.codes], case.maps)
    with pytest.raises(UsageError, match=r"maps are torch.uint8; expected floating-point .*QuantizedMaps"):
        case.head(case.tokens, [maps.codes, maps.codes])
    short = QuantizedTokens(codes=coded.codes[:, 1:], affine=coded.affine, scale=None)
    with pytest.raises(UsageError, match=r"tokens are \(3, 3, 10, 24\); this head expects"):
        case.head([coded, short], case.maps)
    few = QuantizedMaps(codes=maps.codes[:2], row_max=maps.row_max[:2])
    with pytest.raises(UsageError, match=r"maps are \(2, 2, 3, 9, 9\); this head expects"):
        case.head(case.tokens, [maps, few])


def test_heads_that_do_not_divide_the_decoders_width_are_an_error() -> None:
    with pytest.raises(UsageError, match="5 heads do not divide the decoder's width of 16"):
        EVLHead(num_layers=1, width=16, num_frames=2, grid=(2, 2), num_classes=2, num_heads=5)


def test_a_switch_belongs_to_each_head_and_the_class_has_it_too() -> None:
    assert all(hasattr(EVLHead, name) for name in MODULES)
