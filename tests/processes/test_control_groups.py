"""What a job or a container may take of memory and processors, on trees of files as kernels show them."""

import os
import resource

import pytest
import torch

from evl_cache.processes import available_bytes, limit_torch_threads, usable_cpus
from evl_cache.processes.control_groups import cpu_quota, memory_left
from evl_cache_cli.common import default_device

GB = 1 << 30
UNLIMITED_V1 = 9223372036854771712
V2_MOUNT = "30 23 0:26 {shown} {top} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "31 23 0:27 {shown} {top} rw,nosuid shared:5 - cgroup cgroup rw,{controllers}"


class Tree:
    """Files as /proc and the groups' mounts show them, below a directory."""

    def __init__(self, root):
        self.root, self._mounts = root, []
        self.write("proc/meminfo", "MemTotal: 67108864 kB\nMemAvailable: 41943040 kB")  # 40 GB
        self.write("proc/self/status", "VmSize: 1048576 kB\nVmData: 524288 kB")

    def write(self, name, text):
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
        return self

    def own(self, *lines):
        return self.write("proc/self/cgroup", "\n".join(lines))

    def mount(self, line, top, *, shown="/", controllers=""):
        self._mounts.append(line.format(top=top.replace(" ", r"\040"), shown=shown, controllers=controllers))
        (self.root / top.lstrip("/")).mkdir(parents=True, exist_ok=True)
        return self.write(
            "proc/self/mountinfo", "\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *self._mounts])
        )

    def v2(self, group, *, limit="max", used=0, file=0, high="max", cpu="max 100000"):
        self.write(f"{group}/memory.max", limit).write(f"{group}/memory.high", high)
        self.write(f"{group}/memory.current", used).write(f"{group}/cpu.max", cpu)
        stat = f"anon 1\nfile {file + 4096}\nshmem 4096\ninactive_file {file // 2}\nactive_file {file - file // 2}"
        return self.write(f"{group}/memory.stat", stat)

    def v1(self, group, *, limit=UNLIMITED_V1, used=0, file=0):
        self.write(f"{group}/memory.limit_in_bytes", limit).write(f"{group}/memory.usage_in_bytes", used)
        stat = (
            f"cache 7\ninactive_file 0\ntotal_cache {file}\ntotal_inactive_file {file}\ntotal_active_file 0"
        )
        return self.write(f"{group}/memory.stat", stat)

    def v1_cpu(self, group, quota):
        return self.write(f"{group}/cpu.cfs_quota_us", quota).write(f"{group}/cpu.cfs_period_us", 100000)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def test_a_jobs_limit_lies_at_its_own_path(tree):
    tree.own("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0").mount(V2_MOUNT, "/sys/fs/cgroup")
    job = "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    tree.v2(job, limit=8 * GB, used=5 * GB, file=2 * GB, cpu="250000 100000")
    tree.v2(f"{job}/step_0/user/task_0")
    assert memory_left(tree.root) == 5 * GB  # the files that the kernel keeps in memory are given back
    assert cpu_quota(tree.root) == 2.5
    assert available_bytes(torch.device("cpu"), root=tree.root) == 5 * GB


def test_the_smallest_of_a_group_and_its_parents_counts_each_with_its_own_use(tree):
    tree.own("0::/a/b/c").mount(V2_MOUNT, "/sys/fs/cgroup")
    tree.v2("/sys/fs/cgroup/a", limit=10 * GB, used=9 * GB, cpu="100000 100000")
    tree.v2("/sys/fs/cgroup/a/b", limit=4 * GB, used=1 * GB, cpu="400000 100000")
    tree.v2("/sys/fs/cgroup/a/b/c", used=GB // 2)
    assert memory_left(tree.root) == 1 * GB and cpu_quota(tree.root) == 1.0


def test_beyond_the_high_mark_a_group_is_slowed_down_so_it_counts_as_a_limit(tree):
    tree.own("0::/a").mount(V2_MOUNT, "/sys/fs/cgroup")
    tree.v2("/sys/fs/cgroup/a", limit=8 * GB, high=6 * GB, used=1 * GB)
    assert memory_left(tree.root) == 5 * GB


def test_version_1_has_other_names_and_a_tree_for_each_limit(tree):
    tree.own("5:memory:/slurm/uid_1/job_2/step_0", "4:cpu,cpuacct:/slurm/uid_1/job_2", "1:name=systemd:/x")
    tree.mount(V1_MOUNT, "/sys/fs/cgroup/memory", controllers="memory")
    tree.mount(V1_MOUNT, "/sys/fs/cgroup/cpu,cpuacct", controllers="cpu,cpuacct")
    tree.v1("/sys/fs/cgroup/memory/slurm/uid_1/job_2", limit=6 * GB, used=3 * GB, file=GB)
    tree.v1("/sys/fs/cgroup/memory/slurm/uid_1/job_2/step_0").v1("/sys/fs/cgroup/memory")
    tree.v1_cpu("/sys/fs/cgroup/cpu,cpuacct/slurm/uid_1/job_2", 150000)
    tree.v1_cpu("/sys/fs/cgroup/cpu,cpuacct", -1)
    assert memory_left(tree.root) == 4 * GB and cpu_quota(tree.root) == 1.5


def test_with_both_versions_mounted_each_limit_is_found_where_it_is(tree):
    tree.own("4:memory:/job", "1:name=systemd:/x", "0::/x")
    tree.mount(V1_MOUNT, "/sys/fs/cgroup/memory", controllers="memory")
    tree.mount(V2_MOUNT, "/sys/fs/cgroup/unified")
    tree.v1("/sys/fs/cgroup/memory/job", limit=3 * GB, used=GB)
    tree.write("/sys/fs/cgroup/unified/x/cgroup.procs", "1")  # no controller of memory here
    assert memory_left(tree.root) == 2 * GB and cpu_quota(tree.root) is None


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ("/", "/"),  # in a name space of its own
        ("/docker/abc", "/docker/abc"),  # the host's name, of which the mount tells
        ("/docker/abc", "/"),  # the host's name, which is not shown here
        ("/../../other", "/"),  # moved out of its name space
    ],
)
def test_a_containers_limit_is_at_the_root_of_what_it_is_shown(tree, own, shown):
    tree.own(f"0::{own}").mount(V2_MOUNT, "/sys/fs/cgroup", shown=shown)
    tree.v2("/sys/fs/cgroup", limit=2 * GB, used=GB, cpu="50000 100000")
    assert memory_left(tree.root) == GB and cpu_quota(tree.root) == 0.5
    assert usable_cpus(tree.root) == 1


def test_a_mount_may_be_anywhere(tree):
    tree.own("0::/job").mount(V2_MOUNT, "/my groups").v2("/my groups/job", limit=2 * GB, used=GB)
    assert memory_left(tree.root) == GB


def test_without_groups_or_limits_nothing_is_limited(tree):
    assert memory_left(tree.root) is None and cpu_quota(tree.root) is None
    assert usable_cpus(tree.root) == len(os.sched_getaffinity(0))
    tree.own("0::/job").mount(V2_MOUNT, "/sys/fs/cgroup").v2("/sys/fs/cgroup/job")
    assert memory_left(tree.root) is None and cpu_quota(tree.root) is None
    assert available_bytes(torch.device("cpu"), root=tree.root) == 40 * GB


def test_a_users_own_limit_counts_too(tree, monkeypatch):
    limits = {resource.RLIMIT_AS: 5 * GB, resource.RLIMIT_DATA: 4 * GB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert available_bytes(torch.device("cpu"), root=tree.root) == 4 * GB - GB // 2
    limits[resource.RLIMIT_DATA] = resource.RLIM_INFINITY
    assert available_bytes(torch.device("cpu"), root=tree.root) == 4 * GB


def quota(tree, share):
    tree.own("0::/job").mount(V2_MOUNT, "/sys/fs/cgroup").v2("/sys/fs/cgroup/job", cpu=f"{share} 100000")


def test_torch_starts_no_more_threads_than_a_quota_has_processors_for(tree, monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    quota(tree, 210000)
    torch.set_num_threads(8)
    limit_torch_threads(tree.root)
    assert torch.get_num_threads() == usable_cpus(tree.root) == 3
    torch.set_num_threads(1)
    limit_torch_threads(tree.root)
    assert torch.get_num_threads() == 1  # fewer stay


def test_a_number_of_threads_that_the_user_sets_stays(tree, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    quota(tree, 200000)
    torch.set_num_threads(8)
    limit_torch_threads(tree.root)
    assert torch.get_num_threads() == 8


def test_commands_that_compute_limit_torchs_threads(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("evl_cache.processes.processors.cpu_quota", lambda root: 0.5)
    torch.set_num_threads(2)
    assert default_device("cpu") == "cpu" and torch.get_num_threads() == 1
