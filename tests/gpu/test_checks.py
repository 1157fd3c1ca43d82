"""The checks that `benchmarks.device` begins with: on a GPU where there is one, and tiny on the processor in any case."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.support.device_place import TINY, Place, Sizes
from benchmarks.support.device_runner import Clock, Measurement, Skipped
from benchmarks.support.device_tests import measurements

# Of processes that start, and tests of their own elsewhere: tests/train/test_distributed.py, tests/cli/test_out_of_memory.py.
ELSEWHERE = ("two_processes_on_one_device", "out_of_memory.train", "out_of_memory.extract", "pytest")
_LEAST = Place(device="cpu", sizes=TINY, scratch=Path())
ON_CPU = [m.name for m in measurements(_LEAST) if m.name not in ELSEWHERE]
# Both halves: which of them a card computes in is known when it is there.
ON_GPU = [
    m.name for m in measurements(Place(device="cuda", sizes=Sizes(), scratch=Path())) if m.name != "pytest"
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the caches of all checks lie."""
    return tmp_path_factory.mktemp("checks")


@pytest.fixture
def _all_memory() -> Iterator[None]:
    """A check that bounds the memory of its process bounds no other's."""
    yield
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)


def check(place: Place, name: str) -> None:
    """Make one check; what it yields are figures."""
    (measurement,) = [m for m in measurements(place) if m.name == name]
    made(measurement)


def made(measurement: Measurement) -> None:
    try:
        for found in measurement.call(Clock(deadline=time.monotonic() + 10 * measurement.seconds)):
            assert found
    except Skipped as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("name", ON_CPU)
def test_check_on_the_processor(scratch: Path, name: str) -> None:
    check(Place(device="cpu", sizes=TINY, scratch=scratch), name)


@pytest.mark.gpu
@pytest.mark.usefixtures("_all_memory")
@pytest.mark.parametrize("name", ON_GPU)
def test_check_on_the_gpu(scratch: Path, name: str) -> None:
    has_bfloat16 = torch.cuda.get_device_capability() >= (8, 0)
    check(Place(device="cuda", sizes=Sizes(), scratch=scratch, has_bfloat16=has_bfloat16), name)
