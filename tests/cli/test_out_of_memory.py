"""A device without memory ends a command with one line that says what to do, whatever class torch raises."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from evl_cache.errors import is_want_of_memory, told_of_memory
from evl_cache.heads import EVLHead
from evl_cache.towers import Backbone
from evl_cache_cli.main import main
from tests.support.feature_caches import write_pair
from tests.support.store_helpers import make_clips

CUDA = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.10 GiB is free. "
    "Including non-PyTorch memory, this process has 14.66 GiB memory in use."
)
# What torch raises where there is no memory: of its own allocator, of CUDA (pinned memory too), of cuBLAS, of the CPU.
KINDS = {
    "allocator": torch.OutOfMemoryError(CUDA),
    "runtime": torch.AcceleratorError(
        "CUDA error: out of memory\nCUDA kernel errors might be reported later"
    ),
    "blas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 9000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


@pytest.fixture
def error_line(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that fails; gives its last line on stderr, where there is no traceback and the status is 1."""

    def call(*args: str) -> str:
        environment, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
        torch.set_num_threads(1)
        try:
            with pytest.raises(SystemExit) as stop:
                main(list(args))
        finally:
            signal.signal(signal.SIGTERM, handler)
            os.environ.clear()
            os.environ.update(environment)
        found = capsys.readouterr().err
        errors = [line for line in found.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 1 and "Traceback" not in found and len(errors) == 1, found
        return errors[0]

    return call


def raises(error: Exception) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_without_memory_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[..., str], kind: str
) -> None:
    train_cache, val_cache = write_pair(tmp_path)
    monkeypatch.setattr(EVLHead, "forward", raises(KINDS[kind]))
    found = error_line(
        "train", "--cache", str(train_cache.path), "--val-cache", str(val_cache.path), "--head", "decoder1",
        "--epochs", "1", "--device", "cpu", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert "a smaller --batch" in found and "--batch auto" in found and "--accumulate" in found
    if kind == "allocator":
        assert "on the GPU (2.00 GiB asked for, 1.10 GiB free)" in found


@pytest.mark.parametrize("kind", KINDS)
def test_an_extraction_without_memory_ends_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error_line: Callable[..., str], kind: str
) -> None:
    make_clips(tmp_path / "clips", count=2)
    names = tmp_path / "clips.txt"
    names.write_text("00.mp4 0\n01.mp4 1\n")
    monkeypatch.setattr(Backbone, "forward", raises(KINDS[kind]))
    found = error_line(
        "extract", "--dataset", "list", "--list", str(names), "--root", str(tmp_path / "clips"),
        "--model", str(tmp_path / "clips" / "tower.json"), "--pretrained", "none", "--layers", "2-3", "--frames", "4",
        "--stride", "2", "--device", "cpu", "--cache", str(tmp_path / "cache"), "--split", "train",
    )  # fmt: skip
    assert "a smaller --batch" in found and "--accumulate" not in found


def test_other_errors_of_torch_are_no_want_of_memory() -> None:
    others = [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        ValueError("out of memory"),
    ]
    assert [is_want_of_memory(error) for error in others] == [False, False, False]
    assert all(map(is_want_of_memory, KINDS.values()))


def test_what_is_told_names_the_computer_where_it_is_not_the_gpu() -> None:
    assert told_of_memory(KINDS["cpu"]) == "out of memory on the computer (9000000000 bytes asked for)"
    assert told_of_memory(KINDS["blas"]) == "out of memory on the GPU"
