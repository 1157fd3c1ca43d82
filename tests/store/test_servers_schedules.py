"""Servers that misbehave by seed: a pull or a training ends in equal bytes or one true line, in time, and obeys signals.

The suite runs a few seeds, `make soak` the three hundred. A failure names its seed, and `EVL_CACHE_SERVER_SCHEDULE=SEED` runs it
alone.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import bad_server_jobs
from tests.support.bad_server_jobs import epochs_digest
from tests.support.bad_server_runs import Schedules, Sources, words
from tests.support.feature_caches import write_cache
from tests.support.forked_commands import Commands
from tests.support.servers import KEYS, s3_server

pytest.importorskip("urllib3", reason="no urllib3 here: pip install 'evl-cache[remote]'")

from evl_cache.caches.share import push

FEW = 4  # of each kind, in the suite
BATCH = 25  # seeds a test
ALL = 300
ONLY = os.environ.get("EVL_CACHE_SERVER_SCHEDULE")


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    forked = Commands(tmp_path_factory.mktemp("jobs"), script=bad_server_jobs.__file__)
    yield forked
    forked.close()


@pytest.fixture(scope="module")
def sources(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("sources")
    write_cache(root / "a", failed=(3,))
    write_cache(root / "v", labels=(0, 1, 2, 2, 1), split="val", prefix="v", seed=1)
    for name in ("a", "v"):
        shutil.rmtree(root / name / "locks")
    out = tmp_path_factory.mktemp("undisturbed")
    ended = commands.run(*words("train", str(root), out))
    assert ended.status == 0, ended
    digest, head = ended.stdout.split("\n", 1)[0], (out / "run" / "head.safetensors").read_bytes()
    assert digest == epochs_digest(root / "a")
    return Sources(root=root, features=digest, head=head)


@pytest.fixture
def bucket(sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    """The caches in a bucket."""
    with s3_server(tmp_path_factory.mktemp("s3") / "log") as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        push(sources.root / "a", "s3://lab/a")
        yield replace(sources, s3=url)


def batches() -> list[object]:
    """The first few seeds, for the suite, and the others for the soak; or one."""
    if ONLY is not None:
        return [pytest.param([int(ONLY)], id=ONLY)]
    rest = [range(at, min(at + BATCH, ALL)) for at in range(FEW, ALL, BATCH)]
    named = [pytest.param(list(s), id=f"{s[0]}-{s[-1]}", marks=pytest.mark.soak) for s in rest]
    return [pytest.param(list(range(FEW)), id="suite"), *named]


@pytest.mark.parametrize("seeds", batches())
@pytest.mark.parametrize("kind", ["pull", "train"])
def test_a_server_that_misbehaves_costs_time_or_one_true_line(
    commands: Commands, sources: Sources, tmp_path: Path, kind: str, seeds: list[int]
) -> None:
    wrong = Schedules(commands, sources, tmp_path).run(kind, seeds)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("seeds", batches())
@pytest.mark.parametrize("kind", ["pull", "train"])
def test_a_signal_at_any_moment_ends_it_and_leaves_nothing_in_the_way(
    commands: Commands, sources: Sources, tmp_path: Path, kind: str, seeds: list[int]
) -> None:
    wrong = Schedules(commands, sources, tmp_path).run(kind, seeds, signals=True)
    assert not wrong, "\n".join(wrong)


@pytest.mark.soak
@pytest.mark.parametrize("signals", [False, True])
def test_a_bucket_whose_server_misbehaves_costs_time_or_one_true_line(
    commands: Commands, bucket: Sources, tmp_path: Path, signals: bool
) -> None:
    seeds = list(range(56)) if ONLY is None else [int(ONLY)]
    wrong = Schedules(commands, bucket, tmp_path).run("s3", seeds, signals=signals, keys=KEYS)
    assert not wrong, "\n".join(wrong)
