"""What the columns of a table of clips mean, by the names that people give them."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

from evl_cache.datasets.places import VIDEO_SUFFIXES, suffix_of
from evl_cache.errors import UsageError

TABLE_FORM = "path,label[,split][,start,end][,start_frame,end_frame][,id]"
_NAMES = {
    "path": "path file filename file_name filepath file_path video video_path video_file video_name clip clip_path",
    "label": "label labels class classes category label_name class_name category_name target label_id class_id label_index "
    "class_index",
    "split": "split subset partition",
    "start": "start start_s start_sec start_seconds start_time time_start t_start start_timestamp begin",
    "end": "end end_s end_sec end_seconds end_time time_end t_end end_timestamp stop stop_s stop_time stop_timestamp",
    "start_frame": "start_frame frame_start begin_frame",
    "end_frame": "end_frame frame_end stop_frame",
    "id": "id clip_id segment_id",
}
_LENGTHS = frozenset(
    ["duration", "dur", "length", "length_s", "num_frames", "n_frames", "nframes", "frame_count"]
)
_KINDS = {name: kind for kind, names in _NAMES.items() for name in names.split()}
_LEAST_KNOWN = 2  # names among three or more in a first line that make it a header
_NEAR = 0.75
_BETWEEN = re.compile(r"[\s_.-]+")


def kind_of(name: str) -> str | None:
    """Return which column a name means, in any capitals: `path`, `label`, …; None for another."""
    return _KINDS.get(_plain(name))


def is_header(names: Sequence[str]) -> bool:
    """Whether the fields of a first line name columns: a path and another, or what names columns but for a path."""
    kinds = {kind for name in names if (kind := kind_of(name)) is not None}
    if len(names) < 2 or any(suffix_of(name) in VIDEO_SUFFIXES for name in names):
        return False
    if "path" in kinds:
        return len(kinds) > 1 or len(names) > 2 or any(_near(name) == "label" for name in names)
    if len(names) > 2 and len(kinds) >= _LEAST_KNOWN:
        return True
    return "label" in kinds and any(_near(name) == "path" for name in names)


def find_columns(names: Sequence[str], *, where: str) -> dict[str, str]:
    """Return the name of each column that is read, by what it means. Where one has its own name, others like it are not read.

    Raises: UsageError that begins with `where` for two columns that mean the same, or for one that lacks.
    """
    found: dict[str, str] = {}
    for kind in _NAMES:
        alike = [name for name in names if kind_of(name) == kind]
        own = [
            name for name in alike if _plain(name) == kind
        ] or alike  # `label` beside `class_id` is the label
        if len(own) > 1:
            raise UsageError(
                f"{where}: {own[0]!r} and {own[1]!r} both name the {kind} of a clip; expected one such column: "
                "rename the other, or leave it out"
            )
        if own:
            found[kind] = own[0]
    for start, end in (("start", "end"), ("start_frame", "end_frame")):
        lengths = [name for name in names if _plain(name) in _LENGTHS]
        if start in found and end not in found and lengths:
            raise UsageError(
                f"{where}: {found[start]!r} and {lengths[0]!r} name a segment, but no end; expected {start} and {end}: add "
                f"a column {end}, or rename {lengths[0]!r} where it is none of the segment's"
            )
    lacking = [kind for kind in ("path", "label") if kind not in found]
    if lacking:
        meant = [f"{name!r} may be meant as {near}" for name in names if (near := _near(name)) in lacking]
        told = f" ({', '.join(meant)})" if meant else ""
        raise UsageError(
            f"{where}: no column {' and no column '.join(lacking)} among {', '.join(names)[:200]!r}{told}; expected "
            f"{TABLE_FORM}, in any order"
        )
    return found


def remark_of_unread(names: Iterable[str], read: Iterable[str]) -> list[str]:
    """Return a line on columns that are not read, which asks about those that are nearly known; none without any."""
    unknown = [name for name in dict.fromkeys(names) if name not in {*read}]
    told = [f"{name!r}" + (f" (is it {near}?)" if (near := _near(name)) else "") for name in unknown]
    return [f"columns that are not read: {', '.join(told)}"] if told else []


def _near(name: str) -> str | None:
    """Return what a name that is not known nearly means."""
    near = get_close_matches(_plain(name), _KINDS, n=1, cutoff=_NEAR)
    return _KINDS[near[0]] if near and kind_of(name) is None else None


def _plain(name: str) -> str:
    return _BETWEEN.sub("_", name.strip().lower())
