"""What is done with servers that misbehave, in children: commands, and `epochs`. As a script: the process that forks them."""

import hashlib
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.forked_commands import run_command, serve_commands, take_streams

VALIDATED = "is validated"
ERRORS = "errors.jsonl"  # when each began, by the monotonic clock, and what it says


def epochs_digest(place: str | Path) -> str:
    """The digest of what a loader gives of a cache in two shuffled epochs."""
    from evl_cache.batches.feature_loader import FeatureLoader
    from evl_cache.store import FeatureCache

    cache = FeatureCache(place)
    digest = hashlib.sha256()
    loader = FeatureLoader(cache, np.arange(len(cache)), layers=(2, 4), batch=4, shuffle_seed=0)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            digest.update(np.asarray(batch.samples).tobytes())
    samples = np.flatnonzero(cache.is_valid).tolist()
    for tensors in cache.read(samples):
        for tensor in tensors or ():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _work(job: dict[str, Any]) -> None:
    """A command; or `epochs URL`, and `train ...` behind it where that ended well."""
    if copies := job["environment"].get("EVL_CACHE_COPY_ROOT"):
        _note_errors(Path(copies).with_name(ERRORS))
    if job["argv"][0] != "epochs":
        run_command(job)
        return
    take_streams(job)
    from evl_cache.errors import EvlCacheError
    from evl_cache_cli.main import main

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):  # as scripts do that tidy up
        signal.signal(number, end)
    _, place, *command = job["argv"]
    try:
        sys.stdout.write(f"{epochs_digest(place)}\n")
        sys.stdout.flush()
    except EvlCacheError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _mark_the_end_of(command)
    main(command)


def _note_errors(path: Path) -> None:
    """Note when each error of ours is made: to tell it takes a while longer."""
    from evl_cache.errors import EvlCacheError

    def init(self: EvlCacheError, *given: object) -> None:
        with path.open("a") as file:
            file.write(json.dumps([time.monotonic(), str(given[0])]) + "\n")

    EvlCacheError.__init__ = init  # type: ignore[method-assign, assignment]


def _mark_the_end_of(command: list[str]) -> None:
    """Leave a mark beside the run when its only epoch is trained and validated: nothing is left then but to write."""
    from evl_cache.train.trainer import Trainer

    real, mark = Trainer.end_epoch, Path(command[command.index("--out") + 1]).with_name(VALIDATED)

    def end_epoch(self: Trainer, *given: Any) -> None:
        mark.touch()
        real(self, *given)

    Trainer.end_epoch = end_epoch  # type: ignore[method-assign]


if __name__ == "__main__":
    serve_commands(_work)
