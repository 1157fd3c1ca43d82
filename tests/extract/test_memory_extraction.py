"""What `benchmarks.extract` measures: stage one whole, from frames in memory, and what is predicted of it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import extract as benchmark
from benchmarks.support.core_costs import CoreCosts, predicted_rate
from benchmarks.support.memory_extraction import (
    StubTower,
    begin,
    blocks_written,
    frames_at_hand,
    frames_of,
    memory_job,
)
from benchmarks.support.stored_features import VIT_B_16
from evl_cache.extract.job import ExtractionJob, ExtractOptions
from evl_cache.store import FeatureCache, finish_cache, sample_nbytes
from evl_cache.towers import Tower
from tests.support.example_data import ROOT

SMALL = Tower(visual=nn.Identity(), spec=replace(VIT_B_16, image_size=32, width=16, heads=2))


def stub_job(cache: Path, *, clips: int, block_clips: int) -> ExtractionJob:
    return memory_job(cache, tower=SMALL, clips=clips, block_clips=block_clips)


def test_a_stub_in_a_towers_place_makes_a_whole_cache(tmp_path: Path) -> None:
    digests = []
    for batch in (4, 4):
        job = stub_job(tmp_path / "cache", clips=10, block_clips=4)
        begin(job)
        with StubTower(job.spec, "cpu").in_use(), frames_at_hand(frames_of(SMALL.spec, distinct=2)):
            found = blocks_written(job, ExtractOptions(batch=batch))
        digests.append(finish_cache(job.cache_path, job.spec))
        assert found.samples == 10 and found.ended_s > found.began_s
        assert found.stages.keys() == {"decoding", "transfer", "device", "writing"}
    cache = FeatureCache(job.cache_path)
    assert not cache.failures and cache.spec.num_blocks == 3
    assert len(set(digests)) == 1


@pytest.mark.parametrize("batch", [64, 128, 256])
def test_a_batch_above_a_block_runs_no_more_samples_than_the_block_has(tmp_path: Path, batch: int) -> None:
    job = stub_job(tmp_path / "cache", clips=128, block_clips=64)
    begin(job)
    stub = StubTower(job.spec, "cpu")
    with stub.in_use(), frames_at_hand(frames_of(SMALL.spec, distinct=1)):
        blocks_written(job, ExtractOptions(batch=batch))
    assert stub.asked == [64, 64]


def test_a_stubs_features_have_the_shapes_of_the_tower_in_batches_of_any_size() -> None:
    spec = memory_job(Path("none"), tower=SMALL, clips=1).spec
    features = StubTower(spec, "cpu", distinct=2)(torch.empty(3, 8, 3, 32, 32))
    assert {tuple(tokens.shape) for tokens in features.tokens.values()} == {(3, 8, 5, 16)}
    assert {tuple(maps.shape) for maps in features.maps.values()} == {(3, 2, 7, 4, 4)}
    assert torch.equal(features.tokens[8][2], features.tokens[8][0])


def test_a_prediction_adds_up_what_cores_do() -> None:
    spec = memory_job(Path("none"), clips=64).spec
    raw, stored = sample_nbytes(spec)
    costs = CoreCosts(compress_mb_s=raw / 1e6 / 0.02, append_mb_s=stored / 1e6 / 0.01, disk_gb_s=100.0)
    rate, limit = predicted_rate(spec, costs, cores=2, rows_ms=10.0, device_s=1e-9, border_s=0.0)
    assert limit == "cores" and rate == pytest.approx(2 / 0.04)
    rate, limit = predicted_rate(spec, costs, cores=2, rows_ms=10.0, device_s=0.5, border_s=0.0)
    assert limit == "device" and rate == pytest.approx(2.0)


def test_what_is_measured_is_chosen_by_part() -> None:
    assert benchmark.parsed([]).parts == ["bare", "written"]
    assert benchmark.parsed(["--ranks", "2"]).parts == ["bare", "written", "ranks"]
    assert benchmark.parsed(["--parts", "estimate"]).parts == ["written", "estimate"]
    assert benchmark.parsed(["--device", "cuda"]).compute_dtype == "float16"
    with pytest.raises(SystemExit):
        benchmark.parsed(["--parts", "speed"])


@pytest.mark.soak
def test_processes_share_the_blocks_of_one_cache() -> None:
    words = "--parts ranks,padding --ranks 2 --blocks 1 --rounds 1 --json".split()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.extract", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["ranks_stub_samples_of_each"]) == 128 and found["ranks_stub_samples_per_s"] > 0
    assert found["padding_processor_s"].keys() == {"64", "128", "256"}
