"""One process of several that extract one cache: `python -m benchmarks.support.extract_rank WORK`, a `RankWork` as JSON.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT say which one it is, as torchrun sets them.
"""

import json
import socket
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.memory_extraction import (
    StubTower,
    begin,
    blocks_written,
    frames_at_hand,
    frames_of,
    memory_job,
)
from evl_cache.extract.job import ExtractOptions
from evl_cache.processes import ProcessPlace, Rendezvous
from evl_cache.towers import build_tower


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """What every process is told.

    Attributes:
        folder: where the cache is, and the files by which they begin together.
        model: a tower with random weights; empty for a stub that costs nothing.
        clips: of the cache.
        decode_workers: None for as many as `extract` takes.
    """

    folder: str
    model: str
    clips: int
    batch: int
    device: str
    compute_dtype: str
    decode_workers: int | None


def main() -> None:
    """Extract this process's share, and print what it came to."""
    work = RankWork(**json.loads(sys.argv[1]))
    place = ProcessPlace.of_environment()
    device = device_of(work.device, place)
    tower = build_tower(work.model, "none") if work.model else None
    folder = Path(work.folder)
    job = memory_job(folder / "cache", tower=tower, clips=work.clips, compute_dtype=work.compute_dtype)
    given: dict[str, Any] = {"decode_workers": work.decode_workers} if work.decode_workers else {}
    options = ExtractOptions(device=device, batch=work.batch, **given)
    with ExitStack() as used:
        if tower is None:
            stub = StubTower(job.spec, device)
            stub.prepare(work.batch)
            used.enter_context(stub.in_use())
        used.enter_context(frames_at_hand(frames_of(job.spec.tower)))
        if place.is_first:
            begin(job)
        rendezvous = Rendezvous.of_environment(place)
        (folder / f"ready-{place.rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        is_gpu = torch.device(device).type == "cuda"
        found = blocks_written(
            job,
            options,
            rendezvous=rendezvous,
            after=(lambda: torch.cuda.synchronize(device)) if is_gpu else lambda: None,
        )
    print(json.dumps(asdict(found)))


def device_of(name: str, place: ProcessPlace) -> str:
    """This process's own GPU, or one that it shares where there are fewer than processes."""
    if name != "cuda":
        return name
    return f"cuda:{(place.local_rank or 0) % torch.cuda.device_count()}"


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as asked:
        asked.bind(("127.0.0.1", 0))
        return int(asked.getsockname()[1])


if __name__ == "__main__":
    main()
