"""Damage to the files of a cache, by seed: a file's name and its other bytes, or None where it is gone."""

import random
from collections.abc import Callable
from typing import Protocol


class Files(Protocol):
    """Files of a cache by name, and of others whose intact files may be put into it."""

    @property
    def files(self) -> dict[str, bytes]:
        """Its own."""

    @property
    def twin(self) -> dict[str, bytes]:
        """Of the same spec and clip list, but of other videos."""

    @property
    def other(self) -> dict[str, bytes]:
        """Of the same videos, stored otherwise."""


Damage = Callable[[random.Random, Files], tuple[str, bytes | None]]


def flip(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    name = pick(rng, caches.files)
    content = bytearray(caches.files[name])
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return name, bytes(content)


def truncate(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    name = pick(rng, caches.files)
    size = len(caches.files[name])
    return name, caches.files[name][: rng.choice([0, 1, size // 2, rng.randrange(size), size - 1])]


def delete(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    needed = {name: content for name, content in caches.files.items() if name != "index.bin"}
    return pick(rng, needed), None


def overwrite(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    """A page of zeros, as a disk leaves it that lost a write; or bytes more at the end."""
    name = pick(rng, caches.files)
    content = caches.files[name]
    if rng.random() < 0.3:
        return name, content + rng.choice([b"\0", b"\n", b" ", content])
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice([16, 512, 4096]))
    return name, content[:start] + bytes(stop - start) + content[stop:]


def swap_blocks(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    """An intact file of another block."""
    names = [name for name in caches.files if "/c." in name or name.startswith("done/")]
    name = rng.choice(names)
    kind = name.split("/", maxsplit=1)[0]
    other = rng.choice([found for found in names if found.startswith(f"{kind}/") and found != name])
    return name, caches.files[other]


def swap_caches(rng: random.Random, caches: Files) -> tuple[str, bytes | None]:
    """An intact file of another cache."""
    source = rng.choice([caches.twin, caches.other])
    name = pick(rng, {name: content for name, content in source.items() if name in caches.files})
    return name, source[name]


def pick(rng: random.Random, files: dict[str, bytes]) -> str:
    """A file: of each kind (data, marks, manifest, metadata) as often."""
    kinds: dict[str, list[str]] = {}
    for name in files:
        kinds.setdefault(kind_of(name), []).append(name)
    return rng.choice(kinds[rng.choice(sorted(kinds))])


def kind_of(name: str) -> str:
    if "/c." in name:
        return "data"
    return "marks" if name.startswith("done/") else "manifest" if name == "manifest.json" else "metadata"


KINDS: tuple[Damage, ...] = (flip, flip, truncate, delete, overwrite, swap_blocks, swap_caches)
