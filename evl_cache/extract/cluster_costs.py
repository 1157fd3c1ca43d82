"""Extraction by several devices, on paper: device-hours, bytes, rates, and what limits it.

How fast machines are is assumed, not measured. Bytes, samples and floating-point operations follow from the spec.

T frames, N = 1+P tokens of a frame, C channels.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from evl_cache.errors import UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store import projections_nbytes, sample_nbytes

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is assumed of machines and videos; nothing here is measured.

    Attributes:
        device_tflops: 1e12 operations a second that one device sustains in the tower's forward pass (not its data
            sheet's peak); a multiplication and an addition are two operations.
        decode_ms: time in which one core reads, decodes and crops a clip with all its views.
        compress_mb_s: megabytes before the codec that one core compresses in a second.
        append_mb_s: megabytes after the codec that one core appends to shards in a second: checksums, digests, copies.
        cores_per_device: cores that decode, compress and append for one device.
        link_gb_s: rate at which frames reach one device and features leave it.
        border_s: time that a device waits once a cache, at its beginning for the first frames and at its end for the last
            block's files and for other devices; between blocks it waits for nothing.
        devices_per_node: devices that share a network link.
        network_gbit_s: rate of that link, each way.
        disk_gb_s: rate of the shared disk for all nodes together, reads and writes added up.
        video_mb: size of a clip's file.
    """

    device_tflops: float = 60.0
    decode_ms: float = 80.0
    compress_mb_s: float = 350.0
    append_mb_s: float = 500.0
    cores_per_device: float = 8.0
    link_gb_s: float = 25.0
    border_s: float = 5.0
    devices_per_node: float = 8.0
    network_gbit_s: float = 25.0
    disk_gb_s: float = 2.0
    video_mb: float = 1.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (value > 0 or (name == "border_s" and value == 0)):
                raise UsageError(f"--assume {name}={value:g}; expected more than 0")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Assumptions":
        """The defaults, changed by texts such as `decode_ms=150`. Raises: UsageError for another name or no number."""
        names = [field.name for field in fields(cls)]
        given: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition("=")
            try:
                given[names[names.index(name.strip())]] = float(value)
            except ValueError:
                raise UsageError(
                    f"--assume {text!r}; expected NAME=NUMBER, NAME one of {', '.join(names)}"
                ) from None
        return replace(cls(), **given)


@dataclass(frozen=True, kw_only=True)
class ClusterCosts:
    """What extracting one cache costs.

    Attributes:
        devices: how many there are.
        tflop_a_sample: operations of a forward pass, in 1e12.
        device_hours: of all devices together.
        core_hours: of all cores together.
        core_hours_of: the same by what they do (decoding, compressing, writing).
        hours: duration of each stage (device, link, cores, network, disk) if nothing else limited it; devices take whole
            blocks, so the one that takes most of them counts.
        limited_by: the stage that takes longest.
        border_hours: time at the cache's beginning and end in which devices wait.
        total_hours: duration of that stage and of the borders; the other stages run meanwhile.
        bytes_read: size of the videos.
        bytes_written: size of the features.
        disk_gb_s: read and written on average in that time.
        network_gbit_s: average rate of a node's link, in the busier direction.
        epoch_hours: time to read every sample once from that disk, as training does.
    """

    devices: int
    tflop_a_sample: float
    device_hours: float
    core_hours: float
    core_hours_of: Mapping[str, float]
    hours: Mapping[str, float]
    limited_by: str
    border_hours: float
    total_hours: float
    bytes_read: int
    bytes_written: int
    disk_gb_s: float
    network_gbit_s: float
    epoch_hours: float


def forward_tflop(spec: CacheSpec) -> float:
    """Operations (1e12) of one sample: the tower's layers up to the last one asked for, and the maps."""
    C, N, T = spec.tower.width, spec.num_tokens + spec.tower.registers, spec.views.frames
    P = spec.num_tokens - 1
    # Per token and C^2: in-projection 6, out-projection 2, MLP 16. Then logits and weighted mean.
    layer = 24 * N * C**2 + 4 * N**2 * C
    embedding = 2 * 3 * spec.tower.patch_size**2 * C * P
    maps = 4 * (T - 1) * P**2 * C * len(spec.layers) if spec.stores_maps else 0
    return (T * (max(spec.layers) * layer + embedding) + maps) / 1e12


def busiest_share(spec: CacheSpec, devices: int) -> float:
    """The share of a cache's samples that the device makes which takes most blocks."""
    blocks = math.ceil(spec.num_blocks / devices)
    return min(1.0, blocks * spec.block_clips / spec.num_clips)


def _frame_nbytes(spec: CacheSpec) -> int:
    """Bytes of a sample's frames as they go to a device, in float32."""
    return 4 * 3 * spec.tower.image_size**2 * spec.views.frames


def cluster_costs(spec: CacheSpec, devices: int, assumed: Assumptions) -> ClusterCosts:
    """Costs of extracting the whole cache with so many devices. Raises: UsageError for fewer than one."""
    if devices < 1:
        raise UsageError(f"--cluster {devices}; expected at least 1 device")
    raw, stored = sample_nbytes(spec)
    samples, clips = spec.num_samples, spec.num_clips
    read = round(clips * assumed.video_mb * 1e6)
    written = samples * stored + projections_nbytes(spec)
    tflop = forward_tflop(spec)
    device_s = samples * tflop / assumed.device_tflops
    core_s = {
        "decoding": clips * assumed.decode_ms / 1e3,
        "compressing": 0.0 if spec.codec == "raw" else samples * raw / (assumed.compress_mb_s * 1e6),
        "writing": written / (assumed.append_mb_s * 1e6),
    }
    all_cores_s = sum(core_s.values())
    nodes = max(1.0, devices / assumed.devices_per_node)
    share = busiest_share(spec, devices)
    busier = max(read, written)
    hours = {
        "device": device_s * share / _HOUR_S,
        "link": samples * max(_frame_nbytes(spec), raw) * share / (assumed.link_gb_s * 1e9) / _HOUR_S,
        "cores": all_cores_s * share / assumed.cores_per_device / _HOUR_S,
        "network": busier * 8 / (nodes * assumed.network_gbit_s * 1e9) / _HOUR_S,
        "disk": (read + written) / (assumed.disk_gb_s * 1e9) / _HOUR_S,
    }
    slowest = max(hours, key=lambda name: hours[name])
    border_hours = assumed.border_s / _HOUR_S
    total_s = (hours[slowest] + border_hours) * _HOUR_S
    return ClusterCosts(
        devices=devices,
        tflop_a_sample=tflop,
        device_hours=device_s / _HOUR_S,
        core_hours=all_cores_s / _HOUR_S,
        core_hours_of={name: seconds / _HOUR_S for name, seconds in core_s.items()},
        hours=hours,
        limited_by=slowest,
        border_hours=border_hours,
        total_hours=total_s / _HOUR_S,
        bytes_read=read,
        bytes_written=written,
        disk_gb_s=(read + written) / total_s / 1e9,
        network_gbit_s=busier * 8 / nodes / total_s / 1e9,
        epoch_hours=written / (assumed.disk_gb_s * 1e9) / _HOUR_S,
    )
