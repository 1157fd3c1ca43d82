"""What features were made with: device, batch size, precision and versions, as each mark records it."""

import importlib.metadata
from typing import Any

import torch

from evl_cache.extract.job import ExtractOptions
from evl_cache.spec import CacheSpec

_PACKAGES = ("evl-cache", "torch", "open_clip_torch", "numpy", "numcodecs")


def run_environment(options: ExtractOptions, spec: CacheSpec) -> dict[str, Any]:
    """What decides the bytes of a block beside the cache's spec; kept in its mark."""
    return {
        "batch": options.batch,
        "device": device_name(torch.device(options.device)),
        "compute_dtype": spec.compute_dtype,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the bytes of a cache, by name."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """The GPU's name; a CPU is named by its instruction set, which decides the order of its sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
