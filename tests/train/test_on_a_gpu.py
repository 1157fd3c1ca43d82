"""Training on a GPU: losses read late, recorded steps, fused AdamW, against the same training taken plainly."""

import json
import math
from dataclasses import replace

import pytest
import torch

from evl_cache.errors import EvlCacheError
from evl_cache.runs.directory import load_state
from evl_cache.train.optimisation import Optimisation
from evl_cache.train.passes import Passes
from evl_cache.train.stage import TrainOptions, train
from tests.support.feature_caches import write_pair

OPTIONS = TrainOptions(head="decoder2", epochs=4, batch=4, lr=3e-3, seed=5, device="cuda", cuda_graph=False)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("caches"))


def run(caches, out, **how):
    losses, said = {}, []
    train(
        *caches,
        options=replace(OPTIONS, **how),
        out=out,
        on_step=lambda done, total, loss: losses.update({done: loss}),
        on_note=said.append,
    )
    return losses, said


@pytest.mark.parametrize("keep_in", [None, "device"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("head", ["decoder2", "mlap"])
def test_a_recorded_training_is_the_training(caches, tmp_path, head, precision, keep_in):
    how = {"head": head, "precision": precision, "keep_in": keep_in, "grad_clip": 1.0, "ema": 0.9}
    plain, _ = run(caches, tmp_path / "plain", **how)
    recorded, said = run(caches, tmp_path / "recorded", cuda_graph=True, **how)
    assert said == []
    assert list(recorded) == list(plain) == list(range(1, 17))
    tolerance = 1e-4 if precision == "float32" else 3e-2
    assert list(recorded.values()) == pytest.approx(list(plain.values()), rel=tolerance)


def test_the_losses_are_nearly_those_of_a_cpu(caches, tmp_path):
    gpu, _ = run(caches, tmp_path / "gpu", dropout=0.0)
    cpu, _ = run(caches, tmp_path / "cpu", dropout=0.0, device="cpu")
    assert list(gpu.values())[:4] == pytest.approx(list(cpu.values())[:4], rel=1e-3)


def test_a_step_that_cannot_be_recorded_is_trained_without(caches, tmp_path, monkeypatch):
    plain, _ = run(caches, tmp_path / "plain")
    real = Passes.take

    def waits(self, *args, **more):
        loss = real(self, *args, **more)
        assert math.isfinite(loss.item())
        return loss

    monkeypatch.setattr(Passes, "take", waits)
    found, said = run(caches, tmp_path / "recorded", cuda_graph=True)
    assert len(said) == 1 and said[0].startswith("no CUDA graph of the step, training goes on without")
    assert list(found.values()) == pytest.approx(list(plain.values()), rel=1e-4)  # dropout too is as it was


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_divergence_is_noticed_before_anything_of_it_is_saved(caches, tmp_path, monkeypatch, cuda_graph):
    real = Optimisation.finish

    def breaks(self, step):
        real(self, step)
        if step == 11:
            torch.nn.init.constant_(self.head.classifier.bias, math.nan)

    monkeypatch.setattr(Optimisation, "finish", breaks)
    with pytest.raises(EvlCacheError, match="are NaN or infinite after step 12: training diverged"):
        run(caches, tmp_path / "run", save_every_steps=1, cuda_graph=cuda_graph)
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "steps.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 12))
    assert load_state(tmp_path / "run")["progress"]["step"] == 11


class Killed(Exception):
    pass


@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")])
def test_a_state_of_one_device_goes_on_on_another(caches, tmp_path, before, after):
    def die(done, total, loss):
        if done == 7:
            raise Killed

    options = replace(OPTIONS, dropout=0.0, save_every_steps=1)
    whole, _ = run(caches, tmp_path / "whole", dropout=0.0, device="cpu")
    with pytest.raises(Killed):
        train(*caches, options=replace(options, device=before), out=tmp_path / "cut", on_step=die)
    losses = {}
    train(
        *caches,
        options=replace(options, device=after),
        out=tmp_path / "cut",
        resume=True,
        on_step=lambda done, total, loss: losses.update({done: loss}),
    )
    assert min(losses) == 7 and max(losses) == 16
    assert losses[7] == pytest.approx(whole[7], rel=1e-2)
