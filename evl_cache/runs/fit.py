"""What a head reads of a cache, and whether the cache has it: the features that the head was trained on."""

from collections.abc import Sequence
from pathlib import Path

from evl_cache.batches import Source
from evl_cache.errors import UsageError
from evl_cache.heads import Head
from evl_cache.runs.directory import RunConfig
from evl_cache.spec import CacheSpec
from evl_cache.store import Reads, TokensRead


def head_reads(head: Head, layers: Sequence[int]) -> Reads:
    """What a head reads of each sample, given the layers that it was made for."""
    tokens: TokensRead = "class" if head.class_tokens_only else "all"
    return Reads(layers=tuple(layers), with_maps=head.reads_maps, tokens=tokens)


def check_reads(reads: Reads, cache: Source) -> None:
    """Refuse a cache without the layers, or without the maps, that a head reads. Raises: UsageError that says what it lacks."""
    missing = [layer for layer in reads.layers if layer not in cache.spec.layers]
    if missing:
        raise UsageError(
            f"{cache.place} has layers {list(cache.spec.layers)}, not {missing}, and the head reads {list(reads.layers)}; "
            "extract them, or choose other ones with --head-layers"
        )
    if reads.with_maps and not cache.spec.has_maps:
        raise UsageError(
            f"{cache.place} holds no attention maps, which the head's temporal cross attention reads; extract with "
            "--maps, or train with --no-temporal-cross-attention"
        )


def check_features(config: RunConfig, spec: CacheSpec, *, run: str | Path) -> tuple[int, ...]:
    """The layers of a cache that a run's head reads.

    Raises: UsageError naming both sides where the cache's features are not those the head was trained on.
    """
    head = config.head_config
    got = {"frames": spec.views.frames, "patches": tuple(spec.tower.grid), "channels": spec.tower.width}
    needs = {"frames": head["num_frames"], "patches": tuple(head["grid"]), "channels": head["width"]}
    differing = [f"{name} {needs[name]}, not {got[name]}" for name in got if got[name] != needs[name]]
    if config.features is not None:
        trained = CacheSpec.from_json(config.features)
        # A shape is in both where the features are known that the head was trained on.
        differing = list(dict.fromkeys([*differing, *feature_differences(trained, spec)]))
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


def frame_rules_differ(ours: str | Path, rule: int, theirs: str | Path, other_rule: int) -> str | None:
    """What a user is told where the frames of two sides were chosen by different rules; None where by the same.

    Most clips have the same frames by every rule, so this refuses nothing.
    """
    if rule == other_rule:
        return None
    return (
        f"{ours} is of frames chosen by rule {rule}, {theirs} of frames chosen by rule {other_rule}: in some videos they are "
        "others (evl-cache verify --sources tells in which)"
    )


def feature_differences(trained: CacheSpec, other: CacheSpec) -> list[str]:
    """What makes features of two caches not comparable, as `name needed, not found`.

    Which layers are stored, how, and which views of a clip there are may differ.
    """
    pairs = {
        "weights": (trained.tower.weights_sha256[:12], other.tower.weights_sha256[:12]),
        "frames": (trained.views.frames, other.views.frames),
        "patches": (tuple(trained.tower.grid), tuple(other.tower.grid)),
        "channels": (trained.tower.width, other.tower.width),
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
