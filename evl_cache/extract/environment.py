"""What features were made with: device, batch size, precision and versions, as each mark records it."""

from typing import Any

import torch
from torch import nn

from evl_cache.extract.job import ExtractOptions
from evl_cache.precision import tf32_of_towers
from evl_cache.processes import device_name
from evl_cache.processes import package_versions as versions_of
from evl_cache.spec import CacheSpec

_PACKAGES = ("evl-cache", "torch", "open_clip_torch", "numpy", "numcodecs")


def run_environment(
    options: ExtractOptions, spec: CacheSpec, *, batch: int, visual: nn.Module | None = None
) -> dict[str, Any]:
    """What decides the bytes of a block beside the cache's spec; kept in its mark.

    What decides nothing on a device is not there. A mark of an older version may lack some of it, or have more.

    Args:
        batch: samples of a forward pass.
        visual: the tower; may be of timm.
    """
    device = torch.device(options.device)
    found: dict[str, Any] = {
        "batch": batch,
        "device": device_name(device),
        "compute_dtype": spec.compute_dtype,
        "versions": package_versions(*_packages_beside(spec, visual)),
    }
    if device.type == "cpu":
        return found | {"threads": torch.get_num_threads()}
    if device.type == "cuda" and spec.compute_dtype == "float32":
        found["tf32"] = tf32_of_towers()
    # Who crops and resizes: torch resizes otherwise where it has one thread (see `preprocess.resized`).
    threads = "one thread" if torch.get_num_threads() == 1 else "several threads"
    return found | {"pixels_by": f"{device_name(torch.device('cpu'))}, {threads}"}


def package_versions(*beside: str) -> dict[str, str]:
    """Versions of the packages that decide the bytes of a cache, by name.

    Args:
        beside: others than those that every cache is made with.
    """
    return versions_of(*_PACKAGES, *beside)


def _packages_beside(spec: CacheSpec, visual: nn.Module | None) -> tuple[str, ...]:
    """What only some caches are made with: towers of timm, and the operations on pixels of augmented views."""
    if spec.views.train_views:
        return ("timm", "Pillow")
    parts = () if visual is None else visual.modules()
    return ("timm",) if any(type(part).__module__.startswith("timm.") for part in parts) else ()
