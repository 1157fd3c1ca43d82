"""What must be right of whole trainings and extractions on a device: batches, memory, several processes, one line.

`benchmarks.device` runs these, and so do the tests in tests/gpu/; see `device_checks`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.support.device_caches import write_generated
from benchmarks.support.device_checks import features_for, stored_batch
from benchmarks.support.device_cli import ROOT, run_command
from benchmarks.support.device_features import new_decoder
from benchmarks.support.device_place import Place, Sizes
from benchmarks.support.device_runner import Skipped, Values
from benchmarks.support.device_towers import image_tower, model_of
from evl_cache.heads import HEADS, EVLHead, Head, LayerTokens
from evl_cache.runs import RunFile, head_logits
from evl_cache.store import FeatureCache
from evl_cache.sweep import RUNS_NAME, sweep
from evl_cache.sweep.grid import expand
from evl_cache.towers import Backbone
from evl_cache.train import TrainOptions, train
from evl_cache.train.batch_size import largest_on_gpu

_SAMPLES = 24
_RANKS_TIMEOUT_S = 120
STREAM_ROUNDS = 50  # a race shows now and then only


def small_sizes(place: Place) -> Sizes:
    """Sizes at which whole trainings take seconds: narrow, but with as many frames and patches."""
    side = min(place.sizes.grid)
    return replace(place.sizes, layers=2, grid=(side, side), classes=2)


def small_caches(place: Place) -> tuple[FeatureCache, FeatureCache]:
    """A training and a validation cache, written once."""
    folder = place.scratch / "checks"
    if not (folder / "val" / "manifest.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_generated(folder / "train", small_sizes(place), samples=_SAMPLES, distinct=_SAMPLES)
        write_generated(folder / "val", small_sizes(place), samples=4, split="val")
    return FeatureCache(folder / "train"), FeatureCache(folder / "val")


def options_of(place: Place, **changes: Any) -> TrainOptions:
    """A short training of a decoder, without dropout."""
    given = {"head": "decoder2", "epochs": 3, "batch": 4, "lr": 1e-3, "dropout": 0.0, "device": place.device}
    return TrainOptions(**{**given, **changes})


def trained(place: Place, name: str, **changes: Any) -> list[float]:
    """Train into a new run; return the loss of each step."""
    out = place.scratch / "checked-runs" / name
    shutil.rmtree(out, ignore_errors=True)
    train(*small_caches(place), options=options_of(place, **changes), out=out)
    return losses_of(out)


def losses_of(run: Path) -> list[float]:
    """The loss of each step of a run."""
    lines = (run / RunFile.STEPS).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


class ProbeHead(Head):
    """Notes a checksum of everything that it is given, while the device has much to do."""

    seen: list[Tensor] = []  # noqa: RUF012 - of all probes, so that a test finds it

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.bias = nn.Parameter(torch.zeros(self.num_classes))

    @property
    def reads_maps(self) -> bool:
        """Always."""
        return True

    def forward(self, tokens: Sequence[Any], maps: Sequence[Any] | None = None) -> Tensor:
        """Logits that depend on no feature."""
        sums = []
        for each in (*tokens, *(maps or ())):
            held = each.stored if isinstance(each, LayerTokens) else each
            for value in (held,) if isinstance(held, Tensor) else vars(held).values():
                sums += [checksum(value)] if isinstance(value, Tensor) else []
        device = self.bias.device
        if device.type == "cuda":
            busy = torch.ones(4096, 4096, device=device)
            for _ in range(8):
                busy = busy @ busy * 1e-4
        if self.training:
            ProbeHead.seen.append(torch.stack(sums))  # (stored arrays, B)
        return self.bias.expand(len(sums[0]), -1)


def checksum(values: Tensor) -> Tensor:
    """A number of each sample (B,) that any change of a bit or a place changes; the same on every device."""
    bits = values.contiguous().view(torch.uint8).flatten(1)
    places = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2654435761 % 2**31
    return (bits.to(torch.int64) * places).sum(1)


def batches_bit_for_bit(place: Place, keep_in: str | None) -> Iterator[Values]:
    """What a head is given in training on the device is what the same training on the CPU gives it."""
    seen = []
    for device, kept in ((place.device, keep_in), ("cpu", None)):
        ProbeHead.seen = []
        with mock.patch.dict(HEADS, {"probe": ProbeHead}):
            # A recorded step runs no code of a head.
            trained(place, "probe", head="probe", device=device, keep_in=kept, cuda_graph=False)
        seen.append([sums.cpu() for sums in ProbeHead.seen])
    ProbeHead.seen = []
    assert len(seen[0]) == len(seen[1]) > 0, f"{len(seen[0])} steps on the device, {len(seen[1])} on the CPU"
    wrong = [step for step, pair in enumerate(zip(*seen, strict=True)) if not torch.equal(*pair)]
    yield {"steps": len(seen[0])}
    assert not wrong, f"batches of steps {wrong} are others on the device"


def pinned_against_pageable(place: Place) -> Iterator[Values]:
    """Training from the pinned ring gives the losses of training from pageable memory, bit for bit."""
    pinned, again = (trained(place, name) for name in ("pinned", "pinned-again"))
    with pageable():
        plain = trained(place, "pageable")
    yield {"steps": len(pinned), "same_twice": pinned == again, "losses": [pinned[0], pinned[-1]]}
    assert pinned == again, "two equal trainings differ on this device, so nothing can be told of the ring"
    assert pinned == plain, "losses differ from those of pageable memory"


@contextmanager
def pageable() -> Iterator[None]:
    """Have no buffer pinned."""
    buffers = FeatureCache.buffers

    def plain(cache: FeatureCache, **arguments: Any) -> Any:
        return buffers(cache, **{**arguments, "pin_memory": False})

    with mock.patch.object(FeatureCache, "buffers", plain):
        yield


def kept_samples(place: Place) -> Iterator[Values]:
    """Samples kept in memory, of the computer or of the device, give the same losses as the disk."""
    found = {str(kept): trained(place, f"kept-{kept}", keep_in=kept) for kept in (None, "ram", "device")}
    yield {"steps": len(found["None"])}
    assert found["ram"] == found["None"], "losses differ where samples are kept in RAM"
    assert found["device"] == found["None"], "losses differ where samples are kept on the device"


def sweep_against_runs(place: Place) -> Iterator[Values]:
    """Each head of a sweep has the losses of a training of its own, but for rounding."""
    common = {"epochs": 2, "batch": 4, "lr": 1e-3, "device": place.device, "dropout": 0.0}
    runs = expand(
        [{"head": ["decoder2", "linear", "attentive"]}, {"head": "decoder1", "temporal": "none"}], common
    )
    out = place.scratch / "checked-sweep"
    shutil.rmtree(out, ignore_errors=True)
    result = sweep(*small_caches(place), runs=runs, out=out)
    assert [row.status for row in result.runs] == ["done"] * len(runs), [row.error for row in result.runs]
    worst = 0.0
    for run in runs:
        alone = place.scratch / "checked-runs" / f"alone-{run.name}"
        shutil.rmtree(alone, ignore_errors=True)
        train(*small_caches(place), options=run.options, out=alone)
        pairs = zip(losses_of(alone), losses_of(out / RUNS_NAME / run.name), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    yield {"heads": len(runs), "largest_loss_difference": worst}
    assert worst < 1e-3, f"losses differ by {worst}"


def one_process_wrapped(place: Place) -> Iterator[Values]:
    """Two steps under DistributedDataParallel, alone, are two steps without it."""
    backend = "nccl" if place.is_gpu else "gloo"
    sizes = small_sizes(place)
    features = stored_batch(sizes, 4, place.device)
    labels = torch.zeros(4, dtype=torch.int64, device=place.device)
    store = place.scratch / "rendezvous"
    store.unlink(missing_ok=True)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    try:
        results = []
        for wrapped in (False, True):
            head = new_decoder(sizes, place.device).eval()
            model: nn.Module = DistributedDataParallel(head) if wrapped else head
            optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
            part = features_for(head, features)
            for _ in range(2):
                torch.nn.functional.cross_entropy(head_logits(model, part), labels).backward()
                optimizer.step()
                optimizer.zero_grad()
            results.append({name: p.detach().clone() for name, p in head.named_parameters()})
    finally:
        dist.destroy_process_group()
    yield {"backend": backend}
    differing = [n for n, p in results[0].items() if not torch.allclose(p, results[1][n], atol=1e-6)]
    assert not differing, f"{differing[:3]} differ"


def two_processes_on_one_device(place: Place) -> Iterator[Values]:
    """Two processes that share a device take the steps of one."""
    caches, out = small_caches(place), place.scratch / "checked-runs" / "ranks"
    shutil.rmtree(out, ignore_errors=True)
    options = {"head": "decoder2", "steps": 4, "batch": 4, "lr": 1e-3, "dropout": 0.0, "device": place.device}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    arguments = [*(str(cache.path) for cache in caches), str(out), json.dumps(options)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.support.device_rank", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": "0", "PYTHONPATH": path},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=_RANKS_TIMEOUT_S)[1] for rank in ranks]
    last = [(text.strip().splitlines() or [""])[-1] for text in said]
    assert [rank.returncode for rank in ranks] == [0, 0], f"{[r.returncode for r in ranks]}: {last}"
    single = trained(place, "one", epochs=None, steps=4)
    worst = max(abs(a - b) for a, b in zip(losses_of(out), single, strict=True))
    yield {"largest_loss_difference": worst}
    assert worst < 1e-4, f"losses differ by {worst}"


def extraction_twice(place: Place) -> Iterator[Values]:
    """Two extractions of the same frames give the same bytes."""
    from benchmarks.support.device_extraction import extract_frames, frames_in_memory

    tower = image_tower(place, place.sizes.towers[0], dtype=torch.float16 if place.is_gpu else torch.float32)
    frames = frames_in_memory(place, tower, 5)
    dtype = "float16" if place.is_gpu else "float32"
    found = [
        extract_frames(place, tower, place.scratch / f"twice-{n}", frames, clips=70, dtype=dtype, batch=4)
        for n in range(2)
    ]
    yield {"clips": found[0].clips, "digest": found[0].digest[:16]}
    assert found[0].digest == found[1].digest, "digests differ"


def rows_on_a_stream_of_their_own(place: Place) -> Iterator[Values]:
    """Rows that are made beside the next batch are those that are made while nothing else runs, every time."""
    from benchmarks.support.device_extraction import extract_frames, frames_in_memory
    from benchmarks.support.memory_extraction import one_thing_at_a_time

    dtype, times = ("float16", STREAM_ROUNDS) if place.is_gpu else ("float32", 2)
    tower = image_tower(place, place.sizes.towers[0], dtype=getattr(torch, dtype))
    frames = frames_in_memory(place, tower, 5)

    def digest(name: str) -> str:
        return extract_frames(
            place, tower, place.scratch / f"stream-{name}", frames, clips=35, dtype=dtype, batch=3
        ).digest

    with one_thing_at_a_time():
        expected = digest("alone")
    for done in range(times):
        assert digest("beside") == expected, f"other bytes in round {done + 1}"
    yield {"rounds": times, "digest": expected[:16]}


def largest_batch_is_found(place: Place) -> Iterator[Values]:
    """`largest_on_gpu` finds a batch, and a smaller one in a process that may use less memory."""
    if not place.is_gpu:
        raise Skipped("needs a CUDA device")
    sizes = small_sizes(place)
    features = stored_batch(sizes, 1, place.device)
    total = torch.cuda.get_device_properties(0).total_memory
    found = []
    for gigabytes in (8, 2):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / total))
        build = lambda: new_decoder(sizes, "cpu")  # noqa: E731
        found.append(largest_on_gpu(build, features, options_of(place), cap=1 << 16))
        yield {f"within_{gigabytes}_gb": found[-1]}
    assert 0 < found[1] < found[0], found


def want_of_memory_is_one_line(place: Place, command: str) -> Iterator[Values]:
    """A command that finds no memory ends with status 1 and one line, without a traceback."""
    if place.is_gpu:
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, 0.2e9 / torch.cuda.get_device_properties(0).total_memory)
        )
    wants = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    # A CPU has memory: there the step itself says that it has none.
    with nullcontext() if place.is_gpu else _failing_for_want_of_memory(wants):
        status, _, said = run_command(*_greedy_command(place, command))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    yield {"exit_status": status, "said": errors}
    assert status == 1 and len(errors) == 1 and "Traceback" not in said, said[-500:]
    assert "out of memory" in errors[0] and "--batch" in errors[0], errors[0]


@contextmanager
def _failing_for_want_of_memory(error: Exception) -> Iterator[None]:
    with (
        mock.patch.object(EVLHead, "forward", side_effect=error),
        mock.patch.object(Backbone, "forward", side_effect=error),
    ):
        yield


def _greedy_command(place: Place, command: str) -> list[str]:
    if command == "train":
        caches, out = small_caches(place), place.scratch / "checked-runs" / "greedy"
        shutil.rmtree(out, ignore_errors=True)
        words = ["train", "--cache", caches[0].path, "--val-cache", caches[1].path, "--out", out]
        words += ["--head", "decoder2", "--steps", "1", "--batch", str(_SAMPLES), "--device", place.device]
        return [str(word) for word in words]
    from benchmarks.support.device_extraction import generated_videos

    folder = place.scratch / "greedy-videos"
    generated_videos(folder, count=4, frames=8)
    names = place.scratch / "greedy.txt"
    names.write_text("".join(f"{number:04d}.mp4 {number % 2}\n" for number in range(4)))
    model = model_of(place, place.sizes.towers[0])
    words = ["extract", "--dataset", "list", "--list", names, "--root", folder, "--pretrained", "none"]
    words += ["--model", model, "--layers", "2-3"]
    words += ["--frames", place.sizes.frames, "--stride", "1", "--device", place.device, "--batch", "64"]
    words += ["--cache", place.scratch / "greedy-cache", "--split", "train"]
    return [str(word) for word in words]
