"""Hosts of a test's own making: network, process and host name spaces, joined by a bridge in one of their own."""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# linux/sched.h, linux/prctl.h
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWPID, _CLONE_NEWNET = 0x20000, 0x4000000, 0x20000000, 0x40000000
_PR_SET_PDEATHSIG = 1


class NoHosts(Exception):
    """They cannot be made here; says why."""


@dataclass(frozen=True)
class Host:
    """One of them, on the network 10.77.0.0/24."""

    name: str
    address: str
    namespace: str

    def enter(self) -> None:
        """Go on in a child process there, as on a machine that sees no other's processes; this one ends as it does."""
        with open(f"/run/netns/{self.namespace}") as network:
            _call("setns", network.fileno(), _CLONE_NEWNET)
        _call("unshare", _CLONE_NEWPID | _CLONE_NEWUTS | _CLONE_NEWNS)
        socket.sethostname(self.name)
        if (pid := os.fork()) != 0:
            _, status = os.waitpid(pid, 0)
            os._exit(max(0, os.waitstatus_to_exitcode(status)) or int(status != 0))
        _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL)
        _run("mount", "--make-rprivate", "/")
        _run("mount", "-t", "proc", "proc", "/proc")

    def cut_off(self) -> None:
        """Nothing it sends arrives, nothing reaches it."""
        _run("ip", "-n", self.namespace, "link", "set", "lan", "down")

    def bring_back(self) -> None:
        _run("ip", "-n", self.namespace, "link", "set", "lan", "up")


@contextmanager
def made_hosts(count: int) -> Iterator[list[Host]]:
    """Make them, and remove them. Raises: NoHosts."""
    if os.geteuid() != 0:
        raise NoHosts("making hosts needs root")
    if missing := [tool for tool in ("ip", "unshare") if shutil.which(tool) is None]:
        raise NoHosts(f"making hosts needs {' and '.join(missing)} (iproute2, util-linux)")
    prefix = f"evl{os.getpid()}"
    switch = f"{prefix}-switch"
    made: list[str] = []
    try:
        _add(switch, made)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for number in range(count):
            host = Host(f"host-{number}", f"10.77.0.{number + 1}", f"{prefix}-{number}")
            _add(host.namespace, made)
            port = f"port{number}"
            _run(
                "ip",
                "-n",
                switch,
                "link",
                "add",
                port,
                "type",
                "veth",
                "peer",
                "lan",
                "netns",
                host.namespace,
            )
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "lan")
            for link in ("lo", "lan"):
                _run("ip", "-n", host.namespace, "link", "set", link, "up")
            hosts.append(host)
        alone = ["unshare", "--pid", "--uts", "--mount", "--fork", "--mount-proc"]
        _run("ip", "netns", "exec", hosts[0].namespace, *alone, "true")  # as `Host.enter` does
        yield hosts
    finally:
        for namespace in reversed(made):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _call(name: str, *arguments: int) -> None:
    """A function of the C library, of which Python 3.11 has no setns and no unshare."""
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), name)


def _add(namespace: str, made: list[str]) -> None:
    _run("ip", "netns", "add", namespace)
    made.append(namespace)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoHosts(f"{' '.join(words)}: {done.stderr.strip()}")
