"""What runs on a GPU, run on a fake one: wrong devices and dtypes, and waits for the device, are found without a card."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.support.device_checks import features_for, new_head, random_projection
from benchmarks.support.device_place import TINY
from evl_cache.heads import HEADS, PlainHead
from evl_cache.quantize import QuantizedMaps, QuantizedTokens, quantize_maps, quantize_tokens
from evl_cache.runs import head_logits
from evl_cache.store import Reads
from evl_cache.store.format.recomputed import ProjectionOnDevices, RecomputedMaps
from evl_cache.store.format.rows import StoredBatch
from evl_cache.sweep.shared_batch import SharedBatch
from evl_cache.train.batch_size import training_step
from evl_cache.train.options import TrainOptions
from tests.support.watched_cuda import watched_cuda

SIZES = replace(TINY, layers=4, classes=5)
BATCH = 3
DTYPES = [None, torch.bfloat16, torch.float16]
PRECISIONS = ["float32", "bfloat16", "float16"]


def features_of(layers: int) -> StoredBatch:
    """Codes of some layers, of arbitrary values, where new tensors are made."""
    B, T, P, C = BATCH, SIZES.frames, SIZES.patches, SIZES.width
    tokens = [
        QuantizedTokens(
            codes=torch.empty(B, T, 1 + P, C, dtype=torch.int8),
            affine=torch.empty(B, 2, C),
            scale=torch.empty(B, T, 1 + P, dtype=torch.float16),
        )
        for _ in range(layers)
    ]
    maps = [
        QuantizedMaps(
            codes=torch.empty(B, 2, T - 1, P, P, dtype=torch.uint8),
            row_max=torch.empty(B, 2, T - 1, P, dtype=torch.float16),
        )
        for _ in range(layers)
    ]
    class_tokens = [torch.empty(B, T, 1, C, dtype=torch.float16) for _ in range(layers)]
    return StoredBatch(tokens=list(tokens), maps=list(maps), class_tokens=list(class_tokens))


def autocast(dtype: torch.dtype | None) -> torch.autocast:
    return torch.autocast("cuda", dtype=dtype, enabled=dtype is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_the_plain_twin_stays_on_the_device(dtype: torch.dtype | None) -> None:
    with watched_cuda() as watched:
        twin = PlainHead(new_head("decoderN", SIZES))
        B, T, P = BATCH, SIZES.frames, SIZES.patches
        tokens = [torch.empty(B, T, 1 + P, SIZES.width) for _ in range(2)]
        maps = [torch.empty(B, 2, T - 1, P, P) for _ in range(2)]
        with autocast(dtype):
            logits = twin(tokens, maps)
        logits.float().sum().backward()
        watched.check()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", HEADS)
def test_a_training_step_stays_on_the_device_and_never_waits_for_it(name: str, precision: str) -> None:
    with watched_cuda() as watched, mock.patch("torch.amp.GradScaler._maybe_opt_step"):  # torch's own wait
        options = TrainOptions(steps=1, batch=4, precision=precision, grad_clip=1.0, device="cuda")
        head = new_head(name, SIZES)
        training_step(head, features_for(head, features_of(SIZES.layers)), options, batch=4)
        for parameter, value in head.named_parameters():
            assert value.grad is not None, parameter
            assert (value.grad.device.type, value.grad.dtype) == ("cuda", torch.float32), parameter
        watched.check()


@pytest.mark.parametrize("name", HEADS)
def test_scoring_stays_on_the_device(name: str) -> None:
    with watched_cuda() as watched, torch.no_grad():
        head = new_head(name, SIZES).eval()
        assert head_logits(head, features_for(head, features_of(SIZES.layers))).device.type == "cuda"
        watched.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_that_heads_share_is_decoded_on_the_device(dtype: torch.dtype | None) -> None:
    reads = Reads(layers=(1, 2, 3, 4), tokens="both")
    with watched_cuda() as watched:
        shared = SharedBatch(features_of(4), reads, products=dtype or torch.float32)
        for name in HEADS:
            head = new_head(name, SIZES)
            layers = reads.layers[-head.num_layers :]
            only_class = head.class_tokens_only
            own = replace(
                reads,
                layers=layers,
                with_maps=head.reads_maps and not only_class,
                tokens="class" if only_class else "all",
            )
            inputs = shared.inputs(own)
            with autocast(dtype):
                assert head(inputs.tokens, inputs.maps).device.type == "cuda", name
        watched.check()


@pytest.mark.parametrize("difference_in_devices", [False, True])
def test_maps_are_made_again_on_the_device(difference_in_devices: bool) -> None:
    held = ProjectionOnDevices(random_projection(SIZES))
    with watched_cuda() as watched:
        below = features_of(1).tokens[0]
        assert isinstance(below, QuantizedTokens)
        on_host = held.on(torch.device("cpu"))
        names = [name for name, value in vars(on_host).items() if isinstance(value, torch.Tensor)]
        there = {
            name: torch.empty(getattr(on_host, name).shape).to(getattr(on_host, name).dtype) for name in names
        }
        held._copies[below.codes.device] = replace(on_host, **there)
        if difference_in_devices:  # what is left on the processor is noticed
            held._copies[below.codes.device] = replace(on_host, **(there | {"bias": on_host.bias}))
            with pytest.raises((AssertionError, RuntimeError), match=r"FakeTensor|device"):
                RecomputedMaps(below=below, projection=held).made()
            return
        made = RecomputedMaps(below=below, projection=held).made()
        assert (made.device.type, made.dtype) == ("cuda", torch.float32)
        assert made.shape == (BATCH, 2, SIZES.frames - 1, SIZES.patches, SIZES.patches)
        watched.check()


def test_the_fake_device_notices_what_a_real_one_would() -> None:
    with watched_cuda() as watched:
        there = torch.empty(3)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(3, device="cpu")
        with pytest.raises(Exception, match="local_scalar_dense"):
            there.sum().item()
        there.double()
        there.cpu()
        assert watched.float64 and watched.to_host
        with pytest.raises(AssertionError):
            watched.check()


def test_a_gradient_on_another_device_is_an_error() -> None:
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return torch.ones(gradient.shape, device="cpu")

    with watched_cuda():
        x = torch.empty(3, requires_grad=True)
        with pytest.raises(AssertionError, match="cpu"):
            Wrong.apply(x).sum().backward()


def test_values_are_looked_at_once_where_rows_are_made() -> None:
    """What is quantised is checked to be finite, which waits for the device: that is known, and extraction's alone."""
    with watched_cuda():
        tokens = torch.empty(2, 4, 10, 16)
        for call in (quantize_tokens, quantize_maps):
            with pytest.raises(Exception, match="local_scalar_dense"):
                call(tokens.abs())
