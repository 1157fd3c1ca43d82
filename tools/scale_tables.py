"""The tables of docs/scale.md: `python -m tools.scale_tables --write`.

Arithmetic of `evl_cache.extract.cluster_costs` for published data sets and towers; nothing is measured.
"""

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from evl_cache.extract.cluster_costs import Assumptions, cluster_costs, forward_tflop
from evl_cache.spec import CacheSpec, TowerSpec, ViewSpec
from evl_cache.store.format.size import sample_nbytes

PATH = Path(__file__).resolve().parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- tables: python -m tools.scale_tables --write -->", "<!-- end of tables -->"
DEVICES = (1, 8, 64)
# Clips of the train and validation splits, as published; and whether every block is read, as for SSv2 is published.
DATA_SETS = {
    "K400": (240_436, 19_796, False),
    "K700": (545_317, 35_000, False),
    "SSv2": (168_913, 24_777, True),
}
# Pixels, patch, width, blocks, heads.
TOWERS = {
    "B/16": (224, 16, 768, 12, 12),
    "L/14": (224, 14, 1024, 24, 16),
    "L/14@336": (336, 14, 1024, 24, 16),
}
FRAMES = (8, 32)
_LAST = 4  # blocks of a decoder4
_VALIDATION_VIEWS = 3


def specs(data_set: str, tower: str, frames: int) -> list[CacheSpec]:
    """The caches of the train split, one view a clip, and of the validation split, three."""
    train, validation, all_blocks = DATA_SETS[data_set]
    size, patch, width, blocks, heads = TOWERS[tower]
    tower_spec = TowerSpec(
        model=tower, pretrained="none", weights_sha256="0" * 64, image_size=size, patch_size=patch, width=width,
        blocks=blocks, heads=heads, quick_gelu=True, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0),
    )  # fmt: skip
    first = 1 if all_blocks else blocks - _LAST + 1
    return [
        CacheSpec(
            dataset=data_set, split=split, classes=("any",), tower=tower_spec,
            views=ViewSpec(frames=frames, temporal_views=views), layers=tuple(range(first, blocks + 1)), tokens="int8",
            maps="uint8", codec="default", compute_dtype="float16", num_clips=clips, content_id="0" * 64,
            block_clips=64 // views,
        )
        for split, clips, views in (("train", train, 1), ("val", validation, _VALIDATION_VIEWS))
    ]  # fmt: skip


def tables() -> str:
    """What stands between BEGIN and END."""
    return "\n".join([BEGIN, "", *_assumptions(), "", *_sizes(), "", *_times(), "", END])


def _assumptions() -> Iterator[str]:
    yield "| assumed (`--assume`) | |"
    yield "|---|---|"
    for name, value in asdict(Assumptions()).items():
        yield f"| `{name}` | {value:g} |"


def _sizes() -> Iterator[str]:
    yield "| | frames | layers kept | a sample | its forward pass | samples | bytes |"
    yield "|---|---|---|---|---|---|---|"
    for data_set, tower, frames in _cases():
        both = specs(data_set, tower, frames)
        samples = sum(spec.num_samples for spec in both)
        stored = sample_nbytes(both[0])[1]
        yield (
            f"| {data_set}, {tower} | {frames} | {len(both[0].layers)} | {stored / 1e6:.1f} MB "
            f"| {forward_tflop(both[0]):.2f} TFLOP | {samples:,} | {samples * stored / 1e12:.2f} TB |"
        )


def _times() -> Iterator[str]:
    yield (
        "| | frames | device-hours | "
        + " | ".join(f"{devices} device{'s' * (devices > 1)}" for devices in DEVICES)
        + " | disk, at most | a node's network, at most |"
    )
    yield "|---|---|---|" + "---|" * len(DEVICES) + "---|---|"
    for data_set, tower, frames in _cases():
        found = [
            [cluster_costs(spec, devices, Assumptions()) for spec in specs(data_set, tower, frames)]
            for devices in DEVICES
        ]
        cells = [f"{sum(costs.total_hours for costs in both):.1f} h, {both[0].limited_by}" for both in found]
        yield (
            f"| {data_set}, {tower} | {frames} | {sum(costs.device_hours for costs in found[0]):,.1f} | "
            f"{' | '.join(cells)} | {max(costs.disk_gb_s for both in found for costs in both):.2f} GB/s "
            f"| {max(costs.network_gbit_s for both in found for costs in both):.1f} Gbit/s |"
        )


def _cases() -> Iterator[tuple[str, str, int]]:
    return ((data_set, tower, frames) for data_set in DATA_SETS for tower in TOWERS for frames in FRAMES)


def main() -> None:
    page = PATH.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    made = before + tables() + rest.split(END)[1]
    if "--write" in sys.argv[1:]:
        PATH.write_text(made, encoding="utf-8")
    elif made != page:
        sys.exit(f"{PATH} is not current: run python -m tools.scale_tables --write")


if __name__ == "__main__":
    main()
