"""What extraction by several devices costs, on paper: device-hours, bytes, rates, and what limits it.

Everything a machine does is an assumption here, given by whoever asks; nothing is measured. What follows from the
cache's spec is arithmetic: bytes, samples, floating-point operations.

T frames, N = 1+P tokens of a frame, C channels.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace

from evl_cache.errors import UsageError
from evl_cache.spec import CacheSpec
from evl_cache.store import projections_nbytes, sample_nbytes

_HOUR_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """What is taken for granted of machines and videos; no measurement.

    Attributes:
        device_tflops: of one device, in the tower's forward pass, sustained (not its data sheet's peak), 1e12 operations
            a second, a multiplication and an addition being two.
        decode_ms: of one core, to read, decode and crop a clip, all its views.
        compress_mb_s: of one core, bytes before the codec.
        cores_per_device: for both of these.
        devices_per_node: which share a network link. network_gbit_s: of that link, each way.
        disk_gb_s: of the shared disk, for all nodes together, reading and writing added up.
        video_mb: of a clip's file.
    """

    device_tflops: float = 60.0
    decode_ms: float = 80.0
    compress_mb_s: float = 300.0
    cores_per_device: float = 8.0
    devices_per_node: float = 8.0
    network_gbit_s: float = 25.0
    disk_gb_s: float = 2.0
    video_mb: float = 1.5

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise UsageError(f"--assume {name}={value:g}; expected more than 0")

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Assumptions":
        """`NAME=VALUE` each, over the defaults. Raises: UsageError for another name or no number."""
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
    """Of extracting one cache.

    Attributes:
        devices: how many. tflop_a_sample: operations of the forward pass, 1e12. device_hours, core_hours: of all.
        hours: of each stage if nothing else limited: device, cores, network, disk. limited_by: the longest of them.
        total_hours: of that stage, the others going on meanwhile.
        bytes_read, bytes_written: videos, features.
        disk_gb_s: read and written in that time. network_gbit_s: of the busiest direction of a node's link.
        epoch_hours: to read every sample once from that disk, as training does; a device's own speed aside.
    """

    devices: int
    tflop_a_sample: float
    device_hours: float
    core_hours: float
    hours: Mapping[str, float]
    limited_by: str
    total_hours: float
    bytes_read: int
    bytes_written: int
    disk_gb_s: float
    network_gbit_s: float
    epoch_hours: float


def forward_tflop(spec: CacheSpec) -> float:
    """Operations (1e12) of one sample: the blocks up to the last one asked for, and the maps."""
    C, N, T = spec.tower.width, spec.num_tokens + spec.tower.registers, spec.views.frames
    P = spec.num_tokens - 1
    block = (
        24 * N * C**2 + 4 * N**2 * C
    )  # in-projection 6, out 2, MLP 16 a token and C^2; logits and weighted mean
    embedding = 2 * 3 * spec.tower.patch_size**2 * C * P
    maps = 4 * (T - 1) * P**2 * C * len(spec.layers) if spec.stores_maps else 0
    return (T * (max(spec.layers) * block + embedding) + maps) / 1e12


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
    core_s = clips * assumed.decode_ms / 1e3 + samples * raw / (assumed.compress_mb_s * 1e6)
    nodes = max(1.0, devices / assumed.devices_per_node)
    busiest = max(read, written)
    hours = {
        "device": device_s / devices / _HOUR_S,
        "cores": core_s / (devices * assumed.cores_per_device) / _HOUR_S,
        "network": busiest * 8 / (nodes * assumed.network_gbit_s * 1e9) / _HOUR_S,
        "disk": (read + written) / (assumed.disk_gb_s * 1e9) / _HOUR_S,
    }
    slowest = max(hours, key=lambda name: hours[name])
    total_s = hours[slowest] * _HOUR_S
    return ClusterCosts(
        devices=devices,
        tflop_a_sample=tflop,
        device_hours=device_s / _HOUR_S,
        core_hours=core_s / _HOUR_S,
        hours=hours,
        limited_by=slowest,
        total_hours=hours[slowest],
        bytes_read=read,
        bytes_written=written,
        disk_gb_s=(read + written) / total_s / 1e9,
        network_gbit_s=busiest * 8 / nodes / total_s / 1e9,
        epoch_hours=written / (assumed.disk_gb_s * 1e9) / _HOUR_S,
    )
