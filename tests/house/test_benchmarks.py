"""Benchmarks and tools are run by hand: what they import must be there all the same, and variants of storage decode alike."""

import importlib
from collections.abc import Callable

import pytest
import torch

from benchmarks.precision import AttentionProbe, Shape, measure
from benchmarks.support.storage_variants import affine_tokens, grouped_int4
from tests.support.example_data import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "tools")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("module", MODULES)
def test_what_a_benchmark_or_a_tool_imports_is_there(module: str) -> None:
    importlib.import_module(module)


@pytest.mark.parametrize("variant", [affine_tokens, grouped_int4])
def test_frame_differences_of_a_storage_variant_are_exact(variant: Callable[..., object]) -> None:
    tokens = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
    plain, differences = (variant(tokens, difference=difference) for difference in (False, True))
    decoded = plain.decode(plain.arrays)  # type: ignore[attr-defined]
    assert torch.equal(differences.decode(differences.arrays), decoded)  # type: ignore[attr-defined]
    assert (decoded - tokens).norm() < 0.1 * tokens.norm()


def test_attention_weights_read_by_markers_are_those_of_the_plain_twin() -> None:
    shape = Shape(clips=2, frames=3, grid=(3, 2), width=48, heads=2, layers=2, classes=5, markers=16)
    probe = AttentionProbe(shape, torch.Generator().manual_seed(0))
    exact = probe.exact().flatten(2)
    assert exact.shape == (2, 3, 21) and probe.turns == 2
    torch.testing.assert_close(exact.sum(-1), torch.ones(2, 3))
    torch.testing.assert_close(probe.weights("float32").float(), exact, atol=1e-6, rtol=0)
    assert probe.error("float32") < 1e-5 < 1e-4 < probe.error("bfloat16") < 0.03


def test_errors_of_lower_precision_are_measured_against_float32() -> None:
    shape = Shape(clips=2, frames=2, grid=(2, 3), width=48, heads=2, layers=2, classes=5, markers=16)
    found = measure(shape, torch.device("cpu"))
    assert found["tf32"] is None
    bfloat16, float16 = found["bfloat16"], found["float16"]
    assert isinstance(bfloat16, dict) and isinstance(float16, dict)
    assert bfloat16.keys() == float16.keys() == {"maps", "attention_weights", "class_logits", "gradients"}
    for name, error in bfloat16.items():
        assert 0 < float16[name] < error < 0.1, name
