"""Whether the features of a cache are those that a head was trained on."""

from pathlib import Path

from evl_cache.errors import UsageError
from evl_cache.runs.directory import RunConfig
from evl_cache.spec import CacheSpec


def check_features(config: RunConfig, spec: CacheSpec, *, run: str | Path) -> tuple[int, ...]:
    """The blocks of a cache that a run's head reads.

    Raises: UsageError naming both sides where the cache's features are not those the head was trained on.
    """
    head = config.head_config
    got = {"frames": spec.views.frames, "patches": tuple(spec.tower.grid), "channels": spec.tower.width}
    needs = {"frames": head["num_frames"], "patches": tuple(head["grid"]), "channels": head["width"]}
    differing = [f"{name} {needs[name]}, not {got[name]}" for name in got if got[name] != needs[name]]
    if config.features is not None:
        trained = CacheSpec.from_json(config.features)
        differing += provenance_differences(trained, spec)
    if differing:
        raise UsageError(
            f"{run}: its head needs {'; '.join(differing)} of the cache; extract a cache that fits"
        )
    depth = head["num_layers"]
    wanted = spec.layers[-depth:] if config.layers is None else config.layers
    missing = [layer for layer in wanted if layer not in spec.layers]
    if missing or len(wanted) < depth:
        raise UsageError(
            f"{run}: its head reads {depth} layers {list(wanted)}, the cache has {list(spec.layers)}"
        )
    return tuple(wanted)


def provenance_differences(trained: CacheSpec, other: CacheSpec) -> list[str]:
    """What makes features of two caches not comparable, `needed, not found`; views may differ."""
    pairs = {
        "weights": (trained.tower.weights_sha256[:12], other.tower.weights_sha256[:12]),
        "frames": (trained.views.frames, other.views.frames),
        "sampling": (trained.views.sampling, other.views.sampling),
        "stride": (trained.views.stride, other.views.stride),
        "image size": (trained.tower.image_size, other.tower.image_size),
        "mean": (trained.tower.mean, other.tower.mean),
        "std": (trained.tower.std, other.tower.std),
        "QuickGELU": (trained.tower.quick_gelu, other.tower.quick_gelu),
        "preprocessing": (trained.preprocessing, other.preprocessing),
        "pixels": (trained.pixels, other.pixels),
    }
    return [f"{name} {ours}, not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
