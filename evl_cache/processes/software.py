"""What a process computes with: versions of packages, and the name of a device."""

import importlib.metadata
import platform
from datetime import UTC, datetime
from typing import Any

import torch

from evl_cache import __version__
from evl_cache.processes.place import ProcessPlace


def package_versions(*packages: str) -> dict[str, str]:
    """Return the versions of packages that are installed, by name; `unknown` of others."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def training_environment(
    device: str, precision: str, place: ProcessPlace, command: str | None
) -> dict[str, Any]:
    """Return what a training is begun with, beside its options and data, as plain JSON values.

    Results are the same bits where versions, device, threads and processes are.

    Args:
        command: the command line, as it may be stored; None where Python called.
    """
    return {
        "versions": {
            "evl-cache": __version__,
            **package_versions("torch", "numpy"),
            "python": platform.python_version(),
        },
        "device": device_name(torch.device(device)),
        "threads": torch.get_num_threads(),
        "processes": place.world,
        "precision": precision,
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """Return the GPU's name; a CPU is named by its instruction set, which decides the order of its sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
