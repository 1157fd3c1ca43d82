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
from benchmarks.support.core_costs import CoreCosts, predicted_rate, rows_ms
from benchmarks.support.memory_extraction import (
    StubTower,
    Written,
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


@pytest.mark.parametrize(
    ("blocks", "layers"), [(24, (20, 21, 22, 23, 24)), (12, (8, 9, 10, 11, 12)), (3, (1, 2, 3))]
)
def test_a_job_has_the_last_layers_of_its_tower(blocks: int, layers: tuple[int, ...]) -> None:
    """Of a ViT-L/14, the passes of half the tower would be measured otherwise, with `--ranks` too."""
    tower = Tower(visual=nn.Identity(), spec=replace(VIT_B_16, blocks=blocks))
    assert memory_job(Path("none"), tower=tower, clips=1).spec.layers == layers


def noted(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> list[ExtractionJob]:
    """Have runs over blocks end at once, in so many seconds by their own clock; their jobs are noted."""
    jobs: list[ExtractionJob] = []

    def run(job: ExtractionJob, options: ExtractOptions, **_: object) -> Written:
        jobs.append(job)
        took = seconds if len(jobs) > 1 else 100 * seconds
        return Written(
            samples=job.spec.num_samples, began_s=5.0, ended_s=5.0 + took, processor_s=1.0, stages={}
        )

    monkeypatch.setattr(benchmark, "blocks_written", run)
    return jobs


def test_the_share_of_the_bare_pass_goes_by_the_time_of_the_blocks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = noted(monkeypatch, seconds=0.5)
    monkeypatch.setattr(benchmark, "begin", lambda job: None)
    monkeypatch.setattr(benchmark.os, "sync", lambda: None)
    words = "--model evl-tiny --clips 6 --batch 2 --rounds 1".split()
    found = benchmark.bare(benchmark.parsed(words), tmp_path)
    assert found["ours_clips_per_s"] == pytest.approx(6 / 0.5)
    assert found["vs_bare_forward"] == pytest.approx(12 / found["bare_clips_per_s"])
    assert [job.spec.num_blocks for job in jobs] == [2, 2]


def test_the_bare_pass_has_two_blocks_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = noted(monkeypatch, seconds=0.5)
    monkeypatch.setattr(benchmark, "begin", lambda job: None)
    monkeypatch.setattr(benchmark.os, "sync", lambda: None)
    found = benchmark.bare(benchmark.parsed("--model evl-tiny --rounds 1".split()), tmp_path)
    assert found["blocks_of_bare"] == jobs[0].spec.num_blocks == 2


def test_passes_of_the_bare_tower_are_those_of_the_blocks() -> None:
    assert benchmark.passes_of(16, 8, 8) == [8, 8]
    assert benchmark.passes_of(17, 8, 4) == [4, 4, 4, 4, 1]
    assert benchmark.passes_of(130, 64, 32) == [32, 32, 32, 32, 2]


def test_a_prediction_takes_nothing_from_the_run_that_it_is_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = CoreCosts(compress_mb_s=1e6, append_mb_s=1e6, disk_gb_s=1e3)
    monkeypatch.setattr(benchmark, "core_costs", lambda scratch: costs)
    monkeypatch.setattr(benchmark, "rows_ms", lambda spec, device, batch: 10.0)
    monkeypatch.setattr(benchmark.os, "sched_getaffinity", lambda pid: {0, 1})
    measured = {"samples_per_s_written": 50.0, "samples_per_s_written_raw_processor_s_a_sample": 1e3}
    found = benchmark.estimate(benchmark.parsed(["--parts", "estimate"]), tmp_path, measured)
    assert found["predicted_written"]["samples_per_s"] == pytest.approx(200.0, rel=0.1)
    assert found["predicted_written"]["measured_vs_predicted"] == pytest.approx(0.25, rel=0.1)


def test_rows_are_measured_alone() -> None:
    spec = memory_job(Path("none"), tower=SMALL, clips=1).spec
    assert 0 < rows_ms(spec, "cpu", batch=4, rounds=1) < 1e3


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
