"""Write a cache's card, the README.md that data hubs expect, with YAML front matter; nothing in it is guessed."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from evl_cache import __version__
from evl_cache.caches.extract_command import extract_command
from evl_cache.caches.info import frames_of
from evl_cache.caches.places import FoundCache
from evl_cache.clips import VAL_SPLITS
from evl_cache.errors import CacheError, UsageError
from evl_cache.notation import command_line, format_layers
from evl_cache.spec import CacheSpec
from evl_cache.store import (
    CARD_NAME,
    CacheSize,
    FeatureCache,
    cache_size,
    is_url,
    public_url,
    size_together,
    split_url,
    write_card,
)

UNKNOWN_LICENSE = "unknown"  # as data hubs call it
# The classes of size that data hubs use, by number of samples.
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)


class _Work(NamedTuple):
    """An entry of BibTeX."""

    key: str
    title: str
    author: str
    year: int
    howpublished: str

    def entry(self) -> str:
        named = (f"  {name} = {{{value}}}," for name, value in list(self._asdict().items())[1:])
        return "\n".join([f"@misc{{{self.key},", *named, "}"])


_EVL = _Work(
    "lin2022frozen", "Frozen CLIP Models are Efficient Video Learners", "Lin, Ziyi and others", 2022, "ECCV"
)
_KINETICS = "The Kinetics Human Action Video Dataset"
_SOMETHING = "The Something Something Video Database"
_UCF = "UCF101: A Dataset of 101 Human Actions"
_HMDB = "HMDB: A Large Video Database for Human Motion Recognition"
_DATASETS = {
    "k400": _Work("kay2017kinetics", _KINETICS, "Kay, Will and others", 2017, "arXiv:1705.06950"),
    "ssv2": _Work("goyal2017something", _SOMETHING, "Goyal, Raghav and others", 2017, "ICCV"),
    "ucf101": _Work("soomro2012ucf101", _UCF, "Soomro, Khurram and others", 2012, "arXiv:1212.0402"),
    "hmdb51": _Work("kuehne2011hmdb", _HMDB, "Kuehne, H. and others", 2011, "ICCV"),
}
# fmt: on


def cache_card(
    cache: FeatureCache, *, license_name: str = UNKNOWN_LICENSE, address: str | None = None
) -> str:
    """Return the text of a complete cache's card.

    Args:
        cache: the cache.
        license_name: as data hubs name it, such as `cc-by-4.0`.
        address: URL where others will find the cache; the card has it without credentials.

    Raises: CacheError where the cache is not complete; UsageError for a licence that is no such name, or an
        address that is no URL though it looks like one.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,60}", license_name):
        raise UsageError(
            f"--license {license_name!r}; expected an identifier in small letters, such as cc-by-4.0 or other"
        )
    held = [(member.path, member.spec) for member in cache.members] or [(cache.path, cache.spec)]
    size = size_together([cache_size(path, spec) for path, spec in held])
    if size.cache_digest is None:
        raise CacheError(
            f"{cache.place}: has no intact manifest, and a card has its digest; run extract again, or repair it"
        )
    parts = [
        _front_matter(cache.spec, license_name),
        _introduction(cache.spec),
        _table("What is in it", _contents(cache)),
        _how_made(cache),
        _table("Size and digests", _sizes(cache.spec, size)),
        _PROOF,
        _how_to_use(cache, address),
        _licence(cache.spec, license_name),
        _citation(cache.spec),
    ]
    return "\n\n".join(parts) + "\n"


def make_card(path: str | Path, *, license_name: str, address: str | None, replace_card: bool) -> Path:
    """Write the card of a cache into its directory, and return the file.

    Raises: as `cache_card`; UsageError for a URL, or where another README.md is there and may not be replaced.
    """
    if is_url(path):
        raise UsageError(
            "a cache behind a URL cannot be written to; use --print, or write the card before push"
        )
    cache = FeatureCache(path)
    text = cache_card(cache, license_name=license_name, address=address)
    file = cache.path / CARD_NAME
    if file.exists() and not replace_card and file.read_text(encoding="utf-8", errors="replace") != text:
        raise UsageError(f"{file} is there and says something else; use --replace, or --print")
    write_card(cache.path, text.encode())
    return file


def _front_matter(spec: CacheSpec, license_name: str) -> str:
    size = next((name for most, name in _SIZES if spec.num_clips < most), "n>10M")
    fields: Mapping[str, Any] = {
        "pretty_name": _plain(_title(spec), quote=False),
        "license": license_name,
        "task_categories": ["video-classification"],
        "size_categories": [size],
        "tags": ["evl-cache", "features", "video", "zarr", _plain(spec.dataset, quote=False)],
        "viewer": False,
    }
    # Values are JSON, which is YAML too, as names may hold anything.
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])


def _title(spec: CacheSpec) -> str:
    layers = format_layers(spec.layers)
    return f"{spec.dataset} {spec.split}, {spec.tower.model}, layers {layers}, {spec.views.frames} frames"


def _introduction(spec: CacheSpec) -> str:
    maps = " and adjacent-frame attention maps" if spec.has_maps else ""
    return (
        f"# {_plain(_title(spec))}\n\n"
        f"Unpooled tokens{maps} of a frozen image tower, for training video classifiers (EVL, arXiv 2208.03550) without "
        "videos and without the tower: made and read by evl-cache, a Zarr v3 group for every other reader. There is no "
        "video in it."
    )


def _contents(cache: FeatureCache) -> dict[str, object]:
    spec, views, failed = cache.spec, cache.spec.views, len(cache.failures)
    sampling = views.sampling if views.stride is None else f"{views.sampling}, stride {views.stride}"
    return {
        "data set": f"{spec.dataset}, {spec.split}",
        "clips": f"{spec.num_clips} of {len(spec.classes)} classes"
        + (f"; {failed} failed and have no features" if failed else ""),
        "views of a clip": f"{views.summary} of {views.frames} frames ({sampling})",
        "tower": f"{spec.tower.model} ({spec.tower.pretrained}), {spec.tower.image_size} pixels, width {spec.tower.width}",
        "weights, sha256": spec.tower.weights_sha256,
        "layers": f"{format_layers(spec.layers)} of {spec.tower.blocks}",
        "stored as": f"tokens {spec.tokens}, maps {spec.maps}, codec {spec.codec}",
    }


def _how_made(cache: FeatureCache) -> str:
    spec, decoders = cache.spec, sorted({decoder for decoder, _ in cache.provenance})
    # Not where the videos lay, and files by their names alone: the rest is nobody's business, and of no use to anyone.
    origin = {
        name: Path(value).name if isinstance(value, str) and value.startswith("/") else value
        for name, value in cache.origin.items()
    }
    if "root" in origin:
        origin["root"] = "VIDEOS"
    command = extract_command(
        FoundCache(address=cache.place, spec=spec, origin=origin),
        split=spec.split,
        layers=format_layers(spec.layers),
    )
    shown = _code("bash", command) if command else "By what no command line can show."
    if origin.get("is_whole") is not True:
        shown += "\n\nAn older version made it, which did not record list, annotations, limit, fold and training views."
    versions = ", ".join(f"{name} {version}" for name, version in cache.description.created_with.items())
    return (
        f"## How it was made\n\n{shown}\n\n"
        f"Computed in {spec.compute_dtype}, preprocessing {_plain(spec.preprocessing)}; decoded by "
        f"{_plain(', '.join(decoders) or 'an unknown decoder')}; frames: {frames_of(cache).told()}. Versions: {_plain(versions)}."
    )


def _sizes(spec: CacheSpec, size: CacheSize) -> dict[str, object]:
    return {
        "size": f"{size.nbytes:,} bytes in {size.files} files",
        "cache digest": size.cache_digest,
        "feature_id": spec.feature_id,
        "content_id": spec.content_id,
    }


_PROOF = "`evl-cache verify .` proves every byte against the cache digest: compare it with the one above."


def _how_to_use(cache: FeatureCache, address: str | None) -> str:
    place = cache.spec.name if not address else _public(address)
    shown = place if place.isprintable() else "CACHE"
    layers = tuple(cache.spec.layers[-4:])
    side, other = ("--cache", ("--val-cache", "VAL_CACHE"))
    if cache.spec.split in VAL_SPLITS:
        side, other = "--val-cache", ("--cache", "TRAIN_CACHE")
    train = ("train", side, shown, *other, "--head", f"decoder{len(layers)}")
    pull = [command_line(("evl-cache", "pull"), shown)] if address else []
    lines = ["pip install evl-cache", *map(str, pull), shlex.join(("evl-cache", *train))]
    python = (
        f"from evl_cache import FeatureCache\n\ncache = FeatureCache({json.dumps(place)})\n"
        f"tokens, maps = cache.read([0, 1], layers={layers})  # float32, a tensor a layer\nlabels = cache.labels"
    )
    return f"## How to use it\n\n{_code('bash', chr(10).join(lines))}\n\n{_code('python', python)}"


def _public(address: str) -> str:
    """Return an address without credentials. Raises: UsageError for a URL that is none."""
    if not is_url(address):
        return address
    split_url(address)
    return public_url(address)


def _licence(spec: CacheSpec, license_name: str) -> str:
    said = "not stated" if license_name == UNKNOWN_LICENSE else f"`{license_name}`"
    return (
        f"## Licence\n\n{said[0].upper()}{said[1:]}. The features are made from the videos of {_plain(spec.dataset)} and "
        f"the weights {_plain(spec.tower.pretrained)} of {_plain(spec.tower.model)}: whatever those ask for holds too."
    )


def _citation(spec: CacheSpec) -> str:
    works = [_EVL] + ([_DATASETS[spec.dataset]] if spec.dataset in _DATASETS else [])
    return (
        "## Citation\n\n```bibtex\n"
        + "\n\n".join(work.entry() for work in works)
        + f"\n```\n\nWritten by `evl-cache card` {__version__}."
    )


def _table(title: str, rows: Mapping[str, object]) -> str:
    return "\n".join(
        [f"## {title}\n\n| | |\n|---|---|", *(f"| {n} | {_plain(str(v))} |" for n, v in rows.items())]
    )


def _code(language: str, text: str) -> str:
    """A fenced block, whatever its lines hold: the fence is longer than any row of backticks in them."""
    fence = "`" * max([3, *(1 + len(row) for row in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(text: str, *, quote: bool = True) -> str:
    """Return a cache's text, which may hold anything, on one line; `quote` escapes Markdown and HTML."""
    line = "".join(c for c in " ".join(text.split()) if c.isprintable())
    if not quote:
        return line.replace("```", "")
    return re.sub(r"([|<>`*\[\]\\])", r"\\\1", line)
