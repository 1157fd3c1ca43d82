"""`evl-cache estimate`."""

from dataclasses import asdict
from typing import Any

import click

from .common import Command, default_device, human_bytes, print_json
from .extract import dataset_options, make_options, make_request

EXAMPLES = """
evl-cache estimate --dataset folder --root clips --layers 8-12
evl-cache estimate --dataset folder --root clips --measure --json
"""


@click.command(cls=Command, name="estimate", examples=EXAMPLES)
@dataset_options
@click.option("--measure", is_flag=True, help="Also run a few clips, for time and real bytes.")
@click.option("--json", "as_json", is_flag=True, help="Report as JSON.")
def command(measure: bool, as_json: bool, **given: Any) -> int:
    """What extract with the same options would cost: clips, bytes, files; nothing is kept."""
    from evl_cache.estimate import estimate

    found = estimate(
        make_request(given), options=make_options(given, default_device(given["device"])), measure=measure
    )
    if as_json:
        print_json({"caches": [asdict(row) for row in found]})
        return 0
    for row in found:
        click.echo(
            f"{row.split}: {row.clips} clips, {row.samples} samples, {row.files} files, about "
            f"{human_bytes(row.expected_bytes)} ({human_bytes(row.raw_bytes)} before the codec) -> {row.cache}"
        )
        if row.measured_bytes is not None and row.measured_seconds is not None:
            click.echo(
                f"  measured on a few clips: {human_bytes(row.measured_bytes)}, {row.measured_seconds / 3600:.2f} h"
            )
    return 0
