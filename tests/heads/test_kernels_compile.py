"""Tokens with position compile, as they are launched, whatever is off and however tokens and maps are stored."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evl_cache.heads.decoder.tensors import SharedTensors, StoredMaps, StoredTokens

pytest.importorskip("triton")

OFF = SharedTensors(None, None, None, None)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


FLOATING = StoredTokens(tokens=empty(2, 3, 5, 32), affine=None, token_scale=None)
CODES = empty(2, 3, 5, 32, dtype=torch.int8)
CODED = StoredTokens(tokens=CODES, affine=empty(2, 2, 32), token_scale=None)
SCALED = StoredTokens(tokens=CODES, affine=empty(2, 2, 32), token_scale=empty(2, 3, 5, dtype=torch.float16))
TABLES = OFF._replace(table_prev=empty(9, 32), table_next=empty(9, 32))
ALL = TABLES._replace(taps=empty(3, 32), shift=empty(3, 32))


@pytest.mark.parametrize(
    ("tokens", "shared"),
    [
        pytest.param(FLOATING, OFF, id="floating, all off"),
        pytest.param(FLOATING, ALL, id="floating, all on"),
        pytest.param(CODED, OFF._replace(taps=ALL.taps), id="no token scale, convolution alone"),
        pytest.param(SCALED, OFF._replace(shift=ALL.shift), id="position alone"),
        pytest.param(SCALED, TABLES, id="motion alone"),
    ],
)
def test_tokens_with_position_compile(
    tokens: StoredTokens, shared: SharedTensors, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from evl_cache.heads.decoder.kernels import positioned
    from tests.support.compiled_kernels import Launches

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = Launches(positioned._positioned)
    monkeypatch.setattr(positioned, "_positioned", launches)
    maps = StoredMaps(maps=empty(2, 2, 2, 4, 4, dtype=torch.float16), row_max=None)
    positioned.positioned(tokens, maps, shared, (2, 2), torch.float16)
    assert launches.compiled(80).asm["cubin"]
