"""What runs on a GPU, run on a fake one: wrong devices and dtypes, and waits for the device, are found without a card."""

from dataclasses import replace
from unittest import mock

import pytest
import torch

from benchmarks.support.device_checks import features_for, new_head, random_projection, stored_batch
from benchmarks.support.device_place import TINY
from evl_cache.heads import HEADS, Head
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.quantize import QuantizedMaps, QuantizedTokens, quantize_maps, quantize_tokens
from evl_cache.runs import head_logits
from evl_cache.store import Reads
from evl_cache.store.format.recomputed import ProjectionOnDevices, RecomputedMaps
from evl_cache.store.format.rows import StoredBatch
from evl_cache.sweep.shared_batch import SharedBatch
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.options import PRECISIONS, TrainOptions
from tests.support.fake_cuda import Watched, backward, fake_cuda, on_cuda, walkable

SIZES = replace(TINY, layers=4, classes=5)
BATCH = 3
DTYPES = [None, torch.bfloat16, torch.float16]


def empty_batch(layers: int) -> StoredBatch:
    """Codes of some layers on the fake device."""
    B, T, P, C = BATCH, SIZES.frames, SIZES.patches, SIZES.width

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="cuda")

    tokens = [
        QuantizedTokens(
            codes=empty(B, T, 1 + P, C, dtype=torch.int8),
            affine=empty(B, 2, C, dtype=torch.float32),
            scale=empty(B, T, 1 + P, dtype=torch.float16),
        )
        for _ in range(layers)
    ]
    maps = [
        QuantizedMaps(
            codes=empty(B, 2, T - 1, P, P, dtype=torch.uint8),
            row_max=empty(B, 2, T - 1, P, dtype=torch.float16),
        )
        for _ in range(layers)
    ]
    class_tokens = [empty(B, T, 1, C, dtype=torch.float16) for _ in range(layers)]
    return StoredBatch(tokens=list(tokens), maps=list(maps), class_tokens=list(class_tokens))


def fake_head(name: str) -> tuple[Head, StoredBatch]:
    """A head and its features on the fake device."""
    with torch.device("meta"):
        head = new_head(name, SIZES)
    return on_cuda(head), features_for(head, empty_batch(SIZES.layers))


def check_gradients(head: Head) -> None:
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device.type, parameter.grad.dtype) == ("cuda", torch.float32), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_a_step_of_a_head_stays_on_the_device_and_never_waits_for_it(
    name: str, dtype: torch.dtype | None
) -> None:
    with fake_cuda() as watched:
        head, features = fake_head(name)
        labels = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        watched.to_host.clear()
        logits = head_logits(head.train(), features, dtype)
        assert (logits.device.type, logits.dtype, logits.shape) == ("cuda", torch.float32, (BATCH, 5))
        torch.nn.functional.cross_entropy(logits, labels).backward()
        check_gradients(head)
        check_clean(watched)


def check_clean(watched: Watched) -> None:
    assert watched.operations and watched.float64 == [] and watched.to_host == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_of_the_plain_twin_does_too(dtype: torch.dtype | None) -> None:
    with torch.device("meta"):
        twin = PlainHead(new_head("decoderN", SIZES))
    with fake_cuda() as watched:
        features = empty_batch(2)
        assert features.maps is not None
        tokens, maps = (
            [torch.empty(part.codes.shape, device="cuda") for part in parts]  # type: ignore[union-attr]
            for parts in (features.tokens, features.maps)
        )
        with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
            logits = on_cuda(twin)(tokens, maps)
        logits.float().sum().backward()
        check_clean(watched)


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "float16"])
def test_the_optimiser_takes_its_step_on_the_device(precision: str) -> None:
    options = TrainOptions(
        head="decoder4", steps=1, batch=BATCH, precision=precision, ema=0.9, grad_clip=1.0, device="cuda"
    )
    with fake_cuda() as watched:
        head, features = fake_head("decoderN")
        labels = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        with mock.patch("copy.deepcopy", return_value=fake_head("decoderN")[0]):
            optimisation = Optimisation(head, options, total_steps=1)
        optimisation.begin(0)
        logits = head_logits(head.train(), features, PRECISIONS[precision])
        optimisation.backward(torch.nn.functional.cross_entropy(logits, labels))
        watched.to_host.clear()
        optimisation.finish(0)
        assert all(p.device.type == "cuda" for p in head.parameters())
        assert watched.float64 == []


@pytest.mark.parametrize("name", HEADS)
def test_scoring_stays_on_the_device(name: str) -> None:
    with fake_cuda() as watched, torch.no_grad():
        head, features = fake_head(name)
        watched.to_host.clear()
        assert head_logits(head.eval(), features).device.type == "cuda"
        check_clean(watched)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_batch_that_heads_share_is_decoded_on_the_device(dtype: torch.dtype | None) -> None:
    reads = Reads(layers=(1, 2, 3, 4), tokens="both")
    with fake_cuda() as watched:
        features = empty_batch(SIZES.layers)
        watched.to_host.clear()
        shared = SharedBatch(features, reads, products=dtype or torch.float32)
        heads = {name: fake_head(name)[0] for name in HEADS}
        for name, head in heads.items():
            own = replace(
                reads, layers=reads.layers[-head.num_layers :], with_maps=head.reads_maps, tokens="all"
            )
            if head.class_tokens_only:
                own = replace(own, with_maps=False, tokens="class")
            inputs = shared.inputs(own)
            assert head_logits(head, inputs, dtype).device.type == "cuda", name
        check_clean(watched)


def test_maps_are_made_again_on_the_device() -> None:
    projection = random_projection(SIZES)
    with fake_cuda() as watched:
        tokens = empty_batch(1).tokens[0]
        assert isinstance(tokens, QuantizedTokens)
        tensors = {name: value for name, value in vars(projection).items() if torch.is_tensor(value)}
        there = replace(
            projection,
            **{name: torch.empty(v.shape, dtype=v.dtype, device="cuda") for name, v in tensors.items()},
        )
        held = ProjectionOnDevices(there)
        held._copies[tokens.codes.device] = there
        watched.to_host.clear()
        made = RecomputedMaps(below=tokens, projection=held).made()
        P = SIZES.patches
        assert (made.device.type, made.dtype) == ("cuda", torch.float32)
        assert made.shape == (BATCH, 2, SIZES.frames - 1, P, P)
        check_clean(watched)


def test_the_fake_device_notices_what_a_real_one_would() -> None:
    with fake_cuda() as watched:
        there = torch.empty(3, device="cuda")
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(3)
        with pytest.raises(Exception, match="local_scalar_dense"):
            there.sum().item()
        there.double()
        there.cpu()
        assert watched.float64 and watched.to_host


def test_gradients_walked_node_by_node_are_those_of_the_engine() -> None:
    torch.manual_seed(0)
    head = new_head("decoderN", SIZES)
    features = features_for(head, stored_batch(SIZES, BATCH, "cpu"))
    labels = torch.arange(BATCH)
    found = []
    for walk in (torch.Tensor.backward, backward):
        torch.manual_seed(1)  # dropout
        head.zero_grad()
        with walkable():
            walk(torch.nn.functional.cross_entropy(head_logits(head, features), labels))
        found.append({name: parameter.grad for name, parameter in head.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_nothing_is_quantised_without_a_look_at_its_values() -> None:
    """Rows are checked to be finite, which waits for the device: each sample once a kind, no more."""
    with fake_cuda():
        tokens = torch.empty(2, 4, 10, 16, device="cuda")
        for call in (quantize_tokens, quantize_maps):
            with pytest.raises(Exception, match="local_scalar_dense"):
                call(tokens.abs())
