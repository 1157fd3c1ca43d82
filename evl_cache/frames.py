"""A clip's video made ready for the backbone: hashed, decoded, cropped; with a record of where it came from."""

import hashlib
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch  # before anything that decodes: see video

from evl_cache.augmentation import augmented_view, view_generator
from evl_cache.clips import Clip
from evl_cache.errors import ClipError
from evl_cache.preprocess import spatial_crops
from evl_cache.sampling import strided_test_views, strided_train_view, tsn_test_views, tsn_train_view
from evl_cache.spec import TowerSpec, ViewSpec
from evl_cache.store import ClipRecord
from evl_cache.video import Choose, DecodedClip, decode_clip

Decode = Callable[[Path, Choose], DecodedClip]


@dataclass(frozen=True, kw_only=True)
class PreparedClip:
    """One clip before the forward pass.

    Attributes:
        record: where it came from, or why it failed.
        samples: float32 (samples of the clip, T, 3, S, S), spatial views first, temporal within, or training views
            by number; None where it failed or need not be decoded.
    """

    record: ClipRecord
    samples: torch.Tensor | None


def prepare_clip(
    clip: Clip,
    root: Path,
    *,
    tower: TowerSpec,
    views: ViewSpec,
    is_known: Callable[[str, str], bool] = lambda clip_id, sha256: False,
    decode: Decode = decode_clip,
) -> PreparedClip:
    """Hash, decode and crop one clip. This is where a clip's failure becomes data.

    Args:
        root: what relative paths are relative to.
        is_known: whether features of a clip (id, sha256 of its file) are at hand: then it is not decoded.
        decode: gives the frames chosen of a file; `decode_pool` does it in another process.
    """
    path = root / clip.path
    try:
        size, sha256 = _hash_source(path)
    except ClipError as error:
        return PreparedClip(record=ClipRecord(id=clip.id, error=str(error)), samples=None)
    source = ClipRecord(id=clip.id, source_bytes=size, source_sha256=sha256)
    if is_known(clip.id, sha256):
        return PreparedClip(record=source, samples=None)
    try:
        decoded = decode(path, lambda count: choose_frames(count, views, clip.id))
        samples = (
            _train_views(decoded, clip.id, tower, views)
            if views.train_views
            else _test_views(decoded, tower, views)
        )
    except ClipError as error:
        failed = ClipRecord(id=clip.id, error=str(error), source_bytes=size, source_sha256=sha256)
        return PreparedClip(record=failed, samples=None)
    record = ClipRecord(
        id=clip.id,
        source_bytes=size,
        source_sha256=sha256,
        frame_size=(int(decoded.frames.shape[1]), int(decoded.frames.shape[2])),
        frame_count=decoded.num_frames_in_file,
        indices=tuple(tuple(int(i) for i in view) for view in decoded.indices),
        decoder=decoded.decoder,
    )
    return PreparedClip(record=record, samples=samples)


def _test_views(decoded: DecodedClip, tower: TowerSpec, views: ViewSpec) -> torch.Tensor:
    crops = [
        spatial_crops(
            decoded.view(view),
            size=tower.image_size,
            mean=tower.mean,
            std=tower.std,
            crops=views.spatial_views,
        )
        for view in range(views.temporal_views)
    ]
    return torch.stack(crops, dim=1).flatten(0, 1)


def _train_views(decoded: DecodedClip, clip_id: str, tower: TowerSpec, views: ViewSpec) -> torch.Tensor:
    made = []
    for view in range(views.train_views):
        rng = view_generator(views.augment_seed, clip_id, view)
        _train_indices(decoded.num_frames_in_file, views, rng)  # drawn before; what follows is drawn after
        made.append(
            augmented_view(
                decoded.view(view),
                rng,
                size=tower.image_size,
                mean=tower.mean,
                std=tower.std,
                flip=views.flip,
            )
        )
    return torch.stack(made)


def _train_indices(count: int, views: ViewSpec, rng: np.random.Generator) -> np.ndarray:
    if views.sampling == "tsn":
        return tsn_train_view(count, frames=views.frames, rng=rng)
    assert views.stride is not None
    return strided_train_view(count, frames=views.frames, stride=views.stride, rng=rng)


def choose_frames(num_frames_in_file: int, views: ViewSpec, clip_id: str) -> np.ndarray:
    """Frame indices of every temporal view, int64 (views, T): drawn for training views, else by the test sampling."""
    if views.train_views:
        return np.stack(
            [
                _train_indices(num_frames_in_file, views, view_generator(views.augment_seed, clip_id, view))
                for view in range(views.train_views)
            ]
        )
    if views.sampling == "tsn":
        return tsn_test_views(num_frames_in_file, frames=views.frames, views=views.temporal_views)
    assert views.stride is not None
    return strided_test_views(
        num_frames_in_file, frames=views.frames, stride=views.stride, views=views.temporal_views
    )


def _hash_source(path: Path) -> tuple[int, str]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ClipError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise ClipError(f"{path}: cannot be opened ({error.strerror})") from error
