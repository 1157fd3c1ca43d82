"""A training step starts few operations on a GPU, counted on fake CUDA tensors."""

import json

import pytest
import torch

from benchmarks import launches
from benchmarks.support.fake_cuda import Counting, backward, fake_cuda

# Of a step in bfloat16, when they were first counted; ten of them make the masks of dropout. Other versions of torch may cast
# a little more.
OTHERS = {"linear": 41, "meanpool": 41, "attentive": 359, "mlap": 408, "uniformerv2": 482, "ladder": 538}
SLACK = 1.1


@pytest.mark.parametrize("precision", launches.PRECISIONS)
def test_a_step_of_four_decoder_layers_starts_at_most_1000_operations(precision: str) -> None:
    assert launches.step_launches("decoder4", precision, batch=256).launches <= 1000


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_head_starts_more_than_it_did(name: str) -> None:
    assert launches.step_launches(name, "bfloat16", batch=256).launches <= SLACK * OTHERS[name]


def test_the_walk_of_the_graph_gives_what_torchs_engine_gives() -> None:
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    x = torch.randn(5, 3)
    gradients = []
    for run in (backward, torch.Tensor.backward):
        layers.zero_grad()
        y = layers(x)
        run((y * y.detach().cos() + layers[0].weight.mean()).sum())
        gradients.append([p.grad.clone() for p in layers.parameters() if p.grad is not None])
    for ours, engines in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, engines)
    assert len(gradients[0]) == 6


def test_views_and_allocations_start_nothing() -> None:
    with fake_cuda() as device, Counting() as counting:
        x = torch.empty(4, 6, device=device)
        x.view(2, 12).t()[1:]
        assert counting.launches == 0
        assert counting.operations == 4
        x.add_(1)
        assert counting.launches == 1


def test_json_has_every_head_in_every_precision(capsys: pytest.CaptureFixture[str]) -> None:
    launches.main(["--json", "--heads", "linear", "meanpool"])
    found = json.loads(capsys.readouterr().out)
    for name in ("linear", "meanpool", "plain_twin"):
        for precision in ("float32", "bfloat16", "float16"):
            assert 0 < found[f"{name}.{precision}"] < found["operations"][f"{name}.{precision}"]
