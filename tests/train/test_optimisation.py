"""The optimiser's kernels: fused where a GPU has them, states of either kind, and no step that waits for the device."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evl_cache.train.optimisation as module
from evl_cache.batches import FeatureLoader, samples_of_clips
from evl_cache.heads import build_head
from evl_cache.processes import Processes
from evl_cache.train.optimisation import Optimisation, StepRandom, takes_fused
from evl_cache.train.options import TrainOptions
from evl_cache.train.passes import Passes
from tests.support.feature_caches import write_cache

OPTIONS = TrainOptions(head="decoder2", epochs=3, batch=4, lr=3e-3, seed=5)
# What a host does to know a value of a device, for which it waits.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique2", "_unique2"}
HEADS = ("decoder2", "linear", "meanpool", "attentive", "mlap", "uniformerv2", "ladder")

pytestmark = pytest.mark.usefixtures("one_thread")


class Waits(TorchDispatchMode):
    """Notes what would have a host wait for its GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def small_head(name="decoder2", **changes):
    config = {"width": 16, "num_frames": 3, "grid": (2, 2), "num_classes": 3, "num_heads": 2, **changes}
    torch.manual_seed(0)
    return build_head(name, **config)


def take_steps(optimisation, steps):
    for step in steps:
        optimisation.begin(step)
        for number, parameter in enumerate(optimisation.head.parameters()):
            generator = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimisation.finish(step)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("caches") / "cache")


def test_a_cpu_keeps_torchs_own_choice():
    assert takes_fused(small_head()) is None
    (group,) = Optimisation(small_head(), OPTIONS, total_steps=3).optimizer.param_groups
    assert group["fused"] is None and group["foreach"] is None


@pytest.mark.parametrize(("before", "after"), [(None, True), (True, None), (True, True)])
def test_a_state_goes_on_with_the_kernels_of_the_device_it_is_loaded_on(monkeypatch, before, after):
    options = replace(OPTIONS, decay_norms_and_biases=False, ema=0.9)

    def made(fused):
        monkeypatch.setattr(module, "takes_fused", lambda head: fused)
        return Optimisation(small_head(), options, total_steps=9)

    whole, cut = made(None), made(before)
    take_steps(whole, range(6))
    take_steps(cut, range(3))
    resumed = made(after)
    resumed.load(cut.state())
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [after] * 2
    take_steps(resumed, range(3, 6))
    for mine, theirs in zip(resumed.head.parameters(), whole.head.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    steps = {float(state["step"]) for state in resumed.state()["optimizer"]["state"].values()}
    assert steps == {6.0}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "how",
    [
        {"precision": "bfloat16", "label_smoothing": 0.1},
        {"precision": "float16", "grad_clip": 1.0, "ema": 0.9, "accumulate": 2},
    ],
    ids=["plain", "everything"],
)
def test_no_step_waits_for_the_device(cache, monkeypatch, head, how):
    monkeypatch.setattr(module, "takes_fused", lambda head: True)
    options = replace(OPTIONS, head=head, **how)
    layers = {"attentive": (4,)}.get(head, (3, 4))
    loader = FeatureLoader(cache, samples_of_clips(cache, None), layers=layers, batch=4)
    optimisation = Optimisation(small_head(head, num_layers=len(layers)), options, total_steps=9)
    passes = Passes(optimisation.head, optimisation, options, Processes())
    with Waits() as waits:
        for step, batch in zip(range(2), loader.epoch(), strict=False):
            waits.found.clear()  # what a first step sets up may wait
            optimisation.begin(step)
            passes.run(batch, StepRandom(seed=0, step=step, rank=0))
            optimisation.finish(step)
    assert waits.found == []


def test_a_step_that_waits_is_noticed():
    optimisation = Optimisation(small_head(), replace(OPTIONS, precision="float16"), total_steps=9)
    optimisation.begin(0)
    optimisation.backward(sum(p.square().sum() for p in optimisation.head.parameters()))
    with Waits() as waits:
        optimisation.finish(0)  # without a fused kernel a scaler's step is left out by the host
    assert waits.found
