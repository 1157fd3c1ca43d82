"""Which GPU of its computer is a process's own, as torchrun and SLURM tell."""

import pytest
import torch

from evl_cache.errors import UsageError
from evl_cache.processes import ProcessPlace
from evl_cache_cli.common import default_device

VARIABLES = ("LOCAL_RANK", "SLURM_LOCALID", "SLURM_PROCID", "WORLD_SIZE", "RANK")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def place(monkeypatch: pytest.MonkeyPatch, **variables: str) -> ProcessPlace:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return ProcessPlace.of_environment()


def test_eight_tasks_of_srun_that_see_eight_gpus_have_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [
        place(monkeypatch, SLURM_PROCID=str(8 + task), SLURM_LOCALID=str(task)).device("cuda", lambda: 8)
        for task in range(8)
    ]
    assert found == [f"cuda:{task}" for task in range(8)]


@pytest.mark.parametrize(("seen", "own"), [(1, "cuda:0"), (2, "cuda:1"), (4, "cuda:3"), (0, "cuda")])
def test_a_task_has_one_of_the_gpus_that_it_sees(
    monkeypatch: pytest.MonkeyPatch, seen: int, own: str
) -> None:
    assert place(monkeypatch, SLURM_PROCID="7", SLURM_LOCALID="7").device("cuda", lambda: seen) == own


def test_torchruns_number_comes_before_slurms_and_counts_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        raise AssertionError("asked for the GPUs")

    found = place(monkeypatch, SLURM_PROCID="1", SLURM_LOCALID="0", LOCAL_RANK="3")
    assert found.device("cuda", count) == "cuda:3"


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_LOCALID": "1"},  # without a task
        {"SLURM_LOCALID": "one", "SLURM_PROCID": "1"},
        {"SLURM_LOCALID": "-1", "SLURM_PROCID": "1"},
        {"SLURM_LOCALID": "²", "SLURM_PROCID": "1"},
        {},
    ],
)
def test_what_is_no_number_of_a_task_names_no_gpu(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert place(monkeypatch, **variables).device("cuda", lambda: 8) == "cuda"


@pytest.mark.usefixtures("eight_gpus")
def test_every_command_has_its_device_from_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [default_device(name) for name in (None, "cuda", "cuda:2", "cpu")] == [
        "cuda", "cuda", "cuda:2", "cpu",
    ]  # fmt: skip
    monkeypatch.setenv("SLURM_PROCID", "13")
    monkeypatch.setenv("SLURM_LOCALID", "5")
    assert [default_device(name) for name in (None, "cuda", "cuda:2", "cpu")] == [
        "cuda:5", "cuda:5", "cuda:2", "cpu",
    ]  # fmt: skip


@pytest.mark.usefixtures("eight_gpus")
def test_a_command_that_needs_no_other_process_takes_half_an_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert default_device(None) == "cuda"


@pytest.mark.usefixtures("eight_gpus")
def test_a_rank_without_a_gpu_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "8")
    with pytest.raises(UsageError, match="--device cuda:8: this machine has 8 CUDA devices"):
        default_device(None)
