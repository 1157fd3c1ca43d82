"""Read a list file: a path and a label a line."""

from collections.abc import Sequence
from pathlib import Path, PurePath

from evl_cache.clips import Clip, ClipList, number_labels
from evl_cache.datasets.list_lines import LIST_FORMS, ListLine, parse_list
from evl_cache.datasets.missing import FRAMES_REMEDY
from evl_cache.datasets.places import VIDEO_SUFFIXES
from evl_cache.errors import UsageError


def read_list_file(path: Path, *, split: str) -> ClipList:
    """Return the clips of a list file. Paths stay as written: `extract --root` says what they are relative to.

    mmaction2's lists of videos have this form. Its lists of frame folders (`folder total_frames label`) do not name
    videos, and are an error.

    Raises: UsageError where the file cannot be read, a line has no label, or the lines name frame folders.
    """
    try:
        # Names of files need not be UTF-8, and those in another encoding are not found on the disk.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"{path}: cannot be read as a list of clips ({reason}); expected lines {LIST_FORMS}"
        ) from error
    if "\0" in text:  # as in UTF-16
        raise UsageError(f"{path}: is no list of clips (it holds zeros); expected UTF-8 lines {LIST_FORMS}")
    rows = parse_list(text, source=str(path))
    _refuse_frame_folders(rows, source=str(path))
    labels, classes = number_labels([r.label for r in rows], source=str(path), lines=[r.line for r in rows])
    clips = tuple(
        Clip(id=row.path, path=row.path, label=label, split=split, line=row.line)
        for row, label in zip(rows, labels, strict=True)
    )
    return ClipList(clips=clips, classes=classes, source=str(path), is_undivided=True)


def _refuse_frame_folders(rows: Sequence[ListLine], *, source: str) -> None:
    """Raise UsageError where all lines name frame folders; a single such line may be a video's odd name."""
    if rows and all(_counts_frames(row.path) for row in rows):
        row = rows[0]
        raise UsageError(
            f"{source}, line {row.line}: '{row.path} {row.label}' looks like a folder of frames, their number "
            "and a label (mmaction2 rawframes); expected 'path label' with the path of a video: "
            f"list the videos instead, or {FRAMES_REMEDY}"
        )


def _counts_frames(path: str) -> bool:
    parts = path.rsplit(None, 1)
    return len(parts) == 2 and parts[1].isdecimal() and PurePath(path).suffix.lower() not in VIDEO_SUFFIXES
