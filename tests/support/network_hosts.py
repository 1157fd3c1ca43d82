"""Hosts of a test's own making: network, process and host name spaces, joined by a bridge in one of their own."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


class NoHosts(Exception):
    """They cannot be made here; says why."""


@dataclass(frozen=True)
class Host:
    """One of them, on the network 10.77.0.0/24."""

    name: str
    address: str
    namespace: str

    @property
    def words(self) -> list[str]:
        """Of a command that runs another one there, as a machine that sees no other's processes."""
        alone = ["unshare", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        named = ["sh", "-c", f'hostname {self.name}; exec "$@"', "sh"]
        return ["ip", "netns", "exec", self.namespace, *alone, *named]

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
        _run(*hosts[0].words, "true")
        yield hosts
    finally:
        for namespace in reversed(made):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _add(namespace: str, made: list[str]) -> None:
    _run("ip", "netns", "add", namespace)
    made.append(namespace)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoHosts(f"{' '.join(words)}: {done.stderr.strip()}")
