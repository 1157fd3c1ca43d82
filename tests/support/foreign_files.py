"""A person's own files beside, below and above a cache, and what tells whether any was touched."""

import hashlib
import os
import stat
from pathlib import Path

Found = tuple[str, str, int]  # kind, content, time of the last change


def look(root: Path) -> dict[str, Found]:
    """Every file, link and directory below a place: what it is and holds, and for files and links when it was changed."""
    found: dict[str, Found] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = path.relative_to(root).as_posix()
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", os.readlink(path), status.st_mtime_ns)
        elif stat.S_ISREG(status.st_mode):
            found[name] = ("file", hashlib.sha256(path.read_bytes()).hexdigest(), status.st_mtime_ns)
        else:
            found[name] = ("directory", "", 0)
    return found


def touched(before: dict[str, Found], root: Path) -> list[str]:
    """Return what is gone or is another than before; what came is not looked at."""
    after = look(root)
    return [name for name, found in before.items() if after.get(name) != found]


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text} {path.name}")
    return path


def link(path: Path, target: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target, target_is_directory=target.is_dir())
    return path


# Names that look like those of our staged files, locks, marks and shards, and are not.
NAMES_BESIDE = (
    ".hidden", ".nfs000000000a1b2c3d00000001", ".tmp-mine", ".tmp-host-12-zz", ".tmp-host-1-0123456789abcdef.bak",
    ".tmp-host-1-0123456789ABCDEF", "zarr.json.orig", ".zarr.json.swp", "manifest.json.bak", "manifest.json~",
    "README.txt", "12", "notes", ".writer.lock-mine", "train.py", "recovery.json.old", "clips.jsonl.gz",
)  # fmt: skip
NAMES_OF_MARKS = (
    "000000.json.bak", ".000000.json.swp", "7.json", "7.redo", "000000.redo.bak", "0000001.json",
    "999999.json", "notes.json", "thesis.txt",
    ".nfs000000000a1b2c3d00000002", ".tmp-mine", "000001.lock", "cache.lock",
)  # fmt: skip
NAMES_OF_SHARDS = (
    "c/lib/thesis.c", "c/0/0/notes.txt", "c/0/thesis.c", "c/007/0/0/0/0", "c/99999/0/0/0/0", "c/.nfs0000000000000001",
    "c/0.bak", "notes.md", ".tmp-mine", "zarr.json.bak", "c/0/.tmp-99-xyz", "c/12", "d/0/0/0/0/0",
    "c.lib", "c.007.0.0.0.0", "c.99999.0.0.0.0", "c.0.0.0.0.0.bak", "c.0", "c.0.0.0.0.0.0.0.0", "c.1.0.0.0.1", "d.0.0.0.0.0",
    ".tmp-b0.host-1-0123456789abcdef", ".tmp-bx.host-1-0123456789abcdef",
)  # fmt: skip
NAMES_OF_LOCKS = (
    "notes.txt", ".nfs000000000a1b2c3d00000003", "000000.lock.bak", ".hidden", "thesis.lock", ".000000.lock-mine",
)  # fmt: skip
ARRAYS = ("tokens", "token_affine", "token_scale", "maps", "map_scale", "class_tokens")


def plant_in_cache(cache: Path, outside: Path) -> list[Path]:
    """Put a person's files into a cache's directories, and links that lead to `outside`."""
    made = [write(cache / name) for name in NAMES_BESIDE]
    made += [write(cache / "done" / name) for name in NAMES_OF_MARKS]
    made += [write(cache / array / name) for array in ARRAYS for name in NAMES_OF_SHARDS]
    made += [write(cache / "locks" / name) for name in NAMES_OF_LOCKS]
    made += [
        write(cache / folder / "thesis.c") for folder in ("c/lib", "src/c/0/0/0", "work", "maps-old/c/0")
    ]
    target = write(outside / "linked" / "0" / "0" / "0" / "0" / "0", "outside").parent
    write(outside / "linked" / "thesis.c")
    made += [link(cache / name, outside / "linked") for name in ("linked", "done/linked", "tokens/c/linked")]
    made += [
        link(cache / "tokens" / "c" / "77777", target),
        link(cache / "tokens" / "c.77777.0.0.0.0", target / "0"),
        link(cache / "done" / "888888.json", target / "0"),
    ]
    made += [
        link(cache / "dangling", outside / "nowhere"),
        link(cache / ".tmp-link", outside / "linked/thesis.c"),
    ]
    return made
