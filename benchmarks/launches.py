"""Operations that a training step starts on a GPU, counted without one: `python -m benchmarks.launches --json`.

A step is forward, backward and AdamW, of every head and of the decoder's plain twin, in each precision, ViT-B/16 with 8
frames. An operation is started in about 6 microseconds, whatever its size, so a step of 1,000 takes at least 6 ms. Counted
on fake CUDA tensors: views and allocations start nothing, everything else counts once (an operation of torch may start
more than one kernel; benchmarks.device counts those on a card).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.support.fake_cuda import Counting, backward, fake_cuda
from evl_cache.heads import HEADS, EVLHead, PlainHead, SampleMasks, build_head, head_depth
from evl_cache.quantize import QuantizedMaps, QuantizedTokens, dequantize_maps, dequantize_tokens

FRAMES, GRID, WIDTH, CLASSES = 8, (14, 14), 768, 400
PATCHES = GRID[0] * GRID[1]
PRECISIONS: Mapping[str, torch.dtype | None] = {
    "float32": None,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def quantized(
    batch: int, layers: int, device: torch.device
) -> tuple[list[QuantizedTokens], list[QuantizedMaps]]:
    """Features as a cache holds them."""

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    tokens = [
        QuantizedTokens(
            codes=empty(batch, FRAMES, 1 + PATCHES, WIDTH, dtype=torch.int8),
            affine=empty(batch, 2, WIDTH, dtype=torch.float32),
            scale=empty(batch, FRAMES, 1 + PATCHES, dtype=torch.float16),
        )
        for _ in range(layers)
    ]
    rows = (batch, 2, FRAMES - 1, PATCHES)
    maps = [
        QuantizedMaps(
            codes=empty(*rows, PATCHES, dtype=torch.uint8), row_max=empty(*rows, dtype=torch.float16)
        )
        for _ in range(layers)
    ]
    return tokens, maps


def step_launches(name: str, precision: str, *, batch: int) -> Counting:
    """Count a training step.

    Args:
        name: of a head, with a number of layers for N; `plain_twin` is that of decoder4.
        precision: a key of `PRECISIONS`.
    """
    twin = name == "plain_twin"
    layers = head_depth(name := "decoder4" if twin else name) or 4
    with fake_cuda() as device, device:
        head: torch.nn.Module = build_head(
            name, num_layers=layers, width=WIDTH, num_frames=FRAMES, grid=GRID, num_classes=CLASSES
        )
        if twin:
            assert isinstance(head, EVLHead)
            with mock.patch.object(PlainHead, "to", lambda self, device: self):  # it is there already
                head = PlainHead(head)
        optimizer = torch.optim.AdamW(head.parameters(), lr=4e-4, weight_decay=0.05, fused=True)
        labels = torch.empty(batch, dtype=torch.int64, device=device)
        features, masks = quantized(batch, layers, device), SampleMasks(head)
        for counting in (
            Counting(),
            Counting(),
        ):  # the first makes what is kept, such as the optimiser's state
            with counting:
                _step(head, masks, *features, labels, optimizer, PRECISIONS[precision], plain=twin)
    return counting


def _step(
    head: torch.nn.Module,
    masks: SampleMasks,
    tokens: Sequence[QuantizedTokens],
    maps: Sequence[QuantizedMaps],
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype | None,
    *,
    plain: bool,
) -> None:
    inputs: tuple[Any, Any] = (tokens, maps)
    if plain:
        inputs = (
            [dequantize_tokens(t.codes, t.affine, t.scale) for t in tokens],
            [dequantize_maps(m.codes, m.row_max) for m in maps],
        )
    keys = torch.empty_like(labels)  # of samples, as a training has them
    with (
        masks.of(keys),
        torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        logits = head(*inputs)
    backward(F.cross_entropy(logits.float(), labels))
    optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result's JSON object alone")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--heads", nargs="+", default=[name.replace("N", "4") for name in HEADS])
    options = parser.parse_args(arguments)
    found = {
        f"{name}.{precision}": step_launches(name, precision, batch=options.batch)
        for name in [*options.heads, "plain_twin"]
        for precision in PRECISIONS
    }
    result = {
        **{name: counting.launches for name, counting in found.items()},
        "operations": {name: counting.operations for name, counting in found.items()},
        "batch": options.batch,
        "torch": str(torch.__version__),
    }
    if not options.json:
        print(__doc__)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
