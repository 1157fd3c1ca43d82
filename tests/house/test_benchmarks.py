"""Benchmarks and tools are run by hand: what they import must be there all the same, and variants of storage decode alike."""

import importlib
from collections.abc import Callable

import pytest
import torch

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
