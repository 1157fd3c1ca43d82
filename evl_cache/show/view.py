"""Gather what a tower and a head see in one clip, and draw it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from evl_cache.clips import Clip, select
from evl_cache.errors import ClipError, Outage, UsageError, reason_alone
from evl_cache.extract import Decode, PreparedClip, decoding_for, prepare_clip
from evl_cache.heads import EVLHead, Head, PlainHead
from evl_cache.live.run_tower import live_spec, run_backbone
from evl_cache.notation import format_layers
from evl_cache.precision import precision_of_run
from evl_cache.runs import (
    HeadInputs,
    RunConfig,
    check_features,
    class_probabilities,
    head_logits,
    load_head,
    read_run_config,
)
from evl_cache.show.displacement import displacements
from evl_cache.show.picture import ViewPicture, draw_view
from evl_cache.spec import CacheSpec
from evl_cache.store import ClipRecord, FeatureCache, Reads
from evl_cache.video import Choose, DecodeOptions, FrameEvent
from evl_cache.video.pool import DEFAULT_TIMEOUT_S, DecodePool


@dataclass(frozen=True, kw_only=True)
class ShowRun:
    """A run whose head is shown.

    Attributes:
        path: of its directory.
        config: as the directory has it.
        head: in eval mode, on the CPU.
    """

    path: Path
    config: RunConfig
    head: Head

    @classmethod
    def read(cls, path: str | Path, *, best: bool = False) -> "ShowRun":
        """Read a run. Raises: UsageError where there is none; WeightsError where its head cannot be read."""
        return cls(path=Path(path), config=read_run_config(path), head=load_head(path, best=best))


def show_cached(
    cache: FeatureCache,
    name: str,
    out: str | Path,
    *,
    run: ShowRun | None,
    view: int = 0,
    layer: int | None = None,
    decoding: DecodeOptions | None = None,
    clip_timeout_s: float = DEFAULT_TIMEOUT_S,
) -> None:
    """Draw one view of a clip from its cached features, and its frames if the video is still there.

    Args:
        cache: the cache.
        name: id or path of the clip.
        out: the PNG file to write.
        run: whose head is shown; None shows the tower only.
        view: number of the clip's sample.
        layer: layer whose maps give the arrows; None takes the mean over all.
        decoding: how; by default with a decoder that gives the pixels that the cache was made of.
        clip_timeout_s: longest time for decoding the video.

    Raises: UsageError for a clip or view that is not there; CacheError for one without features.
    """
    with decoder_of(cache.spec, decoding, clip_timeout_s) as decode:
        draw_cached(cache, name, Path(out), run=run, decode=decode, view=view, layer=layer)


@contextmanager
def decoder_of(spec: CacheSpec, options: DecodeOptions | None, clip_timeout_s: float) -> Iterator[Decode]:
    """Yield what decodes the videos of a cache in processes, which end with the block.

    Where this machine cannot give the cache's pixels, every clip fails with the reason: its features can be shown all
    the same.
    """

    try:
        device = spec.pixels.removeprefix("torchcodec-")
        options = decoding_for(spec.pixels, options or DecodeOptions(), device=device)
    except UsageError as error:
        yield partial(_refuse, reason=str(error))
        return
    with DecodePool(1, options=options, timeout_s=clip_timeout_s) as pool:
        yield pool.frames


def _refuse(path: Path, choose: Choose, *, reason: str) -> Iterator[FrameEvent]:
    if reason:  # always, in a generator, as decoders are
        raise ClipError(reason)
    yield from ()


def draw_cached(
    cache: FeatureCache,
    name: str,
    out: Path,
    *,
    run: ShowRun | None,
    decode: Decode,
    view: int = 0,
    layer: int | None = None,
) -> None:
    """Draw as `show_cached` does, with a decoder that several pictures share."""
    rows = select(cache.clips, [name], source=cache.place)
    if len(rows) > 1:
        ids = [cache.clips[row].id for row in rows[:3]]
        raise UsageError(
            f"{cache.place}: {name!r} names {len(rows)} clips, segments of one video; expected one: give its id, such as "
            f"{', '.join(map(repr, ids))}"
        )
    (row,) = rows
    views = cache.spec.views.per_clip
    if not 0 <= view < views:
        raise UsageError(f"--view {view}: a clip of {cache.place} has {views}; expected 0 to {views - 1}")
    layers = cache.spec.layers if run is None else check_features(run.config, cache.spec, run=run.path)
    stored = cache.read_stored([row * views + view], Reads(layers=tuple(layers)))  # maps give the arrows
    tokens, maps = stored.with_made_maps().dequantized()
    root = Path(str(cache.origin.get("root") or "."))
    try:
        prepared = prepare_clip(
            cache.clips[row], root, tower=cache.spec.tower, views=cache.spec.views, decode=decode
        )
    except Outage as outage:
        prepared = PreparedClip(record=ClipRecord(id=cache.clips[row].id, error=outage.trouble), samples=None)
    features = _Features(spec=cache.spec, layers=tuple(layers), tokens=tokens, maps=maps)
    label = cache.spec.classes[cache.clips[row].label]
    draw_view(_picture(_title(cache.clips[row]), label, features, prepared, view, run, layer), out)


def show_video(
    video: str | Path,
    out: str | Path,
    *,
    run: ShowRun,
    view: int = 0,
    layer: int | None = None,
    device: str = "cpu",
    decoding: DecodeOptions | None = None,
    clip_timeout_s: float = DEFAULT_TIMEOUT_S,
    model: str | None = None,
    pretrained: str | None = None,
) -> None:
    """Draw one view of a video without a cache, with the run's own tower.

    Args:
        video: the file.
        out: the PNG file to write.
        run: whose head is shown.
        view: number of the clip's sample.
        layer: layer whose maps give the arrows; None takes the mean over all.
        device: where the tower runs.
        decoding: how; by default with a decoder that gives the pixels that the run was trained on.
        clip_timeout_s: longest time for decoding the video.
        model: tower's name, where the run's is not to be used.
        pretrained: tower's weights, likewise.

    Raises: ClipError where the video cannot be decoded; as `run_backbone` does.
    """
    video, out = Path(video), Path(out)
    spec = live_spec(run.config, run.path, num_clips=1)
    if not 0 <= view < spec.views.per_clip:
        raise UsageError(
            f"--view {view}: the run has {spec.views.per_clip} views of a clip; expected 0 to {spec.views.per_clip - 1}"
        )
    clip = Clip(id=str(video), path=str(video), label=0, split="show")
    decoding = decoding_for(spec.pixels, decoding or DecodeOptions(), device=device)
    with DecodePool(1, options=decoding, timeout_s=clip_timeout_s) as pool:
        prepared = prepare_clip(clip, Path(), tower=spec.tower, views=spec.views, decode=pool.frames)
    if prepared.samples is None:
        raise ClipError(f"{video}: {reason_alone(prepared.record.error or '', clip.id)}")
    backbone = run_backbone(
        run.config, run.path, spec, model, pretrained, with_maps=True, device=torch.device(device)
    )
    found = backbone(prepared.samples[view : view + 1].to(device))
    tokens = [found.tokens[layer].float().cpu() for layer in spec.layers]
    maps = [found.maps[layer].float().cpu() for layer in spec.layers] if found.maps else None
    features = _Features(spec=spec, layers=spec.layers, tokens=tokens, maps=maps)
    draw_view(_picture(video.name, None, features, prepared, view, run, layer), out)


@dataclass(frozen=True, kw_only=True)
class _Features:
    """The features of one sample.

    Attributes:
        spec: of the cache, or of what was computed.
        layers: those of `tokens` and `maps`.
        tokens: one for each layer, float32 (1, T, 1+P, C).
        maps: one for each layer, float32 (1, 2, T-1, P, P); None without maps.
    """

    spec: CacheSpec
    layers: tuple[int, ...]
    tokens: list[torch.Tensor]
    maps: list[torch.Tensor] | None


def _title(clip: Clip) -> str:
    return clip.id if clip.segment is None else f"{clip.id} ({clip.segment.unit} {clip.segment})"


def _picture(
    title: str,
    label: str | None,
    features: _Features,
    prepared: PreparedClip,
    view: int,
    run: ShowRun | None,
    layer: int | None,
) -> ViewPicture:
    spec = features.spec
    notes = [_made_by(spec, features.layers, run)]
    frames = None
    if prepared.samples is None:
        notes.append(f"No frames: {reason_alone(prepared.record.error or '', prepared.record.id)}.")
    else:
        frames = _as_pixels(prepared.samples[view], spec)
    said = [] if label is None else [f"label: {label}"]
    attention = None
    if run is not None:
        said.append(_said(run, features))
        attention = _attention(run.head, features)
        if attention is None:
            notes.append(f"No attention: a head {run.config.head} has no decoder over space and time.")
    return ViewPicture(
        title=title,
        subtitle="   ".join(said),
        frames=frames,
        frame_names=_frame_names(prepared, view, spec),
        grid=spec.tower.grid,
        motion=_motion(features, layer),
        attention=attention,
        notes=notes,
    )


def _made_by(spec: CacheSpec, layers: Sequence[int], run: ShowRun | None) -> str:
    """Return a line that names the picture's tower, layers and head."""
    weights = "random weights" if spec.tower.pretrained == "none" else spec.tower.pretrained
    head = "" if run is None else f", head {run.config.head} of run {run.path.name}"
    return f"Tower {spec.tower.model} ({weights}), layers {format_layers(layers)}{head}."


def _as_pixels(sample: torch.Tensor, spec: CacheSpec) -> np.ndarray:
    """Return normalised frames (T, 3, S, S) as uint8 pixels (T, S, S, 3)."""
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (spec.tower.std, spec.tower.mean))
    pixels = ((sample * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy()


def _frame_names(prepared: PreparedClip, view: int, spec: CacheSpec) -> list[str]:
    indices = prepared.record.indices
    if not indices:
        return [f"t = {t}" for t in range(spec.views.frames)]
    return [f"frame {index}" for index in indices[spec.views.temporal_view(view)]]


def _motion(features: _Features, layer: int | None) -> np.ndarray | None:
    if features.maps is None:
        return None
    if layer is not None and layer not in features.layers:
        raise UsageError(f"--layer {layer}; expected one of {list(features.layers)}")
    chosen = features.maps if layer is None else [features.maps[features.layers.index(layer)]]
    found = torch.stack([displacements(maps[0], features.spec.tower.grid) for maps in chosen])
    return found.mean(dim=0).numpy()


@torch.no_grad()
def _said(run: ShowRun, features: _Features) -> str:
    """Return the head's two most probable classes for this view, as text."""
    precision = precision_of_run(run.config.training, "cpu")
    inputs = HeadInputs(tokens=features.tokens, maps=features.maps)
    probabilities = class_probabilities(head_logits(run.head, inputs, precision)[0])
    best = torch.argsort(probabilities, descending=True, stable=True)[:2].tolist()
    return "said: " + ", ".join(
        f"{run.config.classes[i]} {100 * float(probabilities[i]):.0f} %" for i in best
    )


def _attention(head: Head, features: _Features) -> np.ndarray | None:
    """Return the attention (T, 1+P), a mean over decoder layers and attention heads; None for other heads."""
    if not isinstance(head, EVLHead):
        return None
    weights = PlainHead(head).attention(features.tokens, features.maps)
    return torch.stack([layer[0].mean(dim=0) for layer in weights]).mean(dim=0).numpy()
