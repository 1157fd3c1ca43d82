"""Readers of a cache that grows. As a script: processes that read, and compare, until they are told to stop.

It imports once and forks, so that a reader costs next to nothing; see `Readers`.
"""

import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evl_cache.batches.feature_loader import FeatureLoader
from evl_cache.store import FeatureCache
from tests.support.warm_python import warm_python

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Seen:
    """What one reader saw: samples read, how often the cache had grown, samples valid at the end, its error."""

    reads: int
    growths: int
    valid_at_end: int
    error: str


def write_expected(cache: FeatureCache, path: Path) -> None:
    """Features of every valid sample, for readers to compare with: tokens and maps of all layers, float32."""
    rows = np.flatnonzero(cache.is_valid)
    tokens, maps = cache.read(rows.tolist())
    assert maps is not None
    arrays = {f"tokens{i}": value.numpy() for i, value in enumerate(tokens)}
    np.savez(path, rows=rows, **arrays, **{f"maps{i}": value.numpy() for i, value in enumerate(maps)})


class Readers:
    """Several processes that read a cache at random until `stop`.

    A third keeps the cache open and looks again, a third opens it anew each time, a third reads by a training loader.
    """

    def __init__(self, cache: Path, expected: Path, folder: Path, *, count: int) -> None:
        self._stop, self._folder, self._count = folder / "stop", folder, count
        self._stop.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            [warm_python(), __file__, str(cache), str(expected), str(folder), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "ready"

    def stop(self) -> list[Seen]:
        """Each reader looks once more, at everything there is, and ends."""
        self._stop.touch()
        assert self._process.stdout is not None
        with self._process.stdout:
            assert self._process.wait(timeout=120) == 0
        return [Seen(**json.loads((self._folder / f"{n}.json").read_text())) for n in range(self._count)]


class _Reader:
    def __init__(self, cache: Path, expected: Path, seed: int) -> None:
        with np.load(expected) as arrays:
            self._row_of = {int(row): place for place, row in enumerate(arrays["rows"])}
            self._tokens = [torch.from_numpy(arrays[n]) for n in sorted(arrays) if n.startswith("tokens")]
            self._maps = [torch.from_numpy(arrays[n]) for n in sorted(arrays) if n.startswith("maps")]
        self._path, self._random, self._seed = cache, random.Random(seed), seed
        self._cache: FeatureCache | None = None
        self.reads = self.growths = self.valid = 0

    def look(self) -> None:
        """Read some of what is there; raises where anything is not as expected."""
        if not (self._path / "zarr.json").exists():
            return
        opens_anew, by_loader = self._seed % 3 == 1, self._seed % 3 == 2
        if self._cache is None or opens_anew:
            if self._cache is not None:
                self._cache.close()
            self._cache = FeatureCache(self._path)
        else:
            self._cache.refresh()
        rows = np.flatnonzero(self._cache.is_valid)
        assert len(rows) >= self.valid, "a block is gone again"
        self.growths += len(rows) > self.valid
        self.valid = len(rows)
        if not len(rows):
            return
        if by_loader:
            self._epoch(rows)
        else:
            self._compare(self._random.choices(rows.tolist(), k=min(4, len(rows))))

    def everything(self) -> None:
        """Look, and read all there is."""
        self.look()
        assert self._cache is not None
        self._compare(np.flatnonzero(self._cache.is_valid).tolist())

    def _compare(self, rows: list[int]) -> None:
        assert self._cache is not None
        self._check(rows, *self._cache.read(rows))

    def _epoch(self, rows: np.ndarray) -> None:
        assert self._cache is not None
        loader = FeatureLoader(
            self._cache, rows, layers=self._cache.spec.layers, batch=4, shuffle_seed=self._seed
        )
        for batch in loader.epoch(self.reads):
            self._check(batch.samples.tolist(), *batch.features.dequantized())

    def _check(self, rows: list[int], tokens: list[torch.Tensor], maps: list[torch.Tensor] | None) -> None:
        places = [self._row_of[row] for row in rows]
        found, expected = [*tokens, *(maps or [])], [*self._tokens, *self._maps]
        assert len(found) == len(expected)
        assert all(torch.equal(a, b[places]) for a, b in zip(found, expected, strict=True)), rows
        self.reads += len(rows)


def _read(reader: _Reader, stop: Callable[[], bool], report: Path) -> None:
    error = ""
    try:
        while not stop():
            reader.look()
            time.sleep(0.1)
        reader.everything()
    except BaseException:
        error = traceback.format_exc()
    seen: dict[str, Any] = {"reads": reader.reads, "growths": reader.growths, "valid_at_end": reader.valid}
    report.write_text(json.dumps(seen | {"error": error}))


def main() -> None:
    cache, expected, folder, count = *map(Path, sys.argv[1:4]), int(sys.argv[4])
    torch.set_num_threads(1)
    children = []
    for number in range(count):
        pid = os.fork()
        if pid == 0:
            reader = _Reader(cache, expected, seed=number)
            _read(reader, (folder / "stop").exists, folder / f"{number}.json")
            os._exit(0)
        children.append(pid)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for pid in children:
        assert os.waitpid(pid, 0)[1] == 0


if __name__ == "__main__":
    main()
