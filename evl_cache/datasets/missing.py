"""Count clips whose files are missing before hours of work start.

A missing clip keeps its row: it becomes a failed clip, which marks name with its reason and which is never served. So the
order of samples, the content id and the blocks do not depend on what one machine has downloaded, and a clip that is
found later fills its own row.
"""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from evl_cache.clips import Clip, ClipList
from evl_cache.datasets.near_names import files_there, likeliest_cause
from evl_cache.datasets.places import is_file, list_directory
from evl_cache.errors import UsageError

_SHOWN = 3
FRAMES_REMEDY = (
    "make videos of them, which loses nothing: ffmpeg -framerate 25 -i 'FOLDER/img_%05d.jpg' -c copy CLIP.mkv"
)
_FRAME_PATTERN = re.compile(r"%0?\d*d")


def missing_clips(clips: ClipList, root: Path) -> list[Clip]:
    """Return the clips without a file, in list order.

    Each folder is listed once, as a request for each file is slow on network disks.

    Raises: UsageError where a folder cannot be listed.
    """
    files: dict[str, set[str]] = {}
    missing = []
    for clip in clips.clips:
        folder, name = os.path.split(os.path.join(root, clip.path))
        if folder not in files:
            files[folder] = {entry.name for entry in list_directory(Path(folder)) if is_file(entry)}
        if name not in files[folder]:
            missing.append(clip)
    return missing


def check_missing(
    clips: ClipList, root: Path, *, allow_percent: float, missing: list[Clip] | None = None
) -> list[Clip]:
    """Return the clips that are missing, in list order, if they are at most `allow_percent` (0 to 100) of all.

    Args:
        missing: they, where they were looked for already.

    Raises: UsageError otherwise, with count, percentage, the first files with their lines, a file that is there under
    another name, and the remedy.
    """
    check_allowance(allow_percent)
    missing = missing_clips(clips, root) if missing is None else missing
    _check_locale(missing, clips.source)
    percent = 100 * len(missing) / len(clips.clips)
    if percent <= allow_percent:
        return missing
    files = list({clip.path: clip for clip in reversed(missing)}.values())[::-1]  # of many segments one file
    shown = ", ".join(_named(clip) for clip in files[:_SHOWN])
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    segments = (
        f": {len(files)} file{'' if len(files) == 1 else 's'}"
        if any(clip.segment is not None for clip in missing)
        else ""
    )
    without = f"go on without them by --allow-missing {math.ceil(percent * 100) / 100:g}"
    raise UsageError(
        f"{clips.source}: {len(missing)} of {len(clips.clips)} clips ({percent:.3g} %) are missing "
        f"under {root}{segments}: {shown}{more}; expected at most {allow_percent:g} %; "
        f"{_remedy(clips, missing, root, without=without)}"
    )


def _check_locale(missing: Sequence[Clip], source: str) -> None:
    """Raise UsageError for a path with letters that this process cannot ask the disk for."""
    for clip in missing:
        try:
            os.fsencode(clip.path)
        except UnicodeEncodeError as error:
            raise UsageError(
                f"{source}: {_named(clip)} cannot be looked up, as the locale's names of files are {error.encoding}; "
                "set PYTHONUTF8=1, or LC_ALL to a UTF-8 locale such as C.UTF-8"
            ) from error


def check_allowance(allow_percent: float) -> None:
    """Check how much may be missing. Raises: UsageError for what is no percentage."""
    if not 0 <= allow_percent <= 100:
        raise UsageError(f"--allow-missing {allow_percent}; expected a percentage from 0 to 100")


def _remedy(clips: ClipList, missing: Sequence[Clip], root: Path, *, without: str) -> str:
    """Return what to do about missing clips. Another root is offered only where no file is under the one given."""
    if any(_names_frames(clip, root) for clip in missing[:_SHOWN]):
        return f"frames in files of their own are not read: {FRAMES_REMEDY}"
    there, paths = files_there(root), {clip.path for clip in clips.clips}
    cause = likeliest_cause(
        list(dict.fromkeys(clip.path for clip in missing)),
        root,
        there=there,
        wanted=lambda path: path in paths,
    )
    is_partial = len(missing) < len(clips.clips)
    if cause is not None:
        return f"{cause}; fetch those that are not there, or {without}" if is_partial else cause
    if is_partial:
        packed = f" or unpack {there.archives[0]}" if there.archives else ""
        return f"fetch them{packed}, or {without}"
    if there.videos:
        number = f"{'' if there.is_whole else 'at least '}{len(there.videos)}"
        return (
            f"other names are there, such as {there.videos[0]} ({number} in all): compare them with those expected "
            "(--explain says more)"
        )
    if there.archives:
        return f"no video is there, but {there.archives[0]} is: unpack it"
    return "give the folder that holds the videos as --root (--explain says what is expected in it)"


def _named(clip: Clip) -> str:
    return clip.path if clip.line is None else f"{clip.path} (line {clip.line})"


def _names_frames(clip: Clip, root: Path) -> bool:
    """Whether a path that is no file is a folder, or a pattern of files' names as FFmpeg takes it."""
    return bool(_FRAME_PATTERN.search(os.path.basename(clip.path))) or os.path.isdir(root / clip.path)
