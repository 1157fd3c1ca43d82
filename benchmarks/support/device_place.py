"""What the measurements of `benchmarks.device` run on, their sizes there, and how calls on a GPU are timed."""

import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.device_runner import Clock, one_line
from benchmarks.support.machine import machine

PACKAGES = (
    "torch",
    "triton",
    "timm",
    "open_clip_torch",
    "zarr",
    "numcodecs",
    "awscrt",
    "av",
    "pytest",
    "safetensors",
)
DTYPES = {"float32": None, "tf32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LEAST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The head's sizes, and how much of everything is measured.

    Attributes:
        layers, frames, grid, width, heads, classes: of the decoder; `heads` are its attention heads.
        batches: of a training step; the second is that of compiled steps and of other precisions.
        towers: models of stage one, as `build_tower` takes them, each with the one that replaces it where open_clip lacks.
        tower_layers: how many of its last layers are kept.
        clips: that stage one runs for each tower.
        videos: that are decoded, and frames of each.
        samples: of the generated cache.
        train_batch: of `train`.
        sweep_samples: that each of the sweep's heads sees in an epoch.
        sweep_batch: of the sweep's steps.
        copy_mb: of the copy that the bandwidth is taken from.
        limit_gb: of memory, for the largest batch.
        most_batch: that is tried for it.
        rounds: of a timed call, at most.
    """

    layers: int = 4
    frames: int = 8
    grid: tuple[int, int] = (14, 14)
    width: int = 768
    heads: int = 12
    classes: int = 400
    batches: tuple[int, ...] = (64, 256, 1024)
    towers: tuple[tuple[str, str], ...] = (
        ("ViT-B-16-quickgelu", "timm/vit_base_patch16_clip_224"),
        ("ViT-L-14-quickgelu", "timm/vit_large_patch14_clip_224"),
    )
    tower_layers: int = 5
    clips: int = 256
    tower_batch: int = 32
    videos: tuple[int, int] = (128, 160)
    samples: int = 1024
    train_batch: int = 256
    sweep_samples: int = 512
    sweep_batch: int = 64
    copy_mb: int = 2048
    limit_gb: float = 16.0
    most_batch: int = 4096
    rounds: int = 20

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return self.grid[0] * self.grid[1]


TINY = Sizes(
    layers=2,
    frames=4,
    grid=(3, 4),
    width=64,
    heads=2,
    classes=5,
    batches=(2, 4),
    towers=(("tiny", "timm/test_vit"),),
    tower_layers=2,
    clips=6,
    tower_batch=3,
    videos=(4, 8),
    samples=8,
    train_batch=4,
    sweep_samples=8,
    sweep_batch=4,
    copy_mb=8,
    limit_gb=0.5,
    most_batch=16,
    rounds=3,
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where everything is measured.

    Attributes:
        device: `cuda` or `cpu`.
        sizes: as they suit it.
        scratch: a folder for caches and runs, which goes again.
        has_bfloat16: whether the device computes in it quickly.
    """

    device: str
    sizes: Sizes
    scratch: Path
    has_bfloat16: bool = True

    @property
    def is_gpu(self) -> bool:
        """Whether it is a CUDA device."""
        return self.device.startswith("cuda")

    @property
    def half(self) -> str:
        """The precision of 16 bits that suits the device."""
        return "bfloat16" if self.has_bfloat16 else "float16"

    def synchronize(self) -> None:
        """Wait for everything that the device was told to do."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """Return the autocast of a precision."""
        dtype = DTYPES[precision]
        return nullcontext() if dtype is None else torch.autocast(torch.device(self.device).type, dtype=dtype)

    def allocated(self) -> int:
        """The bytes that tensors take on the GPU."""
        return torch.cuda.memory_allocated() if self.is_gpu else 0

    def peak(self, call: Callable[[], object]) -> int | None:
        """Return how many bytes a call takes on the GPU at most, beyond what was taken before; None on a CPU."""
        if not self.is_gpu:
            call()
            return None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated() - before


def described_machine() -> dict[str, Any]:
    """Return the processor, the card, its driver, and versions. Only a worker may call it: it touches the GPU."""
    found: dict[str, Any] = dict(machine())
    found["packages"] = {name: _version(name) for name in PACKAGES}
    found["compiler"] = shutil.which("cc") or shutil.which("gcc") or ""
    found["commit"] = _commit()
    if not torch.cuda.is_available():
        return found
    index = torch.cuda.current_device()
    card = torch.cuda.get_device_properties(index)
    found |= {
        "card": card.name,
        "capability": f"{card.major}.{card.minor}",
        "memory_gb": round(card.total_memory / 1e9, 1),
        "multiprocessors": card.multi_processor_count,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        # Emulated elsewhere, which torch counts as supported.
        "bfloat16": card.major >= 8,
    }
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    told = Path("/proc/driver/nvidia/version")
    return told.read_text().splitlines()[0] if told.is_file() else ""


def _commit() -> str:
    """The commit of the checkout, where git knows it; else what EVL_CACHE_COMMIT says."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("EVL_CACHE_COMMIT", "")


def seconds_of(call: Callable[[], object], place: Place) -> float:
    """The seconds of one call, until the device has done it."""
    place.synchronize()
    started = time.perf_counter()
    call()
    place.synchronize()
    return time.perf_counter() - started


def median_seconds(place: Place, call: Callable[[], object]) -> float:
    """The median of five calls, after one that is not counted."""
    seconds_of(call, place)
    return statistics.median(seconds_of(call, place) for _ in range(5))


def timed(
    sides: Mapping[str, Callable[[], object]], place: Place, clock: Clock
) -> dict[str, dict[str, Any] | str]:
    """Time calls in turns, A B A B, after they were called twice.

    Returns: by side, the median of `seconds`, their `spread` (largest less smallest, of the median) and `rounds`; or why
        it failed, while the others go on.
    """
    found: dict[str, dict[str, Any] | str] = {}
    seconds: dict[str, list[float]] = {}
    for name, call in sides.items():
        try:
            seconds_of(call, place)
            seconds_of(call, place)
            seconds[name] = []
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
            release(place)
        except Exception as error:
            if is_lost(error):
                raise
            found[name] = one_line(error)
    for turn in range(place.sizes.rounds):
        if turn >= _LEAST_ROUNDS and clock.left_s < 2.0 * sum(each[-1] for each in seconds.values()) + 1.0:
            break
        for name in seconds:
            seconds[name].append(seconds_of(sides[name], place))
    for name, all_of in seconds.items():
        median = statistics.median(all_of)
        spread = (max(all_of) - min(all_of)) / median
        found[name] = {"seconds": median, "spread": round(spread, 3), "rounds": len(all_of)}
    return found


def release(place: Place) -> None:
    """Give back memory that nothing uses."""
    if place.is_gpu:
        torch.cuda.empty_cache()


def is_lost(error: BaseException) -> bool:
    """Whether a CUDA context is of no more use after an error."""
    text = str(error)
    return "CUDA error" in text or "illegal memory access" in text or "device-side assert" in text
