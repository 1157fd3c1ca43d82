"""Maps made in batches: clip by clip on a CPU with the bits that they always had, in few launches on a GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import evl_cache.attention_maps as module
from evl_cache.attention_maps import MapProjection, maps_from_tokens, parts_of, patch_maps, projection_nbytes
from evl_cache.quantize import QuantizedTokens, dequantize_tokens, quantize_tokens
from evl_cache.store.format.recomputed import ProjectionOnDevices, RecomputedMaps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H100_NBYTES = 79 << 30
NO_LAUNCH = {"device", "empty", "new_empty", "_unsafe_view"}


class Launches(TorchDispatchMode):
    """Counts what a GPU would be given: every operation but views."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.count += not is_view and func.overloadpacket.__name__ not in NO_LAUNCH
        return func(*args, **(kwargs or {}))


def projection(channels, heads, device="cpu"):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    return MapProjection(
        norm_weight=make(channels),
        norm_bias=make(channels),
        norm_eps=1e-5,
        weight=make(2 * channels, channels),
        bias=make(2 * channels),
        num_heads=heads,
    )


def clip_by_clip(q, k):
    """The maps of `patch_maps` made one clip, direction and frame at a time."""
    B, T, P, _, D = q.shape
    maps = q.new_empty(B, 2, T - 1, P, P)
    for clip in range(B):
        scaled, keys = q[clip].transpose(1, 2) * D**-0.5, k[clip].permute(0, 2, 3, 1)  # (T,H,P,D), (T,H,D,P)
        for direction, (mine, theirs) in enumerate(((scaled[1:], keys[:-1]), (scaled[:-1], keys[1:]))):
            scores = torch.matmul(mine, theirs)
            maps[clip, direction] = torch.softmax(scores, dim=-1, dtype=torch.float32).mean(dim=1)
    return maps


@pytest.fixture
def several_at_once(monkeypatch):
    """A CPU works on several clips at a time, as a GPU does; returns how many clips each part had."""
    sizes, real = [], parts_of

    def parts(clips, *, device, clip_nbytes):
        found = real(clips, device=torch.device("meta"), clip_nbytes=clip_nbytes)
        sizes.append([part.stop - part.start for part in found])
        return found

    monkeypatch.setattr(module, "parts_of", parts)
    monkeypatch.setattr("evl_cache.store.format.recomputed.parts_of", parts)
    return sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 5, 2, 4), (2, 3, 49, 5, 16), (1, 8, 4, 3, 64)])
def test_a_cpu_makes_the_bits_of_one_clip_at_a_time(shape, dtype):
    torch.manual_seed(0)
    q, k = torch.randn(*shape[:2], 1 + shape[2], 2, *shape[3:]).to(dtype)[:, :, 1:].unbind(3)
    assert torch.equal(patch_maps(q, k), clip_by_clip(q, k))


def test_several_clips_at_a_time_are_the_same_maps(several_at_once, monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3, 9, 2, 8).unbind(0)
    one_nbytes = module._attention_nbytes(q.shape, 4)
    for clips, sizes in ((1, [1] * 7), (3, [2, 2, 3]), (9, [7])):
        monkeypatch.setattr(module, "_device_nbytes", lambda device, clips=clips: clips * one_nbytes)
        torch.testing.assert_close(patch_maps(q, k), clip_by_clip(q, k), atol=1e-6, rtol=0)
        assert several_at_once.pop() == sizes


def test_recomputed_maps_are_those_of_every_clip_alone(several_at_once, monkeypatch):
    torch.manual_seed(0)
    tokens, made_by = torch.randn(5, 3, 10, 16), projection(16, 2)
    coded = quantize_tokens(tokens, token_scale=True)
    alone = [
        maps_from_tokens(
            dequantize_tokens(*(t[i : i + 1] for t in (coded.codes, coded.affine, coded.scale))), made_by
        )
        for i in range(5)
    ]
    monkeypatch.setattr(module, "_device_nbytes", lambda device: 2 * projection_nbytes(tokens.shape, 2))
    several_at_once.clear()
    made = RecomputedMaps(below=coded, projection=ProjectionOnDevices(made_by)).made()
    assert several_at_once[0] == [1, 2, 2]
    torch.testing.assert_close(made, torch.cat(alone), atol=1e-6, rtol=0)


def test_a_cpu_works_on_one_clip_and_a_device_on_what_memory_is_for(monkeypatch):
    monkeypatch.setattr(module, "_device_nbytes", lambda device: 100)
    assert parts_of(3, device=CPU, clip_nbytes=1) == [slice(0, 1), slice(1, 2), slice(2, 3)]
    assert parts_of(10, device=CUDA, clip_nbytes=30) == [slice(0, 2), slice(2, 5), slice(5, 7), slice(7, 10)]
    assert parts_of(2, device=CUDA, clip_nbytes=1000) == [slice(0, 1), slice(1, 2)]
    assert parts_of(0, device=CUDA, clip_nbytes=1) == parts_of(0, device=CPU, clip_nbytes=1) == []


def made_on_a_gpu(batch, device_nbytes, monkeypatch):
    """Launches that the maps of one layer of ViT-B/16 take on a device with so much memory."""
    monkeypatch.setattr(module, "_device_nbytes", lambda device: module._DEVICE_SHARE * device_nbytes)
    with FakeTensorMode(), Launches() as launches:
        codes = torch.empty(batch, 8, 197, 768, dtype=torch.int8, device=CUDA)
        affine = torch.empty(batch, 2, 768, device=CUDA)
        scale = torch.empty(batch, 8, 197, dtype=torch.float16, device=CUDA)
        below = QuantizedTokens(codes=codes, affine=affine, scale=scale)
        made_by = ProjectionOnDevices(projection_on(CUDA))
        launches.count = 0
        made = RecomputedMaps(below=below, projection=made_by).made()
        assert made.shape == (batch, 2, 7, 196, 196) and made.dtype == torch.float32 and made.is_cuda
    return launches.count


def projection_on(device):
    shapes = {"norm_weight": (768,), "norm_bias": (768,), "weight": (1536, 768), "bias": (1536,)}
    tensors = {name: torch.empty(*shape, device=device) for name, shape in shapes.items()}
    return MapProjection(norm_eps=1e-5, num_heads=12, **tensors)


def test_a_gpu_is_given_few_launches(monkeypatch):
    layers = 4
    assert layers * made_on_a_gpu(128, H100_NBYTES, monkeypatch) < 100
    assert layers * made_on_a_gpu(256, H100_NBYTES, monkeypatch) < 200
    small = made_on_a_gpu(256, 16 << 30, monkeypatch)
    assert layers * small < 1000


def test_what_a_clip_takes_is_reckoned_high_enough():
    # ViT-B/16, 8 frames, float32: what is held at once, by hand.
    values, attention = 8 * 197 * 768, 7 * 12 * 196 * 196
    by_hand = 4 * (5 * values + 2 * 7 * 196 * 768 + 2 * attention)
    assert projection_nbytes((8, 197, 768), 12) == by_hand
