"""Costs on paper: operations as torch counts them, what limits a run, the tables of docs/scale.md, the command."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip.transformer
import pytest
import torch
from click.testing import CliRunner
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evl_cache.errors import UsageError
from evl_cache.extract.cluster_costs import Assumptions, cluster_costs, forward_tflop
from evl_cache.spec import CacheSpec, ViewSpec
from evl_cache.store.format.size import sample_nbytes
from evl_cache_cli.main import cli
from tools import scale_tables


def spec(**changes: Any) -> CacheSpec:
    return replace(scale_tables.specs("K400", "B/16", 8)[0], **changes)


def test_operations_are_those_that_torch_counts() -> None:
    with torch.device("meta"):
        tower = open_clip.transformer.VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=768)
    with FlopCounterMode(display=False) as counted, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        tower(torch.empty(8, 3, 224, 224, device="meta"))
    projection = 8 * 2 * 768 * 768  # of the class token, which is not kept
    expected = (counted.get_total_flops() - projection) / 1e12
    assert forward_tflop(spec(maps="none")) == pytest.approx(expected, rel=1e-6)


def test_blocks_after_the_last_one_kept_and_maps_that_are_not_stored_cost_nothing() -> None:
    half, maps = spec(layers=(3, 4, 5, 6), maps="none"), spec()
    assert forward_tflop(half) == pytest.approx(forward_tflop(spec(maps="none")) / 2, rel=0.01)
    # 7 pairs, 2 directions, 196 x 196 queries and keys of 768 channels, 4 layers; multiplication and addition
    assert forward_tflop(maps) - forward_tflop(spec(maps="none")) == pytest.approx(
        7 * 2 * 196**2 * 768 * 2 * 4 / 1e12
    )


ONE_SECOND = {  # a device, a core, a link and a disk that need one second a sample each
    "device_tflops": forward_tflop(spec()),
    "decode_ms": 500.0,
    "compress_mb_s": sample_nbytes(spec())[0] / 1e6 / 0.25,
    "append_mb_s": sample_nbytes(spec())[1] / 1e6 / 0.25,
    "cores_per_device": 1.0,
    "link_gb_s": sample_nbytes(spec())[0] / 1e9,
    "border_s": 0.0,
    "devices_per_node": 4.0,
    "network_gbit_s": sample_nbytes(spec())[1] * 8 / 1e9,
    "disk_gb_s": (sample_nbytes(spec())[1] + 1e6) / 1e9,
    "video_mb": 1.0,
}


@pytest.mark.parametrize(
    ("slower", "devices", "hours"),
    [
        ({"device_tflops": 0.5}, 1, 2.0),
        ({"device_tflops": 0.125}, 8, 1.0),
        ({"cores_per_device": 0.25}, 2, 2.0),
        ({"link_gb_s": 0.5}, 1, 2.0),
        ({"network_gbit_s": 0.5}, 2, 2.0),  # one node
        ({"network_gbit_s": 0.125}, 8, 4.0),  # two nodes
        ({"disk_gb_s": 0.5}, 8, 2.0),  # one for all
    ],
)
def test_the_slowest_stage_is_the_time_and_is_named(
    slower: dict[str, float], devices: int, hours: float
) -> None:
    (name, factor), names = *slower.items(), {"device_tflops": "device", "cores_per_device": "cores"}
    assumed = Assumptions(**{**ONE_SECOND, name: ONE_SECOND[name] * factor})
    costs = cluster_costs(spec(num_clips=3600, block_clips=1), devices, assumed)
    assert costs.total_hours == pytest.approx(hours)
    assert costs.limited_by == names.get(name, name.split("_")[0])
    assert costs.device_hours == pytest.approx(3600 * costs.tflop_a_sample / assumed.device_tflops / 3600)
    assert costs.bytes_written == 3600 * sample_nbytes(spec())[1] and costs.bytes_read == 3600 * 10**6
    moved = costs.bytes_read + costs.bytes_written
    assert costs.disk_gb_s == pytest.approx(moved / 1e9 / (hours * 3600))
    nodes = max(1, devices / 4)
    assert costs.network_gbit_s == pytest.approx(costs.bytes_written * 8 / 1e9 / nodes / (hours * 3600))


@pytest.mark.parametrize(
    ("name", "stage", "factor"),
    [("decode_ms", "decoding", 2.0), ("compress_mb_s", "compressing", 0.5), ("append_mb_s", "writing", 0.5)],
)
def test_what_cores_do_is_told_apart_and_adds_up(name: str, stage: str, factor: float) -> None:
    usual, slower = (
        cluster_costs(spec(), 1, Assumptions(**{**ONE_SECOND, name: ONE_SECOND[name] * by}))
        for by in (1, factor)
    )
    assert slower.core_hours_of[stage] == pytest.approx(2 * usual.core_hours_of[stage])
    others = usual.core_hours_of.keys() - {stage}
    assert all(slower.core_hours_of[other] == usual.core_hours_of[other] for other in others)
    assert slower.core_hours == pytest.approx(sum(slower.core_hours_of.values()))
    assert slower.hours["cores"] - usual.hours["cores"] == pytest.approx(usual.core_hours_of[stage])


def test_a_cache_that_is_not_compressed_costs_no_compressing() -> None:
    assert cluster_costs(spec(codec="raw"), 1, Assumptions()).core_hours_of["compressing"] == 0


def test_devices_wait_at_a_caches_borders_once_however_many_blocks_it_has() -> None:
    without, few, many = (
        cluster_costs(
            spec(num_clips=clips, block_clips=1), 4, Assumptions(**{**ONE_SECOND, "border_s": wait})
        )
        for clips, wait in ((3600, 0.0), (3600, 36.0), (36_000, 36.0))
    )
    assert few.border_hours == many.border_hours == pytest.approx(0.01)
    assert few.total_hours == pytest.approx(without.total_hours + 0.01)
    assert many.total_hours == pytest.approx(10 * without.total_hours + 0.01)


def test_devices_take_whole_blocks() -> None:
    # 10 blocks for 4 devices: one makes 3 of them, and 9 of them have 64 samples
    costs = cluster_costs(spec(num_clips=580), 4, Assumptions(**ONE_SECOND))
    assert costs.hours["device"] * 3600 == pytest.approx(3 * 64)
    assert costs.device_hours * 3600 == pytest.approx(580)
    alone = cluster_costs(spec(num_clips=580), 1, Assumptions(**ONE_SECOND))
    assert alone.hours["device"] * 3600 == pytest.approx(580)


def test_every_view_is_a_sample_and_a_clip_is_decoded_once() -> None:
    views = ViewSpec(frames=8, temporal_views=3)
    one, three = (
        cluster_costs(spec(num_clips=100, views=v), 1, Assumptions()) for v in (ViewSpec(frames=8), views)
    )
    assert three.device_hours == pytest.approx(3 * one.device_hours)
    assert three.bytes_written == 3 * one.bytes_written and three.bytes_read == one.bytes_read


@pytest.mark.parametrize(
    "text", ["speed=3", "device_tflops", "device_tflops=fast", "disk_gb_s=0", "disk_gb_s=nan"]
)
def test_an_assumption_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--assume"):
        Assumptions.parse([text])


def test_the_tables_of_the_page_are_what_the_code_says() -> None:
    page = scale_tables.PATH.read_text(encoding="utf-8")
    assert scale_tables.tables() in page, "run python -m tools.scale_tables --write"
    for name in asdict(Assumptions()):
        assert f"`{name}`" in page.split(scale_tables.BEGIN)[0]


def test_estimate_tells_a_cluster_and_what_was_assumed(work: Path) -> None:
    arguments = "estimate --dataset k400 --split val --cluster 64 --assume device_tflops=100".split()
    told = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert told.exit_code == 0
    assert "64 devices, on paper: " in told.output and "limited by " in told.output
    assert "assumed, not measured: device_tflops=100, decode_ms=80" in told.output
    report = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    (row,) = report["caches"]
    assert row["cluster"]["devices"] == 64 and row["cluster"]["bytes_written"] == row["expected_bytes"]
    assert report["assumed"]["device_tflops"] == 100
    without = json.loads(CliRunner().invoke(cli, [*arguments[:-4], "--json"]).stdout)
    assert without["caches"][0]["cluster"] is None and "assumed" not in without
    refused = CliRunner().invoke(cli, arguments[:-4] + arguments[-2:])
    assert isinstance(refused.exception, UsageError) or "--cluster" in refused.output
