"""Read HMDB51: each class and fold has a file of videos and codes (1 train, 2 test, 0 in neither)."""

import re
from pathlib import Path

from evl_cache.clips import Clip, ClipList, numbered_split
from evl_cache.datasets.places import (
    VideoTree,
    annotation_folders,
    find_in_class_folder,
    list_directory,
    require_root,
)
from evl_cache.datasets.text_file import numbered_lines, read_text
from evl_cache.errors import UsageError

_FILE_NAME = re.compile(r"(?P<class_name>.+)_test_split(?P<fold>[1-3])\.txt")
_USUAL_FOLDERS = ("annotations", "testTrainMulti_7030_splits", "test_train_splits", "splits")
_VIDEO_FOLDERS = ("hmdb51_org", "hmdb51", "videos", "")
_EXPECTED = "lines '<file>.avi code', code 1 for train, 2 for test, 0 for neither"
_CODES = {"0": None, "1": "train", "2": "val"}


def read_hmdb51(root: Path, *, annotations: Path | None, split: str | None) -> dict[str, ClipList]:
    """Return clip lists by split; without `split` they are train and val (code 2) of fold 1.

    Classes are named by the annotation files and numbered from 0 in alphabetical order.

    Args:
        root: folder of the videos: `<class>/<file>.avi`, or these in `hmdb51_org`, `hmdb51` or `videos`.
        annotations: folder of `<class>_test_split<fold>.txt`; None looks in `annotations`,
            `testTrainMulti_7030_splits`, `test_train_splits`, `splits` and the root.
        split: `train` or `val`, with or without a fold of 1 to 3 after it; or a fold alone, for both splits.

    Raises: UsageError for missing or malformed annotation files, with the line.
    """
    require_root(root, dataset="HMDB51")
    wanted, fold = numbered_split(split)
    folder, files = _annotation_files(annotation_folders(root, annotations, _USUAL_FOLDERS), fold)
    classes = tuple(sorted(files))
    tree = VideoTree(root, suffix=".avi")
    clips: dict[str, list[Clip]] = {name: [] for name in wanted}
    for label, class_name in enumerate(classes):
        for clip in _read_class(files[class_name], class_name, label, tree):
            if clip.split in clips:
                clips[clip.split].append(clip)
    source = f"{folder} (fold {fold})"
    return {
        name: ClipList(clips=tuple(found), classes=classes, source=source) for name, found in clips.items()
    }


def _annotation_files(folders: list[Path], fold: int) -> tuple[Path, dict[str, Path]]:
    """Return the first folder with annotation files, and the fold's file of every class."""
    for folder in folders:
        matches = [_FILE_NAME.fullmatch(entry.name) for entry in list_directory(folder)]
        classes = sorted({match["class_name"] for match in matches if match})
        files = {name: folder / f"{name}_test_split{fold}.txt" for name in classes}
        absent = [name for name, path in files.items() if not path.is_file()]
        if absent:  # without it, every label after it would be wrong
            raise UsageError(
                f"{folder}: no {files[absent[0]].name}, though other folds name the class; "
                f"expected a file of fold {fold} for each of {len(classes)} classes ({len(absent)} missing)"
            )
        if files:
            return folder, files
    places = " or ".join(str(folder) for folder in folders)
    raise UsageError(
        f"no annotation of HMDB51 in {places}; expected files '<class>_test_split{fold}.txt'; "
        "say where with --annotations (--explain says more)"
    )


def _read_class(path: Path, class_name: str, label: int, tree: VideoTree) -> list[Clip]:
    clips = []
    first_lines: dict[str, int] = {}
    for line, text in numbered_lines(read_text(path, expected=_EXPECTED)):
        file_name, code = (*text.rsplit(None, 1), "")[:2]
        if code not in _CODES or not file_name or "/" in file_name or file_name.startswith("."):
            raise UsageError(f"{path}, line {line}: {text[:120]!r}; expected {_EXPECTED}")
        if file_name in first_lines:
            raise UsageError(
                f"{path}, line {line}: {file_name!r} is on line {first_lines[file_name]} already; "
                "expected each file once"
            )
        first_lines[file_name] = line
        split = _CODES[code]
        if split is not None:
            clip_id = f"{class_name}/{Path(file_name).stem}"
            video = find_in_class_folder(tree, _VIDEO_FOLDERS, class_name, file_name)
            clips.append(Clip(id=clip_id, path=video, label=label, split=split, line=line))
    return clips
