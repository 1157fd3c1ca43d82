"""Read Something-Something v2: JSON files of labels, train and validation; videos named by number."""

import re
from pathlib import Path
from typing import Any

from evl_cache.clips import Clip, ClipList, normal_split
from evl_cache.datasets.places import VideoTree, annotation_folders, find_annotation, join, require_root
from evl_cache.datasets.text_file import read_json_entries, read_json_object
from evl_cache.errors import UsageError

_PREFIX = "something-something-v2-"
_FILES = {
    "labels": [f"{_PREFIX}labels.json", "labels.json"],
    "train": [f"{_PREFIX}train.json", "train.json"],
    "val": [f"{_PREFIX}validation.json", "validation.json", "val.json"],
}
_VIDEO_FOLDERS = ("20bn-something-something-v2", "videos")
_EXPECTED_LABELS = 'a JSON object {"template without brackets": "number"}, numbers from 0 without gaps'
_EXPECTED_CLIPS = 'a JSON list of {"id": "…", "template": "… [something] …"}'
_CLIP_ID = re.compile(r"[A-Za-z0-9_-]+")


def read_something(root: Path, *, annotations: Path | None, split: str | None) -> dict[str, ClipList]:
    """Return clip lists by split; without `split` they are train and val. The labels file numbers the classes.

    Args:
        root: folder of the videos: `20bn-something-something-v2/<id>.webm`, `videos/<id>.webm` or `<id>.webm`.
        annotations: folder of the JSON files; None looks in `annotations` and `labels` under the
            root, and in the root.
        split: train or val (validation). The published test files hold no labels.

    Raises: UsageError for missing or malformed annotation files, with the line.
    """
    require_root(root, dataset="Something-Something v2")
    wanted = (normal_split(split),) if split is not None else ("train", "val")
    if "test" in wanted:
        raise UsageError("--split test of Something-Something v2 has no labels; expected train or val")
    folders = annotation_folders(root, annotations, ["annotations", "labels"])
    labels_path = find_annotation(folders, _FILES["labels"], what="labels file of Something-Something v2")
    numbers = _read_labels(labels_path)
    tree = VideoTree(root, suffix=".webm")
    return {
        name: _read_clips(
            find_annotation(folders, _FILES[name], what=f"{name} annotation of Something-Something v2"),
            numbers=numbers,
            labels_path=labels_path,
            tree=tree,
            split=name,
        )
        for name in wanted
    }


def _read_labels(path: Path) -> dict[str, int]:
    numbers: dict[str, int] = {}
    taken: dict[int, str] = {}
    members, line_of = read_json_object(path, expected=_EXPECTED_LABELS)
    for key, value in members.items():
        name = _without_brackets(key)
        if name in numbers:
            raise UsageError(
                f"{path}, line {line_of(key)}: {key!r} is the label {name!r}, which is there already; "
                "expected each label once, with or without brackets"
            )
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        known = text.isascii() and text.isdecimal() and len(text) <= 9
        if not known or int(text) >= len(members) or int(text) in taken:
            reason = f", which {taken[int(text)]!r} has" if known and int(text) in taken else ""
            shown = f"{value!r:.60}"
            raise UsageError(
                f"{path}, line {line_of(key)}: {key!r} has number {shown}{reason}; "
                f"expected each of 0 to {len(members) - 1} once"
            )
        numbers[name] = int(text)
        taken[int(text)] = name
    if not numbers:
        raise UsageError(f"{path}, line 1: holds no label; expected {_EXPECTED_LABELS}")
    return numbers


def _read_clips(
    path: Path, *, numbers: dict[str, int], labels_path: Path, tree: VideoTree, split: str
) -> ClipList:
    clips = []
    folders = [*(like for name in _VIDEO_FOLDERS for like in tree.folders_like("", name)), ""]
    for line, entry in read_json_entries(path, expected=_EXPECTED_CLIPS):
        clip_id, template = _fields(entry, where=f"{path}, line {line}")
        name = _without_brackets(template)
        if name not in numbers:
            raise UsageError(
                f"{path}, line {line}: clip {clip_id} has the template {template!r:.100}, which is not in "
                f"{labels_path}; expected files of one release"
            )
        found = tree.find(folders, clip_id) or join(folders[0], f"{clip_id}.webm")
        clips.append(Clip(id=clip_id, path=found, label=numbers[name], split=split, line=line))
    classes = tuple(sorted(numbers, key=numbers.__getitem__))
    return ClipList(clips=tuple(clips), classes=classes, source=str(path))


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


def _fields(entry: Any, *, where: str) -> tuple[str, str]:
    if not isinstance(entry, dict):
        raise UsageError(
            f"{where}: an entry is {type(entry).__name__}, not an object; expected {_EXPECTED_CLIPS}"
        )
    for key in ("id", "template"):
        if not isinstance(entry.get(key), str):
            state = f"is {type(entry[key]).__name__}" if key in entry else "is missing"
            raise UsageError(f"{where}: {key!r} of an entry {state}; expected {_EXPECTED_CLIPS}")
    if _CLIP_ID.fullmatch(entry["id"]) is None:
        raise UsageError(
            f"{where}: id {entry['id']!r:.60}; expected a number, the video's name without .webm"
        )
    return entry["id"], entry["template"]
