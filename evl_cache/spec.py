"""The specification of a cache: what it holds, written into the store and compared on every use.

T frames, P patches (grid Hp x Wp), N = 1+P tokens, C channels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any

from evl_cache.canonical_json import digest, flatten
from evl_cache.errors import CacheError, UsageError
from evl_cache.sampling import check_stride
from evl_cache.untrusted.spec_limits import check_spec

FORMAT_VERSION = 2  # of caches that are made; older ones, of 1, are read and written as they are
# Of each the first is the default.
TOKEN_STORAGE = ("int8", "fp16")
MAP_STORAGE = ("uint8", "fp16", "recompute", "none")
CODECS = ("default", "raw", "archive")
CHUNK_KEYS = ("flat", "folders")
_CHOICES = {"tokens": TOKEN_STORAGE, "maps": MAP_STORAGE, "codec": CODECS, "chunk_keys": CHUNK_KEYS}
SAMPLING = ("strided", "tsn")
SOFTWARE_PIXELS = "software"
PREPROCESSING = "short-side-bilinear-v1"  # of preprocess.spatial_crops; if its pixels change, so does this
DECODERS = ("auto", "decord", "pyav", "torchcodec")
# Which frame of a video is frame n, and how it is found. By rule 1 some files gave other frames than those asked for.
FRAME_RULE = 2
# What caches are that were made before there was such a field: left out of their descriptions, which stay as they are.
_BEFORE: Mapping[str, Any] = {"pixels": SOFTWARE_PIXELS, "frame_rule": 1, "chunk_keys": "folders"}


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """The frozen image tower: its name, and everything that changes its output.

    Attributes:
        model: name, for people and for building the tower again.
        pretrained: name of its weights, likewise.
        weights_sha256: digest of the weights' names, shapes and values.
        image_size: side of a frame, in pixels.
        patch_size: side of a patch, in pixels.
        width: channels C.
        blocks: number of layers; caches on disks have this name.
        heads: attention heads of a layer.
        quick_gelu: whether its activation is QuickGELU.
        mean: of each colour channel, in units of [0, 1], by which frames are normalised.
        std: of each colour channel, likewise.
        class_token: `own`, or `mean` where the tower has none and token 0 holds the mean of a frame's patches.
        registers: number of the tower's tokens that are neither class token nor patch, and are not stored.
    """

    model: str
    pretrained: str
    weights_sha256: str
    image_size: int
    patch_size: int
    width: int
    blocks: int
    heads: int
    quick_gelu: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    class_token: str = "own"
    registers: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields; those that CLIP's towers lack are left out of theirs, so that old feature ids stay."""
        content = asdict(self)
        for name, usual in (("class_token", "own"), ("registers", 0)):
            if content[name] == usual:
                del content[name]
        return content

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (Hp, Wp)."""
        side = self.image_size // self.patch_size
        return side, side


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """The frames and crops of a clip that are its samples.

    Attributes:
        frames: frames T of a view.
        sampling: `strided` or `tsn`.
        stride: step from one frame of a view to the next; `auto` spreads each view over its clip; None for `tsn`.
        temporal_views: views over time; a clip's samples are ordered by spatial view, then by temporal view.
        spatial_views: crops of each temporal view, 1 (centre) or 3.
        train_views: random augmented views instead of these; 0 for none.
        augment_seed: seed of the augmented views, beside clip id and view number.
        flip: whether half of the augmented views are mirrored.
        first_view: number of the first augmented view: not 0 only in what was added to a cache that has those before it.
    """

    frames: int = 8
    sampling: str = SAMPLING[0]
    stride: int | str | None = 16
    temporal_views: int = 1
    spatial_views: int = 1
    train_views: int = 0
    augment_seed: int = 0
    flip: bool = False
    first_view: int = 0

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLING:
            raise UsageError(f"sampling {self.sampling!r}; expected one of {', '.join(SAMPLING)}")
        if (self.stride is None) != (self.sampling == "tsn"):
            raise UsageError(
                f"stride {self.stride} with {self.sampling} sampling; TSN takes no stride, strided needs it"
            )
        check_stride(self.stride)
        for name in ("frames", "temporal_views"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.spatial_views not in (1, 3):
            raise UsageError(f"spatial views: got {self.spatial_views}; expected 1 (centre) or 3")
        if self.train_views < 0 or self.augment_seed < 0:
            raise UsageError(
                f"train_views is {self.train_views}, augment_seed {self.augment_seed}; expected at least 0"
            )
        if self.train_views and (self.temporal_views, self.spatial_views) != (1, 1):
            raise UsageError(
                f"{self.train_views} augmented views beside {self.crops}; a clip has either those or these"
            )
        if not self.train_views and (self.augment_seed or self.flip or self.first_view):
            raise UsageError(
                "an augmentation seed or flip without augmented views; give --train-views, or leave them out"
            )

    @property
    def per_clip(self) -> int:
        """The number of samples of one clip."""
        return self.train_views or self.temporal_views * self.spatial_views

    def temporal_view(self, view: int) -> int:
        """Return which choice of frames a clip's sample has, by the sample's number in the clip."""
        return view if self.train_views else view % self.temporal_views

    @property
    def crops(self) -> str:
        """Temporal x spatial views, as `--views` takes them."""
        return f"{self.temporal_views}x{self.spatial_views}"

    @property
    def summary(self) -> str:
        """The views of one clip as a person reads them: `3x1`, or `8 augmented`."""
        return f"{self.train_views} augmented" if self.train_views else self.crops

    def to_json(self) -> dict[str, Any]:
        """Return the fields; those of augmentation only where there is any, so that old feature ids stay."""
        left_out: tuple[str, ...] = () if self.train_views else ("train_views", "augment_seed", "flip")
        left_out += () if self.first_view else ("first_view",)
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything that decides a cache's bytes, except the hardware that made them.

    Attributes:
        dataset: name, for people and for finding caches.
        split: name, likewise.
        classes: class names by label.
        tower: the image tower.
        views: the samples of a clip.
        layers: layers that a head may read, numbered from 1, shallow to deep.
        tokens: how tokens are stored, one of `TOKEN_STORAGE`.
        maps: how maps are stored, one of `MAP_STORAGE`; "recompute" makes them from the tokens one layer below.
        compute_dtype: dtype of the tower's forward pass.
        num_clips: clips of the list, failed ones included.
        content_id: digest of the clip list (ids and labels, in order).
        block_clips: clips of one block, which is one shard of every array.
        codec: profile of the lossless codecs; it never changes a value.
        preprocessing: name of the code that makes the tower's input from frames.
        pixels: kind of decoder: "software" (decord and PyAV, which agree), or another whose pixels differ.
        frame_rule: by which rule frames were chosen; caches made before `FRAME_RULE` was a number have 1.
        chunk_keys: whether an array's shards lie flat in its directory, or in folders each; one of `CHUNK_KEYS`.
        extra: fields of a newer minor version, kept as they were read.
    """

    dataset: str
    split: str
    classes: tuple[str, ...]
    tower: TowerSpec
    views: ViewSpec
    layers: tuple[int, ...]
    tokens: str
    maps: str
    compute_dtype: str
    num_clips: int
    content_id: str
    block_clips: int
    codec: str = CODECS[0]
    preprocessing: str = PREPROCESSING
    pixels: str = SOFTWARE_PIXELS
    frame_rule: int = FRAME_RULE
    chunk_keys: str = CHUNK_KEYS[0]
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise UsageError(f"{name} {getattr(self, name)!r}; expected one of {', '.join(known)}")
        if self.recomputes_maps and 1 in self.layers:
            raise UsageError(
                f"maps 'recompute' with layers {list(self.layers)}: layer 1 has no layer below whose tokens give "
                "its maps; leave it out, or use --maps uint8"
            )
        if self.num_clips < 1:
            raise UsageError("the clip list is empty; expected at least one clip")

    @property
    def num_samples(self) -> int:
        """The number of rows of every array: clips times views."""
        return self.num_clips * self.views.per_clip

    @property
    def num_blocks(self) -> int:
        """The number of blocks, the last of which may be short."""
        return -(-self.num_clips // self.block_clips)

    @property
    def num_tokens(self) -> int:
        """The tokens of a frame, N = 1+P."""
        return 1 + self.tower.grid[0] * self.tower.grid[1]

    @property
    def has_maps(self) -> bool:
        """Whether maps can be read, be they stored or recomputed; a single frame has none."""
        return self.maps != "none" and self.views.frames > 1

    @property
    def stores_maps(self) -> bool:
        """Whether maps are an array of the store."""
        return self.has_maps and self.maps != "recompute"

    @property
    def recomputes_maps(self) -> bool:
        """Whether maps are made from tokens when they are read."""
        return self.has_maps and self.maps == "recompute"

    @property
    def stored_layers(self) -> tuple[int, ...]:
        """The layers along the layer axis of every array: `layers`, and with "recompute" also those one below."""
        below = {layer - 1 for layer in self.layers} if self.recomputes_maps else set()
        return tuple(sorted(below.union(self.layers)))

    @cached_property
    def feature_id(self) -> str:
        """The digest of everything that changes a clip's features, except the choice of layers."""
        tower = {k: v for k, v in self.tower.to_json().items() if k not in ("model", "pretrained")}
        content: dict[str, Any] = {
            "tower": tower,
            "views": self.views.to_json(),
            "preprocessing": self.preprocessing,
            "tokens": self.tokens,
            "maps": self.maps,
            "compute_dtype": self.compute_dtype,
        }
        if self.pixels != SOFTWARE_PIXELS:  # so that old feature ids stay
            content["pixels"] = self.pixels
        if self.frame_rule != 1:
            content["frame_rule"] = self.frame_rule
        return digest(content)

    @property
    def name(self) -> str:
        """The name of a cache's directory: data set, split and eight digits of a digest of its content."""
        identity = digest([self.feature_id, self.content_id, list(self.layers)])
        return f"{self.dataset}-{self.split}-{identity[:8]}"

    @property
    def block_samples(self) -> int:
        """The number of rows of one shard."""
        return self.block_clips * self.views.per_clip

    @property
    def by_older_rule(self) -> bool:
        """Whether frames were chosen by a rule before this version's."""
        return self.frame_rule < FRAME_RULE

    def check_frame_rule(self, place: object) -> None:
        """Check that this version can choose frames as the cache asks for. Raises: UsageError."""
        if self.frame_rule > FRAME_RULE:
            raise UsageError(
                f"{place}: its frames are chosen by rule {self.frame_rule}, this evl-cache knows rules up to "
                f"{FRAME_RULE}: it reads such features, but makes none; install a newer version"
            )

    def clips_of_block(self, block: int) -> range:
        """Return the numbers of the clips of a block."""
        return range(block * self.block_clips, min((block + 1) * self.block_clips, self.num_clips))

    def differences(self, other: "CacheSpec") -> list[str]:
        """Return `field: ours, not theirs` for every field that differs, names of tower and data set apart."""
        mine, theirs = (flatten({**_BEFORE, **s.to_json()}) for s in (self, other))
        ignored = ("tower.model", "tower.pretrained", "dataset", "split")
        return [
            f"{name}: {_short(mine.get(name))}, not {_short(theirs.get(name))}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name) and name not in ignored
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, from which `from_json` makes the same."""
        content = asdict(self) | {"views": self.views.to_json(), "tower": self.tower.to_json()}
        extra = content.pop("extra")
        for name, value in _BEFORE.items():
            if content[name] == value:
                del content[name]
        return {**extra, **json.loads(json.dumps(content)), "feature_id": self.feature_id}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CacheSpec":
        """Return the spec of JSON values. Raises: CacheError where fields are missing, wrong or beyond `spec_limits`."""
        check_spec(content)
        try:
            known = {f.name for f in fields(cls)} - {"extra"}
            given = {**_BEFORE, **{k: v for k, v in content.items() if k in known}}
            given["tower"] = TowerSpec(**_tuples(content["tower"]))
            given["views"] = ViewSpec(**content["views"])
            extra = {k: v for k, v in content.items() if k not in known and k != "feature_id"}
            spec = cls(**_tuples(given), extra=extra)
        except (KeyError, TypeError, AttributeError, UsageError) as error:
            raise CacheError(
                f"the cache's description is incomplete ({error}); expected one that evl-cache wrote: copy or extract it again"
            ) from error
        if content.get("feature_id") != spec.feature_id:
            raise CacheError(
                f"feature_id {str(content.get('feature_id'))[:12]} does not belong to the cache's description "
                f"({spec.feature_id[:12]}); the description was edited: copy or extract the cache again"
            )
        return spec


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: tuple(v) if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in content.items()
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 48 else text[:45] + "…"
