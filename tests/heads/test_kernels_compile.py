"""The kernels compile, as they are launched, for cards that need not be there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from evl_cache.heads.decoder.tensors import SharedTensors, StoredMaps, StoredTokens

pytest.importorskip("triton")

# Two programs fit in what a processor of an H100 has (227 KB), one in that of an A100 (163 KB).
SHARED_MEMORY_AT_MOST = 100 << 10


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What stands in for the two large kernels, by name; they compile into a folder of this test."""
    from evl_cache.heads.decoder.kernels import attention, positioned
    from tests.support.compiled_kernels import Launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    for module, name in ((positioned, "_positioned"), (attention, "_attend_split"), (attention, "_merge")):
        found[name] = Launches(getattr(module, name))
        monkeypatch.setattr(module, name, found[name])
    return found


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(clips: int, dtype: torch.dtype, *, differences: bool = False) -> None:
    """Launch all kernels with a ViT-B/16's tensors of 8 frames."""
    from evl_cache.heads.decoder.kernels.attention import attend
    from evl_cache.heads.decoder.kernels.positioned import positioned

    tokens = StoredTokens(
        tokens=empty(clips, 8, 197, 768, dtype=torch.int8),
        affine=empty(clips, 2, 768),
        token_scale=empty(clips, 8, 197, dtype=torch.float16),
    )
    maps = StoredMaps(
        maps=empty(clips, 2, 7, 196, 196, dtype=torch.uint8),
        row_max=empty(clips, 2, 7, 196, dtype=torch.float16),
    )
    shared = SharedTensors(empty(3, 768), empty(8, 768), empty(27 * 27, 768), empty(27 * 27, 768))
    y = positioned(tokens, maps, shared, (14, 14), dtype, differences=differences)
    attend(y, empty(clips, 12, 768), 1e-5)


@pytest.mark.parametrize(
    ("capability", "differences", "products"),
    [(90, False, ("wgmma.mma_async", "mma.sync")), (80, True, ("mma.sync", "mma.sync"))],
)
def test_kernels_compile_to_matrix_units_and_little_shared_memory(
    launches: dict[str, Any], capability: int, differences: bool, products: tuple[str, str]
) -> None:
    launch(256, torch.bfloat16, differences=differences)
    for name, product in zip(("_positioned", "_attend_split"), products, strict=True):
        kernel = launches[name].compiled(capability)
        assert product in kernel.asm["ptx"], name
        assert kernel.metadata.shared <= SHARED_MEMORY_AT_MOST, name


def test_kernels_compile_where_modules_are_off_and_nothing_is_coded(launches: dict[str, Any]) -> None:
    from evl_cache.heads.decoder.kernels.positioned import positioned

    tokens = StoredTokens(tokens=empty(2, 3, 5, 32), affine=None, token_scale=None)
    off = SharedTensors(None, None, None, None)
    tables = off._replace(table_prev=empty(9, 32), table_next=empty(9, 32))
    maps = StoredMaps(maps=empty(2, 2, 2, 4, 4, dtype=torch.float16), row_max=None)
    for shared in (off, off._replace(taps=empty(3, 32)), off._replace(shift=empty(3, 32)), tables):
        positioned(tokens, maps, shared, (2, 2), torch.float16)
        assert launches["_positioned"].compiled(80).asm["cubin"]


def test_every_clip_of_a_large_batch_has_programs(launches: dict[str, Any]) -> None:
    launch(3000, torch.bfloat16)  # 3.6 thousand million values: places pass 32 bits
    assert launches["_positioned"].grid == (188 * 197 * 6,)  # of 128 rows, one token, 128 channels
    assert launches["_attend_split"].grid == (3000,)
    assert launches["_merge"].grid == (3000 * 12 * 3,)  # of one head, 256 channels
