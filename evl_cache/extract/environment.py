"""What features were made with: device, batch size, precision and versions, as each mark records it."""

import importlib.metadata
from typing import Any

import torch

_PACKAGES = ("evl-cache", "torch", "open_clip_torch", "numpy", "numcodecs")


def run_environment(*, batch: int, device: torch.device, compute_dtype: str) -> dict[str, Any]:
    """What decides the bytes of a block beside the cache's spec; kept in its mark."""
    return {
        "batch": batch,
        "device": device_name(device),
        "compute_dtype": compute_dtype,
        "threads": torch.get_num_threads(),
        "versions": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Versions of what decides the bytes of a cache."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def device_name(device: torch.device) -> str:
    """What the GPU calls itself; of a CPU its instruction set, which decides the order of its sums."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
