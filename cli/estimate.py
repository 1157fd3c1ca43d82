"""`evl-cache estimate`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from evl_cache.extract_options import Role, options_with

from .common import Command, default_device, human_bytes, print_json, say
from .extract_flags import decoding_of, extract_flags, make_request, say_read

if TYPE_CHECKING:
    from evl_cache.extract.cluster_costs import ClusterCosts

EXAMPLES = """
evl-cache estimate --dataset folder --root clips --layers 8-12
evl-cache estimate --dataset folder --root clips --measure --json
evl-cache estimate --dataset k400 --layers 9-12 --cluster 64 --assume device_tflops=150
"""


@click.command(cls=Command, name="estimate", examples=EXAMPLES)
@extract_flags(options_with(Role.ESTIMATE))
@click.option("--measure", is_flag=True, help="Also run a few clips, for time and real bytes.")
@click.option(
    "--cluster", type=click.IntRange(1), metavar="N", help="Also: hours and disk of N GPUs, worked out."
)
@click.option(
    "--assume",
    "assumed",
    multiple=True,
    metavar="NAME=VALUE",
    help="Of these: device_tflops, decode_ms, … (docs/scale.md).",
)
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(
    device: str | None, batch: int | None, decode_workers: int | None, decoder: str, tolerate_bad_frames: bool,
    clip_timeout: float | None, measure: bool, cluster: int | None, assumed: tuple[str, ...], as_json: bool,
    **given: Any,
) -> int:  # fmt: skip
    """What extract with the same options would cost: clips, bytes, files; nothing is kept."""
    from evl_cache.errors import UsageError
    from evl_cache.extract import ExtractOptions
    from evl_cache.extract.cluster_costs import Assumptions
    from evl_cache.extract.estimate import estimate

    if assumed and cluster is None:
        raise UsageError("--assume is of --cluster N; give both")
    assumptions = Assumptions.parse(assumed)
    device = default_device(device)
    options = ExtractOptions(
        device=device,
        batch=batch,
        decode_workers=decode_workers,
        **decoding_of(device, decoder, tolerate_bad_frames, clip_timeout),
    )
    found = estimate(
        make_request(given, pixels=options.decoding.pixels),
        options=options,
        measure=measure,
        cluster=cluster,
        assumed=assumptions,
        on_read=say_read,
    )
    if as_json:
        report: dict[str, object] = {"caches": [asdict(row) for row in found]}
        print_json(report if cluster is None else report | {"assumed": asdict(assumptions)})
        return 0
    for row in found:
        say(
            f"{row.split}: {row.clips} clips, {row.samples} samples, {row.files} files, about "
            f"{human_bytes(row.expected_bytes)} ({human_bytes(row.raw_bytes)} before the codec) -> {row.cache}"
        )
        if row.measured_bytes is not None and row.measured_seconds is not None:
            say(
                f"  measured on a few clips: {human_bytes(row.measured_bytes)}, {row.measured_seconds / 3600:.2f} h"
            )
        if row.cluster is not None:
            _say_cluster(row.cluster)
    if cluster is not None:
        named = ", ".join(f"{name}={value:g}" for name, value in asdict(assumptions).items())
        say(f"assumed, not measured: {named}")
    return 0


def _say_cluster(costs: ClusterCosts) -> None:
    stages, of_cores = (
        ", ".join(f"{name} {hours:.2f} h" for name, hours in of.items())
        for of in (costs.hours, costs.core_hours_of)
    )
    say(
        f"  {costs.devices} devices, on paper: {costs.device_hours:.1f} device-hours, {costs.core_hours:.1f} core-hours "
        f"({of_cores}); {costs.total_hours:.2f} h, limited by {costs.limited_by} ({stages})"
    )
    say(
        f"  rates then: disk {costs.disk_gb_s:.2f} GB/s, a node's network {costs.network_gbit_s:.2f} Gbit/s; "
        f"reading all of it once: {costs.epoch_hours:.2f} h of that disk"
    )
