"""How many processors of its computer are this process's, as torchrun and SLURM share them out."""

import os
import re
from collections.abc import Mapping

from evl_cache.processes.control_groups import ROOT
from evl_cache.processes.processors import allowed_processors, usable_cpus


def processor_share() -> int:
    """Return the number of processors for this process alone; at least 1.

    Ranks share those of the agent of torchrun that started them. A task of SLURM has those that it is bound to, or
    asked for, or else an equal part of its step's.
    """
    return share_of(os.environ, allowed=len(allowed_processors()), usable=usable_cpus(ROOT))


def local_processes() -> int:
    """Return how many processes of the run are on this computer, as torchrun and SLURM tell; at least 1."""
    return _tasks(os.environ) * _ranks(os.environ)


def share_of(environment: Mapping[str, str], *, allowed: int, usable: int) -> int:
    """Return the processors of a process.

    Args:
        environment: its variables.
        allowed: how many processors it may run on.
        usable: likewise, or fewer by a quota of their time.
    """
    on_computer, tasks = _number(environment, "SLURM_CPUS_ON_NODE"), _tasks(environment)
    share = (
        usable if on_computer is None else min(usable, on_computer)
    )  # of the job, on a computer with others
    of_task = _number(environment, "SLURM_CPUS_PER_TASK") if _is_in_step(environment) else None
    if of_task is not None:
        share = min(share, of_task)
    elif on_computer is None or allowed >= on_computer:  # bound to no fewer than all tasks have together
        share //= tasks
    return max(1, share // _ranks(environment))


def _ranks(environment: Mapping[str, str]) -> int:
    """The processes that one agent of torchrun started; 1 for a task of SLURM that no agent started."""
    if _is_in_step(environment) and "TORCHELASTIC_RUN_ID" not in environment:
        return 1  # a script that sets LOCAL_WORLD_SIZE for its tasks counts the same ones again
    return _number(environment, "LOCAL_WORLD_SIZE") or 1


def _tasks(environment: Mapping[str, str]) -> int:
    """The tasks of this step on this computer; 1 for a process that `srun` did not start, as a batch script is."""
    if not _is_in_step(environment):
        return 1
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        if tasks := tasks_on(environment.get(name, ""), _number(environment, "SLURM_NODEID", least=0) or 0):
            return tasks
    return 1


def tasks_on(text: str, node: int) -> int | None:
    """Return the number that belongs to a node in a list such as `8(x2),4`; None where the list has none for it."""
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?", part.strip())
        if found is None:
            return None
        if (nodes := int(found[2] or 1)) > node:
            return int(found[1])
        node -= nodes
    return None


def _is_in_step(environment: Mapping[str, str]) -> bool:
    """Whether `srun` started this process: SLURM tells a batch script how many tasks there might be, but it is one."""
    return "SLURM_STEP_TASKS_PER_NODE" in environment or "SLURM_STEP_ID" in environment


def _number(environment: Mapping[str, str], name: str, *, least: int = 1) -> int | None:
    text = environment.get(name, "")
    number = int(text) if re.fullmatch("[0-9]{1,9}", text) else -1
    return number if number >= least else None
