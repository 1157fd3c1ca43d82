"""How many processors of its computer are a process's, as torchrun and SLURM share them out."""

from collections.abc import Mapping

import pytest

from evl_cache.processes.shares import share_of, tasks_on

STEP = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
EIGHT = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    ("variables", "allowed", "usable", "share"),
    [
        ({}, 16, 16, 16),
        ({}, 16, 3, 3),  # a quota
        # torchrun
        ({"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "a"}, 96, 96, 12),
        ({"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "a"}, 4, 4, 1),
        ({"LOCAL_WORLD_SIZE": "8"}, 96, 96, 12),  # a script that sets torchrun's variables
        # srun
        (EIGHT, 96, 96, 12),
        ({**EIGHT, "SLURM_CPUS_PER_TASK": "10"}, 96, 96, 10),
        ({**EIGHT, "SLURM_CPUS_PER_TASK": "10"}, 1, 1, 1),  # bound to fewer than asked for
        ({**EIGHT, "SLURM_CPUS_ON_NODE": "96"}, 12, 12, 12),  # bound to its own
        ({**EIGHT, "SLURM_CPUS_ON_NODE": "96"}, 96, 96, 12),
        ({**EIGHT, "SLURM_CPUS_ON_NODE": "32"}, 96, 96, 4),  # beside other jobs, which nothing keeps apart
        ({**EIGHT, "SLURM_CPUS_ON_NODE": "96"}, 96, 16, 2),  # a quota for all tasks together
        ({**STEP, "SLURM_TASKS_PER_NODE": "4"}, 96, 96, 24),
        ({**STEP, "SLURM_NTASKS_PER_NODE": "4"}, 96, 96, 24),
        ({**STEP, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, 96, 96, 24),
        ({**STEP, "SLURM_STEP_TASKS_PER_NODE": "nonsense"}, 96, 96, 96),
        # a script that sets torchrun's variables for the tasks of srun counts them again
        ({**EIGHT, "LOCAL_WORLD_SIZE": "8"}, 96, 96, 12),
        # an agent of torchrun on each computer, as srun started it
        (
            {
                **STEP,
                "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
                "SLURM_CPUS_PER_TASK": "64",
                "LOCAL_WORLD_SIZE": "8",
                "TORCHELASTIC_RUN_ID": "a",
            },
            96, 96, 8,
        ),
        # a batch script is one process, however many tasks srun could start
        ({"SLURM_TASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "2", "SLURM_CPUS_ON_NODE": "16"}, 16, 16, 16),
    ],
)  # fmt: skip
def test_a_process_has_its_share(variables: Mapping[str, str], allowed: int, usable: int, share: int) -> None:
    assert share_of(variables, allowed=allowed, usable=usable) == share


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8(x2),4", [8, 8, 4, None]),
        ("1", [1, None, None, None]),
        ("2,3(x2)", [2, 3, 3, None]),
        ("1(x1000000)", [1, 1, 1, 1]),
        ("", [None] * 4),
        ("8(x", [None] * 4),
        ("²", [None] * 4),
    ],
)
def test_tasks_of_each_node_are_read_as_slurm_writes_them(text: str, found: list[int | None]) -> None:
    assert [tasks_on(text, node) for node in range(4)] == found
