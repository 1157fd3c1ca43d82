"""What the kernel's control groups leave this process of memory and processors.

SLURM, Docker and systemd put a process into a group that lies below others, and each may have a limit: the smallest
counts. /proc/self/cgroup names the group, /proc/self/mountinfo where groups are shown as directories. Version 2 has one
tree of groups, version 1 has one for each kind of limit, and both may be there. In a container the name may be that of
the host, which is not shown there: then the container's own group is the root of what is.
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

ROOT = Path("/")
# Of each version: the files with a limit, the file with what is used, and what of it the kernel gives back if asked.
_MEMORY_FILES = {
    1: (("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    2: (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def memory_left(root: Path = ROOT) -> int | None:
    """Return the bytes that the groups leave this process, or None where none has a limit.

    Args:
        root: where /proc and the mounts are found.
    """
    amounts = []
    for version, group in _groups("memory", root):
        limit_names, usage_name, reclaimable = _MEMORY_FILES[version]
        limits = [number for name in limit_names if (number := _number(group / name)) is not None]
        used = _number(group / usage_name)
        if limits and used is not None:
            stat = _statistics(group / "memory.stat")
            amounts.append(max(0, min(limits) - used + sum(stat.get(name, 0) for name in reclaimable)))
    return min(amounts, default=None)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Return how many processors' time the groups give this process, or None where none has a quota.

    Args:
        root: where /proc and the mounts are found.
    """
    quotas = []
    for version, group in _groups("cpu", root):
        if version == 2:
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period) > 0:  # not `max`, not -1
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def _groups(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """Yield version and directory of each group that this process is in, and of their parents."""
    own = _own_names(controller, root)
    for version, top, shown in _mounts(controller, root):
        if version not in own:
            continue
        group = top / _below(own[version], shown)
        if not group.is_dir():
            group = top
        while True:
            yield version, group
            if group == top:
                break
            group = group.parent


def _mounts(controller: str, root: Path) -> Iterator[tuple[int, Path, str]]:
    """Yield version, directory and what is shown at its top of each mount; the usual ones where none can be read."""
    lines = _text(root / "proc/self/mountinfo").splitlines()
    if not lines:
        usual = root / "sys/fs/cgroup"
        yield from ((1, usual / controller, "/"), (2, usual, "/"))
    for line in lines:
        mount, _, kind = line.partition(" - ")
        fields, kinds = mount.split(" "), kind.split(" ")
        if len(fields) < 5 or len(kinds) < 3:
            continue
        version = {"cgroup": 1, "cgroup2": 2}.get(kinds[0])
        if version == 2 or (version == 1 and controller in kinds[2].split(",")):
            yield version, root / _unescaped(fields[4]).lstrip("/"), _unescaped(fields[3])


def _own_names(controller: str, root: Path) -> dict[int, str]:
    """Return the name of this process's group, by version."""
    names = {}
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if number == "0" and not controllers:
            names[2] = name
        elif controller in controllers.split(","):
            names[1] = name
    return names


def _below(name: str, shown: str) -> str:
    """Return a group's name below the group that a mount shows at its top; '' where it is not below it."""
    if ".." in PurePosixPath(name).parts:
        return ""
    try:
        return str(PurePosixPath(name).relative_to(shown))
    except ValueError:
        return ""


def _unescaped(field: str) -> str:
    """Return a path as it is: the kernel writes a space in it as \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None  # not `max`


def _statistics(path: Path) -> dict[str, int]:
    pairs = (line.split(" ") for line in _text(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}
