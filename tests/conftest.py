"""What every test shares: fixed threads, restored random state, the GPU rule, real clips."""

import os
import random
import signal
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is loaded, as in cli/main.py: threads that wait for each other do not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from tests.support.extraction_server import Server

ROOT = Path(__file__).resolve().parent.parent
# Sums depend on the number of threads: one number everywhere.
NUM_THREADS = 2


def pytest_configure() -> None:
    torch.set_num_threads(NUM_THREADS)
    # A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that: tests send it to theirs.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a GPU, tests marked `gpu` are skipped, or fail where EVL_CACHE_REQUIRE_GPU=1 promises one."""
    if item.get_closest_marker("gpu") is None or torch.cuda.is_available():
        return
    if os.environ.get("EVL_CACHE_REQUIRE_GPU") == "1":
        pytest.fail("EVL_CACHE_REQUIRE_GPU=1, but torch finds no CUDA device", pytrace=False)
    pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def _restored_global_state() -> Iterator[None]:
    """Give every test the random state, threads and default dtype of the first one.

    A test that draws without a seed or changes them then cannot change its successors.
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    dtype = torch.get_default_dtype()
    yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)
    torch.set_rng_state(torch_state)
    torch.set_default_dtype(dtype)
    torch.set_num_threads(NUM_THREADS)


# Tests of the process that decodes start it as it is.
REAL_DECODERS = ("video", "test_unattended", "test_outages")


@pytest.fixture(autouse=True, scope="session")
def _warm_decoders() -> Iterator[None]:
    """Processes that decode are forked from one that has loaded the decoders, and start fast, in children too."""
    from evl_cache.video import process
    from tests.support import warm_worker

    if find_spec("av") is None:  # a machine with a GPU and little else
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(warm_worker.ADDRESS, warm_worker.start())
        patch.setattr(process, "WORKER", warm_worker.NAME)
        yield


@pytest.fixture(autouse=True, scope="module")
def _real_decoders(request: pytest.FixtureRequest, _warm_decoders: None) -> Iterator[None]:
    from evl_cache.video import process
    from tests.support import warm_worker

    with pytest.MonkeyPatch.context() as patch:
        if {request.path.stem, request.path.parent.name} & set(
            REAL_DECODERS
        ) and warm_worker.ADDRESS in os.environ:
            patch.delenv(warm_worker.ADDRESS)
            patch.setattr(process, "WORKER", "evl_cache.video.worker")
        yield


# What each test printed and logged.
SHOWN = pytest.StashKey[list[str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    item.stash[SHOWN] = [text for _, text in report.sections]  # type: ignore[attr-defined]
    return report


@pytest.fixture(autouse=True, scope="session")
def _shown_is_kept() -> Iterator[None]:
    from tests.support.recorded import keep_shown

    with pytest.MonkeyPatch.context() as patch:
        keep_shown(patch)
        yield


@pytest.fixture(autouse=True)
def _credentials_go_nowhere_else(request: pytest.FixtureRequest) -> Iterator[None]:
    """No server of the test was sent a credential that is another's, and no file, output or log holds one."""
    from tests.support.recorded import problems

    yield
    found = problems(request.node.funcargs.get("tmp_path"), request.node.stash.get(SHOWN, []))
    assert not found, "\n".join(found)


@pytest.fixture
def one_thread() -> None:
    """On tensors as small as those of most tests a second thread only waits."""
    torch.set_num_threads(1)  # `_restored_global_state` restores the number


@pytest.fixture(scope="session")
def ut_interaction() -> Path:
    """Folder of the UT-Interaction clips: EVL_UT_INTERACTION, or shared/data beside the checkout."""
    given = os.environ.get("EVL_UT_INTERACTION")
    folder = Path(given) if given else ROOT.parent / "shared" / "data" / "ut_interaction"
    if not folder.is_dir():
        if given:
            pytest.fail(f"EVL_UT_INTERACTION={given} is no folder", pytrace=False)
        pytest.skip(f"no real clips at {folder}; set EVL_UT_INTERACTION to the UT-Interaction folder")
    return folder


@pytest.fixture(scope="session")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of eight small rendered clips, one of them broken, and the configuration of a small tower."""
    from tests.support.store_helpers import make_clips

    folder = tmp_path_factory.mktemp("motions")
    make_clips(folder)
    return folder


@pytest.fixture(scope="session")
def store_server(motions: Path) -> "Iterator[Server]":
    """Extracts `motions` in child processes that may be killed."""
    from tests.support.extraction_server import Server

    server = Server(motions)
    yield server
    server.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data under the names that the examples of help, README and docs use."""
    from tests.support.example_data import make_data

    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture
def work(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory where the data lie under their names, and the tower needs no download."""
    from tests.support.example_data import settle

    for name in os.listdir(data):
        (tmp_path / name).symlink_to(data / name)
    settle(monkeypatch, tmp_path)
    return tmp_path
