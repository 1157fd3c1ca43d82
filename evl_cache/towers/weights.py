"""The image tower's part of a weights file, whatever stands before its names and beside it."""

import hashlib
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evl_cache.errors import WeightsError
from evl_cache.towers.huggingface_names import with_open_clip_names
from evl_cache.towers.weights_file import read_weights_file

# Names of the patch embedding in open_clip's own tower, in a timm trunk of open_clip's, and in timm's own models.
_STEMS = ("conv1.weight", "trunk.patch_embed.proj.weight", "patch_embed.proj.weight", "patch_embed.weight")
# Parts of names that wrappers leave, anywhere: data parallel, torch.compile, FSDP and checkpointed layers.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# What stands beside a tower under the same prefix: classifiers, decoders, and what only training needs.
_BESIDE = frozenset(
    {
        *("head", "heads", "head_dist", "fc", "classifier", "cls_head", "classification_head", "linear_head"),
        *("decoder", "projector", "predictor", "mask_token", "logit_scale", "logit_bias", "n_averaged"),
    }
)
# As CLIP's own files and common training scripts have them.
_PLAIN_PREFIXES = frozenset({"", "visual.", "module.", "module.visual."})
_PLAIN_CONTAINERS = frozenset({"state_dict", "model", "module"})
# Dictionaries, or parts of prefixes, of training's own values by the names of the weights: momenta are no towers. Averaged
# weights are, such as those of a momentum_encoder.
_OF_TRAINING = re.compile(
    r"optim(izer)?s?(_states?(_dict)?|_\d+)?|(max_)?exp_(avg|inf)(_sq)?|square_avg|momentum(s|_buffers?)?|grad(ient)?s?",
    re.IGNORECASE,
)
_DEEPEST = 64  # dictionaries within each other; those of training scripts are a few
_LONGEST_SHOWN = 60  # characters of a key or a prefix

Keys = tuple[Hashable, ...]  # of the dictionaries around tensors, outermost first, as they are in the file


class _TooDeep(Exception):
    """Dictionaries are further within each other than any that hold weights."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Tensors of a file that may be a tower's: those of one container whose names begin alike.

    Attributes:
        container: keys of the dictionaries around them, outermost first.
        prefix: what is before each name in the file.
        tensors: by name without the prefix, as they are in the file.
        found: how many names of the tower are among them.
    """

    container: Keys
    prefix: str
    tensors: Mapping[str, torch.Tensor]
    found: int

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to tell: every reader of such files knows container and prefix."""
        return self.prefix in _PLAIN_PREFIXES and _PLAIN_CONTAINERS.issuperset(self.container)

    @property
    def is_image_tower(self) -> bool:
        """Whether a patch embedding is among them."""
        return any(stem in self.tensors for stem in _STEMS)

    def fits(self, own: Mapping[str, torch.Tensor]) -> bool:
        """Whether every name of a tower is here, with its shape."""
        return all(n in self.tensors and self.tensors[n].shape == own[n].shape for n in own)

    def __str__(self) -> str:
        inside = _cut("".join(f"[{_shown(key)}]" for key in self.container), 2 * _LONGEST_SHOWN)
        if not self.prefix:
            return inside or "names without a prefix"
        return f"{_shown(self.prefix)} in {inside}" if inside else _shown(self.prefix)


@dataclass(frozen=True, kw_only=True)
class TowerWeights:
    """What a weights file holds.

    Attributes:
        path: the file.
        containers: the tensors by name, by the keys of the dictionaries around them.
        is_openai_archive: whether the file is a TorchScript archive as OpenAI publishes it; those towers use QuickGELU.
    """

    path: Path
    containers: Mapping[Keys, Mapping[str, torch.Tensor]] = field(repr=False)
    is_openai_archive: bool

    def candidates(self, own: Mapping[str, torch.Tensor]) -> list[Candidate]:
        """Return what may be a tower with these names, the likeliest first: all of its names, or a patch embedding."""
        found = [
            _behind(container, prefix, names, tensors, own)
            for container, tensors in self.containers.items()
            for names in [_unwrapped(tensors)]
            for prefix in _prefixes(names, own)
            if not any(map(_OF_TRAINING.fullmatch, prefix.split(".")))
        ]
        return sorted(found, key=lambda each: (-each.found, not each.is_image_tower, len(each.prefix)))


def read_tower_weights(path: Path | str) -> TowerWeights:
    """Return the weights of a file of any of the three kinds. Raises: WeightsError where the file is of no such kind."""
    content, is_archive = read_weights_file(Path(path))
    try:
        containers = {keys: tensors for keys, tensors in _containers(content, (), set()) if tensors}
    except _TooDeep as error:
        raise WeightsError(
            f"{path}: its dictionaries are more than {_DEEPEST} deep; expected a state dict of tensors (torch.save)"
        ) from error
    return TowerWeights(path=Path(path), containers=containers, is_openai_archive=is_archive)


def beside(names: Mapping[str, object], own: Mapping[str, object]) -> list[str]:
    """Return the names that are no part of a tower, but stand beside it: a classifier's, for example."""
    parts = {name.partition(".")[0] for name in own}
    return [n for n in names if n not in own and n.partition(".")[0] in _BESIDE - parts]


def extra(names: Iterable[str], own: Mapping[str, object]) -> list[str]:
    """Return the names that are neither a tower's nor of what stands beside one."""
    others = dict.fromkeys(name for name in names if name not in own)
    left_out = set(beside(others, own))
    return [name for name in others if name not in left_out]


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names, shapes and float32 values, the same for every kind of file."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}:{tuple(value.shape)};".encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _containers(
    content: Mapping[Any, Any], keys: Keys, seen: set[int]
) -> Iterator[tuple[Keys, dict[str, torch.Tensor]]]:
    """Yield the tensors of each dictionary in a file, which may hold itself; not training's own. Raises: _TooDeep."""
    if len(keys) > _DEEPEST:
        raise _TooDeep
    seen.add(id(content))
    yield (
        keys,
        with_open_clip_names({str(name): value for name, value in content.items() if torch.is_tensor(value)}),
    )
    for name, value in content.items():
        if _OF_TRAINING.fullmatch(str(name)):
            continue
        inside: list[tuple[Keys, Any]] = [((name,), value)]
        if isinstance(value, list | tuple):
            inside = [((name, place), each) for place, each in enumerate(value)]
        for more, each in inside:
            if isinstance(each, Mapping) and id(each) not in seen:
                yield from _containers(each, (*keys, *more), seen)


def _shown(key: Hashable) -> str:
    """Return a key in one short line, whatever a file has as a key."""
    shown = repr(key) if isinstance(key, str | int | float | bytes | None) else f"a {type(key).__name__}"
    return _cut(shown, _LONGEST_SHOWN)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"


def _unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return names by what they are without wrappers' parts; as they are where two would become one."""
    written = list(names)
    plain = {".".join(part for part in name.split(".") if part not in _WRAPPERS): name for name in written}
    return plain if len(plain) == len(written) else {name: name for name in written}


def _prefixes(names: Iterable[str], own: Mapping[str, object]) -> list[str]:
    """Return the prefixes before most of a tower's names and before each patch embedding."""
    counts: Counter[str] = Counter()
    stems: dict[str, None] = {}
    for name in names:
        for start in (0, *(i + 1 for i, letter in enumerate(name) if letter == ".")):
            if name[start:] in own:
                counts[name[:start]] += 1
            if name[start:] in _STEMS:
                stems[name[:start]] = None
    most = max(counts.values(), default=0)
    return list(dict.fromkeys([*(p for p, count in counts.items() if count == most), *stems]))


def _behind(
    container: Keys,
    prefix: str,
    names: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
    own: Mapping[str, object],
) -> Candidate:
    """Return the tensors behind a prefix, of names without wrappers' parts."""
    inside = {n.removeprefix(prefix): written for n, written in names.items() if n.startswith(prefix)}
    first = next(iter([stem for stem in _STEMS if stem in inside] or inside))
    is_whole = inside[first].endswith(f".{first}") or inside[first] == first
    return Candidate(
        container=container,
        prefix=inside[first].removesuffix(first) if is_whole else prefix,
        tensors={name: tensors[written] for name, written in inside.items()},
        found=sum(name in inside for name in own),
    )
