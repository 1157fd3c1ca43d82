"""A training step from a cache against what one would do without it: `python -m benchmarks.train_step --json`.

ViT-B/16, 8 frames, decoder4, float32. A step is forward, backward and AdamW. Three sides, in one run:

- ours: the head, fed int8 tokens and uint8 maps as a cache holds them (and, beside it, float32 ones);
- plain twin: every key and value projected, maps made from q and k within the step, motion gathered from its
  table; fed float32 tokens, q and k, as one would save them;
- the frozen tower: forward pass of open_clip's ViT-B-16 with random weights, on as many frames.

Memory: growth of the peak between a step on one clip and a step on the batch, inputs included, for each clip
more; each side in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.support.machine import interleaved_seconds, machine, medians, peak_memory_bytes
from evl_cache.heads.decoder.evl import EVLHead
from evl_cache.heads.decoder.plain import PlainHead
from evl_cache.quantize import QuantizedMaps, QuantizedTokens

FRAMES, GRID, WIDTH, HEADS, CLASSES = 8, (14, 14), 768, 12, 400
PATCHES = GRID[0] * GRID[1]
SIDES = ("ours", "ours_float32", "plain_twin")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    batch: int
    layers: int


def quantized_features(sizes: Sizes) -> tuple[list[QuantizedTokens], list[QuantizedMaps]]:
    """Random codes, made as codes: a float copy would count as memory. Tokens have deviation 1, rows sum to 1."""
    tokens, maps = [], []
    for _ in range(sizes.layers):
        codes = torch.randint(-128, 128, (sizes.batch, FRAMES, 1 + PATCHES, WIDTH), dtype=torch.int8)
        affine = torch.tensor([1 / 74, 0.0])[:, None].expand(sizes.batch, 2, WIDTH).contiguous()
        scale = torch.ones(codes.shape[:-1], dtype=torch.float16)
        tokens.append(QuantizedTokens(codes=codes, affine=affine, scale=scale))
        map_shape = (sizes.batch, 2, FRAMES - 1, PATCHES, PATCHES)
        map_codes = torch.randint(0, 256, map_shape, dtype=torch.uint8)
        row_max = torch.full(map_shape[:-1], 3 / PATCHES, dtype=torch.float16)
        maps.append(QuantizedMaps(codes=map_codes, row_max=row_max))
    return tokens, maps


def float_features(sizes: Sizes) -> tuple[list[Tensor], list[Tensor]]:
    shape = (sizes.batch, FRAMES, 1 + PATCHES, WIDTH)
    map_shape = (sizes.batch, 2, FRAMES - 1, PATCHES, PATCHES)
    tokens = [torch.randn(shape) for _ in range(sizes.layers)]
    return tokens, [torch.rand(map_shape).mul_(2 / PATCHES) for _ in range(sizes.layers)]


def plain_maps(q: Tensor, k: Tensor) -> Tensor:
    """Adjacent-frame maps of all clips at once. q, k: (B, T, 1+P, H, D) -> (B, 2, T-1, P, P)."""
    q, k = q[:, :, 1:] * q.shape[-1] ** -0.5, k[:, :, 1:]
    prev = torch.einsum("btqhd,btkhd->bthqk", q[:, 1:], k[:, :-1]).softmax(-1).mean(2)
    following = torch.einsum("btqhd,btkhd->bthqk", q[:, :-1], k[:, 1:]).softmax(-1).mean(2)
    return torch.stack([prev, following], 1)


def step_of(
    head: nn.Module, batch: int, logits: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """One training step: forward, backward, AdamW."""
    optimizer = optimizer or torch.optim.AdamW(head.parameters(), lr=4e-4, weight_decay=0.05, fused=True)
    labels = torch.randint(0, CLASSES, (batch,))

    def step() -> None:
        F.cross_entropy(logits(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def new_head(layers: int) -> EVLHead:
    return EVLHead(num_layers=layers, width=WIDTH, num_frames=FRAMES, grid=GRID, num_classes=CLASSES)


def side_step(
    side: str, head: nn.Module, sizes: Sizes, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], None]:
    """A training step of one side, with inputs of its own."""
    if side == "plain_twin":
        shape = (sizes.batch, FRAMES, 1 + PATCHES, HEADS, WIDTH // HEADS)
        tokens, q, k = (
            [torch.randn(s) for _ in range(sizes.layers)]
            for s in ((sizes.batch, FRAMES, 1 + PATCHES, WIDTH), shape, shape)
        )

        def logits() -> Tensor:
            with torch.no_grad():
                maps = [plain_maps(*pair) for pair in zip(q, k, strict=True)]
            return head(tokens, maps)

        return step_of(head, sizes.batch, logits, optimizer)
    features = quantized_features(sizes) if side == "ours" else float_features(sizes)
    return step_of(head, sizes.batch, lambda: head(*features), optimizer)


def measure_memory(side: str, sizes: Sizes) -> float:
    """Peak bytes that each clip beyond the first adds to a training step, in this process."""
    head = new_head(sizes.layers)
    model = PlainHead(head) if side == "plain_twin" else head
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.05, fused=True)
    for _ in range(2):
        side_step(side, model, Sizes(batch=1, layers=sizes.layers), optimizer)()
    before = peak_memory_bytes()
    step = side_step(side, model, sizes, optimizer)
    for _ in range(2):
        step()
    return (peak_memory_bytes() - before) / (sizes.batch - 1)


def memory_of_sides(sizes: Sizes, threads: int) -> dict[str, float]:
    """Peak bytes a clip of each side, each measured in a process of its own."""
    peaks = {}
    for side in SIDES:
        arguments = ["--memory-of", side, "--batch", str(sizes.batch), "--layers", str(sizes.layers)]
        command = [sys.executable, "-m", "benchmarks.train_step", *arguments, "--threads", str(threads)]
        # Threads that wait asleep: memory is the same, and a busy machine takes minutes less.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        peaks[side] = float(done.stdout.splitlines()[-1])
    return peaks


def tower_forward(clips: int) -> Callable[[], None]:
    """The frozen tower's forward pass on the frames of some clips."""
    import open_clip

    visual = open_clip.create_model("ViT-B-16", pretrained=None).visual.eval()
    frames = torch.randn(clips * FRAMES, 3, 224, 224)

    def forward() -> None:
        with torch.no_grad():
            visual(frames)

    return forward


def measure(sizes: Sizes, *, rounds: int, tower_clips: int) -> dict[str, float]:
    """Median seconds a clip of every side."""
    head = new_head(sizes.layers)
    sides = {
        side: side_step(side, PlainHead(head) if side == "plain_twin" else head, sizes) for side in SIDES
    }
    seconds = medians(interleaved_seconds(sides | {"tower": tower_forward(tower_clips)}, rounds))
    return {
        name: value / (tower_clips if name == "tower" else sizes.batch) for name, value in seconds.items()
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print the result's JSON object alone")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tower-clips", type=int, default=2, help="clips that the frozen tower is timed on")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    sizes = Sizes(batch=options.batch, layers=options.layers)
    if options.memory_of:
        print(measure_memory(options.memory_of, sizes))
        return
    memory = memory_of_sides(sizes, options.threads)
    seconds = measure(sizes, rounds=options.rounds, tower_clips=options.tower_clips)
    result = {
        "vs_plain_twin": seconds["plain_twin"] / seconds["ours"],
        "vs_plain_twin_float32_inputs": seconds["plain_twin"] / seconds["ours_float32"],
        "vs_frozen_backbone_and_twin": (seconds["tower"] + seconds["plain_twin"]) / seconds["ours"],
        "memory_vs_plain_twin": memory["ours"] / memory["plain_twin"],
        "memory_vs_plain_twin_float32_inputs": memory["ours_float32"] / memory["plain_twin"],
        "ms_per_clip": {name: round(1e3 * value, 2) for name, value in seconds.items()},
        "peak_mb_per_clip": {name: round(value / 1e6, 2) for name, value in memory.items()},
        "batch": sizes.batch,
        "layers": sizes.layers,
        "machine": machine(),
    }
    if not options.json:
        print(__doc__)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
