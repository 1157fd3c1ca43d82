"""Read UCF101: classInd.txt, and a train and a test list for each of three folds."""

from pathlib import Path

from evl_cache.clips import Clip, ClipList, numbered_split
from evl_cache.datasets.places import (
    VideoTree,
    annotation_folders,
    find_annotation,
    find_in_class_folder,
    require_root,
)
from evl_cache.datasets.text_file import numbered_lines, read_text
from evl_cache.errors import UsageError

_VIDEO_FOLDERS = ("UCF-101", "UCF101", "videos", "")
_LIST_NAMES = {"train": "trainlist", "val": "testlist"}
_EXPECTED_CLASSES = "lines 'number class', numbers from 1 without gaps"
_EXPECTED_LIST = "lines '<class>/<file>.avi', in train lists with the class number after it"


def read_ucf101(root: Path, *, annotations: Path | None, split: str | None) -> dict[str, ClipList]:
    """Return clip lists by split; without `split` they are train and val (the test list) of fold 1.

    Classes are numbered as in classInd.txt, but from 0 instead of 1.

    Args:
        root: folder of the videos: `UCF-101/<class>/<file>.avi`, `videos/<class>/…` or `<class>/…`.
        annotations: folder of the lists; None looks in `annotations`, `ucfTrainTestlist` and the root.
        split: `train` or `val`, with or without a fold of 1 to 3 after it; or a fold alone, for both splits.

    Raises: UsageError for missing or malformed annotation files, with the line.
    """
    require_root(root, dataset="UCF101")
    wanted, fold = numbered_split(split)
    folders = annotation_folders(root, annotations, ["annotations", "ucfTrainTestlist"])
    classes = _read_classes(find_annotation(folders, ["classInd.txt"], what="class list of UCF101"))
    tree = VideoTree(root, suffix=".avi")
    out = {}
    for name in wanted:
        file_name = f"{_LIST_NAMES[name]}{fold:02d}.txt"
        path = find_annotation(folders, [file_name], what=f"{name} list of UCF101, fold {fold}")
        out[name] = _read_clips(path, classes=classes, tree=tree, split=name)
    return out


def _read_classes(path: Path) -> tuple[str, ...]:
    names: dict[str, int] = {}
    for line, text in numbered_lines(read_text(path, expected=_EXPECTED_CLASSES)):
        number, name = (*text.split(None, 1), "")[:2]
        if number != str(len(names) + 1) or not name or "/" in name or name in names:
            raise UsageError(
                f"{path}, line {line}: {text[:80]!r}; expected '{len(names) + 1} <a class not named before>'"
            )
        names[name] = len(names)
    return tuple(names)


def _read_clips(path: Path, *, classes: tuple[str, ...], tree: VideoTree, split: str) -> ClipList:
    numbers = {name: number for number, name in enumerate(classes)}
    clips = []
    for line, text in numbered_lines(read_text(path, expected=_EXPECTED_LIST)):
        class_name, file_name = _class_and_file(
            text, numbers, with_number=split == "train", where=f"{path}, line {line}"
        )
        clips.append(
            Clip(
                id=f"{class_name}/{Path(file_name).stem}",
                path=find_in_class_folder(tree, _VIDEO_FOLDERS, class_name, file_name),
                label=numbers[class_name],
                split=split,
                line=line,
            )
        )
    return ClipList(clips=tuple(clips), classes=classes, source=str(path))


def _class_and_file(text: str, numbers: dict[str, int], *, with_number: bool, where: str) -> tuple[str, str]:
    video, given = text.rsplit(None, 1) if len(text.split(None, 1)) == 2 else (text, "")
    if not (given.isascii() and given.isdecimal()):
        if with_number:
            raise UsageError(f"{where}: {text[:120]!r} has no class number; expected {_EXPECTED_LIST}")
        video, given = text, ""  # test lists are published without class numbers
    class_name, _, file_name = video.strip().partition("/")
    if class_name not in numbers:
        raise UsageError(
            f"{where}: class {class_name[:80]!r} is not in classInd.txt; expected {_EXPECTED_LIST}"
        )
    if not file_name or "/" in file_name or file_name.startswith("."):
        raise UsageError(f"{where}: file {file_name[:80]!r}; expected {_EXPECTED_LIST}")
    if given and given != str(numbers[class_name] + 1):
        raise UsageError(
            f"{where}: {class_name} has number {given[:20]}; "
            f"expected {numbers[class_name] + 1}, as in classInd.txt"
        )
    return class_name, file_name
