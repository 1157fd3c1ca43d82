"""Kernels are used where they were proved on the run's own first clips, and given up where they err."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.support.fake_cuda import fake_cuda
from evl_cache.heads.decoder.kernels import choice
from evl_cache.heads.decoder.tensors import ClipTensors, LayerTensors, Setting, SharedTensors
from evl_cache.heads.decoder.whole import path as whole
from evl_cache.heads.decoder.workspace import Workspace
from evl_cache.quantize import quantize_maps, quantize_tokens

pytest.importorskip("triton")

CLIPS, FRAMES, GRID, WIDTH, HEADS = 4, 3, (2, 3), 16, 2
PATCHES = GRID[0] * GRID[1]
SETTING = Setting(
    grid=GRID,
    epsilon=1e-5,
    device=torch.device("cpu"),
    sums=torch.float32,
    products=torch.bfloat16,
    keep=True,
    workspace=Workspace(),
)


def make_inputs(*, spread: float = 1.0) -> LayerTensors:
    """Inputs as at a head's start, with a query of zeros. With a small `spread` all tokens are much alike."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    alike = 3 * drawn(CLIPS, 1, 1, WIDTH) if spread < 1 else 0.0
    tokens = quantize_tokens(alike + spread * drawn(CLIPS, FRAMES, 1 + PATCHES, WIDTH))
    maps = quantize_maps(drawn(CLIPS, 2, FRAMES - 1, PATCHES, PATCHES).softmax(-1))
    rows = (2 * GRID[0] - 1) * (2 * GRID[1] - 1)
    return LayerTensors(
        ClipTensors(
            torch.zeros(CLIPS, HEADS, WIDTH),
            tokens.codes,
            tokens.affine,
            tokens.scale,
            maps.codes,
            maps.row_max,
        ),
        SharedTensors(*(spread * drawn(size, WIDTH) for size in (3, FRAMES, rows, rows))),
    )


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the kernels' path, which computes by torch's operations here; nothing is proved yet."""
    from evl_cache.heads.decoder.kernels import path

    monkeypatch.setattr(choice, "_proved", {})
    monkeypatch.setattr(path, "forward", whole.forward)
    monkeypatch.setattr(path, "backward", whole.backward)
    return path


def test_right_kernels_are_proved_once_and_without_a_word(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make_inputs()
    assert choice.are_proved(SETTING, inputs)
    monkeypatch.setattr(kernels, "forward", None)  # not asked again
    assert choice.are_proved(SETTING, inputs)


def test_other_sizes_and_dtypes_are_proved_anew(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs()
    assert choice.are_proved(SETTING, inputs)
    monkeypatch.setattr(kernels, "forward", None)
    with pytest.warns(RuntimeWarning, match="kernels are not used here"):
        assert not choice.are_proved(replace(SETTING, products=torch.float16), inputs)


@pytest.mark.parametrize("name", ["query", "taps", "shift", "table_prev", "table_next"])
def test_a_wrong_gradient_gives_the_kernels_up_and_is_named(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def backward(*args: Any, **kwargs: Any) -> LayerTensors:
        clips, shared = whole.backward(*args, **kwargs)
        if name == "query":
            return LayerTensors(clips._replace(query=clips.query.roll(1, -1)), shared)
        return LayerTensors(clips, shared._replace(**{name: getattr(shared, name).roll(1, 0)}))

    monkeypatch.setattr(kernels, "backward", backward)
    with pytest.warns(RuntimeWarning, match=f"their gradient of {name} is not that of torch's operations"):
        assert not choice.are_proved(SETTING, make_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not choice.are_proved(SETTING, make_inputs())  # it is said once


def test_kernels_that_do_not_compile_are_given_up(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(kernels, "forward", forward)
    with pytest.warns(RuntimeWarning, match=r"\(RuntimeError: no such instruction\)"):
        assert not choice.are_proved(SETTING, make_inputs())


def test_tokens_that_are_much_alike_are_no_reason_to_give_the_kernels_up(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The query's gradient is a small difference of large numbers, of which rounding may not leave anything behind."""
    inputs = make_inputs(spread=0.03)
    exact = replace(SETTING, products=torch.float32)
    ours, expected = (
        choice._results(whole.forward, whole.backward, s, inputs)["gradient of query"]
        for s in (SETTING, exact)
    )
    assert choice._error(ours, expected) < choice.TOLERANCE[torch.bfloat16]

    def exactly(run: Any) -> Any:
        return lambda setting, *args, **kwargs: run(exact, *args, **kwargs)

    monkeypatch.setattr(kernels, "forward", exactly(whole.forward))
    monkeypatch.setattr(kernels, "backward", exactly(whole.backward))
    assert choice.are_proved(SETTING, inputs)


@pytest.mark.parametrize("changed", ["query", "table_prev", "taps"])
def test_what_is_zero_in_a_new_head_is_proved_too(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    """A new head's first query and its tables are zero: kernels that ignore them would give the right results."""
    clips, shared = make_inputs()
    new = LayerTensors(clips, SharedTensors(*(t if t is None else torch.zeros_like(t) for t in shared)))

    def without(run: Any) -> Any:
        def part(setting: Setting, few: LayerTensors, *args: Any, **kwargs: Any) -> Any:
            side = "clips" if changed == "query" else "shared"
            tensors = getattr(few, side)
            zeros = torch.zeros_like(getattr(tensors, changed))
            return run(setting, few._replace(**{side: tensors._replace(**{changed: zeros})}), *args, **kwargs)

        return part

    monkeypatch.setattr(kernels, "forward", without(whole.forward))
    monkeypatch.setattr(kernels, "backward", without(whole.backward))
    with pytest.warns(RuntimeWarning, match="are not used here"):
        assert not choice.are_proved(SETTING, new)


def test_features_that_are_not_finite_prove_nothing_either_way() -> None:
    inputs = make_inputs()
    assert inputs.clips.affine is not None
    broken = inputs._replace(clips=inputs.clips._replace(affine=inputs.clips.affine * torch.nan))
    assert not choice.are_proved(SETTING, broken)
    assert choice.are_proved(SETTING, inputs)


def test_want_of_memory_says_nothing_of_the_kernels(kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*args: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(kernels, "forward", forward)
    with pytest.raises(torch.OutOfMemoryError):
        choice.are_proved(SETTING, make_inputs())
    monkeypatch.setattr(kernels, "forward", whole.forward)
    assert choice.are_proved(SETTING, make_inputs())


def test_kernels_suit_plain_tensors_that_need_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_device_suits", lambda device: True)
    inputs = make_inputs()
    assert choice.suits(SETTING, inputs)
    floating = inputs.clips._replace(
        tokens=torch.randn(CLIPS, FRAMES, 1 + PATCHES, WIDTH, requires_grad=True)
    )
    assert not choice.suits(SETTING, inputs._replace(clips=floating))
    assert not choice.suits(replace(SETTING, products=torch.float32), inputs)  # without TF32
    with fake_cuda() as device:
        fake = inputs.clips._replace(
            tokens=torch.empty(CLIPS, FRAMES, 1 + PATCHES, WIDTH, dtype=torch.int8, device=device)
        )
        assert not choice.suits(SETTING, inputs._replace(clips=fake))
